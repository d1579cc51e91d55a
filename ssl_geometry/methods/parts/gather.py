"""The global batch: what all processes computed, in every process."""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from lightly.utils.dist import gather
from torch import Tensor


def gathered(rows: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "WB ..."]:
    """The rows of all processes in the order of their ranks, with gradients.

    A loss of all rows, computed in every process, then has the gradient that one process with all rows has: the
    backward sums over processes, and DDP takes the mean.

    Args:
        rows: of this process; every process has equally many.

    Returns:
        The rows themselves where there is one process.

    Example:
        >>> gathered(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return torch.cat(gather(rows))
