"""Validation of the initialisation: every curve of an evaluation starts where training starts."""

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng


class EvaluateAtStart(L.Callback):
    """Runs one validation before the first step, where the run has any: ``val/knn`` at epoch 0."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Not where a run is resumed: its records have it."""
        every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
        never = not trainer.enable_validation or (every and epochs and 0 <= epochs < every)
        if trainer.global_step or trainer.current_epoch or never:
            return
        progress = trainer.fit_loop.epoch_progress.current
        progress.completed = -1  # Lightning logs the epoch under way, counted from 0: this is the one before it
        trainer.validating = True
        try:
            with isolate_rng(include_cuda=False):
                trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            trainer.training = True
            progress.completed = 0
