"""Batches of one process, in order: which rows each batch holds, and what reads them.

Global batch b of epoch e holds the same images in the same order for any number of processes: the order is a pure
function of (seed, epoch), and each process takes its slice. Evaluation never pads or repeats: process r of R takes the
batches r, r + R, … of the one list.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_geometry.data.datasets import Images
from ssl_geometry.errors import UserError
from ssl_geometry.signals import obey_the_parent_alone, withheld

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]


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
            raise UserError(f"{option} {asked}: {there}; set at most {most}, or null for as many as fit")
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
        seed: shuffles the rows anew in each epoch, the same in every process; None leaves them as they are.

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


class Loader:
    """The batches of one process, in order; Lightning and plain loops iterate it.

    It can be resumed within an epoch: the data module stores its ``state_dict`` in the checkpoint.

    Args:
        images: decoded ones give batches on their device by one index_select, others are read by worker processes.
        plan: rows of each batch.
        num_workers: worker processes, 0 to read in this one.
        pin_memory: put what workers read in page-locked memory, for a faster copy to a CUDA device.
        keep_workers: leave the workers running between epochs.

    Example:
        >>> images = Images(torch.tensor([1, 0, 2]), torch.zeros(3, 3, 4, 4, dtype=torch.uint8))
        >>> [batch["label"].tolist() for batch in Loader(images, BatchPlan(torch.arange(3), every_nth(3, 2)))]
        [[1, 0], [2]]
    """

    def __init__(
        self,
        images: Images,
        plan: BatchPlan,
        num_workers: int = 0,
        pin_memory: bool = False,
        keep_workers: bool = False,
    ) -> None:
        self.images = images
        self.sampler = self.batch_sampler = plan  # where Lightning looks for ``set_epoch``
        self.batch_size = max((part.stop - part.start for part in plan.slices), default=0)
        self._position = self._resume = {"epoch": 0, "batch": 0}
        self._reader: DataLoader | None = None
        if num_workers or not images.in_memory:
            self._reader = DataLoader(
                _Reader(images),
                batch_sampler=plan,
                num_workers=num_workers,
                collate_fn=_as_it_is,
                worker_init_fn=obey_the_parent_alone,
                pin_memory=pin_memory,
                persistent_workers=keep_workers and num_workers > 0,
                generator=torch.Generator(),  # else each epoch draws its workers' seed from the global generator
            )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        plan = self.sampler
        plan.start = self._resume["batch"] if self._resume["epoch"] == plan.epoch else 0
        self._resume = {"epoch": 0, "batch": 0}
        for number, batch in enumerate(self._batches(plan), plan.start + 1):
            self._position = {"epoch": plan.epoch, "batch": number}
            yield batch

    def _batches(self, plan: BatchPlan) -> Iterator[Batch]:
        if self._reader is None:
            rows = plan.order().to(self.images.labels.device)
            for part in plan.slices[plan.start :]:
                yield self.images[rows[part]]
        else:
            with withheld():  # the workers, which start here, keep it so
                batches = iter(self._reader)
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it that were given."""
        return self._position

    @contextmanager
    def without_the_last(self) -> Iterator[None]:
        """For a checkpoint that is written meanwhile, the batch given last was not trained on."""
        position, self._position = self._position, {**self._position, "batch": self._position["batch"] - 1}
        yield
        self._position = position

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin that epoch after the batches that were given; other epochs begin at their first."""
        self._resume = state


class _Reader(Dataset):
    """Batches for worker processes; a user's mistake is handed back whole, for torch would wrap it in a traceback."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitems__(self, rows: list[int]) -> Batch | UserError:
        try:
            return self.images[torch.tensor(rows)]
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch
