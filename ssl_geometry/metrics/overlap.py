"""Overlap of nearest neighbours between layers, over batches and ranks.

The state is the features themselves, with the index of each image: they are put in the order of the index, so that
neither the order of images nor the number of ranks changes anything.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ssl_geometry.errors import UserError
from ssl_geometry.geometry.overlap import all_alike, mutual_knn, neighbor_ids


class MutualKNN(Metric):
    """Share of the k nearest neighbours that each row layer has in common with each column layer.

    Chance is k/(N-1): state N beside the number. It stands beside CKA, which a few far images can dominate.

    Args:
        rows: names of the row layers.
        cols: names of the column layers; None compares the row layers with themselves.
        k: neighbours.

    Raises:
        KeyError: a batch lacks one of the layers.
        ValueError: a layer has more or fewer images than the index.
        UserError: an image fed twice, or not more than k images.

    References:
        Huh et al., *The Platonic representation hypothesis*, 2024.

    Example:
        >>> from torchvision.models import resnet18, resnet50
        >>> from ssl_geometry.geometry.cka import pool
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

    full_state_update = False
    is_differentiable = False
    index: list[Tensor]

    def __init__(self, rows: Sequence[str], cols: Sequence[str] | None = None, k: int = 10) -> None:
        super().__init__()
        self.rows = list(rows)
        self.cols = None if cols is None else list(cols)
        self.k = k
        self._names = self.rows + (self.cols or [])
        self.add_state("index", [], dist_reduce_fx="cat")
        # Features are kept flat: a rank that saw no image then joins in with nothing, whatever the width.
        for number in range(len(self._names)):
            self.add_state(f"features{number}", [], dist_reduce_fx="cat")

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
            index: the images' numbers, each once over all batches and ranks.
        """
        self.index.append(index)
        features = [x[name] for name in self.rows] + [(x if y is None else y)[name] for name in self.cols or []]
        for number, (name, part) in enumerate(zip(self._names, features, strict=True)):
            if len(part) != len(index):
                raise ValueError(f"MutualKNN: layer {name} has {len(part)} images, the index {len(index)}")
            getattr(self, f"features{number}").append(part.detach().float().flatten())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather over ranks; one without images joins in with an empty index of the right type."""
        if not self.index:
            self.index.append(torch.empty(0, dtype=torch.long, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> Float[Tensor, "L M"]:
        """The overlap in [0, 1], float64; NaN (with one warning that names the layers) where a layer does not vary."""
        index, order = dim_zero_cat(self.index).sort()
        if len(index) <= self.k:
            raise UserError(f"MutualKNN: k={self.k} neighbours need more than {self.k} images, got {len(index)}")
        twice = index[1:][index.diff() == 0]
        if len(twice):
            raise UserError(f"MutualKNN: image {int(twice[0])} was fed twice; feed each index once over all ranks")
        ids, same = [], []
        for number in range(len(self._names)):
            features = dim_zero_cat(getattr(self, f"features{number}")).view(len(index), -1)[order]
            ids.append(neighbor_ids(features, self.k))
            same.append(all_alike(features))
        if any(same):
            alike = dict.fromkeys(name for name, yes in zip(self._names, same, strict=True) if yes)
            warnings.warn(
                f"Mutual kNN is NaN for layers whose direction does not vary, or is not finite: {', '.join(alike)}",
                stacklevel=2,
            )
        size = len(self.rows)
        cols = slice(0 if self.cols is None else size, None)
        stacked, undefined = torch.stack(ids), torch.tensor(same, device=order.device)
        overlap = mutual_knn(stacked[:size], stacked[cols])
        return overlap.masked_fill(undefined[:size, None] | undefined[cols], torch.nan)
