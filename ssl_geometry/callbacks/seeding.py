"""Random numbers of a step depend on the step alone, so that a resumed run draws those of an uninterrupted one."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch


class SeedSteps(L.Callback):
    """Seeds the global generators before every training step, from the seed, the epoch, the batch and the process.

    Views and the order of images never draw from them; dropout, stochastic depth and a user's own method may.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before each step."""
        words = np.random.SeedSequence([self.seed, trainer.current_epoch, batch_idx, trainer.global_rank])
        mixed = int(words.generate_state(1)[0])
        torch.manual_seed(mixed)
        np.random.seed(mixed)  # noqa: NPY002
        random.seed(mixed)
