"""SimSiam: from one view, a predictor gives the projection of the other, to which no gradient flows."""

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Method, Rate
from ssl_geometry.ranges import at_least, check_arguments

VIEWS = [ViewSpec(augment={"simclr": {"scale": (0.2, 1.0)}}, count=2)]


class SimSiam(Method):
    """SimSiam with the paper's recipe for CIFAR-10.

    The predictor has a constant learning rate: neither warm-up nor cosine.

    Args:
        layers: linear layers of the projection head: 2 on CIFAR-10, 3 on ImageNet.
        hidden_dim: width of the projection head.
        output_dim: dimension of the projections.
        predictor_dim: width of the predictor's hidden layer, a bottleneck.
        constant_predictor_lr: false has the predictor follow the schedule as well.
        views: how both views are made, such as [{augment: {simclr: {strength: 1.0}}}].
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.
        warmup_epochs: epochs in which the learning rate rises linearly, before the cosine.

    References:
        Chen & He, *Exploring simple siamese representation learning*, 2021, equation 4 and appendix D.
    """

    learns_from_labels = False
    num_views = 2

    def __init__(
        self,
        layers: Annotated[int, at_least(1)] = 2,
        hidden_dim: Annotated[int, at_least(1)] = 2048,
        output_dim: Annotated[int, at_least(1)] = 2048,
        predictor_dim: Annotated[int, at_least(1)] = 512,
        constant_predictor_lr: bool = True,
        views: list[ViewSpec] = VIEWS,
        lr: Rate = 0.03,
        weight_decay: Decay = 5e-4,
        warmup_epochs: Annotated[int, at_least(0)] = 0,
        **kwargs: Any,
    ) -> None:
        from lightly.models.modules.heads import ProjectionHead, SimSiamPredictionHead

        check_arguments(SimSiam, locals(), "--model.")
        super().__init__(views=views, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **kwargs)
        widths = [self.num_features, *[hidden_dim] * (layers - 1)]
        hidden = [(width, hidden_dim, nn.BatchNorm1d(hidden_dim), nn.ReLU()) for width in widths[:-1]]
        last = (widths[-1], output_dim, nn.BatchNorm1d(output_dim, affine=False), None)
        self.head = ProjectionHead([*hidden, last])
        self.predictor = SimSiamPredictionHead(output_dim, predictor_dim, output_dim)
        self.constant_predictor_lr = constant_predictor_lr

    def outputs(self, views: Any, batch: Batch) -> tuple[Tensor, ...]:
        """Projections of both views, then what the predictor makes of them."""
        projections = self.encode(views)
        return *projections, *self.predictor(torch.cat(projections)).chunk(2)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Mean negative cosine similarity of each prediction and the other view's projection."""
        first, second, from_first, from_second = outputs
        there = cosine_similarity(from_first, second.detach()).mean()
        back = cosine_similarity(from_second, first.detach()).mean()
        return -(there + back) / 2

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The predictor's parameters in groups of their own, which the schedule of the learning rate leaves alone."""
        predictor = set(self.predictor.parameters())
        return [
            {**group, "params": params, "constant_lr": constant}
            for group in super().parameter_groups()
            for params, constant in (
                ([p for p in group["params"] if p not in predictor], False),
                ([p for p in group["params"] if p in predictor], self.constant_predictor_lr),
            )
        ]
