"""What training changes in a method, in its checkpoint and out of it."""

import pickle
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

PLAIN = (str, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size)
NOT_STATE = frozenset(vars(L.LightningModule())) | {"_hparams_initial"}
"""Attributes of any module, which torch and Lightning keep."""


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits; NaN equals NaN.

    Example:
        >>> same(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan])), same(torch.ones(2), torch.ones(3))
        (True, False)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same in both, or are in one alone."""
    return [name for name in {**a, **b} if name not in a or name not in b or not same(a[name], b[name])]


def copied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Names to copies of tensors, without their history."""
    return {name: tensor.detach().clone() for name, tensor in tensors}


def outside(method: nn.Module) -> dict[str, Tensor]:
    """Tensors, arrays, numbers and random streams on a module's attributes that are not in its ``state_dict``.

    Buffers that are not persistent are among them; metrics, which are computed anew in each epoch, are not.

    Args:
        method: the module.

    Returns:
        Path to a copy; a random stream as the bytes of its state, a number as those of its text.

    Example:
        >>> module = nn.Module()
        >>> module.queue, module.position = [torch.zeros(3)], 0
        >>> list(outside(module))
        ['queue[0]', 'position']
    """
    known = {id(tensor) for tensor in method.state_dict(keep_vars=True).values()}
    known |= {id(parameter) for parameter in method.parameters()}
    found: dict[str, Tensor] = {}
    skipped: set[nn.Module] = set()
    for path, module in method.named_modules():
        if module in skipped:
            continue
        if isinstance(module, Metric):
            skipped.update(module.modules())
            continue
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                found[f"{path}.{name}".lstrip(".")] = buffer.detach().clone()
        for name, value in vars(module).items():
            if name not in NOT_STATE:
                for place, tensor in _walk(value, known):
                    found[f"{path}.{name}".lstrip(".") + place] = tensor
    return found


def _walk(value: Any, seen: set[int], depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Tensors in a value, with the path that leads to each; ``seen`` are ids of what is not looked at."""
    if isinstance(value, int | float):
        yield "", torch.frombuffer(bytearray(repr(value).encode()), dtype=torch.uint8)
        return
    if isinstance(value, (*PLAIN, nn.Module)) or callable(value) or id(value) in seen or not depth:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield "", value.detach().clone()
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "biuf":
            yield "", torch.from_numpy(value.copy())
    elif isinstance(value, torch.Generator):
        yield "", value.get_state()
    elif isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
        yield "", torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from ((f"[{key!r}]{place}", tensor) for place, tensor in _walk(part, seen, depth - 1))
    elif isinstance(value, list | tuple | deque | set):
        for number, part in enumerate(value):
            yield from ((f"[{number}]{place}", tensor) for place, tensor in _walk(part, seen, depth - 1))
    elif not isinstance(value, L.Trainer) and hasattr(value, "__dict__"):
        for name, part in vars(value).items():
            yield from ((f".{name}{place}", tensor) for place, tensor in _walk(part, seen, depth - 1))


def optimizer_state(trainer: L.Trainer) -> dict[str, Tensor]:
    """What the trainer's optimisers keep of each parameter, such as momentum."""
    return {
        f"optimiser {which}, parameter {number}, {name}": value.detach().clone()
        for which, optimizer in enumerate(trainer.optimizers)
        for number, kept in optimizer.state_dict()["state"].items()
        for name, value in kept.items()
        if isinstance(value, Tensor)
    }
