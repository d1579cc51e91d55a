"""Duplicate rows, found by sorting 64-bit hashes, which needs no atomics on any device."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


def row_keys(features: Float[Tensor, "N D"]) -> Int64[Tensor, " N"]:
    """A 64-bit hash of each row, for features of one dtype (float32 or float64); 0 and -0 are equal.

    Example:
        >>> a, b, c = row_keys(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]])).tolist()
        >>> a == b, a == c
        (True, False)
    """
    size = 8 // features.itemsize  # numbers in 64 bits
    words = -(-features.shape[1] // size)
    odd = torch.randint(2**62, (words,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    odd = odd.to(features.device)
    keys = []
    for part in row_blocks(features):
        rows = F.pad(features[part] + 0.0, (0, size * words - features.shape[1]))  # -0 becomes 0
        bits = rows.contiguous().view(torch.int64)
        mixed = (bits >> 32).bitwise_xor_(bits >> 16).bitwise_xor_(bits)  # the lower bits of small integers are 0
        keys.append(mixed.mul_(odd).sum(1))
    return torch.cat(keys)


def first_rows(keys: Int64[Tensor, " N"], seen: Int64[Tensor, " S"] | None = None) -> Int64[Tensor, " n"]:
    """The first row of each key, in ascending order.

    Args:
        keys: from :func:`row_keys`.
        seen: keys whose rows are left out.

    Example:
        >>> first_rows(torch.tensor([7, 3, 7, 5, 3]), seen=torch.tensor([5]))
        tensor([0, 1])
    """
    ordered, order = keys.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    if seen is not None:
        new &= ~torch.isin(ordered, seen)
    return order[new].sort().values


def row_blocks(features: Float[Tensor, "N D"]) -> Iterator[slice]:
    """Slices of few rows: on a CPU they fit into the cache and stay below the size that torch splits over threads."""
    step = max(1, (2**24 if features.is_cuda else 2**15) // features.shape[1])
    return (slice(start, start + step) for start in range(0, len(features), step))
