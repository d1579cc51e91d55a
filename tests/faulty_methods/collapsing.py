"""Nothing keeps images apart: the outputs come to be the same."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ssl_geometry.methods import SimCLR
from ssl_geometry.methods.base import Batch


class Faulty(SimCLR):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(optimizer="adamw", lr=0.02, **kwargs)
        self.head = nn.Linear(self.num_features, 16)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        first, second = outputs
        return 1 - F.cosine_similarity(first, second).mean()
