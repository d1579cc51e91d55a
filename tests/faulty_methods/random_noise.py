"""Noise comes from the global stream: another one in each process, and when a step is taken again."""

import torch
from torch import Tensor

from ssl_geometry.methods import SimCLR
from ssl_geometry.methods.base import Batch


class Faulty(SimCLR):
    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        noisy = [output + 0.1 * torch.randn_like(output) for output in outputs]
        return super().loss(tuple(noisy), batch)
