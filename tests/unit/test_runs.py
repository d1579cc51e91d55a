"""Run directories: who gets which, what is resumed, what is refused."""

import copy
import errno
import json
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from ssl_geometry.callbacks.checkpoints import KeptCheckpoint
from ssl_geometry.errors import UserError
from ssl_geometry.methods import Method
from ssl_geometry.records import RecordStore, record
from ssl_geometry.report.page import write_page
from ssl_geometry.runs.checkpoints import WholeCheckpointIO, read_checkpoint
from ssl_geometry.runs.directory import LOCK_SECONDS, open_run
from ssl_geometry.runs.networks import load_method, load_networks, network_names, split_seeds
from ssl_geometry.runs.run import DIRECTORY_VARIABLE, Run, config_of
from tests.processes import PROCESSES

CONFIG: dict[str, Any] = {
    "model": {"class_path": "x.SimCLR", "init_args": {"backbone": "resnet18"}},
    "data": {},
    "seed_everything": 3,
}

OURS = {"class_path": "ssl_geometry.methods.simclr.SimCLR", "init_args": {}}
STATES = {
    "optimizer_states": [{"state": {}, "param_groups": []}],
    "lr_schedulers": [{"last_epoch": 1, "base_lrs": [0.1]}],
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_JOB_NAME",
        "SLURM_RESTART_COUNT",
        "SLURM_SUBMIT_DIR",
        "WORLD_SIZE",
        "LOCAL_RANK",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")


def loops(processed: Any, **other: Any) -> dict[str, Any]:
    """Lightning's counters, of which some may be others."""
    counts = {"current": {"processed": processed}, "total": {"processed": processed}}
    return {"fit_loop": {"epoch_progress": counts | other}}


def checkpoint(directory: Path, name: str = "last", epochs: int = 1, under_way: int = 0, **other: Any) -> Path:
    """A checkpoint after so many epochs of ten steps, and so many steps of the next."""
    content = {
        "epoch": epochs,
        "global_step": 10 * epochs + under_way,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {"w": torch.arange(1000.0) + epochs},
        "loops": loops(processed=epochs),
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    path = directory / "checkpoints" / f"{name}.ckpt"
    WholeCheckpointIO().save_checkpoint(content | other, path)
    return path


def weight(path: Path) -> float:
    return read_checkpoint(path, "")["state_dict"]["w"][0].item()


def test_a_start_that_fails_takes_away_what_it_made_alone(tmp_path: Path) -> None:
    for leave, stays in {
        "nothing": lambda run: None,
        "a figure": lambda run: run.write("figures/a.png", ""),
        "checkpoint": lambda run: checkpoint(run.directory),
        "records": lambda run: RecordStore(run.directory / "records").write("cka", rows(0, [0])),
    }.items():
        run = open_run(CONFIG, tmp_path, "e", run_id=leave)
        stays(run)
        run.discard()
        assert run.directory.exists() == (leave in ("checkpoint", "records")), leave
    (tmp_path / "e" / "mine").mkdir()
    run = open_run(CONFIG, tmp_path, "e", run_id="mine")
    run.discard()
    assert run.directory.exists(), "it was there before"


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


def _resume_beside(runs: Path, said: Any) -> None:
    assert open_run(CONFIG, runs, "e", resume="auto").resumed_from is None
    try:
        open_run(CONFIG, runs, "e", run_id="a", resume="auto")
    except UserError as error:
        said.send(str(error))


@pytest.mark.slow
def test_a_run_that_another_process_is_at_is_left_alone(tmp_path: Path) -> None:
    mine = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(mine.directory)
    heard, said = PROCESSES.Pipe(duplex=False)
    other = PROCESSES.Process(target=_resume_beside, args=(tmp_path, said))
    other.start()
    said.close()
    assert f"another process trains in {mine.directory} (process {os.getpid()} on {platform.node()})" in heard.recv()
    other.join()
    mine.release()
    assert open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto").resumed_from == mine.last_checkpoint


def test_resume_by_path_of_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory)
    for path in (run.directory, run.last_checkpoint):
        again = open_run(CONFIG, tmp_path / "elsewhere", "f", resume=str(path))
        assert (again.directory, again.resumed_from) == (run.directory, run.last_checkpoint)
    with pytest.raises(UserError, match=r"--resume .*no run or checkpoint here"):
        open_run(CONFIG, tmp_path, "e", resume=str(tmp_path / "e" / "b"))
    stray = tmp_path / "stray.ckpt"
    stray.write_bytes(b"")
    with pytest.raises(UserError, match="not inside a run directory"):
        open_run(CONFIG, tmp_path, "e", resume=str(stray))


def test_every_process_resumes_from_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory, epochs=2)
    older = checkpoint(run.directory, "epoch=00001", epochs=1)
    first = open_run(CONFIG, tmp_path, "e", resume=str(older))
    monkeypatch.setattr("ssl_geometry.runs.run.is_first_process", lambda: False)
    assert open_run(CONFIG, tmp_path, "e", resume=str(older)) == first
    assert open_run(CONFIG, tmp_path, "e", resume="auto") == first


