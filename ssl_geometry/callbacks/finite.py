"""Training stops when the loss is no longer a number, before a checkpoint of it is written."""

from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ssl_geometry.errors import UserError


class StopOnNaN(L.Callback):
    """Stops when the loss became NaN or infinite on any process.

    The loss is looked at on the device in every step. At logging steps what was found sets off to the host, which reads
    it once it is there and never waits for it; of several processes :class:`StopOnSignal` then stops all after the same
    step. At the end of an epoch, and before any checkpoint, the host does wait, and looks at the weights as well: the
    last checkpoint is a good one.
    """

    def __init__(self) -> None:
        self._bad = self._on_host = torch.zeros((), dtype=torch.bool)
        self._arrived: torch.cuda.Event | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All is well so far."""
        self._bad = torch.zeros((), dtype=torch.bool, device=pl_module.device)
        self._on_host = torch.zeros((), dtype=torch.bool, pin_memory=self._bad.is_cuda)
        self._arrived = torch.cuda.Event() if self._bad.is_cuda else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember a bad loss without waiting for the device."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs  # none of manual optimisation
        if isinstance(loss, Tensor):
            self._bad |= ~torch.isfinite(loss.detach())
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (batch_idx + 1) % every == 0:
            self._on_host.copy_(self._bad, non_blocking=True)
            if self._arrived is not None:
                self._arrived.record()
        if trainer.world_size == 1 and self.seen:
            self.stop(trainer)

    @property
    def seen(self) -> bool:
        """Whether this process's host knows of a bad loss by now."""
        return (self._arrived is None or self._arrived.query()) and bool(self._on_host)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The weights too, which the last step may have corrupted."""
        largest = torch.nn.utils.get_total_norm(pl_module.parameters(), torch.inf)
        self._bad |= ~largest.isfinite()
        if trainer.strategy.reduce_boolean_decision(bool(self._bad), all=False):
            self.stop(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """No checkpoint takes the place of a good one, whoever asked for it."""
        self.on_train_epoch_end(trainer, pl_module)

    def stop(self, trainer: L.Trainer) -> NoReturn:
        """End training; every process must.

        Raises:
            UserError: always.
        """
        kept = trainer.checkpoint_callback
        last = Path(kept.dirpath or "", f"{kept.filename}.ckpt") if isinstance(kept, ModelCheckpoint) else None
        raise UserError(
            f"the loss became NaN or infinite in epoch {trainer.current_epoch + 1} (by step "
            f"{trainer.global_step}): training stopped, the last good checkpoint is kept "
            f"({last if last and last.exists() else 'none written yet'}); "
            f"lower --model.lr or lengthen --model.warmup_epochs"
        )
