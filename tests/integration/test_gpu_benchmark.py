"""benchmarks/gpu.py is rehearsed on the CPU: GPU time is too dear for a part that fails at its first line."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from ssl_geometry.errors import UserError
from ssl_geometry.records import record

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402

TINY = argparse.Namespace(device="cpu", tiny=True, compile=False, images=None)
IN_A_PROCESS_OF_THEIR_OWN = {"tests", "interruption", "processes"}  # these start some themselves, and take minutes


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What parts and their runs switch on for a whole process."""
    monkeypatch.setenv("EPOCH_CLOCK", "")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("part", sorted(set(gpu.PARTS) - IN_A_PROCESS_OF_THEIR_OWN))
def test_a_part_runs_and_measures(part: str) -> None:
    rows = list(gpu.PARTS[part](TINY))
    assert rows
    assert gpu.table(rows).count("\n") == len(rows) + 1
    if part == "offline":
        assert all(row["rows with one protocol"] and row["largest difference"] < 1e-6 for row in rows)
    if part == "records":
        assert all(row["largest difference"] == 0 or pd.isna(row["largest difference"]) for row in rows)
        assert not any(row["only in one"] or row["NaN in one"] for row in rows)


def test_differences_are_seen() -> None:
    common = {"metric": "cka", "layer": "stem", "epoch": 0}
    a = pd.DataFrame([record(run="a", model_other="a", value=0.5, **common)])
    b = pd.DataFrame([record(run="b", model_other="b", value=0.75, **common)])
    (row,) = gpu.differences(a, b)
    assert row["largest difference"] == 0.25
    assert row["over the largest value"] == 0.5
    (row,) = gpu.differences(a, b.assign(layer="layer1.0", metric="cka"))
    assert row["only in one"] == 2


def started(*options: str) -> list[str]:
    return ["gpu.py", "--device=cpu", "--tiny", *options]


def test_a_part_that_fails_does_not_take_the_others_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started is an interpreter in name only: the parts are rehearsed in this one."""
    python, commands, out = tmp_path / "python", tmp_path / "commands", tmp_path / "gpu.md"
    python.write_text(f"""#!/bin/sh
        echo "$@" >> {commands}
        case "$*" in
            *epochs*) echo 'ROW {{"run": "one"}}'; echo Traceback >&2; echo 'error: no such folder' >&2; exit 3;;
            *) echo 'ROW {{"n": 32, "what": "eigh"}}'; echo what fit prints;;
        esac
    """)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", started("--images=nowhere", f"--out={out}", "--parts", "epochs", "linalg"))
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code
    epochs, linalg = out.read_text().split("## ")[1:]
    assert "| one |" in epochs, "what it measured before"
    assert "**failed, exit code 3**\n\nerror: no such folder" in epochs
    assert "| 32 | eigh |" in linalg
    assert "failed" not in linalg
    for part, command in zip(("epochs", "linalg"), commands.read_text().splitlines(), strict=True):
        assert command.split()[1:] == ["--inside", "--parts", part, *started("--images=nowhere")[1:]]


def test_a_part_prints_its_rows(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", started("--inside", "--parts", "linalg"))
    gpu.main()
    rows = [json.loads(line.removeprefix("ROW ")) for line in capfd.readouterr().out.splitlines()]
    assert {(row["n"], row["what"]) for row in rows} >= {(32, "eigh"), (64, "rankme")}


def test_a_part_that_fails_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", started("--images=no/such/folder", "--inside", "--parts", "epochs"))
    with pytest.raises(UserError, match="no/such/folder"):
        gpu.main()
