"""Run directories, checkpoints that are whole or absent, and networks read back from them.

``runs/<experiment>/<run-id>/`` holds ``config.yaml``, ``run.json``, ``checkpoints/last.ckpt``, ``records/``,
``figures/`` and the loggers' own folders. The first process chooses the directory; the others learn it from the
environment, or from the SLURM job that they share.
"""

import getpass
import importlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from ssl_geometry import __version__
from ssl_geometry.errors import UserError, nearest
from ssl_geometry.methods import Method
from ssl_geometry.methods.published import from_timm, from_torchvision, from_zoo, untrained
from ssl_geometry.models.zoo import TABLE
from ssl_geometry.models.zoo.load import why_unreadable
from ssl_geometry.ranges import Seed, check_name, check_value
from ssl_geometry.records.lock import holder, lock, unlock
from ssl_geometry.records.store import RecordStore, copy_whole, write_whole
from ssl_geometry.resume import Progress, check_network, differences, progress, unlike, well_formed
from ssl_geometry.slurm import Task, this_task

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
        write_whole(self.directory / name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

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
    in ``superseded/<number>/``; so are the records of a run that has no checkpoint and starts anew.

    Args:
        config: the configuration as plain data; it becomes the run's ``config.yaml``.
        runs: folder of all runs.
        experiment: folder of the runs that belong together.
        run_id: name of the run; by default the SLURM job's, or method, backbone, seed and time.
        resume: None starts anew; "auto" continues the run named by ``run_id`` or the SLURM job, else the newest
            unfinished run of this experiment with the same training options, and starts anew where there is none; a
            path continues that run or checkpoint, or starts a run again that has none.

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
        return _anew(run)
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
    RecordStore(run.directory / "records").wind_back(*reached, aside)
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


def _anew(run: Run) -> Run:
    """Start a run that has no checkpoint from the beginning; what it has measured is kept, and its run in W&B."""
    aside, records = _free_place(run), RecordStore(run.directory / "records")
    kept = ""
    if any(records.directory.glob("**/*.parquet")):
        run.note(wandb_id=None)
        records.wind_back(*Progress(epochs=-1, step=0), aside)
        kept = f"; what it has measured is now in {aside}"
    logger.info(f"--resume: no checkpoint to continue, starting anew in {run.directory}{kept}")
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


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints are written beside their place and renamed into it: whole, or the one before stays."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the whole checkpoint, or leave what was there.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        path = Path(path)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)

        try:
            write_whole(path, write)
        except (OSError, RuntimeError) as error:
            fault = _disk_fault(error)
            reason = fault.strerror if fault else str(error).splitlines()[0]
            kept = f"the checkpoint before it is whole ({path})" if path.exists() else "there is no earlier checkpoint"
            raise UserError(
                f"could not save {path}: {reason}; {kept}. Free space and continue with --resume {path.parent.parent}"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain data; code in a file never runs."""
        return read_checkpoint(path, "--resume", map_location or "cpu")


def _disk_fault(error: BaseException | None) -> OSError | None:
    """What the system said, where torch says that it found itself at another place in the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def read_checkpoint(
    path: str | Path, option: str, map_location: Any = "cpu", mmap: bool | None = None
) -> dict[str, Any]:
    """Read a checkpoint as data, each part held against the checksum that was written with it.

    Args:
        path: the file.
        option: the option that named it, for the error message.
        map_location: where tensors go.
        mmap: leave tensors on the disk until they are used.

    Returns:
        What the file holds: tensors and plain Python data.

    Raises:
        UserError: no such file, or a file that is cut short or altered, no checkpoint, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    damaged, is_archive = None, zipfile.is_zipfile(path)
    try:
        if is_archive:  # as torch writes it; it does not look at the checksums when it reads
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
                if damaged:
                    raise ValueError(damaged)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and is_archive)
    except Exception as error:
        reason = f"its part {damaged} is not what was written" if damaged else why_unreadable(path, error)
        raise UserError(f"{option} {path}: not a whole, plain checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{option} {path}: expected a dictionary, found {type(checkpoint).__name__}")
    return checkpoint


class Loaded(NamedTuple):
    """A network read back."""

    name: str
    """The run's id, or the name of a file that is in no run."""
    method: Method
    """On the CPU, weights loaded."""
    epochs: int
    """Completed epochs."""


def load_method(path: str | Path, option: str = "path") -> Loaded:
    """A trained network from a run directory or a checkpoint.

    Args:
        path: a run directory (its last checkpoint is read) or a checkpoint file.
        option: the option that named it, for the error message.

    Returns:
        Its name, the method, and its completed epochs.

    Raises:
        UserError: nothing there, not a checkpoint of this framework, or a method that is neither this package's, nor
            imported already, nor the model of the run's config.yaml.
    """
    path = Path(path)
    file = Run(path).last_checkpoint if path.is_dir() else path
    name = file.parent.parent.name if file.parent.name == "checkpoints" else file.stem
    checkpoint = read_checkpoint(file, option)
    method = checkpoint.get("method")
    kinds = {"class_path": str, "init_args": dict}
    if not isinstance(method, dict) or not all(isinstance(method.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{option} {path}: not a checkpoint of ssl_geometry (it does not say which method it holds)")
    cls = _method_class(method["class_path"], file.parent.parent, f"{option} {path}")
    try:
        network = cls(**method["init_args"])
    except TypeError as error:
        raise UserError(f"{option} {path}: {cls.__name__} here does not take its options ({error})") from error
    try:
        network.load_state_dict(checkpoint["state_dict"])
    except (KeyError, RuntimeError, TypeError) as error:
        reason = _shortened(str(error).strip().splitlines()[-1].strip())
        raise UserError(f"{option} {path}: its weights do not fit its own description ({reason})") from error
    epoch = checkpoint.get("epoch", -1)
    if not isinstance(epoch, int):
        raise UserError(f"{option} {path}: its epoch is damaged ({str(epoch)[:60]!r}, expected a whole number)")
    return Loaded(name, network, epoch + 1)


def _shortened(reason: str) -> str:
    """What torch says of weights, with the first three names of the parameters that it lists.

    Example:
        >>> _shortened('Missing key(s) in state_dict: "a", "b", "c", "d", "e". ')
        'Missing key(s) in state_dict: "a", "b", "c" and 2 more.'
    """
    names = re.findall(r'"[^"]*"', reason)
    if len(names) <= 3:
        return reason
    return f"{reason.partition(names[0])[0]}{', '.join(names[:3])} and {len(names) - 3} more."


def _method_class(class_path: str, directory: Path, source: str) -> type[Method]:
    """The class that a checkpoint names; a checkpoint is data, and does not decide what is imported.

    Args:
        class_path: as the checkpoint has it.
        directory: of its run, if it is in one.
        source: of the checkpoint, for the error message.
    """
    module = class_path.rpartition(".")[0]
    imported = class_path
    if not module.startswith("ssl_geometry.") and module not in sys.modules:
        imported = str(((config_of(directory) or {}).get("model") or {}).get("class_path"))
        if imported.partition(".")[0] != class_path.partition(".")[0]:
            raise UserError(
                f"{source}: its method {class_path} is not imported on the word of a checkpoint: name the run "
                "directory whose config.yaml has it as its model, or in Python import it first"
            )
    try:
        cls = getattr(importlib.import_module(imported.rpartition(".")[0]), imported.rpartition(".")[2])
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{source}: its method {imported} cannot be imported; put its file on PYTHONPATH") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise UserError(f"{source}: {imported} is no subclass of ssl_geometry.methods.Method")
    if imported != class_path and f"{cls.__module__}.{cls.__qualname__}" != class_path:
        raise UserError(f"{source}: holds the method {class_path}, but the config.yaml of its run says {imported}")
    return cls


def network_names(models: Sequence[str]) -> dict[str, str]:
    """The name of each network that ``--models`` asks for, and where it comes from.

    Args:
        models: ``NAME=SPEC``, or a bare ``SPEC``, of which the name is made: a published checkpoint's or an
            architecture's, a run's, or a file's.

    Returns:
        Name to specification.

    Raises:
        UserError: nothing where a name or a specification is expected, a name that is no folder's, or a name twice.

    Example:
        >>> network_names(["mine=runs/cifar10/simclr", "byol", "runs/cifar10/supervised", "random:resnet18@32:1"])
        {'mine': 'runs/cifar10/simclr', 'byol': 'byol', 'supervised': 'runs/cifar10/supervised',
         'random-resnet18-32-1': 'random:resnet18@32:1'}
    """
    named: dict[str, str] = {}
    for model in models:
        name, equals, spec = model.partition("=")
        if not equals or "/" in name:  # a path may hold the sign
            spec, name = model, _name_of(model)
        elif name:  # files and folders are named after it
            check_name(name, "--models")
        if not name or not spec or name in named:
            raise UserError(
                f"--models {' '.join(models)}: expected NAME=PATH, each name once, such as simclr=runs/x/simclr"
            )
        named[name] = spec
    return named


def split_seeds(models: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """``NAME=RUN,RUN`` as one network per run: seeds of one recipe.

    Args:
        models: as of :func:`network_names`, a specification or several with commas between them.

    Returns:
        ``NAME=SPEC`` for each network, and for each the name that was given.

    Raises:
        UserError: as of :func:`network_names`; a network twice under a name, or runs that differ beyond their seed.

    Example:
        >>> split_seeds(["simclr=runs/a,runs/b", "byol"])
        (['simclr-1=runs/a', 'simclr-2=runs/b', 'byol=byol'],
         {'simclr-1': 'simclr', 'simclr-2': 'simclr', 'byol': 'byol'})
    """
    named, given = [], {}
    for name, specs in network_names(models).items():
        several = specs.split(",")
        _check_seeds(name, several)
        for number, spec in enumerate(several, 1):
            seed = f"{name}-{number}" if len(several) > 1 else name
            named.append(f"{seed}={spec}")
            given[seed] = name
    return named, given


def _check_seeds(name: str, specs: Sequence[str]) -> None:
    """Refuse what is not several runs of one recipe."""
    published = {TABLE[kind].recipe: spec for spec in specs if (kind := spec.partition(":")[0]) in TABLE}
    if len(published) > 1:
        raise UserError(
            f"--models {name}={','.join(specs)}: {' and '.join(published.values())} are of different methods; give "
            "each its own NAME"
        )
    seen: dict[Path | str, str] = {}
    first: tuple[str, dict[str, Any]] | None = None
    for spec in specs:
        path = Path(spec)
        of_run = path.parent.parent if path.is_file() and path.parent.name == "checkpoints" else path
        what = of_run.resolve() if path.exists() else spec
        if what in seen:
            raise UserError(f"--models {name}={','.join(specs)}: {spec} is {seen[what]} again; name each once")
        seen[what] = spec
        config = config_of(of_run)
        if config is None:
            continue
        first = first or (spec, config)
        if other := unlike(first[1], config):
            more = f" and {len(other) - 3} more" if len(other) > 3 else ""
            raise UserError(
                f"--models {name}={','.join(specs)}: {first[0]} and {spec} differ in more than their seed, "
                f"{', '.join(other[:3])}{more}; give each its own NAME"
            )


def _name_of(spec: str) -> str:
    kind, _, rest = spec.partition(":")
    if kind in ("torchvision", "timm"):
        return rest
    if kind == "random":
        return re.sub(r"[:@]", "-", spec)
    if kind in TABLE:
        return kind
    path = Path(spec.partition(",")[0])
    if path.name in ("", ".."):
        path = path.resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem if path.is_file() else path.name


def load_networks(models: Sequence[str]) -> dict[str, tuple[Method, int | None]]:
    """The networks that ``--models`` names.

    Args:
        models: ``NAME=SPEC`` or ``SPEC``. SPEC is a run or a checkpoint; the name of a published checkpoint (``byol``),
            or ``byol:FILE`` where its file was downloaded by hand; ``torchvision:NAME`` or ``timm:NAME``; ``random``
            or ``random:SEED``, an untrained twin of the first network; or ``random:ARCH``, an untrained network, with
            ``@PIXELS`` and ``:SEED`` or without.

    Returns:
        Name to network, and its completed epochs, 0 where they are not known; None marks an untrained network.

    Raises:
        UserError: a specification that means nothing, a name twice, a path that holds no network, a download or a
            published file that is not what it should be, or one network under two names.
    """
    named = network_names(models)
    loaded = {name: _load(spec) for name, spec in named.items() if not _is_twin(spec)}
    if not loaded:
        raise UserError(
            "--models: at least one run or checkpoint; an untrained network takes its architecture from the first (or "
            "name one: random:resnet50)"
        )
    first = next(iter(loaded.values()))[0]
    networks: dict[str, tuple[Method, int | None]] = {}
    for name, spec in named.items():
        if name in loaded:
            networks[name] = loaded[name]
        else:
            seed = int(spec.partition(":")[2] or "0")
            check_value(Seed, seed, "--models random:SEED")
            torch.manual_seed(seed)
            networks[name] = type(first)(**first.init_args), None
    for (one, (a, _)), (other, (b, _)) in itertools.combinations(networks.items(), 2):
        if _same_weights(a, b):
            raise UserError(
                f"--models {one}={named[one]} {other}={named[other]}: one network, its weights are equal; name it "
                "once, or it counts as two seeds"
            )
    return networks


def _same_weights(a: Method, b: Method) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def _is_twin(spec: str) -> bool:
    return re.fullmatch(r"random(:-?\d+)?", spec) is not None


def _load(spec: str) -> tuple[Method, int | None]:
    kind, colon, rest = spec.partition(":")
    if kind == "random":
        return untrained(rest), None
    if kind == "torchvision":
        return from_torchvision(rest), 0
    if kind == "timm":
        return from_timm(rest), 0
    if kind in TABLE:
        return from_zoo(kind, Path(rest) if colon else None), TABLE[kind].epochs or 0
    if "/" in spec or Path(spec).exists():
        network = load_method(spec, "--models")
        return network.method, network.epochs
    raise UserError(
        f"--models {spec}: no such run or checkpoint, and no published one; {nearest(kind, TABLE)} (--help tells what "
        "stands for SPEC in NAME=SPEC, where a run is NAME=PATH)"
    )
