"""One run on disk.

``runs/<experiment>/<run-id>/`` holds ``config.yaml``, ``run.json``, ``checkpoints/last.ckpt``, ``records/``,
``figures/`` and the loggers' own folders. The first process chooses the directory; the others learn it from the
environment, or from the SLURM job that they share.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from ssl_geometry.errors import UserError, did_you_mean
from ssl_geometry.files import write_text
from ssl_geometry.records.lock import unlock
from ssl_geometry.runs.compatibility import well_formed

DIRECTORY_VARIABLE, PARENT_VARIABLE = "SSL_GEOMETRY_RUN_DIR", "SSL_GEOMETRY_PARENT"
"""Set by the first process for those that it starts: the run directory, and its own number."""


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
        """The content of ``run.json``."""
        return facts_of(self.directory)

    @rank_zero_only
    def note(self, **facts: Any) -> None:
        """Write facts about the run into ``run.json``, keeping those that are there."""
        self.write("run.json", json.dumps({**facts_of(self.directory), **facts}, indent=1) + "\n")

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


def run_of(path: Path) -> Path:
    """The directory of the run that ``--resume`` names, by itself or by a checkpoint.

    Raises:
        UserError: neither exists; with the most similar runs and checkpoints.
    """
    if not path.is_file():
        run = Run(path)
        if not run.checkpoints and not (path / "config.yaml").is_file():
            around = [path.parent.parent, path.parent, *path.parent.glob("*/")]
            runs = [str(other) for other in around if (other / "config.yaml").is_file()]
            known = [*map(str, path.parent.glob("*.ckpt")), *runs]
            raise UserError(f"--resume {path}: no run or checkpoint here; {did_you_mean(str(path), known)}")
        return path
    if path.parent.name != "checkpoints":
        raise UserError(f"--resume {path}: not inside a run directory (expected RUN/checkpoints/NAME.ckpt)")
    return path.parent.parent


def config_of(directory: Path) -> dict[str, Any] | None:
    """The configuration of a run; None where there is none, or it is damaged."""
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) and well_formed(config) else None


def facts_of(directory: Path) -> dict[str, Any]:
    """What ``run.json`` holds; nothing where it is missing or damaged."""
    try:
        facts = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
