"""MoCo v2: each view finds a teacher's output for the other view of its image, the key, among keys of past batches."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Method, Optimizer, Rate, Share
from ssl_geometry.methods.parts.gather import gathered
from ssl_geometry.methods.parts.queue import Queue
from ssl_geometry.methods.parts.teacher import Teacher
from ssl_geometry.ranges import above, at_least, check_arguments

VIEWS = [ViewSpec(augment="simclr", count=2)]


class MoCoV2(Method):
    """Momentum contrast with the recipe of lightly's CIFAR-10 benchmark at 512 images, which is symmetric.

    Negatives are the queue alone, which then takes in the keys of all processes. In place of ShuffleBN, batch norm
    takes its statistics from the global batch: they do not give away which process holds the key of a query. (A query
    and its key still share one batch's statistics, where keys in the queue have those of past ones.)

    Args:
        temperature: tau of the loss, above 0.
        hidden_dim: width of the projection head; None is the width of the backbone's features.
        output_dim: dimension of the unit vectors that the loss compares.
        queue_size: how many keys are negatives.
        teacher_momentum: the share of the teacher that stays at each step.
        symmetric: both views are queries; if false the first is the query and the second the key, as in the paper.
        views: how both views are made.
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.

    References:
        He et al., *Momentum contrast for unsupervised visual representation learning*, 2020, equation 1; Chen et al.,
        *Improved baselines with momentum contrastive learning*, 2020.
    """

    learns_from_labels = False
    num_views = 2
    teacher: Teacher

    def __init__(
        self,
        temperature: Annotated[float, above(0)] = 0.1,
        hidden_dim: Annotated[int, at_least(1)] | None = None,
        output_dim: Annotated[int, at_least(1)] = 128,
        queue_size: Annotated[int, at_least(1)] = 8192,
        teacher_momentum: Share = 0.99,
        symmetric: bool = True,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "sgd",
        lr: Rate = 0.12,
        weight_decay: Decay = 5e-4,
        **kwargs: Any,
    ) -> None:
        from lightly.models.modules.heads import MoCoProjectionHead

        check_arguments(MoCoV2, locals(), "--model.")
        super().__init__(views=views, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)
        self.head = MoCoProjectionHead(self.num_features, hidden_dim or self.num_features, output_dim)
        self.teacher = Teacher(self)
        self.queue = Queue(queue_size, output_dim)
        self.temperature, self.teacher_momentum, self.symmetric = temperature, teacher_momentum, symmetric

    def outputs(self, views: Any, batch: Batch) -> tuple[Tensor, ...]:
        """Queries of the student, then the teacher's keys of the other views."""
        first, second = views
        queries, keys = ([first, second], [second, first]) if self.symmetric else ([first], [second])
        return (*self.encode(queries), *self.encode(keys, self.teacher))

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Cross-entropy of a query's own key among it and the queue, which then takes in the keys."""
        half = len(outputs) // 2
        queries = F.normalize(torch.cat(outputs[:half]))
        keys = [F.normalize(key) for key in outputs[half:]]
        positive = (queries * torch.cat(keys)).sum(1, keepdim=True)
        negatives = queries @ self.queue.rows.to(queries, copy=True).T  # the backward reads what a push would change
        for key in keys:  # view by view: the order of one process with all images
            self.queue.push(gathered(key))
        logits = torch.cat([positive, negatives], 1) / self.temperature
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))

    def after_step(self, progress: float) -> None:
        """The teacher follows."""
        self.teacher.follow(self, self.teacher_momentum)
