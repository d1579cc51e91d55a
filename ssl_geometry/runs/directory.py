"""Run directories: made, found again, and continued.

``runs/<experiment>/<run-id>/`` holds ``config.yaml``, ``run.json``, ``checkpoints/last.ckpt``, ``records/``,
``figures/`` and the loggers' own folders. The first process chooses the directory; the others learn it from the
environment, or from the SLURM job that they share.
"""

import getpass
import itertools
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from ssl_geometry import __version__
from ssl_geometry.errors import UserError, nearest
from ssl_geometry.files import copy_whole, write_text
from ssl_geometry.ranges import check_name
from ssl_geometry.records.lock import holder, lock, unlock
from ssl_geometry.records.store import RecordStore
from ssl_geometry.runs.checkpoints import read_checkpoint
from ssl_geometry.runs.resume import Progress, check_network, differences, progress, well_formed
from ssl_geometry.runs.slurm import Task, this_task

logger = logging.getLogger(__name__)
DIRECTORY_VARIABLE, PARENT_VARIABLE = "SSL_GEOMETRY_RUN_DIR", "SSL_GEOMETRY_PARENT"
"""Set by the first process for those that it starts: the run directory, and its own number."""
LOCK_SECONDS, LOCK_POLL_SECONDS = 300, 5
"""How long a requeued job waits for the lock that a dead node still holds, and how often it looks."""


