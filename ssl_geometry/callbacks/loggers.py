"""Where curves are watched: W&B, TensorBoard, CSV. Records in Parquet are always written."""

import logging
import os
import uuid
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from ssl_geometry.callbacks.records import RecordsLogger
from ssl_geometry.runs import Run, is_first_process

LoggerName = Literal["wandb", "tensorboard", "csv"]
WANDB_TIMEOUT_SECONDS = 30


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


def _wandb(run: Run, config: dict[str, Any], project: str) -> WandbLogger:
    """A W&B run that is the run directory's own, found again on resume; it never asks and never stops training."""
    identity = run.facts.get("wandb_id") or f"{run.directory.name}-{uuid.uuid4().hex[:8]}"
    run.note(wandb_id=identity)
    common: dict[str, Any] = {
        "project": project,
        "name": run.directory.name,
        "id": identity,
        "group": run.directory.parent.name,
        "save_dir": run.directory,
        "config": config,
        "resume": "allow",
    }
    os.environ.setdefault("WANDB_SILENT", "true")  # what it would print is said here, or stands in run.json
    settings = wandb.Settings(init_timeout=WANDB_TIMEOUT_SECONDS)
    if not is_first_process():
        return WandbLogger(**common, settings=settings)
    try:
        logger = WandbLogger(**common, offline=not wandb.login(prompt=False), settings=settings)
        experiment = logger.experiment
    except Exception as error:  # neither a missing key nor a server that is away may stop training
        logging.getLogger(__name__).info(f"W&B: logging offline ({str(error).splitlines()[0]})")
        wandb.teardown()
        logger = WandbLogger(**common, offline=True, settings=settings)
        experiment = logger.experiment
    experiment.define_metric("epoch", hidden=True)
    for section in ("cka", "invariance", "class_cka", "probes", "neighbors", "spectrum", "val", "test"):
        experiment.define_metric(f"{section}/*", step_metric="epoch")
    return logger
