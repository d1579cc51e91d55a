"""VICReg: two views of an image agree, each feature keeps its variance, and features do not repeat each other."""

from typing import Annotated, Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Method, Optimizer, Rate
from ssl_geometry.methods.parts.gather import gathered
from ssl_geometry.ranges import at_least, check_arguments

VIEWS = [ViewSpec(augment={"byol": {"blur": 0.0, "solarize": 0.1, "scale": (0.2, 1.0)}}, count=2)]
SMALLEST_VARIANCE = 1e-4

Weight = Annotated[float, at_least(0)]


class VICReg(Method):
    """VICReg with solo-learn's head and views for CIFAR-10, and the LARS of the paper.

    Variances and covariances are those of the global batch.

    Args:
        invariance: weight of the squared distance between the projections of the two views.
        variance: weight of the hinge that keeps the standard deviation of each feature at 1.
        covariance: weight of the squared covariances between different features.
        layers: linear layers of the projection head.
        hidden_dim: width of the projection head.
        output_dim: dimension of the projections.
        views: how both views are made, such as [{augment: {simclr: {strength: 1.0}}}].
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.

    References:
        Bardes, Ponce & LeCun, *VICReg: variance-invariance-covariance regularization*, 2022, equations 1 to 6.
    """

    learns_from_labels = False
    num_views = 2

    def __init__(
        self,
        invariance: Weight = 25.0,
        variance: Weight = 25.0,
        covariance: Weight = 1.0,
        layers: Annotated[int, at_least(2)] = 3,
        hidden_dim: Annotated[int, at_least(1)] = 2048,
        output_dim: Annotated[int, at_least(1)] = 2048,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "lars",
        lr: Rate = 0.3,
        weight_decay: Decay = 1e-4,
        **kwargs: Any,
    ) -> None:
        from lightly.models.modules.heads import VICRegProjectionHead

        check_arguments(VICReg, locals(), "--model.")
        super().__init__(views=views, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)
        self.head = VICRegProjectionHead(self.num_features, hidden_dim, output_dim, layers)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Invariance, variance and covariance of the projections of the two views, weighted."""
        first, second = (gathered(output) for output in outputs)
        loss = self.invariance * F.mse_loss(first, second)
        for z in (first, second):
            loss = loss + self.variance * variance_loss(z) / 2 + self.covariance * covariance_loss(z)
        return loss


def variance_loss(z: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """By how much the standard deviations of features fall short of 1, on average.

    Example:
        >>> import torch
        >>> round(float(variance_loss(torch.tensor([[0.0, -2.0], [0.0, 2.0]]))), 4)  # sqrt(1e-4) of 0, 1 is exceeded
        0.495
    """
    return F.relu(1 - (z.var(0) + SMALLEST_VARIANCE).sqrt()).mean()


def covariance_loss(z: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Sum of the squared covariances between different features, over the number of features.

    Example:
        >>> import torch
        >>> covariance_loss(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))  # all covariances are 2
        tensor(4.)
    """
    centred = z - z.mean(0)
    covariances = centred.T @ centred / (len(z) - 1)
    covariances.diagonal().zero_()  # lightly's VICRegLoss takes a mask, for which it waits for the device
    return covariances.square().sum() / z.shape[1]
