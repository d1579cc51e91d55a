"""What SLURM's variables mean for a run, and what is said where they do not fit."""

from pathlib import Path

import pytest
import torch

from ssl_geometry.errors import UserError
from ssl_geometry.runs.slurm import plugins_of_a_shell, requeue, this_task, trainer_options

JOB = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "fit.sbatch"}
STEP = JOB | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize(
    ("environment", "run_id"),
    [
        (STEP, "slurm-1234"),
        (STEP | {"SLURM_STEP_ID": "3"}, "slurm-1234"),
        (JOB, "slurm-1234"),
        (STEP | {"SLURM_JOB_NAME": "interactive"}, "slurm-1234"),  # salloc, then srun of several tasks
        (STEP | {"SLURM_ARRAY_JOB_ID": "1230", "SLURM_ARRAY_TASK_ID": "4"}, "slurm-1230_4"),
    ],
)
def test_a_job_names_its_run(environment: dict[str, str], run_id: str) -> None:
    task = this_task(environment)
    assert task is not None
    assert task.run_id == run_id


@pytest.mark.parametrize(
    "environment",
    [
        {},
        STEP | {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1"},
        JOB | {"SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "8"},
        STEP | {"TORCHELASTIC_RUN_ID": "x"},
        STEP | {"SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": "4294967290"},  # salloc's shell on a node
    ],
)
def test_no_task_of_a_job(environment: dict[str, str]) -> None:
    assert this_task(environment) is None


def test_the_trainer_follows_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MASTER_PORT", "MASTER_ADDR", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(variable, "")  # so that it is put back: the function sets them
        monkeypatch.delenv(variable)
    for name, value in (STEP | {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_PROCID": "3"}).items():
        monkeypatch.setenv(name, value)
    task = this_task()
    assert task is not None
    options = trainer_options(task, {"num_nodes": 1, "devices": "auto", "accelerator": "cpu"})
    assert (options["num_nodes"], options["devices"]) == (2, 2)
    (environment,) = options["plugins"]
    assert (environment.main_address, environment.main_port) == ("gpu07", task.port)
    assert (environment.world_size(), environment.global_rank()) == (4, 3)
    environment.validate_settings(num_devices=2, num_nodes=2)


def test_jobs_and_steps_that_run_at_the_same_time_meet_at_other_ports() -> None:
    tasks = [
        this_task(STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(100, 300)
        for step in range(8)
    ]
    ports = {task.port for task in tasks if task}
    assert len(ports) == len(tasks)
    assert min(ports) >= 10_000
    assert max(ports) < 32_768


@pytest.mark.parametrize(
    ("environment", "trainer", "words"),
    [
        (JOB | {"SLURM_NTASKS": "4"}, {}, "write `srun python -m ssl_geometry"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, {}, "--ntasks-per-node"),
        (STEP, {"num_nodes": 3}, "--trainer.num_nodes 3"),
        (STEP, {"devices": 8}, "--trainer.devices 8"),
    ],
)
def test_what_does_not_fit_is_reported(environment: dict[str, str], trainer: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        trainer_options(this_task(environment), trainer)  # type: ignore[arg-type]


def test_lightning_takes_no_shell_in_a_job_for_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (STEP | {"SLURM_JOB_NAME": "zsh", "SLURM_NTASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    (environment,) = plugins_of_a_shell()
    assert not environment.creates_processes_externally
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert plugins_of_a_shell() == []


@pytest.mark.parametrize(("gpus", "words"), [(1, "--gpus-per-node=2"), (8, "--ntasks-per-node=8")])
def test_tasks_and_gpus_that_do_not_match(monkeypatch: pytest.MonkeyPatch, gpus: int, words: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=words):
        trainer_options(this_task(STEP), {"accelerator": "auto"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("script", "calls", "problem"),
    [
        ("exit 0", 1, ""),
        ('[ "$(wc -l < calls)" -gt 1 ] || kill -TERM $$', 2, ""),  # srun ends the processes of the step meanwhile
        ("kill -TERM $$", 3, "scontrol requeue 1234: exit status -15"),
        ("echo no such job >&2; exit 1", 1, "scontrol requeue 1234: no such job"),
    ],
)
def test_a_requeue_that_is_struck_down_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, calls: int, problem: str
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\ncd {tmp_path}\necho "$*" >> calls\n{script}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert requeue(this_task(STEP)) == problem  # type: ignore[arg-type]
    assert (tmp_path / "calls").read_text().splitlines() == calls * ["requeue 1234"]
