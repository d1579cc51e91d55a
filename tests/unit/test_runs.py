"""Run directories: who gets which, what is resumed, what is refused."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssl_geometry.errors import UserError
from ssl_geometry.runs import DIRECTORY_VARIABLE, WholeCheckpointIO, load_method, open_run, read_checkpoint

CONFIG = {"model": {"class_path": "x.SimCLR", "init_args": {"backbone": "resnet18"}}, "data": {}, "seed_everything": 3}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_JOB_NAME",
        "SLURM_RESTART_COUNT",
        "WORLD_SIZE",
        "LOCAL_RANK",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")


def checkpoint(directory: Path) -> None:
    WholeCheckpointIO().save_checkpoint({"epoch": 1}, directory / "checkpoints" / "last.ckpt")


def test_a_new_run_is_named_after_method_backbone_and_seed(tmp_path: Path) -> None:
    first = open_run(CONFIG, tmp_path, "e")
    second = open_run(CONFIG, tmp_path, "e")
    assert first.directory.parent == tmp_path / "e"
    assert first.directory.name.startswith("simclr-resnet18-s3-")
    assert first.directory != second.directory


def test_a_slurm_job_has_its_own_directory_and_finds_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    mine = open_run(CONFIG, tmp_path, "e", resume="auto")
    assert mine.directory.name == "slurm-17"
    assert mine.resumed_from is None
    checkpoint(mine.directory)
    with pytest.raises(UserError, match="--run_id"):  # the number of an older job, which SLURM gave away again
        open_run(CONFIG, tmp_path, "e", resume="auto")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert open_run(CONFIG, tmp_path, "e", resume="auto").resumed_from == mine.last_checkpoint
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    other = open_run(CONFIG, tmp_path, "e", resume="auto")
    assert (other.directory.name, other.resumed_from) == ("slurm-18", None)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert open_run(CONFIG, tmp_path, "e").directory.name == "slurm-40_2"


def test_auto_takes_the_newest_unfinished_run_of_the_same_configuration(tmp_path: Path) -> None:
    unfinished = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(unfinished.directory)
    other = open_run({**CONFIG, "seed_everything": 4}, tmp_path, "e", run_id="b")
    checkpoint(other.directory)
    assert open_run(CONFIG, tmp_path, "e", resume="auto").resumed_from == unfinished.last_checkpoint
    unfinished.note(status="finished")
    assert open_run(CONFIG, tmp_path, "e", resume="auto").resumed_from is None


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path: Path) -> None:
    mine = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(mine.directory)
    code = f"""
from ssl_geometry.runs import open_run
config = {CONFIG!r}
assert open_run(config, {str(tmp_path)!r}, "e", resume="auto").resumed_from is None
open_run(config, {str(tmp_path)!r}, "e", run_id="a", resume="auto")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert f"another process trains in {mine.directory}" in done.stderr.splitlines()[-1]
    mine.release()
    assert open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto").resumed_from == mine.last_checkpoint


def test_resume_by_path_of_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory)
    for path in (run.directory, run.last_checkpoint):
        again = open_run(CONFIG, tmp_path / "elsewhere", "f", resume=str(path))
        assert (again.directory, again.resumed_from) == (run.directory, run.last_checkpoint)
    with pytest.raises(UserError, match=r"--resume .*no checkpoint here"):
        open_run(CONFIG, tmp_path, "e", resume=str(tmp_path / "e" / "b"))
    stray = tmp_path / "stray.ckpt"
    stray.write_bytes(b"")
    with pytest.raises(UserError, match="not inside a run directory"):
        open_run(CONFIG, tmp_path, "e", resume=str(stray))


def test_every_process_resumes_from_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory)
    older = run.directory / "checkpoints" / "epoch=00001.ckpt"
    older.write_bytes(run.last_checkpoint.read_bytes())
    first = open_run(CONFIG, tmp_path, "e", resume=str(older))
    monkeypatch.setattr("ssl_geometry.runs.is_first_process", lambda: False)
    assert open_run(CONFIG, tmp_path, "e", resume=str(older)) == first
    assert open_run(CONFIG, tmp_path, "e", resume="auto").directory == first.directory


def test_processes_that_start_together_need_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="--run_id"):
        open_run(CONFIG, tmp_path, "e")
    assert open_run(CONFIG, tmp_path, "e", run_id="a").directory.name == "a"


def test_facts_are_kept_when_more_are_noted(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    run.note(results={"test/knn": 0.5})
    facts = json.loads((run.directory / "run.json").read_text())
    assert facts["results"] == {"test/knn": 0.5}
    assert facts["status"] == "running"


def test_a_user_without_a_name_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    assert run.facts["user"] == str(os.getuid())


class Evil:
    """What a tampered file may hold: code that runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "x": Evil(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("evil.ckpt", "raw.ckpt"):
        with pytest.raises(UserError, match="not a whole, plain checkpoint"):
            read_checkpoint(tmp_path / name, "--resume")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, tmp_path / "whole.ckpt")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:2000])
    with pytest.raises(UserError, match="not a whole"):
        read_checkpoint(tmp_path / "half.ckpt", "--resume")


@pytest.mark.parametrize("class_path", ["os.system", "no_such_module.X", "torch.nn.Linear"])
def test_a_checkpoint_names_only_methods(tmp_path: Path, class_path: str) -> None:
    torch.save({"method": {"class_path": class_path, "init_args": {}}, "state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"no subclass|cannot be imported"):
        load_method(tmp_path / "x.ckpt", "--cka.reference")


def test_a_foreign_checkpoint_is_told_from_ours(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of ssl_geometry"):
        load_method(tmp_path / "x.ckpt", "--cka.reference")
