"""Overlap of nearest neighbours between layers, and between views of the same images, over batches and ranks."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_geometry.geometry.overlap import mutual_knn, neighbor_ids
from ssl_geometry.metrics.features import LayerFeatures


class MutualKNN(LayerFeatures):
    """Share of the k nearest neighbours that each row layer has in common with each column layer.

    The chance level is k/(N-1), so report N with it. Use it together with CKA, which a few outliers can dominate.

    Args:
        rows: names of the row layers.
        cols: names of the column layers; None compares the row layers with themselves.
        k: neighbours.

    Raises:
        KeyError: a batch lacks one of the layers.
        ValueError: a layer has more or fewer images than the index, or another width than before; an image fed twice,
            or not more than k images.

    References:
        Huh et al., *The Platonic representation hypothesis*, 2024.

    Example:
        >>> from torchvision.models import resnet18, resnet50
        >>> from ssl_geometry.geometry.gram import pool
        >>> from ssl_geometry.models.taps import Taps
        >>> reduce = lambda name, activations: pool(activations)
        >>> a = Taps(resnet18().eval(), "stages", reduce)
        >>> b = Taps(resnet50().eval(), "post_residual", reduce)
        >>> overlap = MutualKNN(a.names, b.names, k=5)
        >>> with a, b, torch.no_grad():
        ...     for index in torch.arange(16).split(8):
        ...         images = torch.rand(8, 3, 32, 32)
        ...         overlap.update(a(images), b(images), index=index)
        >>> overlap.compute().shape
        torch.Size([4, 16])
    """

    def __init__(self, rows: Sequence[str], cols: Sequence[str] | None = None, k: int = 10) -> None:
        super().__init__([*rows, *(cols or [])])
        self.rows = list(rows)
        self.cols = None if cols is None else list(cols)
        self.k = k

    def update(
        self,
        x: Mapping[str, Float[Tensor, "B D"]],
        y: Mapping[str, Float[Tensor, "B D"]] | None = None,
        *,
        index: Int64[Tensor, " B"],
    ) -> None:
        """Add one batch.

        Args:
            x: a vector for each image, of each row layer.
            y: the same of each column layer; None takes them from ``x``.
            index: index of each image, unique over all batches and ranks.
        """
        features = [x[name] for name in self.rows] + [(x if y is None else y)[name] for name in self.cols or []]
        self._add(features, index=index)

    def compute(self) -> Float[Tensor, "L M"]:
        """The overlap in [0, 1], float64; NaN, with one warning that names them, for degenerate layers."""
        ids, undefined = self._neighbors()
        size = len(self.rows)
        cols = slice(0 if self.cols is None else size, None)
        return mutual_knn(ids[:size], ids[cols]).masked_fill(undefined[:size, None] | undefined[cols], torch.nan)

    def _neighbors(self) -> tuple[Int64[Tensor, "L N k"], Bool[Tensor, " L"]]:
        """The neighbours in each layer, and which layers are degenerate."""
        order = self._order()
        if len(order) <= self.k:
            raise ValueError(f"{self._name}: k={self.k} neighbours need more than {self.k} images, got {len(order)}")
        ids, degenerate = [], []
        for number in range(len(self._layers)):
            features = self._features(number, order)
            ids.append(neighbor_ids(features, self.k))
            degenerate.append(bool((ids[-1] < 0).all()))
        if any(degenerate):
            names = dict.fromkeys(name for name, yes in zip(self._layers, degenerate, strict=True) if yes)
            warnings.warn(
                f"Mutual kNN is NaN for layers whose direction does not vary, or is not finite: {', '.join(names)}",
                stacklevel=3,
            )
        return torch.stack(ids), torch.tensor(degenerate, device=order.device)


class InvarianceKNN(MutualKNN):
    """Share of the k nearest neighbours that each layer has in common with itself, on two views of the same images.

    The chance level is k/(N-1), so report N with it.

    Args:
        layers: names of the layers.
        k: neighbours.

    Example:
        >>> overlap, images = InvarianceKNN(["layer"], k=5), torch.randn(100, 8)
        >>> overlap.update({"layer": images}, {"layer": 2 * images}, index=torch.arange(100))
        >>> float(overlap.compute())  # directions are the same
        1.0
    """

    def __init__(self, layers: Sequence[str], k: int = 10) -> None:
        super().__init__(layers, layers, k)

    def compute(self) -> Float[Tensor, " L"]:
        """The overlap in [0, 1], float64; NaN, with one warning that names them, for degenerate layers."""
        ids, undefined = self._neighbors()
        pairs = zip(*ids.unsqueeze(1).split(len(self.rows)), strict=True)
        overlap = torch.cat([mutual_knn(x, y).flatten() for x, y in pairs])
        return overlap.masked_fill(undefined.view(2, -1).any(0), torch.nan)
