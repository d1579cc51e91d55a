"""The loss is a sum over the images."""

from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.methods import Supervised
from ssl_geometry.methods.base import Batch


class Faulty(Supervised):
    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        return F.cross_entropy(outputs[0], batch["label"], reduction="sum")
