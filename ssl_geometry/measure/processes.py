"""Several processes share the images; what they found is put together so that all have the numbers of one."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_geometry.errors import ExitCode, Interrupted, UserError

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""How long processes wait while the first one works alone; one that dies ends the wait at once."""
AGREED = "agreed"
"""Marks an error that all processes know of."""


def this_process() -> tuple[int, int]:
    """Rank and number of processes.

    Example:
        >>> this_process()  # alone
        (0, 1)
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(values: Tensor) -> Tensor:
    """The sum over processes, on each of them; every process must call it."""
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


def hosts() -> dist.ProcessGroup:
    """The group of all processes for what lies on the host, whatever their devices; every process must call it."""
    return _gloo(dist.group.WORLD)


@lru_cache(maxsize=1)
def _gloo(world: object) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup), "every process is in it"
    return group


@contextmanager
def reaching() -> Iterator[None]:
    """What is exchanged in it over :func:`hosts` fails in one line where another process has ended.

    Raises:
        UserError: one has.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]  # without its place in gloo
        raise UserError(
            f"another process has ended or cannot be reached ({reason}); its own output may say why; start the "
            "command again"
        ) from error


def of_each(value: T) -> list[T]:
    """What each process has, in their order, on every process; every process must call it.

    Args:
        value: of this process; it is pickled.

    Example:
        >>> of_each(3)  # alone
        [3]
    """
    _, world_size = this_process()
    values = [value] * world_size
    if world_size > 1:
        with reaching():
            dist.all_gather_object(values, value, group=hosts())
    return values


@contextmanager
def agreeing() -> Iterator[None]:
    """What fails in one process fails in all: the first reports it, the others end with its exit code.

    Every process must come to the end of the block, where they wait for each other however long it takes, and inside
    of which a process that fails may keep no other waiting, except at the end of a block inside of it.

    Raises:
        UserError: on the first process, where another made out a mistake.
        RuntimeError: on the first process, if another failed with an unexpected error.
        Interrupted: on the others, without words.

    Example:
        >>> with agreeing():  # alone: as it is
        ...     raise UserError("k 0: expected at least 1")
        Traceback (most recent call last):
        ssl_geometry.errors.UserError: k 0: expected at least 1
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if is_agreed(error):  # at the end of a block inside of this one: the others leave this one as well
            raise
        own = error
    # Of a disk or a memory that is full: the latter is explained outside of this block.
    is_mistake = isinstance(own, UserError | OSError | MemoryError | torch.OutOfMemoryError)
    words = None if own is None else (is_mistake, str(own) or type(own).__name__)
    failed = [(rank, *failure) for rank, failure in enumerate(of_each(words)) if failure is not None]
    if not failed:
        return
    rank, mistake, reason = failed[0]
    this, world_size = this_process()
    agreed: Exception
    if own is not None and (this == 0 or not (mistake or isinstance(own, Interrupted))):
        agreed, own = own, own.__cause__ if isinstance(own.__cause__, Exception) else None
    elif this == 0:
        agreed = UserError(reason) if mistake else RuntimeError(f"process {rank} of {world_size}: {reason}")
    else:
        agreed = Interrupted("", ExitCode.MISTAKE if mistake else ExitCode.FAULT)
    agreed.__dict__[AGREED] = True
    raise agreed from own


def is_agreed(error: BaseException | None) -> bool:
    """Whether all processes know of it, or of its cause, from the end of a block of :func:`agreeing`."""
    return error is not None and (AGREED in error.__dict__ or is_agreed(error.__cause__))


def is_of_the_first(line: logging.LogRecord) -> bool:
    """Filter of a logger: only the first process logs messages that all have in common."""
    return this_process()[0] == 0


@contextmanager
def warned_once() -> Iterator[None]:
    """Only the first process shows warnings that all have in common."""
    rank, _ = this_process()
    with warnings.catch_warnings() if rank else nullcontext():
        if rank:
            warnings.simplefilter("ignore")
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Work that the other processes have no part in: whoever asks here finds a single process.

    Example:
        >>> with alone():
        ...     this_process()
        (0, 1)
    """
    world, dist.group.WORLD = dist.group.WORLD, None
    try:
        yield
    finally:
        dist.group.WORLD = world
