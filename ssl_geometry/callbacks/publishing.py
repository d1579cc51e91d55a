"""Where measured numbers go: rows to the records, scalars and figures to every logger."""

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
from matplotlib.figure import Figure

from ssl_geometry.callbacks.loggers import ResumableWandbLogger
from ssl_geometry.callbacks.records import RecordsLogger
from ssl_geometry.measure.measurement import Measured, Occasion
from ssl_geometry.report.live import Row, live_figures, scalars


def new_folder(trainer: L.Trainer, before: str | None) -> Path:
    """A folder of records for each training, and the same one where it is resumed under the same name.

    Args:
        trainer: in whose root directory it is.
        before: name of the folder of the run that is resumed.
    """
    root = Path(trainer.default_root_dir) / "geometry"
    name = run_name(trainer)
    if trainer.global_step:
        return root / (before if before and re.fullmatch(rf"{re.escape(name)}-\d+", before) else name)
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(root / other for other in numbered if not (root / other).exists())


def run_name(trainer: L.Trainer) -> str:
    """The run that a trainer belongs to."""
    version = next((logger.version for logger in trainer.loggers if logger.version is not None), "run")
    return version if isinstance(version, str) else f"version_{version}"  # as the logger's folder is called


def is_last(trainer: L.Trainer, epoch: int) -> bool:
    """Whether training ends with this epoch: by its epochs, its steps, its time, or a callback."""
    return epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop


def log(
    trainer: L.Trainer,
    records: RecordsLogger,
    measured: Measured,
    curves: Sequence[Row],
    occasion: Occasion,
    part: str,
) -> None:
    """Hand what was measured to every logger in the form that it understands (on the first process)."""
    drawn = live_figures(measured.rows, curves)
    figures = cache(lambda: {name: draw() for name, draw in drawn.items()})
    records.log_findings(part, measured.rows, measured.protocols, occasion.epoch)
    if is_last(trainer, occasion.epoch):
        records.save_figures(figures())
    other: Any
    for other in trainer.loggers:
        if other is records:
            continue
        kinds = {kind.__name__ for kind in type(other).__mro__}  # of either package that Lightning goes by
        shown: Mapping[str, Any] = {}
        if isinstance(other, ResumableWandbLogger):  # W&B's failures are its own matter
            shown = figures() if other.alive else {}
        elif "WandbLogger" in kinds and drawn:
            shown = _for_wandb(figures())
        row = {**scalars(measured.rows), **shown, "epoch": float(occasion.epoch)}  # figures in one row with their epoch
        other.log_metrics(row, occasion.step)
        if "TensorBoardLogger" in kinds:
            for name, figure in figures().items():
                other.experiment.add_figure(name, figure, global_step=occasion.step)


def _for_wandb(figures: Mapping[str, Figure]) -> dict[str, Any]:
    import wandb  # a third of a second

    return {name: wandb.Image(figure) for name, figure in figures.items()}
