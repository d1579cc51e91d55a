"""``python -m ssl_geometry.doctor`` with the two processes that it compares with one."""

from contextlib import suppress
from pathlib import Path

import pytest

from ssl_geometry import doctor, machine
from tests.processes import PROCESSES


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.torch.multiprocessing, "get_context", lambda kind: PROCESSES)


def test_a_machine_that_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):  # this machine may lack something
        doctor.main([f"--runs={tmp_path / 'runs'}", f"--data.root={tmp_path}"])
    said = capsys.readouterr().out
    lines = said.splitlines()
    subjects = [line.split(":")[0].removeprefix("fine").strip() for line in lines if line.startswith("fine")]
    assert {"python", "torch", "lightning", "cores", "FAISS", "SLURM", "W&B", "runs", "data"} <= set(subjects)
    assert "2 processes" in subjects
    assert "loss, gradient and CKA as of one" in said
    assert not (tmp_path / "runs").exists(), "it only looks"


def test_a_parity_that_is_broken_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    true = machine._numbers
    monkeypatch.setattr(
        machine, "_numbers", lambda rank, world: [[value + 1 for value in row] for row in true(rank, world)]
    )
    (finding,) = machine.parity()
    assert "do not train with several processes" in finding.to_do
