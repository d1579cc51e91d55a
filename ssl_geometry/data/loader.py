"""Batches of one process, in order, read from memory or by worker processes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_geometry.data.images import Images
from ssl_geometry.data.plan import BatchPlan
from ssl_geometry.errors import UserError
from ssl_geometry.signals import block_signals, ignore_foreign_signals

logger = logging.getLogger(__name__)
Batch = dict[str, Tensor]


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
        >>> from ssl_geometry.data.plan import every_nth
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
                worker_init_fn=ignore_foreign_signals,
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
            with block_signals():  # the workers, which start here, keep it so
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
        """For a checkpoint that is written in the meantime, the batch given last was not trained on."""
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
