"""Where a training step would wait for the device, found on the CPU.

All that a step computes from images, parameters and buffers would be on the device. Such tensors are marked, and every
operation passes on the mark. Reading a number of a marked tensor, or an operation whose result's shape depends on
values, makes the host wait until the device has caught up. Operations on tensors of the host alone do not wait.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_geometry.conformance.verdict import current_line

READS = {
    Tensor.tolist: ".tolist()",
    Tensor.cpu: ".cpu()",
    Tensor.numpy: ".numpy()",
    Tensor.__array__: "a NumPy array of a tensor",
}
"""What the CPU does in C++ without an operation."""
FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray)
WORDS = {
    "_local_scalar_dense": ".item(), or a tensor as a number or a condition of Python",
    "index": "indexing by a boolean mask",
    "index_put_": "assignment to a boolean mask",
    "_index_put_impl_": "assignment to a boolean mask",
}
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
SHAPES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
WAITING = ("equal", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_lstsq")
"""Operations that read an error code or a number on CUDA, and that torch does not tag."""


class Waits:
    """Notes where marked tensors are read.

    Example:
        >>> waits, x = Waits(), torch.rand(4)
        >>> with waits.noted([x]):
        ...     _ = x.sum().item(), torch.rand(4).sum().item()  # the second is on the host
        >>> [note.partition(" at")[0] for note in waits.notes]
        ['.item(), or a tensor as a number or a condition of Python']
    """

    def __init__(self) -> None:
        self.notes: dict[str, None] = {}
        """What waited and in which line, each once, in order."""
        self._paused = False

    @contextmanager
    def noted(self, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
        """Watch what runs inside.

        Args:
            tensors: that would be on the device, and are not marked yet.
        """
        for tensor in tensors:
            _mark(tensor)
        with _Operations(self), _Functions(self):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not the method's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def note(self, what: str) -> None:
        """Add what waits in the current line."""
        if not self._paused:
            self.notes[f"{what} at {current_line()}"] = None


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS and _is_marked(args[0]):
            self.waits.note(READS[func])
        elif func is Tensor.to and _is_marked(args[0]) and "cpu" in (*args[1:2], kwargs.get("device")):
            self.waits.note('.to("cpu")')
        elif func in FROM_HOST and kwargs.get("device") is not None and not isinstance(args[0], Tensor):
            self.waits.note("numbers of Python copied to the device")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(_is_marked(x) for x in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        name = func._schema.name.rpartition("::")[2]
        if name in INDEXING:
            waits = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        else:
            sized = kwargs.get("output_size") is not None
            waits = name in WAITING or (not sized and any(tag in func.tags for tag in SHAPES))
        if waits:
            self.waits.note(WORDS.get(name, name))
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            _mark(tensor)
        return out


def _mark(tensor: Tensor) -> None:
    """On the storage, which views and detached tensors share."""
    if tensor.layout is torch.strided:
        tensor.untyped_storage().on_device = True  # type: ignore[attr-defined]


def _is_marked(tensor: Any) -> bool:
    strided = isinstance(tensor, Tensor) and tensor.layout is torch.strided
    return strided and getattr(tensor.untyped_storage(), "on_device", False)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)
