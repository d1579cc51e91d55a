"""When training is saved, which checkpoints stay, and that all processes continue from the same one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from ssl_geometry.callbacks.publishing import is_last
from ssl_geometry.errors import UserError


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt``, so often that a killed run repeats at most so many minutes of training.

    That of a new run is there after a tenth of that time: where a node dies early, the job can go on from it.

    It is written at the end of an epoch where that of the next would be too late, or in mid-epoch where an epoch is
    longer than that (:class:`StopOnSignal` then calls :meth:`save` between two steps); and at the end of training. The
    first process's clock decides for all.

    Args:
        folder: where to save.
        every_n_minutes: how long training may go on unsaved; 0 saves at the end of every epoch, and at no other time.
        clock: seconds since any time.
    """

    def __init__(self, folder: Path, every_n_minutes: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        self.path = folder / "last.ckpt"
        self.every_n_minutes = every_n_minutes
        self.clock = clock
        self.wanted = False
        """Set after a step where all processes have agreed to save before the next."""
        self.saves = 0
        """How often it was saved, the same number in all processes."""
        self._saved_at = self._epoch_began = clock()

    def overdue(self, in_seconds: float = 0.0) -> bool:
        """Whether training will have gone on unsaved for too long by then."""
        return 0 < 60 * self.every_n_minutes <= self.clock() + in_seconds - self._saved_at

    def save(self, trainer: L.Trainer) -> None:
        """Save now; to be called in all processes."""
        trainer.save_checkpoint(self.path)
        self._saved()

    def _saved(self) -> None:
        self._saved_at = self.clock()
        self.saves += 1
        self.wanted = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; the checkpoint of a resumed run is as good as new, a new run is saved early once."""
        self._saved_at = self._epoch_began = self.clock()
        if trainer.global_step == 0:
            self._saved_at -= 0.9 * 60 * self.every_n_minutes

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save where this is the last epoch end that is not too late."""
        took, self._epoch_began = self.clock() - self._epoch_began, self.clock()
        late = self.every_n_minutes == 0 or (trainer.is_global_zero and self.overdue(in_seconds=took))
        due = late or self.wanted or is_last(trainer, trainer.current_epoch + 1)
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            super().on_train_epoch_end(trainer, pl_module)
            self._saved()


class KeptCheckpoint(ModelCheckpoint):
    """The checkpoints that stay, named by completed epochs as the records are.

    That of an epoch which is trained again after a kill replaces the one before.

    Args:
        folder: where to save.
        every_n_epochs: how often.
    """

    def __init__(self, folder: Path, every_n_epochs: int) -> None:
        super().__init__(
            folder,
            "{epoch:05d}",
            save_top_k=-1,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        """Its own, next to that of the last checkpoint."""
        return "kept"

    def format_checkpoint_name(self, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        """Epochs are counted as completed ones."""
        return super().format_checkpoint_name({**metrics, "epoch": metrics["epoch"] + 1}, *args, **kwargs)


class SameStart(L.Callback):
    """Ends a run whose processes do not continue from one checkpoint: file systems of several nodes may lag.

    Args:
        resumes: whether this process has found a checkpoint.
    """

    def __init__(self, resumes: bool) -> None:
        self.resumes = resumes

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before weights are read: all processes have a checkpoint, or none has."""
        if stage == "fit":
            self._compare(trainer, "sees one" if self.resumes else "sees none")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """When it is read: it is of the same step in all."""
        self._compare(trainer, f"sees step {checkpoint['global_step']}")

    def _compare(self, trainer: L.Trainer, mine: str) -> None:
        if trainer.world_size == 1:
            return
        all_ranks = [""] * trainer.world_size
        dist.all_gather_object(all_ranks, mine)
        for rank, theirs in enumerate(all_ranks):
            if theirs != all_ranks[0]:
                raise UserError(
                    f"the processes do not see the same checkpoint, process 0 {all_ranks[0]} and process {rank} "
                    f"{theirs}: the file system lags between nodes; start again in a minute"
                )
