"""The last rows of many batches, as the negatives of MoCo and the images that SwAV balances its codes over."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn


class Queue(nn.Module):
    """A ring buffer: new rows take the place of the oldest. It begins with random unit vectors.

    All of it is in the checkpoint, and nothing waits for the device: the position is a tensor. A loss that keeps
    ``rows`` for its backward, and pushes before that, must take a clone of them.

    Args:
        length: K, how many rows it holds; no multiple of the batch is needed.
        width: D, of a row.

    Example:
        >>> queue = Queue(length=3, width=1)
        >>> queue.push(torch.tensor([[1.0], [2.0]]))
        >>> queue.push(torch.tensor([[3.0], [4.0]]))
        >>> queue.rows.flatten(), queue.position
        (tensor([4., 2., 3.]), tensor(1))
    """

    rows: Float[Tensor, "K D"]
    position: Int64[Tensor, ""]
    """Of the oldest row, which the next one replaces."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(length, width)))
        self.register_buffer("position", torch.tensor(0))

    @torch.no_grad()
    def push(self, rows: Float[Tensor, "B D"]) -> None:
        """Take in rows, the last of them as the newest.

        Args:
            rows: the same in all processes, as from :func:`~ssl_geometry.methods.parts.gather.gathered`. Of more than K
                the last K are kept.
        """
        length = len(self.rows)
        number = torch.arange(len(rows), device=rows.device)[-length:]
        self.rows.index_copy_(0, (self.position + number) % length, rows[-length:].to(self.rows.dtype))
        self.position.add_(len(rows)).remainder_(length)
