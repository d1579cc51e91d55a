"""The network sees the first view twice."""

from collections.abc import Sequence

from torch import Tensor

from ssl_geometry.methods import SimCLR
from ssl_geometry.methods.base import Batch


class Faulty(SimCLR):
    def outputs(self, views: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
        return self.encode([views[0], views[0]])
