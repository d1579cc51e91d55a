"""What measurements keep of every batch until the end of a pass: on the host, in memory or in files mapped into it."""

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_geometry.errors import UserError
from ssl_geometry.measure.processes import agreeing, hosts, reaching, this_process


def on_host(size: int, dtype: torch.dtype = torch.float32, folder: Path | None = None) -> Tensor:
    """An empty vector on the host.

    Args:
        size: its length.
        dtype: of its elements.
        folder: where a file takes what memory does not hold; it goes with the vector, whatever ends the process. None
            is memory.

    Raises:
        UserError: the disk has no room for it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vector = on_host(3, folder=Path(folder))
        ...     list(Path(folder).iterdir())
        []
        >>> vector.copy_(torch.arange(3))
        tensor([0., 1., 2.])
    """
    if folder is None or not size:
        return torch.empty(size, dtype=dtype)
    length = size * dtype.itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a disk that is found full later kills the process
                os.posix_fallocate(file.fileno(), 0, length)
            else:
                file.truncate(length)
            return torch.frombuffer(mmap.mmap(file.fileno(), length), dtype=dtype)
    except OSError as error:
        size_there = f"{length / 2**20:,.0f} MiB that memory does not hold"
        raise UserError(f"{folder}: no room for {size_there} ({error.strerror}); free some, or measure less") from error


class BatchStorage:
    """A tensor of each batch of this process on the host, end to end, until the first process takes those of all.

    Args:
        sizes: elements of the tensor of each batch, over all processes; process r of R has the batches r, r + R, ….
        dtype: of the elements.
        folder: as in :func:`on_host`.

    Example:
        >>> storage = BatchStorage([4, 2])
        >>> storage.put(1, torch.tensor([[5.0], [6.0]]))
        >>> storage.put(0, torch.zeros(2, 2))
        >>> storage.on_first()
        tensor([0., 0., 0., 0., 5., 6.])
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, folder: Path | None = None) -> None:
        rank, self._world_size = this_process()
        self._sizes, self._folder = list(sizes), folder
        own = self._sizes[rank :: self._world_size]
        self._kept = on_host(sum(own), dtype, folder)
        self._places = self._kept.split(own)

    def put(self, batch_number: int, values: Tensor) -> None:
        """Copy the tensor of one batch, numbered over all processes, to its place."""
        place = self._places[batch_number // self._world_size]
        place.view(values.shape).copy_(values)

    def on_first(self) -> Tensor | None:
        """All batches in their order on the first process, None on the others; every process must call it, once.

        Raises:
            UserError: the disk has no room for them.
        """
        if self._world_size == 1:
            return self._kept
        rank, _ = this_process()
        with agreeing():
            whole = None if rank else on_host(sum(self._sizes), self._kept.dtype, self._folder)
        places = () if whole is None else whole.split(self._sizes)
        for number, size in enumerate(self._sizes):
            owner, turn = number % self._world_size, number // self._world_size
            if not size or rank not in (0, owner):
                continue
            with reaching():
                if rank:
                    dist.send(self._places[turn], 0, group=hosts())
                elif owner:
                    dist.recv(places[number], owner, group=hosts())
                else:
                    places[number].copy_(self._places[turn])
        return whole