@dataclass(frozen=True)
class Run:
    """One run on disk.

    Args:
        directory: ``runs/<experiment>/<run-id>``.
        resumed_from: the checkpoint that training continues from, if any.
        resumed_step: its completed optimiser steps, where this is the first process.
        new: whether this start made the directory.
    """

    directory: Path
    resumed_from: Path | None = None
    resumed_step: int | None = field(default=None, compare=False)
    new: bool = field(default=False, compare=False)

    @property
    def last_checkpoint(self) -> Path:
        """Where the newest checkpoint is, or will be."""
        return self.directory / "checkpoints" / "last.ckpt"

    @property
    def checkpoints(self) -> list[Path]:
        """Those that training can continue from, the newest first, by their names: the last one, and kept ones."""
        kept = sorted(self.last_checkpoint.parent.glob("epoch=*.ckpt"), reverse=True)
        return [*([self.last_checkpoint] if self.last_checkpoint.exists() else []), *kept]

    @property
    def facts(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        return _facts(self.directory)

    @rank_zero_only
    def note(self, **facts: Any) -> None:
        """Write facts about the run into ``run.json``, keeping those that are there."""
        self.write("run.json", json.dumps({**_facts(self.directory), **facts}, indent=1) + "\n")

    @rank_zero_only
    def write(self, name: str, text: str) -> None:
        """Write a file of the run, whole or not at all."""
        write_text(self.directory / name, text)

    @rank_zero_only
    def discard(self) -> None:
        """Remove the directory of a start that failed; one that was there before, or holds anything measured, stays."""
        if self.new and not self.checkpoints and not any(self.directory.glob("records/**/*.parquet")):
            shutil.rmtree(self.directory, ignore_errors=True)

    def release(self) -> None:
        """Let other processes continue this run; those that this one starts later are no part of it."""
        if unlock(self.directory):
            for variable in (DIRECTORY_VARIABLE, PARENT_VARIABLE):
                os.environ.pop(variable, None)


def is_first_process() -> bool:
    """Whether this process is the one that writes: decided from the environment, before a process group exists."""
    return getattr(rank_zero_only, "rank", 0) == 0


def open_run(
    config: Mapping[str, Any], runs: str | Path, experiment: str, run_id: str | None = None, resume: str | None = None
) -> Run:
    """The directory of this run: a new one, or with ``resume`` the one to continue.

    Continued, the run is first made to be as it was when its checkpoint was written. Where that is an older one than
    the last, because it was named or the last is missing or damaged, what came later, checkpoints and records, is kept
    in ``superseded/<number>/``; so are the records of a run that has no checkpoint and starts from scratch.

    Args:
        config: the configuration as plain data; it becomes the run's ``config.yaml``.
        runs: folder of all runs.
        experiment: folder of the runs that belong together.
        run_id: name of the run; by default the SLURM job's, or method, backbone, seed and time.
        resume: None starts from scratch; "auto" continues the run named by ``run_id`` or the SLURM job, else the newest
            unfinished run of this experiment with the same training options, and starts from scratch where there is
            none; a path continues that run or checkpoint, or starts a run again that has none.

    Returns:
        The run, its directory made.

    Raises:
        UserError: a name that is no folder's; the directory holds a run already; or a run cannot be continued, because
            there is nothing to resume at the path, its checkpoint is damaged, or its options were others.
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
        _take(run, task)
        if resume:
            run = _continued(run, named, config, task, run_id)
        run.write("config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        run.note(
            status="running",
            command=" ".join(sys.argv),
            number=run.facts.get("number") or 1 + max(map(_number, directory.parent.glob("*/run.json")), default=0),
            started=run.facts.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
            host=platform.node(),
            user=_user(),
            job=_job(task),
            git=_git_commit(),
            versions={"ssl_geometry": __version__, "torch": torch.__version__, "lightning": L.__version__},
        )
    except OSError as error:
        raise UserError(f"cannot write to --runs {directory}: {error.strerror}") from error
    return run


def run_of(path: Path) -> Path:
    """The directory of the run that ``--resume`` names, by itself or by a checkpoint.

    Raises:
        UserError: neither is there; with the runs and checkpoints that are most alike.
    """
    if not path.is_file():
        run = Run(path)
        if not run.checkpoints and not (path / "config.yaml").is_file():
            around = [path.parent.parent, path.parent, *path.parent.glob("*/")]
            runs = [str(other) for other in around if (other / "config.yaml").is_file()]
            known = [*map(str, path.parent.glob("*.ckpt")), *runs]
            raise UserError(f"--resume {path}: no run or checkpoint here; {nearest(str(path), known)}")
        return path
    if path.parent.name != "checkpoints":
        raise UserError(f"--resume {path}: not inside a run directory (expected RUN/checkpoints/NAME.ckpt)")
    return path.parent.parent


def _take(run: Run, task: Task | None) -> None:
    """Lock the directory, and clear away what killed processes left half written."""
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


def _continued(run: Run, named: Path | None, config: Mapping[str, Any], task: Task | None, run_id: str | None) -> Run:
    """Bring a run back to the checkpoint that it goes on from; the first process does so, and holds the lock."""
    last, facts, job = run.last_checkpoint, run.facts, _job(task)
    candidates = run.checkpoints
    if named and named.is_file() and not (job and last.exists() and _is_later_start(job, facts.get("job"))):
        candidates = [named]  # else it was for the first start
    if not candidates:
        return _from_scratch(run)
    if job and not named and not run_id and not _is_later_start(job, facts.get("job", job | {"restarts": 0})):
        raise UserError(
            f"{run.directory} holds a run already, and not one of an earlier start of this very job: name this run "
            f"with --run_id, or continue that one with --resume {run.directory}"
        )
    try:
        checkpoint, reached = _newest_whole(run, candidates)
    except UserError as error:
        raise UserError(f"{error}; {_instead_of(run, candidates)}") from error
    _check_length(run, config, reached)
    _check_options(run, config)
    file, aside = run.directory / "run.json", None
    if not facts and file.exists():
        damaged = file.rename(f"{file}.damaged")
        logger.warning(f"{file} was damaged, what is left of it is now {damaged.name}: W&B will show a new run")
    if not last.exists() or not checkpoint.samefile(last):
        aside = _free_place(run)
        run.note(wandb_id=None)  # before: what W&B has of the run beyond this checkpoint, it keeps
        if last.exists():
            copy_whole(last, aside / last.name)
        copy_whole(checkpoint, last)
    for kept in run.checkpoints[1:]:
        if kept.name > f"epoch={reached.epochs:05d}.ckpt":  # those epochs are trained again
            aside = aside or _free_place(run)
            aside.mkdir(parents=True, exist_ok=True)
            kept.rename(aside / kept.name)
    RecordStore(run.directory / "records").rollback(*reached, aside)
    later = f"; what came later is now in {aside}" if aside and aside.exists() else ""
    logger.info(f"continuing from {checkpoint}{later}")
    return Run(run.directory, last, reached.step)


def _newest_whole(run: Run, candidates: Sequence[Path]) -> tuple[Path, Progress]:
    """The first checkpoint, of those given from the newest on, that training can continue from; and how far it came."""
    mistakes: list[UserError] = []
    for path in candidates:
        try:
            reached = _progress_at(run, path)
        except UserError as error:
            mistakes.append(error)
            continue
        for mistake in mistakes:
            logger.warning(str(mistake))
        return path, reached
    raise mistakes[0]


def _progress_at(run: Run, path: Path) -> Progress:
    """How far a run had come at a checkpoint; raises where training cannot continue from it."""
    checkpoint = read_checkpoint(path, "--resume", mmap=True)
    reached = progress(checkpoint, path)
    check_network(checkpoint, config_of(run.directory) or {}, path)
    return reached


def _from_scratch(run: Run) -> Run:
    """Start a run that has no checkpoint from the beginning; what it has measured is kept, and its run in W&B."""
    aside, records = _free_place(run), RecordStore(run.directory / "records")
    kept = ""
    if any(records.directory.glob("**/*.parquet")):
        run.note(wandb_id=None)
        records.rollback(*Progress(epochs=-1, step=0), aside)
        kept = f"; what it has measured is now in {aside}"
    logger.info(f"--resume: no checkpoint to continue, starting from scratch in {run.directory}{kept}")
    return run


def _free_place(run: Run) -> Path:
    """Where to put what a run is about to leave behind."""
    places = (run.directory / "superseded" / str(number) for number in itertools.count(1))
    return next(place for place in places if not place.exists())


def _instead_of(run: Run, damaged: Sequence[Path]) -> str:
    """What to do about checkpoints that cannot be continued."""
    for path in run.checkpoints:
        with suppress(UserError):
            if path not in damaged:
                _progress_at(run, path)
                return f"continue from a whole one with --resume {path}"
    return "the run has no other, so start it again under another --run_id"


def _check_options(run: Run, config: Mapping[str, Any]) -> None:
    """Refuse to go on with other options than the run's own, and say what a new length means."""
    before = config_of(run.directory)
    if before is None:
        raise UserError(
            f"--resume {run.directory}: its config.yaml, which says how it was trained, is missing or damaged: put "
            "it back, or start a new run"
        )
    if other := differences(before, config):
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(
            f"--resume {run.directory}: it was trained with other options, {', '.join(other[:3])}{more}: leave them as "
            "they were, or start a new run with another --run_id and without --resume"
        )
    for option in ("max_epochs", "max_steps"):
        old, new = ((which.get("trainer") or {}).get(option) for which in (before, config))
        if old != new:
            logger.info(f"--trainer.{option} was {old} and is {new}: the learning rate now follows that schedule")


def _check_length(run: Run, config: Mapping[str, Any], reached: Progress) -> None:
    """Refuse a length that the run is beyond: nothing would be trained."""
    for option, done in (("max_epochs", reached.epochs), ("max_steps", reached.step)):
        asked = (config.get("trainer") or {}).get(option)
        if isinstance(asked, int) and 0 <= asked < done:
            trained = f"{done} {option.removeprefix('max_')}"
            raise UserError(
                f"--trainer.{option} {asked}: {run.directory} has trained {trained} already; set more than {done} to "
                "train on"
            )


def config_of(directory: Path) -> dict[str, Any] | None:
    """The configuration of a run; None where there is none, or it is damaged."""
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) and well_formed(config) else None


