"""A working method with a teacher and a queue, which the faulty ones spoil."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods import Method, Teacher
from ssl_geometry.methods.base import Batch
from ssl_geometry.methods.parts.gather import gathered

VIEWS = [ViewSpec(augment="simclr", count=2)]


class Distilled(Method):
    """A predictor on the student's outputs of the first view finds the teacher's of the second."""

    learns_from_labels = False
    num_views = 2

    def __init__(self, views: list[ViewSpec] = VIEWS, lr: float = 0.1, **kwargs: Any) -> None:
        super().__init__(views=views, lr=lr, **kwargs)
        self.head = nn.Sequential(nn.Linear(self.num_features, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.teacher = Teacher(self)
        self.predictor = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def outputs(self, views: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
        first, second = self.encode(views)
        targets = self.encode(views, self.teacher)
        return self.predictor(first), self.predictor(second), *targets

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        first, second, target, other = (F.normalize(output) for output in outputs)
        return 2 - (first * other).sum(1).mean() - (second * target).sum(1).mean()

    def after_step(self, progress: float) -> None:
        assert self.teacher is not None
        self.teacher.follow(self, 0.99)


class Queued(Distilled):
    """Negatives are outputs of the teacher, kept for some batches."""

    queue: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.predictor = nn.Identity()
        self.keep(F.normalize(torch.randn(64, 8)))

    def keep(self, queue: Tensor) -> None:
        self.register_buffer("queue", queue)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        first, _, _, key = (F.normalize(output) for output in outputs)
        logits = torch.cat([(first * key).sum(1, keepdim=True), first @ self.queue.clone().T], 1) / 0.2
        self.queue = torch.cat([gathered(key), self.queue])[: len(self.queue)]
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))
