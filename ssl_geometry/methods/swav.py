"""SwAV: views of an image find each other's cluster; an optimal transport keeps all clusters equally large."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Method, Optimizer, Rate
from ssl_geometry.methods.parts.gather import gathered
from ssl_geometry.methods.parts.prototypes import sinkhorn, swapped_cross_entropy
from ssl_geometry.methods.parts.queue import Queue
from ssl_geometry.ranges import above, at_least, check_arguments

VIEWS = [ViewSpec(augment={"simclr": {"strength": 0.8, "scale": [0.14, 1.0]}}, count=2)]


class SwAV(Method):
    """Swapped assignments between views. The recipe is that of lightly's CIFAR-10 benchmark, for ResNet-18.

    Args:
        temperature: of the similarities to the prototypes, above 0.
        epsilon: of the assignments, above 0; the larger, the softer they are.
        hidden_dim: width of the projection head.
        output_dim: dimension of the unit vectors that are compared with the prototypes.
        num_prototypes: how many clusters.
        freeze_prototypes_epochs: first epochs in which the prototypes do not learn.
        queue_size: earlier images over which assignments are balanced too, where a batch is smaller than the number of
            prototypes; 0 for none.
        queue_from_epoch: first epoch that uses the queue: before, features change too fast.
        views: two global crops, which are assigned, then local ones: {augment: crop, size: 16, count: 4}.
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.

    References:
        Caron et al., *Unsupervised learning of visual features by contrasting cluster assignments*, 2020, equation 2.
    """

    learns_from_labels = False
    num_views = None
    fewest_views = global_views = 2

    def __init__(
        self,
        temperature: Annotated[float, above(0)] = 0.1,
        epsilon: Annotated[float, above(0)] = 0.05,
        hidden_dim: Annotated[int, at_least(1)] = 512,
        output_dim: Annotated[int, at_least(1)] = 128,
        num_prototypes: Annotated[int, at_least(2)] = 512,
        freeze_prototypes_epochs: Annotated[int, at_least(0)] = 1,
        queue_size: Annotated[int, at_least(0)] = 0,
        queue_from_epoch: Annotated[int, at_least(0)] = 15,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "adamw",
        lr: Rate = 2e-3,
        weight_decay: Decay = 1e-6,
        **kwargs: Any,
    ) -> None:
        from lightly.models.modules.heads import SwaVProjectionHead

        check_arguments(SwAV, locals(), "--model.")
        super().__init__(views=views, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)
        self.head = SwaVProjectionHead(self.num_features, hidden_dim, output_dim)
        self.prototypes = nn.Linear(output_dim, num_prototypes, bias=False)
        self.queues: Any = nn.ModuleList([Queue(queue_size, output_dim) for _ in range(2)] if queue_size else [])
        self.after_step(0.0)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Each view finds the assignment of the other global view, or of both, over the temperature."""
        unit = [F.normalize(output) for output in outputs]
        prototypes = self.prototypes.weight.to(unit[0].dtype)  # of a trainer whose weights are of half precision
        similarities = [F.linear(vectors, prototypes) for vectors in unit]
        queued = self._queued(prototypes.detach())
        targets = [sinkhorn(similarities[i] / self.hparams["epsilon"], queued[i]) for i in range(2)]
        for queue, vectors in zip(self.queues, unit, strict=False):
            queue.push(gathered(vectors.detach()))
        return swapped_cross_entropy(targets, (similarity / self.hparams["temperature"] for similarity in similarities))

    def _queued(self, prototypes: Tensor) -> list[Tensor | None]:
        """Similarities of the images in the queues, over epsilon."""
        if not self.queues or self.current_epoch < self.hparams["queue_from_epoch"]:
            return [None, None]
        return [F.linear(queue.rows.to(prototypes), prototypes) / self.hparams["epsilon"] for queue in self.queues]

    def on_after_backward(self) -> None:
        """The prototypes wait for features to become useful."""
        if self.current_epoch < self.hparams["freeze_prototypes_epochs"]:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Prototypes are of unit length in each step."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))
