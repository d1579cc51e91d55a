"""Negatives are those of all processes, but the gradient through those of other processes is lost."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.methods import SimCLR
from ssl_geometry.methods.base import Batch


def concat_all_gather(x: Tensor) -> Tensor:
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


class Faulty(SimCLR):
    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        first, second = (F.normalize(output) for output in outputs)
        logits = first @ concat_all_gather(second).T / self.temperature
        rank = dist.get_rank() if dist.is_initialized() else 0
        return F.cross_entropy(logits, torch.arange(len(first), device=first.device) + rank * len(first))