def with_options(**options: Any) -> dict[str, Any]:
    """The configuration with other options: ``model_lr=3`` is --model.lr 3."""
    config = copy.deepcopy(CONFIG)
    for name, value in options.items():
        group, _, option = name.partition("_")
        where = config.setdefault(group, {})
        (where["init_args"] if group == "model" else where)[option] = value
    return config


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"model_lr": 0.3}, {"model_lr": 3.0}, "--model.lr 0.3 (now 3.0)"),
        ({"data_batch_size": 64}, {"data_batch_size": 32}, "--data.batch_size 64 (now 32)"),
        ({"data_dataset": "cifar10"}, {"data_dataset": "svhn"}, "--data.dataset cifar10 (now svhn)"),
        ({"trainer_precision": None}, {"trainer_precision": "16-mixed"}, "--trainer.precision None (now 16-mixed)"),
    ],
)
@pytest.mark.parametrize("how", ["auto", "run", "checkpoint"])
def test_other_options_than_the_runs_own_are_refused(
    tmp_path: Path, how: str, before: dict[str, Any], now: dict[str, Any], named: str
) -> None:
    run = open_run(with_options(**before), tmp_path, "e", run_id="a")
    last = checkpoint(run.directory)
    kept = (run.directory / "config.yaml").read_bytes()
    resume = {"auto": "auto", "run": str(run.directory), "checkpoint": str(last)}[how]
    with pytest.raises(UserError) as refused:
        open_run(with_options(**now), tmp_path, "e", run_id="a", resume=resume)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (run.directory / "config.yaml").read_bytes() == kept


def test_another_method_or_seed_is_refused(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory)
    other = {**CONFIG, "model": {"class_path": "x.VICReg", "init_args": {"backbone": "resnet50"}}}
    with pytest.raises(UserError, match=r"options, --model x\.SimCLR \(now x\.VICReg\): leave"):
        open_run(other, tmp_path, "e", run_id="a", resume="auto")
    with pytest.raises(UserError, match=r"--seed_everything 3 \(now 4\)"):
        open_run({**CONFIG, "seed_everything": 4}, tmp_path, "e", run_id="a", resume="auto")
    (run.directory / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml.* missing or damaged"):
        open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto")


@pytest.mark.parametrize(
    ("option", "asked", "done"),
    [
        ("max_epochs", 4, 5),
        ("max_epochs", 5, None),
        ("max_epochs", -1, None),
        ("max_steps", 49, 50),
        ("max_steps", 50, None),
    ],
)
def test_a_length_that_the_run_is_beyond_is_refused(tmp_path: Path, option: str, asked: int, done: int | None) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory, epochs=5)
    shorter = {**CONFIG, "trainer": {option: asked}}
    if done is None:
        assert open_run(shorter, tmp_path, "e", run_id="a", resume="auto").resumed_from
        return
    before = (run.directory / "run.json").read_bytes()
    with pytest.raises(UserError) as error:
        open_run(shorter, tmp_path, "e", run_id="a", resume="auto")
    assert str(error.value) == (
        f"--trainer.{option} {asked}: {run.directory} has trained {done} {option[4:]} already; set more than {done} to "
        "train on"
    )
    assert (run.directory / "run.json").read_bytes() == before


def test_one_network_under_two_names_is_refused(tmp_path: Path) -> None:
    """It would count as two seeds, whether it is one file, a copy of it, or made twice."""
    method = Method(backbone="resnet10", width=1 / 16)
    named = {"class_path": "ssl_geometry.methods.Method", "init_args": method.init_args}
    for name, change in {"one": 1.0, "copy": 0.0, "other": 1.0}.items():
        with torch.no_grad():
            next(method.parameters()).add_(change)
        torch.save({"method": named, "state_dict": method.state_dict(), "epoch": 1}, tmp_path / f"{name}.ckpt")
    one, copy, other = (tmp_path / f"{name}.ckpt" for name in ("one", "copy", "other"))
    found = load_networks([f"a={one},{other}", "random", "random:1"])
    given = {name: (model.name, model.given, model.epochs) for name, model in found.items()}
    assert given == {
        "a-1": ("a-1", "a", 2),
        "a-2": ("a-2", "a", 2),
        "random": ("random", "random", None),
        "random-1": ("random-1", "random-1", None),
    }
    assert {(model.architecture, model.source, model.config) for model in found.values()} == {("resnet10", "", None)}
    for a, b in ((f"a={one}", f"b={one}"), (f"a={one}", f"b={copy}"), ("a=random", "b=random:0")):
        with pytest.raises(UserError, match=f"^--models {a} {b}: one network, its weights are equal; name it once"):
            load_networks([str(other), a, b])


