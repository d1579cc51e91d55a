"""Where curves are watched: W&B, TensorBoard, CSV. Records in Parquet are always written."""

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ssl_geometry.callbacks.records import RecordsLogger, completed_epochs
from ssl_geometry.records import wandb_files
from ssl_geometry.report.upload import TIMEOUT_SECONDS, define_axes, new_id, wandb_options
from ssl_geometry.runs import Run, is_first_process

LoggerName = Literal["wandb", "tensorboard", "csv"]


def make_loggers(names: list[LoggerName], run: Run, config: dict[str, Any], project: str) -> list[Logger]:
    """The loggers of a run; the one that writes records comes first.

    Args:
        names: which others are wanted.
        run: the run directory; every logger writes below it.
        config: the whole configuration, shown beside the run by loggers that show one.
        project: W&B project.

    Returns:
        Lightning loggers, W&B online with a key and offline without one.
    """
    loggers: list[Logger] = [RecordsLogger(run.directory)]
    for name in names:
        match name:
            case "wandb":
                loggers.append(_wandb(run, config, project))
            case "tensorboard":
                loggers.append(TensorBoardLogger(run.directory, name="tensorboard", version=""))
            case "csv":
                loggers.append(CSVLogger(run.directory, name="csv", version=""))
    return loggers


class ResumableWandbLogger(WandbLogger):
    """W&B's logger, with each point once, however often the run was killed.

    Killed, W&B loses what it has not written yet; resumed, the steps since the checkpoint are run and logged a second
    time. So numbers are noted in a journal before W&B gets them. What the journal has is not sent again, and what W&B's
    offline files lack of it is sent when the run goes on.

    Args:
        run_dir: directory of the run.
        kwargs: of Lightning's logger.
    """

    def __init__(self, run_dir: Path, **kwargs: Any) -> None:
        super().__init__(save_dir=run_dir, **kwargs)
        self._journal = run_dir / "wandb" / f"{kwargs['id']}.jsonl"
        self._known: set[tuple[str, int]] = set()
        self._lost: list[tuple[int, dict[str, float]]] = []
        self._defined: set[str] = set()
        if not is_first_process() or not self._journal.exists():
            return
        noted = []
        for line in self._journal.read_text().splitlines():
            with suppress(ValueError):  # empty, or cut short when the disk was full
                noted.append(json.loads(line))
        self._known = {(name, row["step"]) for row in noted for name in row if name not in ("step", "epoch")}
        written = {(name, step) for name, step, _ in wandb_files.points(run_dir, kwargs["id"])}
        self._known |= {(name.rpartition("/")[0], step) for name, step in written if name.endswith("/_type")}
        if kwargs["offline"]:
            for row in noted:
                lost = {
                    name: value for name, value in row.items() if name != "step" and (name, row["step"]) not in written
                }
                if lost.keys() - {"epoch"}:
                    self._lost.append((row["step"], lost))

    def complete(self) -> None:
        """Send what W&B lost when the run was killed."""
        for step, row in self._lost:
            self._send(row, step)
        self._lost = []

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers of Lightning: their epoch becomes that of the records."""
        epochs = [completed_epochs(name, metrics) for name in metrics if name != "epoch"]
        if "epoch" in metrics and epochs:
            metrics = {**metrics, "epoch": float(min(epochs))}
        self.log_moment(metrics, step)

    @rank_zero_only
    def log_moment(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Numbers and pictures with their epoch, completed ones counted: what has not been sent of this step."""
        if step is None:
            super().log_metrics(metrics, step)
            return
        new = {name: value for name, value in metrics.items() if name != "epoch" and (name, step) not in self._known}
        if not new:
            return
        self._known |= {(name, step) for name in new}
        epoch = {"epoch": metrics["epoch"]} if "epoch" in metrics else {}
        numbers = {name: float(value) for name, value in new.items() if isinstance(value, int | float)}
        if numbers:
            self._journal.parent.mkdir(parents=True, exist_ok=True)
            with self._journal.open("a") as file:
                file.write("\n" + json.dumps({"step": step, **epoch, **numbers}))
        self._send(new | epoch, step)

    def _send(self, row: Mapping[str, Any], step: int) -> None:
        first = [name for name in row if name not in self._defined and name != "epoch"]
        if first:
            define_axes(self.experiment, first)
            self._defined.update(first)
        super().log_metrics(row, step)


def _wandb(run: Run, config: dict[str, Any], project: str) -> ResumableWandbLogger:
    """A W&B run that is the run directory's own, found again on resume; it never asks and never stops training."""
    identity = run.facts.get("wandb_id")
    wound_back = run.resumed_from not in (None, run.last_checkpoint)
    if identity is None or wound_back:  # W&B keeps what it has of the run beyond an older checkpoint
        identity = new_id(run.directory)
        run.note(wandb_id=identity)
    facts = {**run.facts, "wandb_id": identity}
    common = {"run_dir": run.directory, **wandb_options(run.directory, config, facts, project)}
    os.environ.setdefault("WANDB_SILENT", "true")  # what it would print is said here, or stands in run.json
    settings = wandb.Settings(init_timeout=TIMEOUT_SECONDS)
    if not is_first_process():
        return ResumableWandbLogger(**common, offline=True, settings=settings)
    try:
        logger = ResumableWandbLogger(**common, offline=not wandb.login(prompt=False), settings=settings)
        logger.experiment  # noqa: B018 starts the run
    except Exception as error:  # neither a missing key nor a server that is away may stop training
        logging.getLogger(__name__).info(f"W&B: logging offline ({str(error).splitlines()[0]})")
        wandb.teardown()
        logger = ResumableWandbLogger(**common, offline=True, settings=settings)
    logger.complete()
    return logger
