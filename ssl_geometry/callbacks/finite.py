"""Training stops when the loss is no longer a number, before a checkpoint of it is written."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ssl_geometry.errors import UserError


class StopOnNaN(L.Callback):
    """Stops when the loss became NaN or infinite on any process.

    The loss is looked at on the device in every step; the host looks only at logging steps and before a checkpoint, at
    the end of an epoch or after a signal, so the last checkpoint is a good one.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All is well so far."""
        self._bad = torch.zeros((), dtype=torch.bool, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember a bad loss without waiting for the device."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._bad |= ~torch.isfinite(loss.detach())
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._stop_if_bad(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The weights too, which the last step may have spoilt."""
        self._bad |= ~torch.stack([parameter.isfinite().all() for parameter in pl_module.parameters()]).all()
        self._stop_if_bad(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """No checkpoint takes the place of a good one, whoever asked for it."""
        self.on_train_epoch_end(trainer, pl_module)

    def _stop_if_bad(self, trainer: L.Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(bool(self._bad), all=False):
            kept = trainer.checkpoint_callback
            last = Path(kept.dirpath or "", f"{kept.filename}.ckpt") if isinstance(kept, ModelCheckpoint) else None
            raise UserError(
                f"the loss became NaN or infinite in epoch {trainer.current_epoch + 1} (by step "
                f"{trainer.global_step}): training stopped, the last good checkpoint is kept "
                f"({last if last and last.exists() else 'none written yet'}); "
                f"lower --model.lr or lengthen --model.warmup_epochs"
            )
