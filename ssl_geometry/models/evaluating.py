"""Evaluation mode that leaves no trace."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which nothing of training changes: modes, buffers and random numbers are put back.

    Some forwards change buffers in evaluation mode as well. A network, or a transform of its images, that draws random
    numbers draws the same ones each time, and takes none from the streams of training.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2))  # the first is frozen
        >>> with evaluating(net):
        ...     assert not net.training
        >>> [part.training for part in net]
        [False, True]
    """
    modes = {part: part.training for part in module.modules()}
    buffers = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if not nn.parameter.is_lazy(buffer)
    ]
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.default_generator.manual_seed(0)
            for cuda in devices:
                with torch.cuda.device(cuda):
                    torch.cuda.manual_seed(0)
            module.eval()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        with torch.no_grad():
            for part, name, buffer, before in buffers:
                if getattr(part, name) is not buffer:
                    setattr(part, name, buffer)
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        for part, training in modes.items():
            part.training = training
