"""A Lightning logger that writes records: everything that is logged lands in Parquet, with or without W&B."""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from ssl_geometry.files import naming
from ssl_geometry.records import Protocol, RecordStore, record

LOGGER = logging.getLogger(__name__)


def completed_epochs(name: str, metrics: Mapping[str, float]) -> int:
    """The epoch that a number logged by Lightning belongs to.

    Lightning counts the epochs before: training and validation belong to the one that is under way, and the validation
    of the initialisation to the one before the first, -1.

    Example:
        >>> completed_epochs("train/loss", {"train/loss": 0.1, "epoch": 4}), completed_epochs("test/knn", {"epoch": 5})
        (5, 5)
    """
    return int(metrics.get("epoch", 0)) + (name.partition("/")[0] != "test")


class RecordsLogger(Logger):
    """Writes what Lightning logs as rows, one Parquet part per epoch, and what monitors find, one part per monitor and
    epoch.

    Args:
        run_dir: the run directory; its name is the run's id in the records.
    """

    SCALARS = "scalars"
    """Part of what Lightning logs; no monitor's."""

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__()
        self.run_dir = Path(run_dir)
        self.store = RecordStore(self.run_dir / "records")
        self.epoch = 0  # under way, as Lightning counts; some callbacks log without one
        self._rows: dict[int, list[dict[str, Any]]] = defaultdict(list)

    @property
    def name(self) -> str:
        """The experiment."""
        return self.run_dir.parent.name

    @property
    def version(self) -> str:
        """The run's id."""
        return self.run_dir.name

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's ``config.yaml`` holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep scalars until :meth:`flush`. Their epoch is counted from 1; 0 is the initialisation."""
        for name, value in metrics.items():
            if name != "epoch":
                epoch = completed_epochs(name, {"epoch": self.epoch, **metrics})
                self._rows[epoch].append(
                    record(
                        run=self.version,
                        model=self.version,
                        metric=name,
                        split=name.partition("/")[0],
                        epoch=epoch,
                        step=step,
                        value=float(value),
                    )
                )

    @rank_zero_only
    def log_findings(
        self, part: str, rows: Sequence[Mapping[str, Any]], protocols: Sequence[Protocol], epoch: int
    ) -> None:
        """Write what a monitor found at one epoch; measured again, it replaces itself.

        Args:
            part: the monitor's name, which no other monitor of the run has.
            rows: made by :func:`ssl_geometry.records.record`.
            protocols: behind the rows.
            epoch: completed epochs.
        """
        if rows:
            self.store.write(f"{part}/epoch={epoch:05d}", rows, protocols)

    @rank_zero_only
    def save_figures(self, figures: Mapping[str, Figure]) -> None:
        """Keep figures as PNG under ``figures/``."""
        for name, figure in figures.items():
            path = self.run_dir / "figures" / f"{name.replace('/', '_')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path):
                figure.savefig(path)

    @rank_zero_only
    def flush(self) -> None:
        """Write the scalars kept so far; a step that was written before, and is run again, is replaced."""
        for epoch, rows in self._rows.items():
            part = f"{self.SCALARS}/epoch={epoch:05d}"
            again = {(row["metric"], row["step"]) for row in rows}
            earlier = [row for row in self.store.read_part(part) if (row["metric"], row["step"]) not in again]
            self.store.write(part, earlier + rows)
        self._rows.clear()

    def finalize(self, status: str) -> None:
        """The run ends, well or badly: keep what there is."""
        self.flush()


class FlushRecords(L.Callback):
    """Writes the scalars before every checkpoint, so that a resumed run lacks none, each with its epoch.

    It stands before callbacks that log without an epoch, such as Lightning's ``LearningRateMonitor``.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on in mid-epoch does not start that epoch again."""
        self._flush(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called before the checkpoint is written."""
        self._flush(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Means over the last epoch are logged after its checkpoint, and it is not run again."""
        self._flush(trainer)

    def _flush(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RecordsLogger):
                logger.flush()
                logger.epoch = trainer.current_epoch
            elif isinstance(logger, CSVLogger):
                logger.save()


class LogEveryEpoch(L.Callback):
    """Training is logged at least once per epoch: a run of epochs shorter than the interval had no curve."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The length of an epoch, and of training, is known now."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        an_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        steps = min(an_epoch, trainer.estimated_stepping_batches)
        if steps < every:
            shorter = max(1, math.ceil(steps))
            whole = "an epoch" if steps == an_epoch else "training"
            LOGGER.info(f"--trainer.log_every_n_steps {shorter} (instead of {every}): {whole} has no more steps")
            trainer.log_every_n_steps = shorter  # type: ignore[attr-defined]
