"""Where curves are watched: W&B, TensorBoard, CSV. Records in Parquet are always written."""

import csv
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from ssl_geometry.callbacks.records import RecordsLogger
from ssl_geometry.errors import first_line
from ssl_geometry.report.live import under_way
from ssl_geometry.report.upload import (
    TIMEOUT_SECONDS,
    LoggedRow,
    Sender,
    end_wandb,
    new_id,
    send_records,
    wandb_options,
)
from ssl_geometry.runs.run import Run, is_first_process

FINISH_SECONDS = 20
LOGGER = logging.getLogger(__name__)
LoggerName = Literal["wandb", "tensorboard", "csv"]


def make_loggers(names: list[LoggerName], run: Run, config: dict[str, Any], project: str) -> list[Logger]:
    """The loggers of a run; the one that writes records comes first.

    Args:
        names: which others are wanted.
        run: the run directory; every logger writes below it.
        config: the whole configuration, shown next to the run by loggers that show one.
        project: W&B project.

    Returns:
        Lightning loggers, W&B online with a key and offline without one, and not at all with WANDB_MODE=disabled.
    """
    loggers: list[Logger] = [RecordsLogger(run.directory)]
    for name in names:
        match name:
            case "wandb" if os.environ.get("WANDB_MODE") == "disabled":
                LOGGER.info("W&B: nothing is logged (WANDB_MODE=disabled)")
            case "wandb":
                loggers.append(_wandb(run, config, project))
            case "tensorboard":
                purge = None if run.resumed_step is None else run.resumed_step + 1  # measurements of that step stay
                loggers.append(TensorBoardLogger(run.directory, name="tensorboard", version="", purge_step=purge))
            case "csv":
                loggers.append(_csv(run))
    return loggers


class ResumableWandbLogger(WandbLogger):
    """W&B's logger, with each number once, however often the run was killed; W&B's failures never reach training.

    Args:
        run_dir: directory of the run.
        experiment: W&B's run; None in processes that do not log, and where W&B could not be started.
    """

    def __init__(self, run_dir: Path, experiment: Any = None) -> None:
        super().__init__(save_dir=run_dir, experiment=experiment)
        self._run_dir = run_dir
        self._given_up = experiment is None
        self._carefully(self._begin)

    def _begin(self) -> None:
        """Send what W&B lacks from before; offline it knows of nothing, and each start has a folder of its own."""
        self._sender = Sender(self.experiment)
        if not self.experiment.offline:
            send_records(self._sender, self._run_dir, _announced)

    @property
    def experiment(self) -> Any:
        """W&B's run; something that takes all and does nothing where there is none, as Lightning would start one."""
        return DummyLogger().experiment if self._experiment is None else self._experiment

    @property
    def alive(self) -> bool:
        """Whether W&B still takes numbers and figures."""
        return not self._given_up

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers and figures with their epoch, counted as Lightning does."""
        self._carefully(self._add, metrics, step)

    def _add(self, metrics: Mapping[str, Any], step: int | None) -> None:
        import wandb  # a third of a second, where it was not started

        epoch = metrics.get("epoch")
        for name, value in metrics.items():
            if name != "epoch":
                ahead = under_way(name)
                started = ahead and (epoch is None or epoch >= 0)  # -1: the initialisation, before any step
                shown = wandb.Image(value) if isinstance(value, Figure) else value
                self._sender.add((step or 0) + started, None if epoch is None else epoch + ahead, {name: shown})

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Hyper-parameters that a user's own method logs, in addition to the configuration."""
        self._carefully(super().log_hyperparams, params)

    def finish(self, exit_code: int) -> None:
        """End W&B's run in seconds: what it could not send to a server that is away, the records have.

        Args:
            exit_code: of the command; after a failure the last row may be incomplete, and is sent on resume.
        """
        if exit_code == 0:
            self._carefully(lambda: self._sender.send())
        problems: list[BaseException | None] = []
        thread = threading.Thread(target=lambda: problems.append(end_wandb(exit_code)), daemon=True)
        thread.start()
        thread.join(2 * FINISH_SECONDS)
        if not self._given_up and (thread.is_alive() or problems[0]):
            away = thread.is_alive() or isinstance(problems[0], TimeoutError)
            LOGGER.warning(f"W&B's {'server is away' if away else 'process has ended'}: {self._later}")

    @property
    def _later(self) -> str:
        return f"`python -m ssl_geometry.report {self._run_dir} --to_wandb` sends what it lacks"

    def _carefully(self, send: Callable[..., Any], *args: Any) -> None:
        """Give something to W&B's process; where that is gone, training goes on, and the records have it all.

        SIGTERM to all processes of a job ends it, blocked or not, while this one finishes its step.
        """
        if self._given_up:
            return
        try:
            send(*args)
        except Exception as error:
            self._given_up = True
            LOGGER.warning(f"W&B takes no more numbers ({first_line(error)}): training goes on; {self._later}")


def _announced(rows: list[LoggedRow]) -> list[LoggedRow]:
    if rows:
        LOGGER.info(f"W&B lacks {len(rows):,} row{'s' * (len(rows) > 1)} of this run, sent now from the records")
    return rows


def _csv(run: Run) -> CSVLogger:
    """Lightning's, which deletes the file of an earlier start: what was logged before the checkpoint is kept."""
    logger, file = CSVLogger(run.directory, name="csv", version=""), run.directory / "csv" / "metrics.csv"
    if run.resumed_step is None or not file.exists():
        return logger
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = (line for line in lines if line.endswith("\n"))  # it may have been killed while it wrote the last
    earlier = list(csv.DictReader(whole))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory .* exists")
        writer = logger.experiment
    for row in earlier:
        step, epoch = int(row.pop("step")), {"epoch": row.pop("epoch", "")}
        kept = {name: value for name, value in row.items() if value and step + under_way(name) <= run.resumed_step}
        if kept:
            writer.log_metrics(epoch | kept, step)
    logger.save()
    return logger


def _wandb(run: Run, config: dict[str, Any], project: str) -> ResumableWandbLogger:
    """A W&B run that is the run directory's own, found again on resume; it never asks and never stops training."""
    import wandb  # a third of a second

    identity = run.facts.get("wandb_id")
    if identity is None:  # a new run, or one that was wound back
        identity = new_id(run.directory)
        run.note(wandb_id=identity)
    if not is_first_process():
        return ResumableWandbLogger(run.directory)
    options = wandb_options(run.directory, config, {**run.facts, "wandb_id": identity}, project)
    os.environ.setdefault("WANDB_SILENT", "true")  # its messages are printed here, or are in run.json
    settings = wandb.Settings(init_timeout=TIMEOUT_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)
    for mode in (None, "offline"):  # neither a missing key nor a server that is away may stop training
        try:
            if mode or wandb.login(prompt=False):
                return ResumableWandbLogger(run.directory, wandb.init(**options, settings=settings, mode=mode))
        except Exception as error:
            LOGGER.info(f"W&B: {'nothing is logged' if mode else 'logging offline'} ({first_line(error)})")
            end_wandb(1)  # its process may be gone
    return ResumableWandbLogger(run.directory)
