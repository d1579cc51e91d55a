"""Small instances of all methods, and what a trainer gives to a training step, without a trainer."""

from types import SimpleNamespace
from typing import Any

import torch

from ssl_geometry import methods
from ssl_geometry.methods import Method
from ssl_geometry.methods.base import Batch
from ssl_geometry.models.sync_batchnorm import SyncBatchNormPlugin

RESNET: dict[str, Any] = {"backbone": "resnet10", "width": 1 / 16, "image_size": 16, "warmup_epochs": 0}
METHODS: dict[str, dict[str, Any]] = {
    "SimCLR": {**RESNET, "output_dim": 8},
    "Supervised": {**RESNET, "num_classes": 4},
}
"""Class of :mod:`ssl_geometry.methods` to its options: a few thousand parameters, images of 16 pixels."""


def build(name: str, **options: Any) -> Method:
    """A method of the table, the same one each time."""
    torch.manual_seed(0)
    method: Method = getattr(methods, name)(**{**METHODS[name], **options})
    return method


def images(number: int = 12, side: int = 16) -> Batch:
    """A batch of random images with labels of four classes, and numbers in a data set."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, generator=generator)
    label = torch.randint(4, (number,), generator=generator)
    return {"image": image, "label": label, "index": torch.arange(number) + 100}


def by_hand(method: Method, steps: int) -> Method:
    """Give a method what it asks of a trainer; the caller counts the steps in ``method.trainer.global_step``."""
    trainer: Any = SimpleNamespace(estimated_stepping_batches=steps, global_step=0, current_epoch=0, world_size=1)
    method.trainer = trainer
    method.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return method.train()


def synchronised(method: Method, world_size: int) -> Method:
    """With batch norm over all processes."""
    if world_size > 1:
        SyncBatchNormPlugin().apply(method)
    return method
