"""What commands import before they do anything, counted in one fresh interpreter."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_geometry.__main__ import COMMANDS, main
from ssl_geometry.records import RecordStore, record

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "lightning", "torchvision", "scipy", "sklearn", "matplotlib", "timm", "wandb", "faiss"}
START = """
import contextlib, importlib, io, json, sys

seen, news = set(sys.modules), {}
def start(step, module, *args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(*([list(args)] if args else []))
    news[step] = sorted(set(sys.modules) - seen)
    seen.update(sys.modules)

run, page = sys.argv[1:]
start("list of commands", "ssl_geometry.__main__")
start("doctor --help", "ssl_geometry.doctor", "--help")
start("zoo list", "ssl_geometry.zoo", "list")
start("report --help", "ssl_geometry.report.__main__", "--help")
start("report", "ssl_geometry.report.__main__", run, "-o", page)
import torch, lightning
seen.update(sys.modules)
for command in ("fit", "compare", "probe", "survey"):
    start(command + " --help", "ssl_geometry." + command, "--help")
print(json.dumps(news))
"""


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each start the modules that it imported, and none before it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    row = record(run="run", metric="train/loss", epoch=1, value=1.0)
    RecordStore(run / "records").write("train/epoch=00001", [row])
    done = subprocess.run(
        [sys.executable, "-c", START, run, run.parent / "report.html"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert (run.parent / "report.html").stat().st_size
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("start", "most", "needed"),
    [
        ("list of commands", 30, set()),
        ("doctor --help", 400, {"jsonargparse", "rich"}),
        ("zoo list", 60, set()),
        ("report --help", 700, {"pandas", "pyarrow"}),
        ("report", 100, set()),
    ],
)
def test_without_torch(news: dict[str, list[str]], start: str, most: int, needed: set[str]) -> None:
    packages = {module.partition(".")[0] for module in news[start]}
    assert needed <= packages
    assert not packages & HEAVY
    assert len(news[start]) <= most


@pytest.mark.parametrize(("start", "most"), [("fit", 700), ("compare", 60), ("probe", 60), ("survey", 60)])
def test_next_to_torch_and_lightning(news: dict[str, list[str]], start: str, most: int) -> None:
    packages = {module.partition(".")[0] for module in news[f"{start} --help"]}
    assert not packages & {"faiss", "timm", "sklearn", "wandb", "tensorboard"}
    assert len(news[f"{start} --help"]) <= most, "more than the commands before it"


def test_modules_that_need_no_faiss_do_not_load_it(news: dict[str, list[str]]) -> None:
    loaded = {module for modules in news.values() for module in modules}
    assert {f"ssl_geometry.geometry.{name}" for name in ("duplicates", "manifold", "ridge", "logistic")} <= loaded
    assert "faiss" not in loaded


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ssl-geometry"])
    main()
    shown = capsys.readouterr().out
    mains = {path.stem for path in (ROOT / "ssl_geometry").glob("*.py") if "def main(" in path.read_text()}
    assert mains - {"__main__"} | {"report"} == set(COMMANDS)
    assert all(f"\n  {command} " in shown for command in COMMANDS)
    monkeypatch.setenv("COLUMNS", "50")
    main()
    _, _, *entries = capsys.readouterr().out.splitlines()
    assert max(map(len, entries)) <= 50


def test_a_command_runs_as_with_python_m(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning starts the other processes of a node by the name of the module that runs, and the arguments."""
    monkeypatch.syspath_prepend(tmp_path)
    shown = "import sys; print(__name__, sys.modules['__main__'].__spec__.name, sys.argv[1:])"
    (tmp_path / "shown.py").write_text(shown)
    monkeypatch.setattr("ssl_geometry.__main__.run_module", lambda name, **how: runpy.run_module("shown", **how))
    monkeypatch.setattr(sys, "argv", ["ssl-geometry", "fit", "--x", "1"])
    main()
    assert capsys.readouterr().out == "__main__ shown ['--x', '1']\n"


def test_a_mistyped_command_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ssl-geometry", "fitt"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no command 'fitt'; did you mean 'fit'?\n"
