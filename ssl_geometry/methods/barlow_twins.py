"""Barlow Twins: each feature correlates with itself over the two views, and with no other feature."""

from typing import Annotated, Any

from torch import Tensor

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Method, Optimizer, Rate
from ssl_geometry.methods.parts.gather import gathered
from ssl_geometry.ranges import at_least, check_arguments

VIEWS = [ViewSpec(augment={"byol": {"blur": 0.0}}), ViewSpec(augment={"byol": {"blur": 0.0, "solarize": 0.2}})]


class BarlowTwins(Method):
    """Barlow Twins with solo-learn's recipe for CIFAR-10, and the LARS of the paper.

    The correlations are those of the global batch.

    Args:
        redundancy: lambda, the weight of correlations between different features.
        layers: linear layers of the projection head.
        hidden_dim: width of the projection head.
        output_dim: dimension of the projections, whose correlations form the loss.
        bias_lr_factor: multiplies the learning rate of biases and normalisation layers, which LARS does not adapt to
            the size of the loss: 196 / output_dim in the authors' code.
        views: how both views are made: a list of two {augment: ...}.
        optimizer: lars, sgd or adamw.
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
        layers: Annotated[int, at_least(2)] = 3,
        hidden_dim: Annotated[int, at_least(1)] = 2048,
        output_dim: Annotated[int, at_least(1)] = 2048,
        bias_lr_factor: Annotated[float, at_least(0)] = 0.1,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "lars",
        lr: Rate = 0.3,
        weight_decay: Decay = 1e-4,
        **kwargs: Any,
    ) -> None:
        from lightly.loss import BarlowTwinsLoss
        from lightly.models.modules.heads import VICRegProjectionHead  # Barlow Twins' with as many layers as one likes

        check_arguments(BarlowTwins, locals(), "--model.")
        super().__init__(views=views, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)
        self.head = VICRegProjectionHead(self.num_features, hidden_dim, output_dim, layers)
        self.criterion = BarlowTwinsLoss(redundancy)
        self.bias_lr_factor = bias_lr_factor

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Squared distance of the views' correlation matrix from the identity, off the diagonal times lambda."""
        first, second = outputs
        return self.criterion(gathered(first), gathered(second))  # lightly's own gather normalises locally

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Biases and normalisation layers with a learning rate of their own."""
        decayed, others = super().parameter_groups()
        return [decayed, {**others, "lr_factor": self.bias_lr_factor}]
