"""LeJEPA: views agree with the mean of the global ones, and projections are an isotropic Gaussian."""

from typing import Annotated, Any

import torch
from torch import Tensor

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Method, Optimizer, Rate, Share
from ssl_geometry.methods.parts.sigreg import random_directions, sigreg
from ssl_geometry.ranges import at_least, check_arguments

VIEWS = [ViewSpec(augment={"byol": {"blur": 0.0, "solarize": 0.2}}, count=2)]


class LeJEPA(Method):
    """LeJEPA with the authors' settings for ResNets, on views for CIFAR-10.

    Views made the first way in ``views`` are the global ones; others, such as smaller crops, follow their mean. The
    Gaussian is compared with the global batch, in directions that are new in each step, and the same in all processes
    and when a step is repeated.

    Args:
        sigreg_weight: lambda in [0, 1]; the squared distance between views has weight 1 - lambda. SIGReg grows with
            the global batch.
        directions: random directions in which SIGReg compares the projections with a Gaussian.
        hidden_dim: width of the projection head.
        output_dim: dimension of the projections.
        views: how the views are made, the global ones first.
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        min_lr: learning rate at the end of the cosine, scaled likewise.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.
        warmup_epochs: epochs in which the learning rate rises linearly, before the cosine.

    References:
        Balestriero & LeCun, *LeJEPA: provable and scalable self-supervised learning without the heuristics*, 2025.
    """

    learns_from_labels = False
    num_views = None
    fewest_views = 2
    global_views = 1

    def __init__(
        self,
        sigreg_weight: Share = 0.02,
        directions: Annotated[int, at_least(1)] = 1024,
        hidden_dim: Annotated[int, at_least(1)] = 2048,
        output_dim: Annotated[int, at_least(1)] = 64,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "adamw",
        lr: Rate = 5e-4,
        min_lr: Rate = 5e-7,
        weight_decay: Decay = 5e-4,
        warmup_epochs: Annotated[int, at_least(0)] = 1,
        **kwargs: Any,
    ) -> None:
        from lightly.models.modules.heads import LeJEPAProjectionHead

        check_arguments(LeJEPA, locals(), "--model.")
        rates: dict[str, Any] = {"lr": lr, "min_lr": min_lr, "warmup_epochs": warmup_epochs}
        super().__init__(views=views, optimizer=optimizer, weight_decay=weight_decay, **rates, **kwargs)
        self.head = LeJEPAProjectionHead(self.num_features, hidden_dim, output_dim)
        self.sigreg_weight, self.directions = sigreg_weight, directions

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Squared distance of all views from the mean of the global ones, and SIGReg of all views."""
        projections = torch.stack(outputs)
        center = projections[: len(self.training_views[0][1])].mean(0)
        apart = (projections - center).square().mean()
        seed, step = self.hparams["seed"], self.trainer.global_step
        directions = random_directions(self.directions, projections, seed=seed, step=step)
        return (1 - self.sigreg_weight) * apart + self.sigreg_weight * sigreg(projections, directions)
