"""Run directories: named, found again, locked, and opened by the first process."""

import getpass
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from ssl_geometry import __version__
from ssl_geometry.errors import UserError
from ssl_geometry.ranges import check_name
from ssl_geometry.records.lock import holder, lock, unlock
from ssl_geometry.runs.compatibility import differences
from ssl_geometry.runs.resuming import has_whole_checkpoint, resumed, this_job
from ssl_geometry.runs.run import (
    DIRECTORY_VARIABLE,
    PARENT_VARIABLE,
    Run,
    config_of,
    facts_of,
    is_first_process,
    run_of,
)
from ssl_geometry.runs.slurm import Task, this_task

logger = logging.getLogger(__name__)
LOCK_SECONDS, LOCK_POLL_SECONDS = 300, 5
"""How long a requeued job waits for the lock that a dead node still holds, and how often it looks."""


def open_run(
    config: Mapping[str, Any], runs: str | Path, experiment: str, run_id: str | None = None, resume: str | None = None
) -> Run:
    """The directory of this run: a new one, or with ``resume`` the one to continue.

    A resumed run first returns to its state at the checkpoint (:mod:`ssl_geometry.runs.resuming`). Checkpoints and
    records that are newer than that, because ``resume`` names an older checkpoint or the last one is missing or
    damaged, move to ``superseded/<number>/``; so do the records of a run without a checkpoint, which starts from
    scratch.

    Args:
        config: the configuration as plain data; it becomes the run's ``config.yaml``.
        runs: folder of all runs.
        experiment: folder of the runs that belong together.
        run_id: name of the run; by default the SLURM job's, or method, backbone, seed and time.
        resume: None starts from scratch; "auto" continues the run named by ``run_id`` or the SLURM job, else the newest
            unfinished run of this experiment with the same training options, and starts from scratch where there is
            none; a path continues that run or checkpoint, or starts a run again that has none.

    Returns:
        The run; its directory exists and is locked.

    Raises:
        UserError: a name that no folder can have; a directory that holds a run already; or a run that cannot be
            resumed: nothing is at the path, the checkpoint is damaged, or the options differ.
    """
    check_name(experiment, "--experiment")
    if run_id:
        check_name(run_id, "--run_id")
    task = this_task()
    named = None if resume in (None, "auto") else Path(str(resume)).resolve()
    if named:
        directory = run_of(named)
    elif not is_first_process() and DIRECTORY_VARIABLE in os.environ:
        directory = Path(os.environ[DIRECTORY_VARIABLE])
    else:
        folder = Path(runs) / experiment
        name = run_id or (task.run_id if task else None)
        if name is None and resume == "auto":
            name = _newest_unfinished(folder, config)
        if name is None and os.environ.get("WORLD_SIZE", "1") != "1" and "LOCAL_RANK" in os.environ:
            raise UserError("several processes must agree on a run directory: name it with --run_id")
        directory = folder / (name or _new_id(folder, config))
    run = Run(directory)
    if not is_first_process():
        whole = (named and named.is_file()) or (resume and run.checkpoints)
        return Run(directory, run.last_checkpoint) if whole else run
    try:
        if resume is None and any((directory / part).exists() for part in ("checkpoints", "records")):
            raise UserError(
                f"{directory} holds a run already: continue it with --resume {directory}, or choose another --run_id"
            )
        os.environ |= {DIRECTORY_VARIABLE: str(directory), PARENT_VARIABLE: str(os.getpid())}
        run = Run(directory, new=not directory.exists())
        directory.mkdir(parents=True, exist_ok=True)
        _lock_and_clean(run, task)
        if resume:
            run = resumed(run, named, config, task, run_id)
        run.write("config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        run.note(
            status="running",
            command=" ".join(sys.argv),
            number=run.facts.get("number") or 1 + max(map(_run_number, directory.parent.glob("*/run.json")), default=0),
            started=run.facts.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
            host=platform.node(),
            user=_user(),
            job=this_job(task),
            git=_git_commit(),
            versions={"ssl_geometry": __version__, "torch": torch.__version__, "lightning": L.__version__},
        )
    except OSError as error:
        raise UserError(f"cannot write to --runs {directory}: {error.strerror}") from error
    return run


def _lock_and_clean(run: Run, task: Task | None) -> None:
    """Lock the directory, and delete files that killed processes left half written."""
    patience = LOCK_SECONDS if task and task.restarts else 0
    while not lock(run.directory):
        who = holder(run.directory) or f"a process on {run.facts.get('host', 'an unknown machine')}"
        if patience <= 0:
            raise UserError(
                f"another process trains in {run.directory} ({who}): wait for it, or choose another --run_id"
            )
        if patience == LOCK_SECONDS:
            logger.info(f"{run.directory} is locked by {who}: waiting {patience} s for it to be gone")
        time.sleep(LOCK_POLL_SECONDS)
        patience -= LOCK_POLL_SECONDS
    for pattern in (".*.partial", "checkpoints/.*.partial", "records/**/.*.partial", "superseded/**/.*.partial"):
        for path in run.directory.glob(pattern):
            writer = path.name.split(".")[-2]
            if not writer.isdecimal() or int(writer) == os.getpid() or not Path(f"/proc/{writer}").exists():
                path.unlink(missing_ok=True)


def _run_number(path: Path) -> int:
    """The run's number within its experiment, in the order of starts (clocks of machines differ)."""
    number = facts_of(path.parent).get("number")
    return number if isinstance(number, int) else 0


def _newest_unfinished(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The newest unfinished run with the same options, if possible one with a whole checkpoint."""
    runs = []
    for path in folder.glob("*/run.json"):
        before = config_of(path.parent)
        if before and facts_of(path.parent).get("status") != "finished" and not differences(before, config):
            with suppress(OSError):  # another user's
                if lock(path.parent):  # else another process trains in it
                    unlock(path.parent)
                    runs.append((_run_number(path), path.parent.name))
    names = [name for _, name in sorted(runs, reverse=True)]
    return next((name for name in names if has_whole_checkpoint(Run(folder / name))), next(iter(names), None))


def _new_id(folder: Path, config: Mapping[str, Any]) -> str:
    model = config.get("model") or {}
    parts = [
        str(model.get("class_path", "run")).rpartition(".")[2].lower(),
        (model.get("init_args") or {}).get("backbone"),
        f"s{config.get('seed_everything')}",
        time.strftime("%m%d-%H%M%S"),
    ]
    name = "-".join(part for part in parts if part)
    taken = sum(1 for _ in folder.glob(f"{name}*"))
    return f"{name}-{taken + 1}" if taken else name


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name on this machine, or in this container
        return str(os.getuid())


def _git_commit() -> str | None:
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
