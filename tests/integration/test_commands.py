"""What README and docs/ tell the reader to type is run: each command, script and file, on a few digits.

A page is run from top to bottom in a folder of its own, in which the runs of the README lie. ``SHRUNK`` is appended to
each command, and options that come later win. What is not run stands in ``EXEMPT``, with the reason; a command that is
neither fails the test.
"""

import importlib
import re
import runpy
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from docs.gallery import TUTORIAL, blocks
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.geometry import logistic
from ssl_geometry.models.taps import Taps
from ssl_geometry.models.zoo import TABLE
from ssl_geometry.records import read_records
from ssl_geometry.runs.checkpoints import read_checkpoint
from ssl_geometry.runs.networks import load_method
from tests.integration.test_fit import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:logistic regression of .* stopped before the optimum")

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "studies").glob("*.md"))]
OWN_TESTS = {"add-a-method.md", "architecture.md"}
PAGES = [page for page in PAGES if page.name not in OWN_TESTS]
NETWORK = ["--model.backbone=resnet10", "--model.width=0.25", "--model.image_size=16"]
IMAGES = ["--data.dataset=digits", "--data.limit_train=128", "--data.limit_test=64", "--data.measure_size=64"]
MONITORS = [
    "--cka.layers=stages",
    "--invariance.views=[own]",
    "--neighbors.k=10",
    "--neighbors.copies=3",
    "--neighbors.settings=[crop]",
    "--spectrum.copies=2",
]
OFF = ("invariance", "probes", "neighbors", "spectrum")
TRAINER = ["--trainer.max_epochs=1", "--trainer.precision=32-true", "--loggers=[]", "--data.batch_size=64"]
SHRUNK = {
    "fit": [*NETWORK, *IMAGES, *MONITORS, *TRAINER],
    "compare": [*IMAGES, "--invariance.views=[own]", "--cka.layers=stages", "--permutations=20", "--overwrite"],
    "probe": [
        *IMAGES,
        "--probes.layers=[pooled, head]",
        "--linear_epochs=10",
        "--draws=1",
        "--label_fractions=[1.0]",
        "--k=[5]",
        "--overwrite",
    ],
    "survey": [
        *(*IMAGES, "--neighbors.layers=pooled", "--neighbors.k=10", "--neighbors.copies=3", "--spectrum.copies=3"),
        "--neighbors.settings=[crop]",
    ],
    "report": [],
    "zoo": [],
}
"""Options that make a command small; of these commands everything else is as on the page."""
EXEMPT = {
    "make": "make test is CI's own command; what make demo runs is run by the other pages, smaller",
    "sbatch": "tests/slurm submits the scripts; here the options behind the script are run",
    "sudo": "needs root: tests/slurm starts this cluster",
    "export": "for the commands of a cluster",
    "docker": "needs Docker: tests/unit/test_dockerfile.py reads the Dockerfile",
    "apptainer": "needs Apptainer and the image",
    "ssl_geometry.doctor": "its exit code depends on the machine: tests/unit/test_doctor.py, test_conformance.py",
}
"""First word, or module, of commands that are not run: why, and what tests them instead."""
PUBLISHED = set(TABLE)
"""Networks that would be downloaded: untrained ones take their place and bear their names."""
RUNS = (
    "runs/cifar10/simclr",
    "runs/cifar10/supervised",
    "runs/demo/simclr",
    "runs/demo/supervised",
    "RUN",
    *("RUN1", "RUN2", "RUN3"),
    "runs/imagenet/simclr",
)
"""Runs that pages speak of."""


