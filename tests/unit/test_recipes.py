"""The configurations' optimisers are the published ones, whose rates are not all per 256 images."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssl_geometry import methods
from ssl_geometry.methods import Method

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "lr", "min_lr", "weight_decay", "loss"),
    [
        ("barlow_twins_resnet50_imagenet", 1.6, 1.6e-3, 1.5e-6, 1),  # authors' code: ends at a thousandth
        ("byol_resnet18_cifar10", 0.24, 0, 5e-4, 4),  # lightly: 0.06 for 128 images, a quarter of the loss
        ("byol_resnet50_imagenet", 7.2, 0, 1e-6, 1),
        ("dino_resnet18_cifar10", 0.24, 0, 5e-4, 1),
        ("dino_vit_small_imagenet", 1e-3, 1e-6, 0.04, 1),  # main_dino.py: the last rate is not scaled by the batch
        ("lejepa_resnet18_cifar10", 1e-3, 1e-6, 5e-4, 1),
        ("mae_vit_base_imagenet", 2.4e-3, 0, 0.05, 1),
        ("moco_v2_resnet18_cifar10", 0.24, 0, 5e-4, 1),
        ("moco_v2_resnet50_imagenet", 0.03, 0, 1e-4, 1),
        ("moco_v3_vit_small_imagenet", 6e-4, 0, 0.1, 1),
        ("simclr_resnet50_imagenet", 4.8, 0, 1e-6, 1),
        ("simsiam_resnet18_cifar10", 0.06, 0, 5e-4, 1),
        ("simsiam_resnet50_imagenet", 0.1, 0, 1e-4, 1),
        ("supcon_resnet18_cifar10", 0.5, 0, 1e-4, 0.07 / 0.1),  # for 1,024 images, on a loss times 0.1 / 0.07
        ("swav_resnet18_cifar10", 4e-3, 0, 1e-6, 1),
        ("swav_resnet50_imagenet", 0.6, 6e-4, 1e-6, 1),
        ("vicreg_resnet50_imagenet", 1.6, 1.6e-3, 1e-6, 1),  # authors' code: a thousandth; the paper has 0.002
    ],
)
def test_rates_are_the_published_ones(name: str, lr: float, min_lr: float, weight_decay: float, loss: float) -> None:
    """A loss that is ``loss`` times the published one has a rate that is as much lower, and a decay higher."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    cls = getattr(methods, config["model"]["class_path"].rpartition(".")[2])
    given: dict[str, Any] = {}
    for owner in (Method, *([methods.SimCLR] if cls is methods.SupCon else []), cls):
        options = inspect.signature(owner).parameters.items()
        given |= {option: value.default for option, value in options if value.default is not inspect.Parameter.empty}
    given |= config["model"]["init_args"]
    batches = config["data"]["batch_size"] / 256
    assert given["lr"] * batches * loss == pytest.approx(lr, rel=0.01)
    assert given["min_lr"] * batches * loss == pytest.approx(min_lr, rel=0.01)
    assert given["weight_decay"] / loss == pytest.approx(weight_decay, rel=0.01)
