"""Commands start from what the runs that they get were measured with, and name what runs do not agree on."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from ssl_geometry import compare, launching, probe_options, shared_options, survey_options
from ssl_geometry.errors import UserError

LAYERS = ["stem", "pooled"]
CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "data": {"dataset": "digits", "measure_size": 256, "limit_test": 300, "limit_train": 99, "gone": 1},
    "cka": {"every_n_epochs": 1, "gram_size": 32, "layers": LAYERS},
    "invariance": {"every_n_epochs": 0, "gram_size": 16, "layers": "all", "views": ["own", "crop"]},
    "neighbors": {"every_n_epochs": 5, "k": 20, "copies": 4, "settings": ["crop", "policy"], "layers": None},
    "spectrum": {"every_n_epochs": 5, "copies": 0, "layers": None},
    "probes": {"every_n_epochs": 5, "layers": ["stages"], "train_images": 10},
}


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., list[str]]:
    """Makes runs, of which nothing but the configuration is there, and names them a, b, ..."""

    def make(*changes: dict[str, Any]) -> list[str]:
        specs = []
        for name, change in zip("abc", changes, strict=False):
            config = {group: {**options, **change.pop(group, {})} if isinstance(options, dict) else options
                      for group, options in CONFIG.items()}  # fmt: skip
            (tmp_path / name / "checkpoints").mkdir(parents=True)
            (tmp_path / name / "checkpoints" / "last.ckpt").touch()
            (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config | change))
            specs.append(f"{name}={tmp_path / name}")
        return ["--models", *specs]

    return make


def test_what_the_run_was_measured_with_is_the_default(runs: Callable[..., list[str]]) -> None:
    models = runs({})
    options = compare.parse(models)
    assert (options.gram_size, options.views) == (32, list(compare.VIEWS)), "invariance was not measured"
    assert (options.layers, options.default_layers) == (None, LAYERS)
    assert (options.data.measure_size, options.data.limit_test, options.data.seed) == (256, 300, 3)
    options = survey_options.parse(models)
    asked = options.neighbors
    assert (asked.k, asked.copies, asked.settings) == (20, 4, ["crop", "policy"])
    assert options.default_layers == survey_options.LAYERS
    options = probe_options.parse(models)
    assert (options.default_layers, options.train_images) == (["stages"], None)


def test_a_checkpoint_of_a_run_and_seeds_name_the_run(runs: Callable[..., list[str]]) -> None:
    a, b = (spec.partition("=")[2] for spec in runs({}, {"cka": {"gram_size": 8}})[1:])
    options = compare.parse(["--models", f"x={a}/checkpoints/last.ckpt,{b}"])
    assert options.gram_size == 32
    assert set(shared_options.run_configs(["--models", *options.models])) == {"x-1", "x-2"}


def test_the_command_line_wins(runs: Callable[..., list[str]], caplog: pytest.LogCaptureFixture) -> None:
    models = runs({}, {"cka": {"gram_size": 8}, "data": {"measure_size": 64}})
    given = ["--cka.gram_size=64", "--cka.layers", "all", "--data.measure_size", "200", "--invariance.views=[own]"]
    options = compare.parse([*models, *given])
    assert (options.gram_size, options.layers, options.data.measure_size, options.views) == (64, "all", 200, ["own"])
    assert not caplog.records


@pytest.mark.parametrize(
    ("module", "change", "line"),
    [
        (compare, {"cka": {"gram_size": 64}}, "--cka.gram_size differs between the runs: 32 (a: cka), 64 (b: cka)"),
        (
            compare,
            {"invariance": {"every_n_epochs": 2}, "cka": {"every_n_epochs": 0}},
            "--cka.gram_size differs between the runs: 32 (a: cka), 16 (b: invariance)",
        ),
        (
            compare,
            {"cka": {"layers": "all"}},
            "--cka.layers differs between the runs: ['stem', 'pooled'] (a: cka), all (b",
        ),
        (
            compare,
            {"data": {"limit_test": None}},
            "--data.limit_test differs between the runs: 300 (a), the default (b)",
        ),
        (survey_options, {"neighbors": {"k": 50}}, "--neighbors.k differs between the runs: 20 (a), 50 (b)"),
        (
            survey_options,
            {"spectrum": {"copies": 10}},
            "--spectrum.copies differs between the runs: 0 (a), 10 (b)",
        ),
        (
            probe_options,
            {"probes": {"layers": None}},
            "--probes.layers differs between the runs: ['stages'] (a), the default (b)",
        ),
        (probe_options, {"data": {"limit_train": 9}}, "--data.limit_train differs between the runs: 99 (a), 9 (b)"),
        (compare, {"data": {"limit_train": 9}}, ""),
        (compare, {"data": {"dataset": "/elsewhere/digits", "num_workers": 9}, "seed_everything": 9}, ""),
        (compare, {"invariance": {"gram_size": 8}}, ""),
    ],
)
def test_what_runs_do_not_agree_on_is_one_line(
    runs: Callable[..., list[str]], caplog: pytest.LogCaptureFixture, module: Any, change: dict[str, Any], line: str
) -> None:
    with caplog.at_level(logging.WARNING):
        options = module.parse(runs({}, change))
    said = [record.getMessage() for record in caplog.records if record.name == "ssl_geometry.shared_options"]
    assert all("the first is taken for all" in text for text in said)
    assert (any(text.startswith(line) for text in said) and line) or not (line or said), said
    assert options.data.limit_test == 300


@pytest.mark.parametrize("module", [compare, probe_options, survey_options])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_training_run_is_no_folder_for_results(
    runs: Callable[..., list[str]], tmp_path: Path, module: Any, overwrite: bool
) -> None:
    more = ["--overwrite"] if overwrite else []
    models = runs({})
    (tmp_path / "early" / "records").mkdir(parents=True)
    (tmp_path / "early" / "run.json").touch()
    for name in ("a", "early"):
        with pytest.raises(UserError, match=rf"--out {tmp_path / name} is a training run, .*: choose another") as error:
            module.parse([*models, f"--out={tmp_path / name}", *more])
        assert "--overwrite" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "there", "refused"),
    [
        (module, there, there != [] and not (module is survey_options and "models.json" in there))
        for module in (compare, probe_options, survey_options)
        for there in ([], ["records/x.parquet"], ["records/x.parquet", "models.json"])
    ],
)
def test_results_are_replaced_when_asked_or_by_their_own_job_and_a_survey_goes_on(
    runs: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    there: list[str],
    refused: bool,
) -> None:
    """A survey goes on with what a survey has measured, not with the results of another command."""
    for name in there:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    args = [*runs({}), f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"holds results already: .* --overwrite") if refused else nullcontext():
        assert not module.parse(args).overwrite
    assert module.parse([*args, "--overwrite"]).overwrite
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for more in ([], ["--overwrite"]):
        assert not module.parse([*args, *more]).overwrite, "what the job has measured before stays"


@pytest.mark.parametrize(("code", "how"), [(-9, "killed by signal 9"), (1, "exit code 1")])
def test_a_process_that_is_lost_is_one_line(
    code: int, how: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lightning's observer kills all of them without a word."""
    ended: list[Any] = []
    others: Any = [
        SimpleNamespace(pid=0, returncode=found, poll=lambda: None, kill=lambda: ended.append("killed"))
        for found in (None, code)
    ]
    observer = _ChildProcessObserver(main_pid=0, child_processes=others)
    monkeypatch.setattr("time.sleep", ended.append)
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr(L.Fabric, "launch", lambda self: None)
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", None)
    launching.launch(SimpleNamespace(devices=2, num_nodes=1, device="cpu"))
    assert observer._run()
    line = f"error: process 2 of 3 has ended ({how}); its own output may say why; start the command again\n"
    assert capfd.readouterr().err == line
    assert ended == [launching.GRACE_SECONDS, "killed", "killed", 2]


def test_what_metrics_cannot_compute_names_the_network_and_a_mistake_stays_as_it_is() -> None:
    for error, words in ((ValueError("3 vectors are zero"), "--models a: 3 vectors are zero"), (UserError("x"), "x")):
        with pytest.raises(UserError, match=f"^{words}$"), launching.naming("a"):
            raise error
