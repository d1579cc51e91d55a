"""Several processes share the images; what they found is put together so that all have the numbers of one."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def this_process() -> tuple[int, int]:
    """Rank and number of processes.

    Example:
        >>> this_process()  # alone
        (0, 1)
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(values: Tensor) -> Tensor:
    """The sum over processes, on each of them; every process must call it.

    Args:
        values: of this process's images.
    """
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def gathered(batches: dict[int, Tensor]) -> dict[int, Tensor]:
    """What each process has of the batches, on every process, in the order of the batches; every process must call it.

    Args:
        batches: number of the batch over all processes to what was taken of it, on the host.
    """
    _, world_size = this_process()
    parts: list[Any] = [batches]
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, batches)
    return dict(sorted((number, taken) for part in parts for number, taken in part.items()))
