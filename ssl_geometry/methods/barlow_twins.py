"""Barlow Twins: each feature correlates with itself over the two views, and with no other feature."""

from typing import Annotated, Any

from torch import Tensor

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Method, Rate
from ssl_geometry.methods.gather import gathered
from ssl_geometry.ranges import at_least, check_arguments

VIEWS = [ViewSpec(augment={"byol": {"blur": 0.0}}), ViewSpec(augment={"byol": {"blur": 0.0, "solarize": 0.2}})]


class BarlowTwins(Method):
    """Barlow Twins with lightly's recipe for CIFAR-10, and the paper's views without blur.

    The correlations are those of the global batch.

    Args:
        redundancy: lambda, the weight of correlations between different features.
        layers: linear layers of the projection head: 2 on CIFAR-10, 3 on ImageNet.
        hidden_dim: width of the projection head.
        output_dim: dimension of the projections, whose correlations form the loss.
        bias_lr: learning rate of biases and normalisation layers for a global batch of 256 images; null is lr.
        views: how both views are made: a list of two {augment: ...}.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.

    References:
        Zbontar et al., *Barlow Twins: self-supervised learning via redundancy reduction*, 2021, equation 1.
    """

    learns_from_labels = False
    num_views = 2

    def __init__(
        self,
        redundancy: Annotated[float, at_least(0)] = 5e-3,
        layers: Annotated[int, at_least(2)] = 2,
        hidden_dim: Annotated[int, at_least(1)] = 2048,
        output_dim: Annotated[int, at_least(1)] = 2048,
        bias_lr: Rate | None = None,
        views: list[ViewSpec] = VIEWS,
        lr: Rate = 0.12,
        weight_decay: Decay = 5e-4,
        **kwargs: Any,
    ) -> None:
        from lightly.loss import BarlowTwinsLoss
        from lightly.models.modules.heads import VICRegProjectionHead  # Barlow Twins' with as many layers as one likes

        check_arguments(BarlowTwins, locals(), "--model.")
        super().__init__(views=views, lr=lr, weight_decay=weight_decay, **kwargs)
        self.head = VICRegProjectionHead(self.num_features, hidden_dim, output_dim, layers)
        self.criterion = BarlowTwinsLoss(redundancy)
        self.bias_lr = bias_lr

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Squared distance of the views' correlation matrix from the identity, off the diagonal times lambda."""
        first, second = outputs
        return self.criterion(gathered(first), gathered(second))  # lightly's own gather normalises locally

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Biases and normalisation layers with a learning rate of their own, if there is one."""
        decayed, others = super().parameter_groups()
        lr = self.hparams["lr"]
        return [decayed, others if self.bias_lr is None or not lr else {**others, "lr_factor": self.bias_lr / lr}]
