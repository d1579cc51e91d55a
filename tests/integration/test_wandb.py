"""What a user sees in W&B: the documented keys, live and later, each once.

The server is one of our own (``wandb_server.py``), which takes rows, counts them, and reports on resume what it has.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from matplotlib.figure import Figure
from PIL import Image

from ssl_geometry.fit import fit
from ssl_geometry.report import upload
from ssl_geometry.report.__main__ import main
from ssl_geometry.runs.run import Run
from tests.integration.test_fit import SMALL
from tests.integration.test_interruption import children
from tests.integration.wandb_server import Server

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--model=ssl_geometry.methods.Supervised",
    *SMALL[:-1],
    "--loggers=[wandb]",
    "--experiment=e",
    "--run_id=live",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
    "--cka.every_n_epochs=2",
    "--cka.layers=stages",
    "--invariance.every_n_epochs=2",
    "--invariance.views=[own,crop]",
    "--invariance.layers=stages",
    "--probes.every_n_epochs=2",
    "--probes.layers=stages",
    "--neighbors.every_n_epochs=2",
    "--neighbors.layers=stages",
    "--neighbors.k=10",
    "--neighbors.copies=3",
    "--neighbors.settings=[policy]",
    "--spectrum.every_n_epochs=2",
    "--spectrum.layers=stages",
    "--spectrum.copies=2",
]


def documented() -> dict[str, tuple[re.Pattern[str], str, bool]]:
    """Key to its pattern, its axis, and whether it is a figure, from the table of docs/wandb.md."""
    found = {}
    for line in (ROOT / "docs" / "wandb.md").read_text().splitlines():
        if row := re.fullmatch(r"\| `([^`]+)` \| (.*) \| (step|epoch) \|", line):
            pattern = "".join(
                "[^/]+" if part[0] == "<" else re.escape(part) for part in re.split("(<[^>]+>)", row[1]) if part
            )
            found[row[1]] = re.compile(pattern), row[3], row[2].startswith("figure")
    return found


def seen(server: Server) -> dict[tuple[str, int], Any]:
    """Names and steps, to numbers and what kind of thing a figure is."""
    return {key: value["_type"] if isinstance(value, dict) else value for key, value in server.points().items()}


@pytest.fixture(scope="module")
def online() -> Iterator[Callable[[], Server]]:
    """Starts servers, each of which W&B then sends to. Figures are blank: they would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, file, **options: Image.new("1", (1, 1)).save(file, "png"))

        def start() -> Server:
            upload.end_wandb(0)  # what W&B remembers of the server before
            server = Server()
            for name, value in server.environment.items():
                patch.setenv(name, value)
            return server

        yield start


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, online: Callable[[], Server]) -> tuple[Path, Server]:
    server = online()
    run = fit([*OPTIONS, f"--runs={tmp_path_factory.mktemp('wandb')}"])
    return run.directory, server


