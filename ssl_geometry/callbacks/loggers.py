"""Where curves are watched: W&B, TensorBoard, CSV. Records in Parquet are always written."""

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ssl_geometry.callbacks.records import RecordsLogger, completed_epochs
from ssl_geometry.records import wandb_files
from ssl_geometry.report.upload import TIMEOUT_SECONDS, define_axes, new_id, wandb_options
from ssl_geometry.runs import Run, is_first_process

FINISH_SECONDS = 20
BESIDES = ("step", "epoch", "_row")
"""What a line of the journal says beside its numbers."""
LOGGER = logging.getLogger(__name__)
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
    offline files lack of it, or its server, is sent when the run goes on.

    Args:
        run_dir: directory of the run.
        kwargs: of Lightning's logger.
    """

    def __init__(self, run_dir: Path, **kwargs: Any) -> None:
        super().__init__(save_dir=run_dir, **kwargs)
        self._run_dir = run_dir
        self._journal = run_dir / "wandb" / f"{kwargs['id']}.jsonl"
        self._noted: list[dict[str, Any]] = []
        self._known: set[tuple[str, int]] = set()
        self._defined: set[str] = set()
        self._rows = 0
        self._given_up = False
        if not is_first_process() or not self._journal.exists():
            return
        for line in self._journal.read_text().splitlines():
            with suppress(ValueError):  # empty, or cut short when the disk was full
                self._noted.append(json.loads(line))
        self._known = {(name, row["step"]) for row in self._noted for name in row if name not in BESIDES}
        written = self._written()
        self._known |= {(name.rpartition("/")[0], step) for name, step in written if name.endswith("/_type")}

    def complete(self) -> None:
        """Send what W&B lost when the run was killed, or its server was away."""
        self._rows = 0 if self._offline else self.experiment.starting_step
        has = self._written(on_server=not self._offline)
        if not self._offline:  # the files of a run that was online also hold what its server never got
            has -= {(name, row["step"]) for row in self._noted if "_row" in row for name in row}
            has |= {(name, row["step"]) for row in self._noted if row.get("_row", inf) < self._rows for name in row}
        for row in self._noted:
            step = row["step"]
            lost = {name: row[name] for name in row if name not in BESIDES and (name, step) not in has}
            if lost:
                has |= {(name, step) for name in lost}
                self._note_and_send(lost, {"epoch": row["epoch"]} if "epoch" in row else {}, step)
        self._noted = []

    def _written(self, on_server: bool = False) -> set[tuple[str, int]]:
        """Name and step of what W&B's files hold."""
        points = wandb_files.points(self._run_dir, str(self.version), on_server)
        return {(name, step) for name, step, _ in points}

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
            self._send(metrics, step)
            return
        new = {name: value for name, value in metrics.items() if name != "epoch" and (name, step) not in self._known}
        if not new:
            return
        self._known |= {(name, step) for name in new}
        epoch = {"epoch": metrics["epoch"]} if "epoch" in metrics else {}
        self._note_and_send(new, epoch, step)

    def _note_and_send(self, new: Mapping[str, Any], epoch: Mapping[str, float], step: int) -> None:
        """With the row of the server's history that it becomes, if all goes well."""
        numbers = {name: float(value) for name, value in new.items() if isinstance(value, int | float)}
        place = {} if self._offline or self._given_up else {"_row": self._rows}
        if numbers:
            self._journal.parent.mkdir(parents=True, exist_ok=True)
            with self._journal.open("a") as file:
                file.write("\n" + json.dumps({"step": step, **place, **epoch, **numbers}))
        self._send({**new, **epoch}, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """What a method of a user's own says of itself, beside the configuration."""
        self._carefully(super().log_hyperparams, params)

    def _send(self, row: Mapping[str, Any], step: int | None) -> None:
        first = [name for name in row if name not in self._defined and name != "epoch"]
        if first:
            self._carefully(define_axes, self.experiment, first)
            self._defined.update(first)
        self._carefully(super().log_metrics, row, step)
        self._rows += 1

    def _carefully(self, send: Callable[..., None], *args: Any) -> None:
        """Give something to W&B's process; where that is gone, the journal has the numbers, and training goes on.

        SIGTERM to all processes of a job ends it, blocked or not, while this one finishes its step.
        """
        if self._given_up:
            return
        try:
            send(*args)
        except Exception as error:
            self._given_up = True
            reason = (str(error) or type(error).__name__).splitlines()[0]
            LOGGER.warning(f"W&B takes no more numbers ({reason}): training goes on, the records have them all")


def finish_wandb(exit_code: int) -> None:
    """End W&B's run, if there is one, in seconds: what it could not send to a server that is away stays on the disk.

    Args:
        exit_code: of the command, from which W&B tells a run that failed.
    """
    if wandb.run is None:
        return
    directory, problems = Path(wandb.run.dir).parent, list[BaseException]()

    def finish() -> None:
        for end in (wandb.finish, wandb.teardown):
            try:
                end(exit_code)
            except BaseException as error:  # a process of W&B's that is gone; teardown says sys.exit
                problems.append(error)

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    thread.join(2 * FINISH_SECONDS)
    if thread.is_alive() or any(isinstance(problem, TimeoutError) for problem in problems):
        LOGGER.warning(f"W&B's server is away: `wandb sync {directory}` sends what it lacks")


def _wandb(run: Run, config: dict[str, Any], project: str) -> ResumableWandbLogger:
    """A W&B run that is the run directory's own, found again on resume; it never asks and never stops training."""
    identity = run.facts.get("wandb_id")
    if identity is None:  # a new run, or one that was wound back
        identity = new_id(run.directory)
        run.note(wandb_id=identity)
    facts = {**run.facts, "wandb_id": identity}
    common = {"run_dir": run.directory, **wandb_options(run.directory, config, facts, project)}
    os.environ.setdefault("WANDB_SILENT", "true")  # what it would print is said here, or stands in run.json
    settings = wandb.Settings(init_timeout=TIMEOUT_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)
    if not is_first_process():
        return ResumableWandbLogger(**common, offline=True, settings=settings)
    try:
        logger = ResumableWandbLogger(**common, offline=not wandb.login(prompt=False), settings=settings)
        logger.experiment  # noqa: B018 starts the run
    except Exception as error:  # neither a missing key nor a server that is away may stop training
        LOGGER.info(f"W&B: logging offline ({str(error).splitlines()[0]})")
        with suppress(Exception):  # its process may be gone
            wandb.teardown()
        logger = ResumableWandbLogger(**common, offline=True, settings=settings)
    logger.complete()
    return logger
