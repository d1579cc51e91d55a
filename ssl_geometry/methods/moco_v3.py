"""MoCo v3: a predictor on each view finds the teacher's output for the other one, the key, among those of the batch."""

from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Method, Optimizer, Rate, Share
from ssl_geometry.methods.parts.gather import gathered
from ssl_geometry.methods.parts.teacher import Teacher, rising_momentum
from ssl_geometry.ranges import above, at_least, check_arguments

VIEWS = [
    ViewSpec(augment={"byol": {"blur": 0.0}}),
    ViewSpec(augment={"byol": {"blur": 0.0, "solarize": 0.2}}),
]


def mlp(*widths: int, normalized: bool = True) -> nn.Module:
    """Linear layers with batch norm and ReLU between them; at the end batch norm without affine parameters, or none."""
    from lightly.models.modules.heads import ProjectionHead

    *hidden, last = pairwise(widths)
    blocks: list[Any] = [(*widths, nn.BatchNorm1d(widths[1]), nn.ReLU()) for widths in hidden]
    norm = nn.BatchNorm1d(last[1], affine=False) if normalized else None
    return ProjectionHead([*blocks, (*last, norm, None, False)])


class MoCoV3(Method):
    """Momentum contrast without a queue: negatives are the keys of all processes. The optimiser is that of ResNets.

    Args:
        temperature: tau of the loss, above 0.
        hidden_dim: width of projector and predictor.
        output_dim: dimension of the unit vectors that the loss compares.
        teacher_momentum: of the teacher at the first step; it rises to 1 at the last, along a cosine.
        freeze_patches: leave a vision transformer's patch projection as it was initialised, which keeps the training
            stable; other networks have none.
        views: how the first and the second view are made.
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.

    References:
        Chen, Xie & He, *An empirical study of training self-supervised vision transformers*, 2021, algorithm 1.
    """

    learns_from_labels = False
    num_views = 2
    teacher: Teacher

    def __init__(
        self,
        temperature: Annotated[float, above(0)] = 0.2,
        hidden_dim: Annotated[int, at_least(1)] = 4096,
        output_dim: Annotated[int, at_least(1)] = 256,
        teacher_momentum: Share = 0.99,
        freeze_patches: bool = True,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "lars",
        lr: Rate = 0.3,
        weight_decay: Decay = 1e-6,
        **kwargs: Any,
    ) -> None:
        check_arguments(MoCoV3, locals(), "--model.")
        super().__init__(views=views, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)
        patches = getattr(self.backbone, "patch_embed", None)
        if patches is not None and freeze_patches:
            patches.requires_grad_(False)
        # projectors of ResNets have two layers, of ViTs three; predictors of ResNets end without batch norm
        hidden = [hidden_dim] * (1 if patches is None else 2)
        self.head = mlp(self.num_features, *hidden, output_dim)
        self.predictor = mlp(output_dim, hidden_dim, output_dim, normalized=patches is not None)
        self.teacher = Teacher(self)
        self.temperature, self.teacher_momentum = temperature, teacher_momentum

    def outputs(self, views: Any, batch: Batch) -> tuple[Tensor, ...]:
        """Predictions for both views, then the teacher's keys of them."""
        predictions = self.predictor(torch.cat(self.encode(views))).chunk(2)
        return (*predictions, *self.encode(views, self.teacher))

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Cross-entropy of the key of the other view among those of all images, times 2 tau; summed over both."""
        first, second, key_of_first, key_of_second = (F.normalize(output) for output in outputs)
        start = (dist.get_rank() if dist.is_initialized() else 0) * len(first)
        own = torch.arange(start, start + len(first), device=first.device)
        logits = torch.cat([first @ gathered(key_of_second).T, second @ gathered(key_of_first).T]) / self.temperature
        return 4 * self.temperature * F.cross_entropy(logits, own.repeat(2))

    def after_step(self, progress: float) -> None:
        """The teacher follows, ever more slowly."""
        self.teacher.follow(self, rising_momentum(self.teacher_momentum, progress))
