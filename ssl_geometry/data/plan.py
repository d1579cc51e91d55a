"""Which images make up which batch of which process."""

import logging
import math
import os
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ssl_geometry.errors import UserError

logger = logging.getLogger(__name__)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def size_within(option: str, asked: int | None, usual: int, most: int, there: str) -> int:
    """A size that a user asked for, or the usual one; where the data set has less, as much as it has.

    Args:
        option: as it is typed.
        asked: what was given; None is nothing.
        usual: the default.
        most: what there is.
        there: says so, for messages.

    Raises:
        UserError: more was asked for than there is.

    Example:
        >>> size_within("--k", None, 20, 100, "100 images"), size_within("--k", None, 20, 7, "7 images")
        (20, 7)
        >>> size_within("--k", 20, 20, 7, "there are 7 images")
        Traceback (most recent call last):
        ssl_geometry.errors.UserError: --k 20: there are 7 images; set at most 7, or null for as many as fit
    """
    if asked is not None:
        if asked > most:
            nothing = "null" if option.startswith("--") else "None"  # as it is typed, in a command or in a script
            raise UserError(f"{option} {asked}: {there}; set at most {most}, or {nothing} for as many as fit")
        return asked
    if most < usual:
        logger.info(f"{option} {most} (by default {usual}): {there}")
    return min(usual, most)


def shares(n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[slice]:
    """Training: this process's slice of each global batch of ``batch_size``; an incomplete last batch is dropped.

    Example:
        >>> shares(9, 4, rank=1, world_size=2)
        [slice(2, 4, None), slice(6, 8, None)]
    """
    share = batch_size // world_size
    starts = range(0, n - batch_size + 1, batch_size)
    return [slice(start + rank * share, start + (rank + 1) * share) for start in starts]


def every_nth(n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[slice]:
    """Measuring: every ``world_size``-th of the batches that one process would see; some get one batch fewer.

    Example:
        >>> every_nth(5, 2), every_nth(5, 2, rank=1, world_size=2)
        ([slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)], [slice(2, 4, None)])
    """
    starts = range(rank * batch_size, n, world_size * batch_size)
    return [slice(start, min(start + batch_size, n)) for start in starts]


def evenly(n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[slice]:
    """Lightning's evaluation loops: as many batches in each process, at most ``batch_size`` each, sizes within one.

    These loops communicate at each batch, so a process with fewer of them would leave the others waiting.

    Example:
        >>> evenly(5, 2), evenly(5, 2, rank=1, world_size=2)
        ([slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)], [slice(1, 2, None), slice(3, 5, None)])
    """
    n_batches = world_size * math.ceil(n / (world_size * batch_size))
    bounds = [i * n // n_batches for i in range(n_batches + 1)]
    return [slice(bounds[i], bounds[i + 1]) for i in range(rank, n_batches, world_size)]


class BatchPlan:
    """Which rows each batch of one process holds, epoch by epoch.

    Args:
        rows: rows to go through, (N,) int64.
        slices: the batches, as parts of the order of ``rows``.
        seed: shuffles the rows again in each epoch, the same in every process; None leaves them as they are.

    Example:
        >>> list(BatchPlan(torch.tensor([7, 8, 9]), every_nth(3, 2)))
        [[7, 8], [9]]
    """

    def __init__(self, rows: Int64[Tensor, " N"], slices: list[slice], seed: int | None = None) -> None:
        self.rows = rows
        self.slices = slices
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def order(self) -> Int64[Tensor, " N"]:
        """All rows in the order of this epoch, (N,) int64."""
        if self.seed is None:
            return self.rows
        return self.rows[torch.from_numpy(np.random.default_rng((self.seed, self.epoch)).permutation(len(self.rows)))]

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order().tolist()
        return (rows[s] for s in self.slices[self.start :])
