"""A trainer that trains, and nothing else."""

from typing import Any

import lightning as L


def quiet_trainer(**options: Any) -> L.Trainer:
    """On the CPU, for one epoch; it logs, saves and shows nothing, and leaves the batches to the data module.

    Args:
        options: of the trainer; they replace these.
    """
    quiet = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return L.Trainer(**{**quiet, **options})
