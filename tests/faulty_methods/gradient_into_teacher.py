"""The teacher is called with gradients, and learns them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ssl_geometry.methods.base import Batch
from tests.faulty_methods.working import Distilled


class Faulty(Distilled):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        assert self.teacher is not None
        self.teacher.requires_grad_(True)

    def outputs(self, views: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
        assert self.teacher is not None
        first, second = (self.predictor(output) for output in self.encode(views))
        targets = (self.teacher.head(self.teacher.backbone(view)) for view in views)
        return first, second, *targets
