"""Small instances of all methods, and what a trainer gives to a training step, without a trainer."""

import json
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ssl_geometry import methods
from ssl_geometry.methods import Method
from ssl_geometry.methods.base import Batch
from ssl_geometry.models.sync_batchnorm import SyncBatchNormPlugin

RESNET: dict[str, Any] = {"backbone": "resnet10", "width": 1 / 16, "image_size": 16, "warmup_epochs": 0}
CROPS = [{"augment": "crop", "count": 2}, {"augment": ["crop", "flip"], "size": 8, "count": 2}]
"""Two global and two local crops."""
METHODS: dict[str, dict[str, Any]] = {
    "BYOL": {**RESNET, "hidden_dim": 16, "output_dim": 8},
    "BarlowTwins": {**RESNET, "hidden_dim": 16, "output_dim": 8},
    "DINO": {**RESNET, "hidden_dim": 16, "output_dim": 8, "freeze_prototypes_epochs": 0, "views": CROPS},
    "LeJEPA": {**RESNET, "hidden_dim": 16, "output_dim": 8, "directions": 16},
    "MAE": {
        "backbone": "tests.methods.tiny_vit",
        "image_size": 16,
        "warmup_epochs": 0,
        "decoder_dim": 32,
        "decoder_depth": 1,
    },
    "MoCoV2": {**RESNET, "output_dim": 8, "queue_size": 20},
    "MoCoV3": {**RESNET, "hidden_dim": 16, "output_dim": 8},
    "SimCLR": {**RESNET, "output_dim": 8},
    "SimSiam": {**RESNET, "hidden_dim": 16, "output_dim": 8, "predictor_dim": 4},
    "SupCon": {**RESNET, "output_dim": 8},
    "Supervised": {**RESNET, "num_classes": 4},
    "SwAV": {
        **RESNET,
        "hidden_dim": 16,
        "output_dim": 8,
        "num_prototypes": 6,
        "freeze_prototypes_epochs": 0,
        "queue_size": 30,
        "queue_from_epoch": 0,
        "views": CROPS,
    },
    "VICReg": {**RESNET, "hidden_dim": 16, "output_dim": 8},
}
"""Class of :mod:`ssl_geometry.methods` to its options: a few thousand parameters, images of 16 pixels."""

COLORS = {"p": 1.0, "brightness": 0.6, "contrast": 0.4, "saturation": 0.6, "hue": 0.3}
DIGITS = [{"crop": {"scale": [0.5, 1.0]}}, {"color": COLORS}, {"gray": {"p": 0.2}}, {"solarize": {"p": 0.3}}]
"""An augmentation that leaves a digit what it is."""
UNCROPPED = [{"augment": DIGITS[1:], "count": 2}]
"""Two views in which a digit stays where it is: without negatives, a network needs more steps than there are else."""
SHAPES: dict[str, Any] = {"backbone": "tests.methods.tiny_vit", "views": [{"augment": DIGITS[:1], "count": 2}]}
UNCOLORED = {"data": {"dataset": "digits", "batch_size": 64}}
"""Digits without colours, for which an untrained vision transformer has features worse than those of ``tiny``."""
LONGER = {"data": {"batch_size": 64}, "trainer": {"max_epochs": 8, "check_val_every_n_epoch": 8}}
COLORED = [{"augment": ["color", {"gray": {"p": 0.5}}]}]
GRAY = [{"augment": [{"color": {"p": 1.0, "brightness": 0.4, "contrast": 0.4}}, {"gray": {"p": 1.0}}]}]
"""Views for methods whose loss forgets colour more slowly than SimCLR's."""
TRAINED = {"backbone": "tests.methods.tiny", "width": 1.0, "optimizer": "adamw", "lr": 4e-3, "warmup_epochs": 1}
TRAININGS: dict[str, dict[str, dict[str, Any]]] = {
    "BYOL": {
        "model": {"teacher_momentum": 0.99, "hidden_dim": 256, "output_dim": 128, "lr": 1.6e-2, "views": GRAY},
        "data": {"batch_size": 64},
    },
    "BarlowTwins": LONGER
    | {"model": {"layers": 2, "hidden_dim": 128, "output_dim": 64, "redundancy": 0.02, "views": UNCROPPED}},
    "DINO": UNCOLORED
    | {
        "model": {**SHAPES, "lr": 1e-2, "teacher_momentum": 0.98, "hidden_dim": 64, "output_dim": 128},
        "trainer": {"max_epochs": 8, "check_val_every_n_epoch": 8},
    },
    "LeJEPA": LONGER
    | {"model": {"hidden_dim": 512, "output_dim": 64, "directions": 64, "sigreg_weight": 0.01, "views": UNCROPPED}},
    "MAE": UNCOLORED | {"model": {"backbone": "tests.methods.averaging_vit", "views": [{"augment": DIGITS[:1]}]}},
    "MoCoV2": {"model": {"temperature": 0.2, "output_dim": 64, "queue_size": 500, "lr": 8e-3, "views": COLORED}},
    "MoCoV3": {
        "model": {"hidden_dim": 256, "output_dim": 128, "lr": 2e-2, "views": COLORED},
        "data": {"batch_size": 64},
    },
    "SimCLR": {"model": {"temperature": 0.2, "output_dim": 64, "views": [{"augment": DIGITS}]}},
    "SimSiam": LONGER
    | {"model": {"layers": 1, "output_dim": 256, "predictor_dim": 256, "lr": 6e-3, "views": UNCROPPED}},
    "SupCon": {"model": {"temperature": 0.2, "output_dim": 64, "views": [{"augment": DIGITS}]}},
    "Supervised": {
        "model": {"num_classes": None, "lr": 4e-2, "views": [{"augment": "color"}]},
        "data": {"batch_size": 64},
    },
    "SwAV": UNCOLORED
    | {"model": {**SHAPES, "epsilon": 0.03, "num_prototypes": 64, "queue_size": 256, "queue_from_epoch": 2}},
    "VICReg": {"model": {"hidden_dim": 64, "output_dim": 64, "views": UNCROPPED}},
}
"""Class to options of a training of two seconds on coloured digits that beats its initialisation: model, data, trainer.

What is not given is as in ``METHODS``, ``TRAINED`` and tests/integration/test_methods.py.
"""


def tiny() -> nn.Module:
    """A network that learns to ignore colour in seconds; a ResNet of this size takes a minute."""

    def block(width: int, wider: int) -> list[nn.Module]:
        return [nn.Conv2d(width, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]

    return nn.Sequential(*block(3, 16), *block(16, 32), *block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def tiny_vit(width: int = 32, **options: Any) -> nn.Module:
    """A vision transformer with two blocks and patches of 4 pixels, for images of 16."""
    from timm.models import VisionTransformer

    size: dict[str, int] = {"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": 2, "num_heads": 2}
    return VisionTransformer(**size, num_classes=0, dynamic_img_size=True, **options)


def averaging_vit() -> nn.Module:
    """The same, wider; its features are the mean of the patches, which MAE improves sooner than the class token."""
    return tiny_vit(width=64, global_pool="avg", fc_norm=False)


def as_options(group: str, values: dict[str, Any]) -> list[str]:
    """The command line that gives these values."""
    plain = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return [f"--{group}.{name}={value}" for name, value in plain.items()]


def build(name: str, **options: Any) -> Method:
    """A method of the table, the same one each time."""
    torch.manual_seed(0)
    method: Method = getattr(methods, name)(**{**METHODS[name], **options})
    return method


class ByItself(Method):
    """A method that calls its optimiser itself."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


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
