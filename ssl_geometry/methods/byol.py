"""BYOL: a predictor on one view finds what a slowly moving teacher makes of the other; nothing repels."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Method, Optimizer, Rate, Share
from ssl_geometry.methods.parts.teacher import Teacher, rising_momentum
from ssl_geometry.ranges import at_least, check_arguments

VIEWS = [
    ViewSpec(augment={"byol": {"blur": 0.0}}),
    ViewSpec(augment={"byol": {"blur": 0.0, "solarize": 0.2}}),
]


class BYOL(Method):
    """Bootstrap your own latent, symmetric: each view predicts the teacher's projection of the other.

    The optimiser is that of lightly's CIFAR-10 benchmark: SGD with 0.06 and decay 5e-4 for 128 images. Its loss is a
    quarter of the paper's, which stands here: the learning rate is a quarter, and the decay four times as much, which
    is the same training.

    Args:
        hidden_dim: width of projector and predictor.
        output_dim: dimension of the projections.
        teacher_momentum: of the teacher at the first step; it rises to 1 at the last, along a cosine.
        views: how the first and the second view are made.
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.

    References:
        Grill et al., *Bootstrap your own latent: a new approach to self-supervised learning*, 2020, equation 2.
    """

    learns_from_labels = False
    num_views = 2
    teacher: Teacher

    def __init__(
        self,
        hidden_dim: Annotated[int, at_least(1)] = 4096,
        output_dim: Annotated[int, at_least(1)] = 256,
        teacher_momentum: Share = 0.996,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "sgd",
        lr: Rate = 0.03,
        weight_decay: Decay = 2e-3,
        **kwargs: Any,
    ) -> None:
        from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead

        check_arguments(BYOL, locals(), "--model.")
        super().__init__(views=views, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)
        self.head = BYOLProjectionHead(self.num_features, hidden_dim, output_dim)
        self.predictor = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.teacher = Teacher(self)
        self.teacher_momentum = teacher_momentum

    def outputs(self, views: Any, batch: Batch) -> tuple[Tensor, ...]:
        """Predictions for both views, then the teacher's projections of them."""
        predictions = self.predictor(torch.cat(self.encode(views))).chunk(2)
        return (*predictions, *self.encode(views, self.teacher))

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Squared distances of unit vectors, 2 - 2 cos, summed over both directions: in [0, 8]."""
        first, second, target_of_first, target_of_second = outputs
        cosines = F.cosine_similarity(first, target_of_second) + F.cosine_similarity(second, target_of_first)
        return 4 - 2 * cosines.mean()

    def after_step(self, progress: float) -> None:
        """The teacher follows, ever more slowly."""
        self.teacher.follow(self, rising_momentum(self.teacher_momentum, progress))
