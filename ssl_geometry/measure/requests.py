"""What measurements ask of a pass: layers of a view, reduced inside the hook."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ssl_geometry.geometry.gram import gram_vector, pool

Reduction = Callable[[Tensor], Tensor]
Split = Literal["measure", "bank", "test"]


@dataclass(frozen=True)
class Request:
    """What a measurement wants of every batch: the layers of one view, reduced inside the hook.

    Args:
        layers: names of layers, in forward order.
        reduce: hashable function of a layer's output (B, ...); equal reductions of several measurements are computed
            once.
        view: how the images are seen: "clean", "own", or a policy or operation; see :meth:`Subject.view`.
        draw: number of the draw of a random view: two draws are two augmented views.
        split: which images: "measure" (the measurement images), "bank" (labelled training images) or "test".
        images: the first so many of them; None takes all.
    """

    layers: tuple[str, ...]
    reduce: Reduction
    view: str = "clean"
    draw: int = 0
    split: Split = "measure"
    images: int | None = None


Reduced = Mapping[Request, Mapping[str, Tensor]]
"""For each request, layer to reduced output."""


def pooled(activations: Tensor) -> Tensor:
    """The reduction of probes and neighbourhoods: averaged over space, float32."""
    return pool(activations).float()


@dataclass(frozen=True)
class GramVector:
    """The reduction that CKA asks of every layer.

    Args:
        size: images in a Gram matrix.
    """

    size: int

    def __call__(self, activations: Tensor) -> Tensor:
        """See :func:`ssl_geometry.geometry.gram.gram_vector`."""
        return gram_vector(activations, self.size)