@pytest.fixture(scope="module")
def trained(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run by each of the names."""
    folder = tmp_path_factory.mktemp("trained")
    for name in RUNS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(runs / ("supervised" if "supervised" in name else "simclr"), folder / name)
        tell_apart(folder / name / "checkpoints" / "last.ckpt", name)
    return folder


@pytest.fixture
def folder(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder: a clone of the repository, in which the README's runs have been trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    few = partial(logistic.logistic_regression, max_iterations=10)  # an optimum is tested elsewhere
    monkeypatch.setattr(logistic, "logistic_regression", few)
    for name in ("configs", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def tell_apart(checkpoint: Path, name: str) -> None:
    """Give a copy of a run weights of its own: one network by two names is refused."""
    content = torch.load(checkpoint, weights_only=True)
    first = next(iter(content["state_dict"].values()))
    first += 1e-4 * RUNS.index(name)
    torch.save(content, checkpoint)


def run_page(page: Path, **shrunk: list[str]) -> None:
    """Run all blocks of a page here; with ``shrunk`` instead of ``SHRUNK``, all monitors are on."""
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, f"{block.page.name}:{block.line}", "exec"), {"__name__": "page"})
        elif block.language == "bash":
            for words in block.commands():
                run_command(words, f"{page.name}:{block.line}: {' '.join(words)}", shrunk or SHRUNK)


def run_command(words: list[str], where: str, shrunk: dict[str, list[str]]) -> None:
    """Run one command line, if it is not exempt."""
    if words[0] == "sbatch":
        (script,) = (number for number, word in enumerate(words) if word.endswith(".sbatch"))
        started = re.search(r"^srun .*python -m (\S+)", Path(words[script]).read_text(), re.MULTILINE)
        assert started, where
        if len(words) == script + 1:
            return  # the sweep names its configurations itself
        words = ["python", "-m", started[1], *words[script + 1 :]]
        if "sweep" in where:
            words += ["--config", "configs/simclr_resnet18_cifar10.yaml"]
    if words[0] == "python" and words[1].endswith(".py") and Path(words[1]).is_file():  # that the page wrote
        runpy.run_path(words[1], run_name="__main__")
        return
    if words[0] in EXEMPT or (words[:2] == ["python", "-m"] and words[2] in EXEMPT):
        return
    assert words[:2] == ["python", "-m"], f"{where}: neither run nor exempt"
    module, args = words[2], words[3:]
    name = module.removeprefix("ssl_geometry.")
    assert name in shrunk, f"{where}: neither run nor exempt"
    if name == "fit" and "--run_id" in args:  # the README trains these itself
        shutil.rmtree(Path("runs/cifar10", args[args.index("--run_id") + 1]), ignore_errors=True)
    if "--models" in args:
        args = [f"{arg}=random:resnet10@16:{seed}" if arg in PUBLISHED else arg for seed, arg in enumerate(args)]
    if name == "fit" and shrunk is SHRUNK:  # monitors that a command does not speak of are off
        args += [f"--{monitor}.every_n_epochs=0" for monitor in OFF if not any(f"--{monitor}." in arg for arg in args)]
    entry = importlib.import_module("ssl_geometry.report.__main__" if name == "report" else module)
    entry.main([*args, *shrunk[name]])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, folder: Path) -> None:
    run_page(page)


def test_the_method_of_the_tutorial_learns(folder: Path) -> None:
    longer = [*SHRUNK["fit"], "--trainer.max_epochs=6", "--trainer.log_every_n_steps=1", "--model.lr=0.01"]
    run_page(TUTORIAL, **{**SHRUNK, "fit": longer})
    records = read_records("runs/quickstart/hypersphere")
    losses = records.query("metric == 'train/loss'").sort_values("step")["value"]
    assert len(losses) == 12
    assert losses.iloc[-3:].mean() < losses.iloc[:3].mean() - 0.1
    last = set(records.query("epoch == 6")["metric"])
    assert {"cka", "invariance", "class_cka", "ridge_probe", "neighbors", "purity", "rankme", "lidar"} <= last
    assert set(records.query("metric == 'cka'")["model_other"]) == {"hypersphere", "init", "simclr"}
    checkpoint = read_checkpoint(Path("runs/quickstart/hypersphere/checkpoints/last.ckpt"), "")
    assert checkpoint["method"]["class_path"] == "hypersphere.Hypersphere"
    taught = read_checkpoint(Path("runs/quickstart/taught/checkpoints/last.ckpt"), "")
    weights = [taught["state_dict"][f"{network}backbone.conv1.weight"] for network in ("", "teacher.")]
    assert not torch.equal(*weights)
    near = read_checkpoint(Path("runs/quickstart/near/checkpoints/last.ckpt"), "")
    assert near["state_dict"]["queue.position"] > 0
    compared = read_records("runs/compare/hypersphere-simclr-supervised-untrained")
    assert set(compared["model"]) == {"hypersphere", "simclr", "supervised", "untrained"}


def test_the_measurement_of_the_architecture_page_measures_what_it_says(folder: Path) -> None:
    run_page(ROOT / "docs" / "architecture.md")
    records = read_records("runs/quickstart/lengths").query("metric == 'length'")
    assert sorted(records["epoch"].unique()) == [0, 1]
    assert list(records["layer"].unique()) == [f"layer{stage}.0" for stage in (1, 2, 3, 4)]
    assert set(records["n"]) == {64}
    method = load_method("runs/quickstart/lengths").method.eval()
    data = DataModule("digits", measure_size=64, limit_test=64)
    data.setup("test")
    (batch,) = data.loader("measure")
    with Taps(method, "stages", lambda name, x: x.mean((2, 3)).norm(dim=1).mean()) as taps, torch.no_grad():
        lengths = taps(method.clean_view(batch["image"], batch["index"], seed=0, epoch=0, view=0))
    measured = records[records["epoch"] == 1].set_index("layer")["value"]
    assert measured.to_dict() == pytest.approx({name: float(value) for name, value in lengths.items()}, rel=1e-5)


@pytest.mark.parametrize(
    "words",
    [["python", "-m", "ssl_geometry.fitt"], ["curl", "x"], ["python", "x.py"], ["python", "-m", "ssl_geometry.probes"]],
)
def test_an_unknown_command_fails(words: list[str], folder: Path) -> None:
    with pytest.raises(AssertionError, match="neither run nor exempt"):
        run_command(words, " ".join(words), SHRUNK)


def test_a_wrong_option_fails(folder: Path) -> None:
    words = "python -m ssl_geometry.fit --config configs/quickstart/simclr.yaml --data.dtaset digits"
    with pytest.raises(SystemExit):
        run_command(words.split(), words, SHRUNK)
