"""The moving average takes a step in each batch, also where the gradients of several make one step."""

from torch import Tensor

from ssl_geometry.methods.base import Batch
from tests.faulty_methods.working import Distilled


class Faulty(Distilled):
    def after_step(self, progress: float) -> None:
        pass

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        assert self.teacher is not None
        self.teacher.follow(self, 0.9)
        return super().loss(outputs, batch)
