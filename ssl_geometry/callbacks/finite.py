"""Training stops when the loss is no longer a number, before a checkpoint of it is written."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ssl_geometry.errors import UserError


class StopOnNaN(L.Callback):
    """Stops when the loss became NaN or infinite on any process.

    The loss is looked at on the device in every step; the host looks only at logging steps and at the end of an
    epoch, before the checkpoint, so the last checkpoint is a good one.
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
        """The last look before the checkpoint: the weights too, which the last step may have spoilt."""
        self._bad |= ~torch.stack([parameter.isfinite().all() for parameter in pl_module.parameters()]).all()
        self._stop_if_bad(trainer)

    def _stop_if_bad(self, trainer: L.Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(bool(self._bad), all=False):
            checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "") or "none written yet"
            raise UserError(
                f"the loss became NaN or infinite in epoch {trainer.current_epoch + 1} (by step "
                f"{trainer.global_step}): training stopped, the last good checkpoint is kept ({checkpoint}); "
                f"lower --model.lr or lengthen --model.warmup_epochs"
            )
