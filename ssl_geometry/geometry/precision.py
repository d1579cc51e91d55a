"""Full precision of float32 products and convolutions, which torch settings may lower silently."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: Any = torch.backends  # made while torch is imported, unseen by type checkers
FLOAT32_SWITCHES: tuple[Any, ...] = (  # each below the one that it follows
    _BACKENDS,
    _BACKENDS.cudnn,  # of all of CUDA, products included
    _BACKENDS.mkldnn,
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
    _BACKENDS.cuda.matmul,
    _BACKENDS.mkldnn.conv,
    _BACKENDS.mkldnn.rnn,
    _BACKENDS.mkldnn.matmul,
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 and bfloat16 in float32 products and convolutions, whichever of torch's two interfaces allowed them.

    A switch without a value of its own inherits that of its parent. Parents are set first: a switch that then still
    differs has its own value, which is set and restored. A switch that inherits is never written, as that could not be
    undone.
    """
    matmul = _matmul_precision()
    found: list[tuple[Any, str]] = []
    for switch in FLOAT32_SWITCHES:
        if switch.fp32_precision != "ieee":
            found.append((switch, switch.fp32_precision))
            switch.fp32_precision = "ieee"
    if matmul != "highest":  # the older interface, which torch refuses to read where the two disagree
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)
        for switch, precision in reversed(found):
            switch.fp32_precision = precision


def _matmul_precision() -> str:
    """The precision of products in the older interface; "highest" where the newer interface was used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"
