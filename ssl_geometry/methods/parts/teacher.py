"""The teacher of a method: a moving average of its student, which gives targets and takes no gradient."""

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Teacher(nn.Module):
    """Backbone and head of a student, as an exponential moving average of their parameters.

    Batch norm has running statistics of its own: in training mode it normalises by the batch, as the student does.

    Args:
        student: has ``backbone`` and ``head``, which are copied.

    References:
        Tarvainen & Valpola, *Mean teachers are better role models*, 2017; He et al., *Momentum contrast*, 2020,
        equation 2.

    Example:
        >>> student = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Identity()})
        >>> student.backbone, student.head = student["backbone"], student["head"]
        >>> teacher = Teacher(student)
        >>> before = teacher.backbone.weight.clone()
        >>> _ = nn.init.ones_(student.backbone.weight)
        >>> teacher.follow(student, momentum=0.9)
        >>> torch.testing.assert_close(teacher.backbone.weight, 0.9 * before + 0.1)
        >>> any(parameter.requires_grad for parameter in teacher.parameters())
        False
    """

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.backbone: nn.Module = copy.deepcopy(student.backbone)
        self.head: nn.Module = copy.deepcopy(student.head)
        self.requires_grad_(False)

    def forward(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Backbone and head on images that are views already, without gradients."""
        with torch.no_grad():
            return self.head(self.backbone(images))

    @torch.no_grad()
    def follow(self, student: Any, momentum: float) -> None:
        """Move towards the student, once after each step of its optimiser: ``m teacher + (1 - m) student``.

        Args:
            student: whose backbone and head were copied.
            momentum: m, in [0, 1]: the share of the teacher that stays.
        """
        theirs = [*student.backbone.parameters(), *student.head.parameters()]
        torch._foreach_lerp_(list(self.parameters()), theirs, 1 - momentum)


def rising_momentum(start: float, progress: float) -> float:
    """The momentum of a teacher that follows more and more slowly, along half a cosine.

    Args:
        start: at the beginning of the run.
        progress: share of the run that is done, in [0, 1].

    Returns:
        From ``start`` to 1: ``1 - (1 - start) (cos(pi progress) + 1) / 2``.

    References:
        Grill et al., *Bootstrap your own latent*, 2020, section 3.2.

    Example:
        >>> rising_momentum(0.9, 0.0), rising_momentum(0.9, 0.5), rising_momentum(0.9, 1.0)
        (0.9, 0.95, 1.0)
    """
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2
