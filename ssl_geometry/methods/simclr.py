"""SimCLR: two views of an image attract, all other images of the global batch repel."""

from typing import Annotated, Any

from torch import Tensor

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Method, Optimizer, Rate
from ssl_geometry.methods.parts.nt_xent import nt_xent
from ssl_geometry.ranges import above, at_least, check_arguments

VIEWS = [ViewSpec(augment="simclr", count=2)]


class SimCLR(Method):
    """SimCLR with the paper's views and temperature for CIFAR-10, and its learning rate for ImageNet.

    Negatives come from every process, with gradients through the gather.

    Args:
        temperature: tau of the NT-Xent loss, above 0.
        hidden_dim: width of the projection head; None is the width of the backbone's features.
        output_dim: dimension of the unit vectors that the loss compares.
        views: how both views are made, such as [{augment: {simclr: {strength: 1.0}}}].
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.

    References:
        Chen et al., *A simple framework for contrastive learning of visual representations*, 2020.
    """

    learns_from_labels = False
    num_views = 2

    def __init__(
        self,
        temperature: Annotated[float, above(0)] = 0.5,
        hidden_dim: Annotated[int, at_least(1)] | None = None,
        output_dim: Annotated[int, at_least(1)] = 128,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "lars",
        lr: Rate = 0.3,
        weight_decay: Decay = 1e-4,
        **kwargs: Any,
    ) -> None:
        from lightly.models.modules.heads import SimCLRProjectionHead  # with timm: here, not with every --help

        check_arguments(SimCLR, locals(), "--model.")
        super().__init__(views=views, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)
        self.head = SimCLRProjectionHead(self.num_features, hidden_dim or self.num_features, output_dim)
        self.temperature = temperature

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """NT-Xent between the projections of the two views."""
        first, second = outputs
        return nt_xent(first, second, self.temperature)