def _facts(directory: Path) -> dict[str, Any]:
    try:
        facts = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _number(path: Path) -> int:
    """Which run of its experiment it is, in the order of their starts: clocks differ, and are set."""
    number = _facts(path.parent).get("number")
    return number if isinstance(number, int) else 0


def _job(task: Task | None) -> dict[str, Any] | None:
    """Which start of which SLURM job this is; numbers are given away again, so that they alone do not tell."""
    if task is None:
        return None
    about = {name: os.environ.get(f"SLURM_{name.upper()}") for name in ("cluster_name", "submit_host", "submit_dir")}
    return {"id": task.job, **about, "restarts": task.restarts}


def _is_later_start(job: Mapping[str, Any], noted: Mapping[str, Any] | None) -> bool:
    """Whether SLURM has put the job that is noted in the run back into the queue, and this is the same one."""
    return (
        noted is not None and noted["restarts"] < job["restarts"] and {**noted, "restarts": 0} == {**job, "restarts": 0}
    )


def _newest_unfinished(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The newest that can be continued; where none can, the newest that there is."""
    runs = []
    for path in folder.glob("*/run.json"):
        before = config_of(path.parent)
        if before and _facts(path.parent).get("status") != "finished" and not differences(before, config):
            with suppress(OSError):  # someone else's
                if lock(path.parent):  # else another process is at it
                    unlock(path.parent)
                    runs.append((_number(path), path.parent.name))
    names = [name for _, name in sorted(runs, reverse=True)]
    return next((name for name in names if _has_whole_checkpoint(Run(folder / name))), next(iter(names), None))


def _has_whole_checkpoint(run: Run) -> bool:
    for path in run.checkpoints:
        with suppress(UserError, OSError):
            _progress_at(run, path)
            return True
    return False


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
    except (KeyError, OSError):  # a number that this machine, or container, has no name for
        return str(os.getuid())


def _git_commit() -> str | None:
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
