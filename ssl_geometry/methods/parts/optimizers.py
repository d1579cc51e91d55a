"""Optimisers, their groups of parameters, and the schedule of the learning rate."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightly.utils.scheduler import cosine_warmup_schedule
from torch import nn

from ssl_geometry.errors import UserError
from ssl_geometry.methods.parts.lars import LARS

Optimizer = Literal["lars", "sgd", "adamw"]


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained of a module, in two groups: with weight decay, and without.

    Without are vectors and scalars (biases, normalisation), and what a part of the module names itself by timm's
    convention, ``no_weight_decay()``: class tokens, position embeddings, tables of relative positions.

    Args:
        module: whose parameters.
        weight_decay: of the first group.

    Example:
        >>> [len(group["params"]) for group in decay_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 1e-4)]
        [1, 3]
    """
    spared = {
        f"{path}.{name}".lstrip(".")
        for path, part in module.named_modules()
        if callable(names := getattr(part, "no_weight_decay", None))
        for name in names()
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim < 2 or name in spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(
    name: str, groups: Sequence[dict[str, Any]], lr: float, momentum: float, betas: Sequence[float]
) -> torch.optim.Optimizer:
    """An optimiser by its name.

    Args:
        name: lars, sgd or adamw.
        groups: of parameters; ``lr_factor`` of a group multiplies its learning rate.
        lr: learning rate.
        momentum: of lars and sgd.
        betas: of adamw.

    Raises:
        UserError: an unknown name.
    """
    groups = [{**group, "lr": lr * group.get("lr_factor", 1.0)} for group in groups]
    match name:
        case "lars":
            return LARS(groups, lr=lr, momentum=momentum)
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=momentum)
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]))
    raise UserError(f"--model.optimizer {name!r}: known: 'lars', 'sgd', 'adamw'")


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int, end: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up, then half a cosine; groups with ``constant_lr`` keep their learning rate.

    Args:
        optimizer: whose learning rates.
        steps: of the whole run.
        warmup: of these, steps of the warm-up.
        end: share of the learning rate that is left at the end.
    """

    # A function and not lightly's scheduler: that one's state would bring an old length of the run back on resume.
    def share(step: int) -> float:
        return cosine_warmup_schedule(min(step, steps), steps + 1, 1.0, end, warmup, 0.0)

    shares = [(lambda step: 1.0) if group.get("constant_lr") else share for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