def test_other_places_and_workers_are_the_same_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = with_options(data_num_workers=2, data_root="/a", data_dataset="/node1/birds", trainer_max_epochs=5)
    now = with_options(data_num_workers=8, data_root="/b", data_dataset="/node2/birds", trainer_max_epochs=9)
    now["trainer"] |= {"devices": 4, "num_nodes": 2}
    run = open_run(before, tmp_path, "e", run_id="a")
    checkpoint(run.directory)
    with caplog.at_level("INFO"):
        assert open_run(now, tmp_path, "e", resume="auto") == Run(run.directory, run.last_checkpoint)
    assert "--trainer.max_epochs was 5 and is 9" in caplog.text


def rows(epoch: int, steps: list[int]) -> list[dict[str, Any]]:
    return [record(metric="train/loss", epoch=epoch, step=step, value=1.0) for step in steps]


def test_winding_back_sets_aside_what_came_later(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    run.note(wandb_id="a-1")
    checkpoint(run.directory, epochs=3)
    middle = checkpoint(run.directory, "middle", epochs=1, under_way=5)
    store = RecordStore(run.directory / "records")
    for epoch in (1, 2, 3):
        store.write(f"scalars/epoch={epoch:05d}", rows(epoch, list(range(10 * epoch - 10, 10 * epoch))))
        store.write(f"cka/epoch={epoch:05d}", rows(epoch, [10 * epoch]))
    store.write("transfer", rows(3, [30]))
    again = open_run(CONFIG, tmp_path, "e", resume=str(middle))
    frame = store.read()
    assert sorted(frame["step"]) == [*range(10), 10, *range(10, 15), 30]
    assert weight(run.last_checkpoint) == 1
    aside = run.directory / "superseded" / "1"
    assert weight(aside / "last.ckpt") == 3
    assert len(RecordStore(aside).read()) == 20 + 2
    assert again.facts["wandb_id"] is None, "W&B keeps what it has beyond this checkpoint: it gets a new run"
    assert open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto").resumed_from == run.last_checkpoint
    assert len(store.read()) == len(frame)
    store.write("cka/epoch=00002", rows(2, [20]))
    open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto")
    assert len(store.read()) == len(frame), "and what came after the last checkpoint is run again"
    assert not (run.directory / "superseded" / "2").exists()


def test_a_run_that_starts_again_has_no_earlier_rows_and_loses_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    run.note(wandb_id="a-1")
    store = RecordStore(run.directory / "records")
    for epoch in (0, 7):
        store.write(f"cka/epoch={epoch:05d}", rows(epoch, [epoch]))
    with caplog.at_level("INFO"):
        again = open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto")
    aside = run.directory / "superseded" / "1"
    assert f"starting from scratch in {run.directory}; what it has measured is now in {aside}" in caplog.text
    assert again.resumed_from is None
    assert again.facts["wandb_id"] is None
    assert not len(store.read())
    assert RecordStore(aside).read()["epoch"].tolist() == [0, 7]
    open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto")
    assert not (run.directory / "superseded" / "2").exists(), "there was nothing to keep"


@pytest.mark.parametrize("last", ["missing", "damaged"])
@pytest.mark.parametrize("how", ["auto", "path"])
def test_without_a_whole_last_checkpoint_the_newest_kept_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, last: str, how: str
) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    run.note(wandb_id="a-1")
    kept = [checkpoint(run.directory, f"epoch={epoch:05d}", epochs=epoch) for epoch in (2, 10, 12)]
    kept[2].write_bytes(b"half")
    store = RecordStore(run.directory / "records")
    for epoch in (2, 10, 11):
        store.write(f"cka/epoch={epoch:05d}", rows(epoch, [10 * epoch]))
    if last == "damaged":
        run.last_checkpoint.write_bytes(b"half")
    with caplog.at_level("INFO"):
        resume = {"auto": "auto", "path": str(run.directory)}[how]
        again = open_run(CONFIG, tmp_path, "e", run_id="a", resume=resume)
    aside = run.directory / "superseded" / "1"
    assert f"continuing from {kept[1]}; what came later is now in {aside}" in caplog.text
    assert caplog.text.count("not a whole, plain checkpoint") == 1 + (last == "damaged")
    assert (again.resumed_from, again.resumed_step) == (run.last_checkpoint, 100)
    assert weight(run.last_checkpoint) == 10
    assert store.read()["epoch"].tolist() == [2, 10]
    assert RecordStore(aside).read()["epoch"].tolist() == [11]
    assert again.facts["wandb_id"] is None
    assert {path.name for path in aside.glob("*.ckpt")} == {"epoch=00012.ckpt"} | {
        name for name in ["last.ckpt"] if last == "damaged"
    }
    assert open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto").resumed_step == 100
    assert not (run.directory / "superseded" / "2").exists()


