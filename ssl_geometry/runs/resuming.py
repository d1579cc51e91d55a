"""Resume a run: choose the checkpoint, check that the options fit it, and set later files and records aside.

Which run ``--resume`` names is found in :mod:`ssl_geometry.runs.directory`; what fits is decided in
:mod:`ssl_geometry.runs.compatibility`. Lightning then loads the checkpoint, with the ``state_dict`` of each part.
"""

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_geometry.errors import UserError
from ssl_geometry.files import copy_whole
from ssl_geometry.records.store import RecordStore
from ssl_geometry.runs.checkpoints import read_checkpoint
from ssl_geometry.runs.compatibility import Progress, check_network, differences, progress
from ssl_geometry.runs.run import Run, config_of
from ssl_geometry.runs.slurm import Task

logger = logging.getLogger(__name__)


def resumed(run: Run, named: Path | None, config: Mapping[str, Any], task: Task | None, run_id: str | None) -> Run:
    """Bring a run directory back to its state at the checkpoint that training resumes from.

    Only the first process calls this, while it holds the lock of the directory.

    Args:
        run: the run on disk.
        named: what ``--resume`` named, a run directory or a checkpoint; None for ``auto``.
        config: the options of this start.
        task: the SLURM task of this process; None outside of SLURM.
        run_id: what ``--run_id`` named.

    Returns:
        The run with its checkpoint and step; without one where training starts from scratch.

    Raises:
        UserError: no checkpoint can be resumed from, other options, or another SLURM job's run.
    """
    last, facts, job = run.last_checkpoint, run.facts, this_job(task)
    candidates = run.checkpoints
    if named and named.is_file() and not (job and last.exists() and _is_later_start(job, facts.get("job"))):
        candidates = [named]  # a later start of a SLURM job continues from its own last checkpoint instead
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
        raise UserError(f"{error}; {_advice_for(run, candidates)}") from error
    _check_length(run, config, reached)
    _check_options(run, config)
    file, aside = run.directory / "run.json", None
    if not facts and file.exists():
        damaged = file.rename(f"{file}.damaged")
        logger.warning(f"{file} was damaged, what is left of it is now {damaged.name}: W&B will show a new run")
    if not last.exists() or not checkpoint.samefile(last):
        aside = _superseded_folder(run)
        run.note(wandb_id=None)  # a new run in W&B, which cannot forget what it has of later epochs
        if last.exists():
            copy_whole(last, aside / last.name)
        copy_whole(checkpoint, last)
    for kept in run.checkpoints[1:]:
        if kept.name > f"epoch={reached.epochs:05d}.ckpt":  # those epochs are trained again
            aside = aside or _superseded_folder(run)
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
    """Start a run that has no checkpoint from the beginning; its records move aside, its run in W&B stays as it is."""
    aside, records = _superseded_folder(run), RecordStore(run.directory / "records")
    kept = ""
    if any(records.directory.glob("**/*.parquet")):
        run.note(wandb_id=None)
        records.rollback(*Progress(epochs=-1, step=0), aside)
        kept = f"; what it has measured is now in {aside}"
    logger.info(f"--resume: no checkpoint to continue, starting from scratch in {run.directory}{kept}")
    return run


def _superseded_folder(run: Run) -> Path:
    """The next free folder for files that are superseded."""
    places = (run.directory / "superseded" / str(number) for number in itertools.count(1))
    return next(place for place in places if not place.exists())


def _advice_for(run: Run, damaged: Sequence[Path]) -> str:
    """Advice where these checkpoints cannot be resumed from: another one, or a new run."""
    for path in run.checkpoints:
        with suppress(UserError):
            if path not in damaged:
                _progress_at(run, path)
                return f"continue from a whole one with --resume {path}"
    return "the run has no other, so start it again under another --run_id"


def _check_options(run: Run, config: Mapping[str, Any]) -> None:
    """Refuse options that differ from the run's own, and report the effect of a new length."""
    before = config_of(run.directory)
    if before is None:
        raise UserError(
            f"--resume {run.directory}: its config.yaml, the options of the run, is missing or damaged: put "
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
    """Refuse a length that the run has passed already: nothing would be trained."""
    for option, done in (("max_epochs", reached.epochs), ("max_steps", reached.step)):
        asked = (config.get("trainer") or {}).get(option)
        if isinstance(asked, int) and 0 <= asked < done:
            trained = f"{done} {option.removeprefix('max_')}"
            raise UserError(
                f"--trainer.{option} {asked}: {run.directory} has trained {trained} already; set more than {done} to "
                "train on"
            )


def this_job(task: Task | None) -> dict[str, Any] | None:
    """Which start of which SLURM job this is, with cluster and folder, because job numbers are reused."""
    if task is None:
        return None
    about = {name: os.environ.get(f"SLURM_{name.upper()}") for name in ("cluster_name", "submit_host", "submit_dir")}
    return {"id": task.job, **about, "restarts": task.restarts}


def _is_later_start(job: Mapping[str, Any], noted: Mapping[str, Any] | None) -> bool:
    """Whether this is a later start of the job that ``run.json`` notes: SLURM has requeued it."""
    return (
        noted is not None and noted["restarts"] < job["restarts"] and {**noted, "restarts": 0} == {**job, "restarts": 0}
    )


def has_whole_checkpoint(run: Run) -> bool:
    """Whether training can continue from one of its checkpoints."""
    for path in run.checkpoints:
        with suppress(UserError, OSError):
            _progress_at(run, path)
            return True
    return False
