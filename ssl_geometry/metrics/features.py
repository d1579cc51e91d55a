"""Base class of metrics whose state is the features of layers, over batches and ranks.

Features are sorted by the index of their image, so results depend neither on the order of images nor on the number of
ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class KeptRows(Metric):
    """Base of metrics that keep rows of every image until ``compute``, and gather them over ranks."""

    full_state_update = False
    is_differentiable = False

    def __init__(self) -> None:
        super().__init__()
        self._empty: dict[str, Tensor] = {}

    def _add_rows(self, name: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = ()) -> None:
        self.add_state(name, [], dist_reduce_fx="cat")
        self._empty[name] = torch.empty(0, *shape, dtype=dtype)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather over ranks; a rank without images contributes empty tensors of the right type."""
        for name, empty in self._empty.items():
            if not getattr(self, name):
                getattr(self, name).append(empty.to(self.device))
        super().sync(*args, **kwargs)


class LayerFeatures(KeptRows):
    """Base of metrics whose state is the features of layers.

    Args:
        layers: names, for messages.
        integers: further states of one integer per image, such as labels.
    """

    index: list[Tensor]

    def __init__(self, layers: Sequence[str], integers: Sequence[str] = ()) -> None:
        super().__init__()
        self._layers, self._widths = list(layers), list[int]()
        for name in ("index", *integers):
            self._add_rows(name, torch.long)
        # Features are kept flat: a rank without images then contributes an empty tensor, whatever the width.
        for number in range(len(self._layers)):
            self._add_rows(f"features{number}")

    def _add(self, features: Sequence[Float[Tensor, "B D"]], **integers: Int64[Tensor, " B"]) -> None:
        """Add one batch: the features of each layer, the index and the other integers. Invalid batches change nothing.

        Raises:
            ValueError: sizes that do not match the index, or the widths of earlier batches.
        """
        images = len(integers["index"])
        for name, values in integers.items():
            if values.shape != (images,):
                raise ValueError(f"{self._name}: {name} of shape {tuple(values.shape)} for {images} images")
        widths = [part.shape[1:].numel() for part in features]
        for layer, part, width, before in zip(
            self._layers, features, widths, self._widths if self.index else widths, strict=True
        ):
            if len(part) != images:
                raise ValueError(f"{self._name}: layer {layer} has {len(part)} images, the index {images}")
            if width != before:
                raise ValueError(f"{self._name}: layer {layer} has {width} features, {before} in the batches before")
        self._widths = widths
        for name, values in integers.items():
            getattr(self, name).append(values)
        for number, part in enumerate(features):
            getattr(self, f"features{number}").append(part.detach().float().flatten())

    def _order(self) -> Int64[Tensor, " N"]:
        """The permutation that sorts the images by their index.

        Raises:
            ValueError: an image fed twice.
        """
        index, order = dim_zero_cat(self.index).sort()
        twice = index[1:][index.diff() == 0]
        if len(twice):
            raise ValueError(f"{self._name}: image {int(twice[0])} was fed twice; feed each index once over all ranks")
        return order

    def _features(self, number: int, order: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Features of one layer, sorted, float32."""
        return dim_zero_cat(getattr(self, f"features{number}")).view(len(order), -1)[order]

    @property
    def _name(self) -> str:
        return type(self).__name__