def test_other_processes_continue_where_only_a_kept_checkpoint_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory, "epoch=00001")
    monkeypatch.setattr("ssl_geometry.runs.run.is_first_process", lambda: False)
    assert open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto").resumed_from == run.last_checkpoint


def test_a_run_wound_back_and_killed_continues_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here and under SLURM, where the requeued job has the old command; nothing was saved in between."""
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory, epochs=9)
    older = checkpoint(run.directory, "epoch=00005", epochs=5)
    open_run(CONFIG, tmp_path, "e", resume=str(older))
    assert weight(open_run(CONFIG, tmp_path, "e", resume="auto").last_checkpoint) == 5

    checkpoint(run.directory, epochs=9)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the first start died before it came to this run
    assert weight(open_run(CONFIG, tmp_path, "e", resume=str(older)).last_checkpoint) == 5
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert weight(open_run(CONFIG, tmp_path, "e", resume=str(older)).last_checkpoint) == 5
    checkpoint(run.directory, epochs=6)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert weight(open_run(CONFIG, tmp_path, "e", resume=str(older)).last_checkpoint) == 6


def test_a_job_number_that_is_given_away_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", "/home/a")
    run = open_run(CONFIG, tmp_path, "e", resume="auto")
    checkpoint(run.directory)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert open_run(CONFIG, tmp_path, "e", resume="auto").resumed_from
    for variable, value in {"SLURM_SUBMIT_DIR": "/home/b", "SLURM_RESTART_COUNT": "1"}.items():
        with monkeypatch.context() as other:
            other.setenv(variable, value)
            with pytest.raises(UserError, match="not one of an earlier start of this very job"):
                open_run(CONFIG, tmp_path, "e", resume="auto")


def test_the_newest_run_is_a_matter_of_order_not_of_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, clock in (("a", "2026-11-21T15:00:00+0100"), ("b", "2020-01-01T00:00:00+0000")):
        with monkeypatch.context() as skewed:
            skewed.setattr("time.strftime", lambda _, clock=clock: clock)
            checkpoint(open_run(CONFIG, tmp_path, "e", run_id=name).directory)
    open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto")
    assert open_run(CONFIG, tmp_path, "e", resume="auto").directory.name == "b"


def test_a_run_is_named_by_its_directory_however_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory)
    (tmp_path / "newest").symlink_to(run.directory)
    for folder, path in (
        (run.directory, "."),
        (run.directory / "checkpoints", "last.ckpt"),
        (run.directory / "checkpoints", ".."),
        (tmp_path, "newest"),
    ):
        monkeypatch.chdir(folder)
        assert open_run(CONFIG, tmp_path, "e", resume=path).directory == run.directory


HOLD = """
import fcntl, sys
file = open(sys.argv[1] + "/.lock", "w"); fcntl.lockf(file, fcntl.LOCK_EX); print("locked", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("ends", [True, False], ids=["it goes", "it stays"])
def test_a_requeued_job_waits_for_the_lock_of_a_dead_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ends: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run = open_run(CONFIG, tmp_path, "e", resume="auto")
    run.note(host="node5")
    checkpoint(run.directory)
    run.release()
    command = [sys.executable, "-c", HOLD, str(run.directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        holder.stdout.readline()
        polls = []

        def sleep(seconds: float) -> None:
            polls.append(seconds)
            if ends and len(polls) == 3:
                holder.kill()
                holder.wait()

        monkeypatch.setattr("time.sleep", sleep)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with caplog.at_level("INFO"):
            if ends:
                assert open_run(CONFIG, tmp_path, "e", resume="auto").resumed_from
                assert len(polls) == 3
            else:
                with pytest.raises(UserError, match=r"another process trains in .* \(a process on node5\)"):
                    open_run(CONFIG, tmp_path, "e", resume="auto")
                assert sum(polls) == LOCK_SECONDS
        assert caplog.text.count("locked by a process on node5") == 1
        holder.kill()


def test_what_killed_processes_left_half_written_is_removed(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [
        run.directory / folder / f".{name}.{dead.pid}.partial"
        for folder, name in ((".", "run.json"), ("checkpoints", "last.ckpt"), ("records/cka", "epoch=00001.parquet"))
    ]
    alive = run.directory / f".run.json.{os.getppid()}.partial"
    for path in (*left, alive):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto")
    assert not any(path.exists() for path in left)
    assert alive.exists()


def test_files_cut_short_by_a_power_cut_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory, epochs=2)
    store = RecordStore(run.directory / "records")
    for epoch in (1, 2):
        store.write(f"cka/epoch={epoch:05d}", rows(epoch, [10 * epoch]))
    (store.directory / "cka" / "epoch=00001.parquet").write_bytes(b"")
    (store.directory / "scalars").mkdir()
    whole = (store.directory / "cka" / "epoch=00002.parquet").read_bytes()
    (store.directory / "scalars" / "epoch=00002.parquet").write_bytes(whole[: len(whole) // 2])
    (run.directory / "run.json").write_text("")
    open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto")
    assert store.read()["step"].tolist() == [20]
    assert caplog.text.count("cut short") == 2
    assert caplog.text.count("run.json was damaged") == 1
    assert len(list(run.directory.rglob("*.damaged"))) == 3
    assert run.facts["status"] == "running"


def test_an_error_without_a_message_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.save", Mock(side_effect=RuntimeError))
    with pytest.raises(UserError, match=r"could not save .*x.ckpt: RuntimeError; there is no earlier checkpoint"):
        WholeCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "x.ckpt")


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut, a name for what is not on the disk yet is an empty file."""
    done: list[tuple[str, str]] = []
    flush, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        done.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    def replace(source: Path, target: Path) -> None:
        done.append(("rename", str(source)))
        rename(source, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", replace)
    run = Run(tmp_path / "a")
    for write in (
        lambda: run.note(status="running"),
        lambda: checkpoint(run.directory),
        lambda: RecordStore(run.directory / "records").write("cka/epoch=00001", rows(1, [10])),
        lambda: write_page(tmp_path / "report.html", "page"),
    ):
        done.clear()
        write()
        (_, file), (_, renamed), (_, folder) = done
        assert [kind for kind, _ in done] == ["flush", "rename", "flush"]
        assert file == renamed
        assert folder == str(Path(file).parent)


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
    (tmp_path / "text.ckpt").write_text("hello")
    reasons = {"evil": "it contains code (", "raw": "a raw pickle", "text": "not a file written by torch.save"}
    for name, reason in reasons.items():
        for mmap in (None, True):
            with pytest.raises(UserError, match="not a whole, plain checkpoint") as error:
                read_checkpoint(tmp_path / f"{name}.ckpt", "--resume", mmap=mmap)
            assert reason in str(error.value)
            assert "weights_only" not in str(error.value), "torch's advice is to load it whatever it runs"
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, tmp_path / "whole.ckpt")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:2000])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("half", "empty"):
        with pytest.raises(UserError, match=r"--resume .*not a whole, plain checkpoint \(\w"):
            read_checkpoint(tmp_path / f"{name}.ckpt", "--resume")


def test_a_checkpoint_of_an_older_torch_is_read_with_and_without_a_map_of_the_file(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(3)}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for mmap in (None, True):
        assert read_checkpoint(tmp_path / "old.ckpt", "--resume", mmap=mmap)["state_dict"]["w"].sum() == 3


def test_a_damaged_checkpoint_names_the_one_to_continue_from(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    last = checkpoint(run.directory, epochs=2)
    last.write_bytes(last.read_bytes()[:2000])
    with pytest.raises(
        UserError, match=r"cut short or damaged\); the run has no other, so start it again under another"
    ):
        open_run(CONFIG, tmp_path, "e", resume=str(run.directory))
    older = checkpoint(run.directory, "epoch=00001", epochs=1)
    with pytest.raises(UserError, match=f"continue from a whole one with --resume {older}$"):
        open_run(CONFIG, tmp_path, "e", resume=str(last))
    assert open_run(CONFIG, tmp_path, "e", resume=str(older)).resumed_from == last


def test_a_full_disk_is_the_reason_and_its_advice_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports where in the file it found itself, and the disk's own words are behind that."""
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    run.release()

    def save(content: Any, file: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 185856 vs 185752")

    with monkeypatch.context() as patch:
        patch.setattr("ssl_geometry.runs.checkpoints.torch.save", save)
        with pytest.raises(UserError, match="No space left on device; there is no earlier checkpoint") as error:
            WholeCheckpointIO().save_checkpoint({}, run.last_checkpoint)
    advised = str(error.value).rpartition("--resume ")[2]
    again = open_run(CONFIG, tmp_path / "elsewhere", "f", resume=advised)
    assert (again.directory, again.resumed_from) == (run.directory, None)
    monkeypatch.setattr("ssl_geometry.runs.run.is_first_process", lambda: False)
    assert open_run(CONFIG, tmp_path, "f", resume=advised) == again


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/tmp/x",
        ".",
        "..",
        ".hidden",
        "a/b",
        "a\\b",
        "a\nb",
        "<script>",
        "a:b",
        "a,b",
        "a;b",
        "a?",
        "*",
        "a ",
        "a.",
        "-x",
        "x" * 300,
        "ä" * 100,
        "\ud800",
    ],
    ids=ascii,
)
def test_a_name_is_that_of_one_folder(tmp_path: Path, name: str) -> None:
    for names in ({"experiment": "e", "run_id": name}, {"experiment": name, "run_id": "a"}):
        with pytest.raises(UserError, match=r"^--(run_id|experiment) ") as error:
            open_run(CONFIG, tmp_path / "runs", **names)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 250
    assert not list(tmp_path.iterdir()), "nothing was made"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "random:resnet10:99999999999999999999",
            "--models random:ARCH:SEED 99999999999999999999: expected a whole number",
        ),
        ("random:-1", "--models random:SEED -1: expected a whole number from 0 to 4,294,967,295"),
        ("random:resnet10@1", "--models random:ARCH@PIXELS 1: expected a whole number of at least 8"),
    ],
)
def test_untrained_networks_have_a_seed_and_a_size_in_range(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_networks([spec, "random:resnet10@32"])


@pytest.mark.parametrize("name", ["my run#1", "seed_0", "größe (2)", "lr=0.1+wd", "2026-11-26"])
def test_names_that_are_fine(tmp_path: Path, name: str) -> None:
    assert open_run(CONFIG, tmp_path, name, run_id=name).directory == tmp_path / name / name


@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
def test_a_flipped_bit_is_refused(tmp_path: Path, place: float) -> None:
    """Inside a tensor, where torch itself would read another number."""
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(100_000)}}, path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["state_dict"]["w"].any()
    with pytest.raises(UserError, match=r"not a whole, plain checkpoint .* not what was written"):
        read_checkpoint(path, "--resume")


