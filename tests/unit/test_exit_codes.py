"""The exit codes: one list, which docs and code share."""

import errno
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ssl_geometry.cli import run_command
from ssl_geometry.errors import ExitCode, Interrupted, UserError
from ssl_geometry.failures import explain
from ssl_geometry.metrics import KNNAccuracy
from ssl_geometry.runs.run import Run

ROOT = Path(__file__).parents[2]


def test_the_table_in_the_docs_has_every_code_and_no_other() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)
    assert {name: int(code) for code, name in rows} == {code.name: code.value for code in ExitCode}
    assert len(rows) == len(ExitCode)


def test_no_command_ends_with_a_number_that_is_not_in_the_list() -> None:
    ends = []
    for path in (ROOT / "ssl_geometry").rglob("*.py"):
        for call, given in re.findall(r"\b(sys\.exit|os\._exit|Interrupted)\(([^()]*)", path.read_text()):
            ends.append(path.name)
            assert not re.search(r"(^|[ =,])\d+\s*(,|$)", given), f"{path}: {call}({given})"
    assert {"cli.py", "failures.py", "zoo.py"} <= set(ends)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("--x 1: expected 2"), ExitCode.MISTAKE),
        (Interrupted("saved", ExitCode.RESUMABLE), ExitCode.RESUMABLE),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    ],
    ids=lambda value: getattr(value, "name", type(value).__name__),
)
def test_how_commands_end(error: BaseException, code: ExitCode) -> None:
    def command(args: object) -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_command(command, [], interrupted="interrupted")
    assert exit_.value.code == code


def test_files_that_may_not_be_read_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command(args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/root/run")

    with pytest.raises(SystemExit) as exit_:
        run_command(command, [], interrupted="interrupted")
    assert exit_.value.code == ExitCode.MISTAKE
    assert capsys.readouterr().err == "error: /root/run: Permission denied\n"
    with pytest.raises(PermissionError):
        run_command(command, ["--debug"], interrupted="interrupted")


def test_a_terminal_that_has_no_sign_for_it_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    run_command(lambda args: print("1 ± 2"), [], interrupted="interrupted")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"1 ? 2\n"  # type: ignore[attr-defined]


def test_files_of_text_are_utf8_whatever_the_machine_speaks() -> None:
    in_brackets = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
    calls = []
    for path in (ROOT / "ssl_geometry").rglob("*.py"):
        source = re.sub(r"^ *>>>.*$", "", path.read_text("utf-8"), flags=re.MULTILINE)
        calls += [f"{path}: {call}" for call in re.findall(rf"\.(?:read|write)_text{in_brackets}", source)]
    assert len(calls) > 10
    assert [call for call in calls if "encoding=" not in call] == []


def test_what_an_evaluation_cannot_compute_ends_training_in_one_line_and_an_error_of_the_program_does_not(
    tmp_path: Path,
) -> None:
    """A metric raises an ordinary error: it knows neither a run nor a user."""
    trainer: Any = SimpleNamespace(world_size=1)
    metric = KNNAccuracy(k=1)
    metric.update_bank(torch.full((3, 2), torch.nan), torch.arange(3))
    metric.update(torch.ones(2, 2), torch.arange(2))
    with pytest.raises(ValueError, match="are not finite") as error:
        metric.compute()
    assert type(error.value) is ValueError
    ended = explain(error.value, Run(tmp_path), trainer, None)
    assert isinstance(ended, UserError)
    assert str(ended) == "accuracy of 1 nearest neighbours: bank: 3 of 3 vectors are not finite"
    with pytest.raises(ValueError, match="invalid literal") as error:
        int("x")
    for other in (error.value, ValueError("never raised")):
        assert explain(other, Run(tmp_path), trainer, None) is other


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_ctrl_c_names_the_run_to_continue(tmp_path: Path, error: BaseException) -> None:
    trainer: Any = SimpleNamespace(world_size=1)
    ended = explain(error, Run(tmp_path), trainer, None)
    assert isinstance(ended, Interrupted)
    assert (str(ended), ended.code) == (f"interrupted; continue with --resume {tmp_path}", ExitCode.INTERRUPTED)


def test_of_many_weights_that_are_missing_three_are_named(tmp_path: Path) -> None:
    trainer, run = SimpleNamespace(world_size=1), SimpleNamespace(resumed_from="a.ckpt")
    missing = ", ".join(f'"teacher.{number}"' for number in range(70))
    error = RuntimeError(f"Error(s) in loading state_dict for DINO:\n\tMissing key(s) in state_dict: {missing}. ")
    ended = str(explain(error, run, trainer, None))  # type: ignore[arg-type]
    assert ended.endswith('(Missing key(s) in state_dict: "teacher.0", "teacher.1", "teacher.2" and 67 more.)')


def test_what_lightning_refuses_is_one_line(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(world_size=1)
    error = MisconfigurationException("0.01 * 4 < 1.\nIncrease `limit_train_batches`.")
    ended = explain(error, Run(tmp_path), trainer, None)
    assert isinstance(ended, UserError)
    assert str(ended) == "0.01 * 4 < 1. Increase `limit_train_batches`."


def test_a_worker_that_was_killed_is_said_plainly(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(world_size=1)
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore")
    said = str(explain(error, Run(tmp_path), trainer, None))
    assert said == (
        "a DataLoader worker died (DataLoader worker (pid 7) is killed by signal: Killed): if memory ran out, lower "
        f"--data.num_workers; continue with --resume {tmp_path}"
    )