@pytest.fixture
def later(live: tuple[Path, Server], tmp_path: Path) -> Path:
    """The same run, of which W&B has nothing."""
    copy = tmp_path / "e" / "live"
    shutil.copytree(live[0], copy, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    return copy


def test_live_keys_are_the_documented_ones_over_epochs(live: tuple[Path, Server]) -> None:
    points, axes, schema = seen(live[1]), live[1].axes, documented()
    used = set()
    for name, step in points:
        fits = [key for key, (pattern, *_) in schema.items() if pattern.fullmatch(name)]
        assert fits, f"{name} is not documented"
        used.update(fits)
        assert axes.get(name, "step") == schema[fits[0]][1], name
        assert (points[name, step] == "image-file") == any(schema[key][2] for key in fits), name
    logistic = {f"probes/logistic{part}/<layer>" for part in ("", "_l2", "_mean_per_class")}
    assert set(schema) - used == logistic, "what this run was not asked for"
    assert {name.partition("/")[0] for name, _ in points} == {
        "train", "val", "test", "cka", "invariance", "probes", "neighbors", "spectrum",
    }  # fmt: skip


def test_a_row_is_a_step_with_its_epoch(live: tuple[Path, Server]) -> None:
    rows = {row["step"]: row for row in live[1].rows()}
    assert list(rows) == list(range(9)), "completed steps, the initialisation among them"
    assert [row["epoch"] for row in rows.values()] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert [step for step in rows if "train/loss" in rows[step]] == list(range(1, 9))
    assert [step for step in rows if "val/knn" in rows[step]] == [0, 4, 8]
    assert [step for step in rows if "cka/map_self" in rows[step] and "spectrum/rankme/layer1.0" in rows[step]] == [
        0,
        8,
    ]
    assert "test/knn" in rows[8]


def test_runs_are_grouped_and_searched_by_what_they_are(live: tuple[Path, Server]) -> None:
    about, config = live[1].run, live[1].config
    assert (about["groupName"], about["jobType"]) == ("e", "Supervised")
    assert about["tags"] == ["Supervised", "resnet10", "digits"]
    assert (config["method"], config["backbone"], config["seed"]) == ("Supervised", "resnet10", 0)
    assert config["model"]["init_args"]["width"] == 0.25
    assert {"ssl_geometry", "torch"} <= set(config["versions"])


def test_what_is_uploaded_later_is_what_was_logged_live_and_once(
    live: tuple[Path, Server], later: Path, online: Callable[[], Server], capsys: pytest.CaptureFixture[str]
) -> None:
    server = online()
    main([str(later), "--to_wandb"])
    points = seen(live[1])
    assert f"{len(points):,} numbers and figures sent" in capsys.readouterr().out
    assert seen(server) == points
    assert [row["epoch"] for row in server.rows()] == [row["epoch"] for row in live[1].rows()]
    assert server.axes == live[1].axes
    same = ("name", "groupName", "jobType", "tags", "project")
    assert [server.run[name] for name in same] == [live[1].run[name] for name in same]
    main([str(later), "--to_wandb"])
    assert "W&B has everything already" in capsys.readouterr().out
    assert seen(server) == points
    assert len(server.lines) == len(live[1].lines)


def test_offline_the_whole_run_is_written(
    later: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    main([str(later), "--to_wandb"])
    (file,) = later.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert content.count(b"test/knn") >= 1, "the last row is in the file when the command has ended"
    said = capsys.readouterr().out
    assert "numbers and figures written" in said
    assert f"wandb sync {file.parent}`" in said


def test_a_run_without_an_id_gets_one_that_stays(later: Path, online: Callable[[], Server]) -> None:
    Run(later).note(wandb_id=None)
    server = online()
    main([str(later), "--to_wandb"])
    assert server.run["name"] == Run(later).facts["wandb_id"]
    assert Run(later).facts["status"] == "finished", "the rest of run.json is kept"


@pytest.mark.parametrize("sent", [False, True], ids=["before a row", "before the end"])
def test_wandb_killed_in_mid_upload(
    live: tuple[Path, Server],
    later: Path,
    online: Callable[[], Server],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    sent: bool,
) -> None:
    """One line; the same command sends the rest, in the same process as well."""
    server, send = online(), upload.Sender.send

    def strike(sender: upload.Sender) -> None:
        if sent:
            send(sender)
        if sender._step == (8 if sent else 3):
            for process in children(os.getpid()):
                if Path(f"/proc/{process}/comm").read_text() == "wandb-core\n":
                    os.kill(process, signal.SIGKILL)
        if not sent:
            send(sender)

    with monkeypatch.context() as killed:
        killed.setattr(upload.Sender, "send", strike)
        with pytest.raises(SystemExit) as stop:
            main([str(later), "--to_wandb"])
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert said.count("error: --to_wandb: W&B did not take the whole run (") == 1
    assert "Traceback" not in said
    main([str(later), "--to_wandb"])
    assert seen(server) == seen(live[1])
    steps = [row["step"] for row in server.rows()]
    assert len(steps) == len(set(steps)), "each once"


HOLD = """
import fcntl, sys
file = open(sys.argv[1] + "/.lock", "w"); fcntl.lockf(file, fcntl.LOCK_EX); print("locked", flush=True)
sys.stdin.readline()
"""


def test_a_run_that_a_process_is_at_is_left_alone(
    later: Path, online: Callable[[], Server], capsys: pytest.CaptureFixture[str]
) -> None:
    online()
    Run(later).note(wandb_id=None)
    command = [sys.executable, "-c", HOLD, str(later)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(SystemExit) as stop:
            main([str(later), "--to_wandb"])
        holder.kill()
    assert stop.value.code == 2
    assert f"RUN {later}: another process trains in it" in capsys.readouterr().err
    assert Run(later).facts["wandb_id"] is None


def test_without_a_key_it_reports_it(
    live: tuple[Path, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(SystemExit) as stop:
        main([str(live[0]), "--to_wandb"])
    assert stop.value.code == 2
    assert "no W&B key here; run `wandb login`" in capsys.readouterr().err


class Process:
    """Stands for W&B's run."""

    starting_step = 0

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self._local_step = 0

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, row: dict[str, Any], step: int, commit: bool) -> None:
        self.rows.append((step, row))


def test_rows_are_sent_whole_in_order_and_from_where_wandb_is() -> None:
    run = Process()
    run.starting_step = 2
    sender = upload.Sender(run)
    for step, epoch, values in [
        (1, 1, {"train/loss": 1.0}),  # it is there
        (2, 1, {"train/loss": 2.0}),
        (2, 1, {"val/knn": 0.5}),
        (1, None, {"late": 3.0}),
        (3, 2, {"train/loss": 4.0}),
    ]:
        sender.add(step, epoch, values)
    whole = {"train/loss": 2.0, "val/knn": 0.5, "late": 3.0, "epoch": 1.0}
    assert run.rows == [(2, whole)], "the last may not be complete yet"
    run._local_step = 7  # somebody else has logged
    sender.send()
    assert run.rows[1:] == [(7, {"train/loss": 4.0, "epoch": 2.0})]


def test_what_others_log_to_the_run_costs_no_row(online: Callable[[], Server], tmp_path: Path) -> None:
    server = online()
    run = wandb.init(project="p", id="mixed", resume="allow", dir=tmp_path)
    sender = upload.Sender(run)
    for step in (1, 2, 3):
        sender.add(step, 1, {"train/loss": float(step)})
        run.log({"mine": step})
        run.log({"mine": step})
    sender.send()
    assert upload.end_wandb(0) is None
    assert [row["train/loss"] for row in server.rows() if "train/loss" in row] == [1, 2, 3]