@pytest.mark.parametrize(
    "other",
    [
        {"state_dict": 3},
        {"state_dict": {"w": 3}},
        {"optimizer_states": None},
        {"callbacks": None},
        {"loops": {}},
        {"loops": {"fit_loop": 3}},
        {"pytorch-lightning_version": 7},
        {"pytorch-lightning_version": "new"},
        {"global_step": "1"},
        {"global_step": True},
        {"global_step": -5},
        {"loops": loops(processed=-1)},
        {"loops": loops(processed=True)},
        {"loops": loops(processed=1, total=None)},
        {"loops": {"fit_loop": loops(1)["fit_loop"] | {"epoch_loop.batch_progress": {"current": {"ready": 1}}}}},
        {"optimizer_states": [3]},
        {"optimizer_states": [], "lr_schedulers": STATES["lr_schedulers"], "method": OURS},
        {"optimizer_states": [{"state": {}}], "lr_schedulers": STATES["lr_schedulers"], "method": OURS},
        {"lr_schedulers": [3]},
        {"lr_schedulers": [], "optimizer_states": STATES["optimizer_states"], "method": OURS},
        {"lr_schedulers": [{"a": 1}], "optimizer_states": STATES["optimizer_states"], "method": OURS},
    ],
    ids=str,
)
def test_a_checkpoint_that_training_cannot_go_on_from_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    checkpoint(run.directory, **other)
    store = RecordStore(run.directory / "records")
    store.write("cka/epoch=00001", rows(1, [10]))
    with pytest.raises(UserError, match=rf"last\.ckpt: training cannot continue .* its {next(iter(other))} is missing"):
        open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto")
    assert len(store.read()) == 1
    checkpoint(run.directory, "epoch=00001", epochs=1)
    assert open_run(CONFIG, tmp_path, "e", run_id="a", resume="auto").resumed_step == 10
    assert weight(run.last_checkpoint) == 1


