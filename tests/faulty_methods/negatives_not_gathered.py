"""Negatives are those of one process: the loss depends on the number of processes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.methods import SimCLR
from ssl_geometry.methods.base import Batch


class Faulty(SimCLR):
    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        first, second = (F.normalize(output) for output in outputs)
        return F.cross_entropy(first @ second.T / self.temperature, torch.arange(len(first), device=first.device))
