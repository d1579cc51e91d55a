"""``python -m ssl_geometry.doctor``: each line says fine, or what to do. Its two processes: tests/distributed."""

from pathlib import Path

import pytest

from ssl_geometry import doctor, machine


def lines(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--skip_parity", *more])
    assert stop.value.code == 1
    return capsys.readouterr().out


@pytest.mark.slow
def test_what_is_to_do_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "version", lambda package: {"lightning": "2.6.3"}.get(package, "1.0"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "fit")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    said = lines(capsys, f"--runs={tmp_path}")
    for words in ("lightning>=2.6.6", "write `srun python -m ssl_geometry", "update the driver"):
        assert words in said
    assert "0" * 40 not in said, "a key is never shown"


def test_what_faiss_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = machine.exact_search
    (finding,) = machine.faiss()
    support = "GPU support, 0 GPU(s)" if exact.has_gpu() else "no GPU support"
    assert finding.detail.startswith(exact.faiss().__version__)
    if not machine.torch.cuda.is_available():
        assert support in finding.detail
    monkeypatch.setattr(exact, "has_gpu", lambda: False)
    for blas, words in (
        (("0.3.15", "SkylakeX"), "no GPU support, OpenBLAS 0.3.15 with kernels for SkylakeX, 5 threads"),
        (None, "no GPU support, its BLAS is not OpenBLAS, 5 threads"),
    ):
        monkeypatch.setattr(exact, "faiss_blas", lambda blas=blas: blas)
        monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 5)
        (finding,) = machine.faiss()
        assert words in finding.detail
        assert not finding.to_do or machine.torch.cuda.is_available()
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    (finding,) = machine.faiss()
    assert "faiss-gpu-cuvs" in finding.to_do
    monkeypatch.setattr(exact, "faiss_blas", lambda: ("0.3.15", "Prescott"))
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    (finding,) = machine.faiss()
    assert "set OPENBLAS_CORETYPE to newer ones" in finding.to_do
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    (finding,) = machine.faiss()
    assert "unset OPENBLAS_CORETYPE=Prescott" in finding.to_do


def test_a_folder_that_cannot_be_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    *_, finding = machine.folders(tmp_path / "runs", tmp_path)
    assert (finding.subject, finding.detail) == ("data", f"{tmp_path}: cannot be read (Permission denied)")
    assert finding.to_do


def test_weights_and_biases_that_does_not_answer_is_no_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(**options: bool) -> None:
        raise RuntimeError("the service process is busy\nmore")

    monkeypatch.setattr(machine.wandb, "login", busy)
    (finding,) = machine.weights_and_biases()
    assert finding.detail == "cannot be asked for a key (the service process is busy)"