@pytest.mark.parametrize(
    ("model", "method", "words"),
    [
        (
            {"class_path": "ssl_geometry.methods.SimCLR", "init_args": {"backbone": "resnet18", "width": 1.0}},
            {**OURS, "init_args": {"backbone": "resnet50", "width": 1, "compile": True, "seed": 7}},
            r"--model\.backbone resnet50 \(the run: resnet18\);",
        ),
        (
            {"class_path": "ssl_geometry.methods.SimCLR", "init_args": {}},
            {"class_path": "ssl_geometry.methods.supervised.Supervised", "init_args": {}},
            r"--model ssl_geometry\.methods\.supervised\.Supervised \(the run: ssl_geometry\.methods\.SimCLR\);",
        ),
        ({"class_path": "ssl_geometry.methods.SimCLR", "init_args": {}}, None, r"--model unknown \(the run: ssl_"),
        ({"class_path": "mine.Own", "init_args": {}}, OURS, r"--model ssl_.* \(the run: mine\.Own\);"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_before_anything_is_moved(
    tmp_path: Path, model: dict[str, Any], method: dict[str, Any] | None, words: str
) -> None:
    config = {**CONFIG, "model": model}
    run = open_run(config, tmp_path, "e", run_id="a")
    model["init_args"] |= {"num_classes": None, "normalize": [0.5, 0.2]}
    right = {**model, "init_args": {**model["init_args"], "num_classes": 10, "normalize": (0.5, 0.2), "new": 1}}
    checkpoint(run.directory, epochs=3, method=right, **STATES)
    checkpoint(run.directory, "epoch=00003", epochs=3, method=right, **STATES)
    store = RecordStore(run.directory / "records")
    store.write("cka/epoch=00003", rows(3, [30]))
    alien = checkpoint(run.directory, "other", epochs=1, **({"method": method} if method else {}), **STATES)
    before = sorted(run.directory.rglob("*"))
    with pytest.raises(UserError, match=rf"--resume {alien}: holds another network than this run, {words}") as error:
        open_run(config, tmp_path, "e", resume=str(alien))
    assert str(error.value).endswith(f"continue from a whole one with --resume {run.last_checkpoint}")
    assert sorted(run.directory.rglob("*")) == before
    assert len(store.read()) == 1
    assert open_run(config, tmp_path, "e", resume=str(run.directory)).resumed_step == 30


def test_kept_checkpoints_later_than_the_last_are_set_aside(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    run.note(wandb_id="a-1")
    checkpoint(run.directory, epochs=3, under_way=5)
    for epoch in (3, 4):
        checkpoint(run.directory, f"epoch={epoch:05d}", epochs=epoch)
    store = RecordStore(run.directory / "records")
    store.write("cka/epoch=00004", rows(4, [40]))
    again = open_run(CONFIG, tmp_path, "e", resume=str(run.directory))
    aside = run.directory / "superseded" / "1"
    assert [path.name for path in run.checkpoints] == ["last.ckpt", "epoch=00003.ckpt"]
    assert [path.name for path in aside.glob("*.ckpt")] == ["epoch=00004.ckpt"]
    assert RecordStore(aside).read()["epoch"].tolist() == [4]
    assert not len(store.read())
    assert (again.resumed_step, again.facts["wandb_id"]) == (35, "a-1")
    open_run(CONFIG, tmp_path, "e", resume=str(run.directory))
    assert not (run.directory / "superseded" / "2").exists()


def test_an_epoch_that_is_trained_again_replaces_its_kept_checkpoint(tmp_path: Path) -> None:
    kept = KeptCheckpoint(tmp_path, every_n_epochs=2)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda value: value))
    for _ in range(2):
        path = Path(kept._get_metric_interpolated_filepath_name({"epoch": torch.tensor(1)}, trainer))
        assert path == tmp_path / "epoch=00002.ckpt"
        path.touch()


def test_auto_takes_a_run_that_it_can_continue_before_a_newer_one_that_it_cannot(tmp_path: Path) -> None:
    open_run(CONFIG, tmp_path, "e", run_id="a")
    trained = open_run(CONFIG, tmp_path, "e", run_id="b")
    damaged = open_run(CONFIG, tmp_path, "e", run_id="c")
    newest = open_run(CONFIG, tmp_path, "e", run_id="d")
    assert open_run(CONFIG, tmp_path, "e", resume="auto") == newest
    checkpoint(trained.directory)
    checkpoint(damaged.directory).write_bytes(b"half")
    assert open_run(CONFIG, tmp_path, "e", resume="auto").resumed_from == trained.last_checkpoint


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"class_path": "os.system", "init_args": {}}, "no subclass"),
        ({"class_path": "torch.nn.Linear", "init_args": {}}, "no subclass"),
        ({"class_path": "ssl_geometry.methods.Nothing", "init_args": {}}, "cannot be imported"),
        ({"class_path": "no_such_module.X", "init_args": {}}, "is not imported on the word of a checkpoint"),
        ({"class_path": "ssl_geometry.methods.SimCLR", "init_args": {"colour": 1}}, "does not take its options"),
        ({"class_path": "ssl_geometry.methods.SimCLR"}, "not a checkpoint of ssl_geometry"),
        ({"init_args": {}}, "not a checkpoint of ssl_geometry"),
    ],
)
def test_a_checkpoint_names_only_methods(tmp_path: Path, method: dict[str, Any], words: str) -> None:
    torch.save({"method": method, "state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=words):
        load_method(tmp_path / "x.ckpt", "--cka.reference")


def test_a_foreign_checkpoint_is_distinguished_from_ours(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of ssl_geometry"):
        load_method(tmp_path / "x.ckpt", "--cka.reference")


def test_a_checkpoint_does_not_decide_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module is imported that the config.yaml of the run names, and no other."""
    for place in ("ours", "theirs"):
        package = tmp_path / f"{place}_package"
        package.mkdir()
        (package / "__init__.py").write_text(f"from {place}_package.inner import Mine\n")
        (package / "inner.py").write_text(
            "from pathlib import Path\nfrom ssl_geometry.methods import Method\n"
            f"Path({str(tmp_path)!r}, 'ran-{place}').touch()\n\n\nclass Mine(Method):\n    pass\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    small = {"backbone": "resnet10", "width": 0.25}
    state = Method(**small).state_dict()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for place in ("ours", "theirs"):
        method = {"class_path": f"{place}_package.inner.Mine", "init_args": small}
        torch.save({"method": method, "state_dict": state}, run / "checkpoints" / f"{place}.ckpt")
    (run / "config.yaml").write_text("model: {class_path: ours_package.Mine}")

    with pytest.raises(UserError, match=r"theirs_package.inner.Mine is not imported on the word of a checkpoint"):
        load_method(run / "checkpoints" / "theirs.ckpt", "--models")
    assert not (tmp_path / "ran-theirs").exists()
    assert type(load_method(run / "checkpoints" / "ours.ckpt").method).__module__ == "ours_package.inner"
    alone = (run / "checkpoints" / "ours.ckpt").rename(tmp_path / "alone.ckpt")
    assert load_method(alone).epochs == 0, "imported already"


def test_a_run_named_by_a_path_that_ends_in_dots_has_its_folders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seed_0" / "records").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "seed_0" / "records")
    assert network_names([".."]) == {"seed_0": ".."}
    assert network_names(["."]) == {"records": "."}


def test_another_runs_damaged_facts_are_no_obstacle(tmp_path: Path) -> None:
    for name, text in {"a": '{"number": "7"}', "b": "5", "c": '{"number": 4}'}.items():
        (tmp_path / "e" / name).mkdir(parents=True)
        (tmp_path / "e" / name / "run.json").write_text(text)
    assert open_run(CONFIG, tmp_path, "e").facts["number"] == 5


@pytest.mark.parametrize("text", ["model: 5", "model: {init_args: 5}", "cka: 5", "trainer: [1]", "5"])
def test_a_run_whose_configuration_is_damaged_is_passed_over(tmp_path: Path, text: str) -> None:
    run = open_run(CONFIG, tmp_path, "e", run_id="a")
    run.release()
    (run.directory / "config.yaml").write_text(text)
    assert config_of(run.directory) is None
    assert open_run(CONFIG, tmp_path, "e", resume="auto").directory != run.directory


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"epoch": "x"}, "its epoch is damaged ('x', expected a whole number)"),
        ({"state_dict": {}}, " more.)"),
        ({"state_dict": 5}, "its weights do not fit its own description"),
    ],
)
def test_what_is_wrong_with_a_network_is_one_short_line(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    method = Method(backbone="resnet10", width=0.25)
    named = {"class_path": "ssl_geometry.methods.Method", "init_args": method.init_args}
    torch.save({"method": named, "state_dict": method.state_dict(), "epoch": 1} | other, tmp_path / "x.ckpt")
    with pytest.raises(UserError) as error:
        load_method(tmp_path / "x.ckpt", "--models")
    assert words in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_seeds_of_one_name_are_several_runs_of_one_recipe(tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {"a": {}, "b": {"seed_everything": 4}, "c": {"data": {"batch_size": 8}}}
    for name, other in options.items():
        checkpoint(tmp_path / name)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "data": {"batch_size": 4}, **other}))
    checkpoint(tmp_path / "a", "epoch=00001")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert split_seeds([f"s={a},{b}"])[1] == {"s-1": "s", "s-2": "s"}
    for again in (a, f"{a}/", f"{a}/checkpoints/epoch=00001.ckpt", str(tmp_path / "link")):
        with pytest.raises(UserError, match=f"{again} is {a} again; name each once"):
            split_seeds([f"s={a},{b},{again}"])
    with pytest.raises(UserError, match="byol and swav are of different methods; give each its own NAME"):
        split_seeds(["s=byol,swav"])
    assert split_seeds(["s=simclr-v1,simclr-v2"])[0] == {"s-1": "simclr-v1", "s-2": "simclr-v2"}
    for models in (["s-1=byol", "s=simclr-v1,simclr-v2"], ["s=simclr-v1,simclr-v2", "s-1=byol"]):
        with pytest.raises(UserError, match="two networks are named s-1; set another NAME"):
            split_seeds(models)
    with pytest.raises(UserError, match="byol is byol again"):
        split_seeds(["s=byol,byol"])
    with pytest.raises(UserError, match=f"{a} and {c} differ in more than their seed, --data.batch_size 4 and 8; give"):
        split_seeds([f"s={a},{b},{c}"])
