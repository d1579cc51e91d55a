"""Work on many queries in slices: threads on a CPU, whole chunks on a GPU, memory that slices share."""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from ssl_geometry.geometry.precision import full_float32

T = TypeVar("T")
_memory = threading.local()


def over_chunks(work: Callable[[slice], T], n: int, device: torch.device, chunk: int | None = None) -> list[T]:
    """Apply a function to consecutive slices of n queries, without gradients or autocast.

    On a CPU every thread of torch takes whole slices and runs them alone. Small operations that are split over
    threads one by one wait for the slowest thread each time: 10 to 20 times slower where other processes use the
    cores.

    Args:
        work: a function of a slice that touches nothing shared.
        n: queries.
        device: where the tensors are.
        chunk: longest slice; None for 256 on a CPU and 8,192 elsewhere.

    Returns:
        The results in order.

    Example:
        >>> over_chunks(lambda r: r.stop - r.start, 10, torch.device("cpu"), chunk=5)
        [5, 5]
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    size = max(1, min(chunk or (256 if device.type == "cpu" else 8192), -(-n // threads)))
    slices = [slice(start, min(start + size, n)) for start in range(0, n, size)]

    inference = torch.is_inference_mode_enabled()  # a thread starts without the modes of its parent

    def alone(r: slice) -> T:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return work(r)

    if device.type != "cpu":
        with full_float32():
            return [alone(r) for r in slices]
    torch.set_num_threads(1)  # inside the slices
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(alone, slices))
    finally:
        torch.set_num_threads(threads)


def queries_at_once(candidates: Shaped[Tensor, "Q K"]) -> int:
    """Longest slice of queries with so many candidates each: K² numbers of a query stay in a core's cache.

    Example:
        >>> queries_at_once(torch.zeros(1000, 50)), queries_at_once(torch.zeros(1000, 128))
        (256, 64)
    """
    most = 8192 if candidates.device.type != "cpu" else 256
    return max(1, min(most, most * 64**2 // candidates.shape[1] ** 2))


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that the slices of a thread share: on a CPU fresh pages can cost more than the arithmetic done in them.

    Args:
        name: what it is used for; two uses at once need two names.
        shape: of the tensor.
        dtype: of the tensor.
        device: where it is; only on a CPU is memory shared.

    Returns:
        A tensor of whatever the last slice left there.
    """
    if device.type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device)
    held = _memory.__dict__  # of this thread, which over_chunks has started and ends
    size = math.prod(shape)
    if name not in held or held[name].dtype != dtype or held[name].numel() < size:
        held[name] = torch.empty(size, dtype=dtype)
    return held[name][:size].view(*shape)
