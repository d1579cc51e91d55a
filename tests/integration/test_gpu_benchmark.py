"""benchmarks/gpu.py is rehearsed on the CPU: GPU time is too dear for a part that fails at its first line."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

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


def test_a_part_that_fails_does_not_take_the_others_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.md"
    options = ["--device=cpu", "--tiny", f"--images={tmp_path / 'no such folder'}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options, "--parts", "epochs", "linalg"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code
    epochs, linalg = out.read_text().split("## ")[1:]
    assert "**failed, exit code" in epochs
    assert "no such folder" in epochs
    assert "| 32 | eigh |" in linalg
    assert "failed" not in linalg
