"""A number is read in each step."""

from torch import Tensor

from ssl_geometry.methods import SimCLR
from ssl_geometry.methods.base import Batch


class Faulty(SimCLR):
    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        loss = super().loss(outputs, batch)
        self.running = 0.9 * getattr(self, "running", 0.0) + 0.1 * loss.item()
        return loss
