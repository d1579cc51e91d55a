"""Pooled features of all images of a split, each row in its place: what classifiers of frozen features learn from."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ssl_geometry.measure.measurement import Measured, Measurement, Occasion
from ssl_geometry.measure.requests import Reduced, Request, Split, pooled
from ssl_geometry.measure.storage import BatchStorage
from ssl_geometry.measure.subject import Subject


class Features(Measurement):
    """Average over space of each layer, one view of each image of one or more splits.

    Each process keeps those of its images on the host; at the end the first one has them all.

    Args:
        widths: layer to number of its features, see :func:`~ssl_geometry.measure.engine.layer_widths`.
        images: split to how many of its images, the first so many; None takes all.
        view: how the images are seen; see :class:`Request`.
        draw: number of the draw of a random view.
        folder: for files of what does not fit into memory; None keeps all in memory.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        images: Mapping[Split, int | None],
        view: str = "clean",
        draw: int = 0,
        folder: Path | None = None,
    ) -> None:
        super().__init__()
        self._widths, self._folder = widths, folder
        self._requests = {
            split: Request(tuple(widths), pooled, view, draw, split, most) for split, most in images.items()
        }
        self._found: dict[Split, dict[str, Tensor]] = {}

    def requests(self, subject: Subject) -> Sequence[Request]:
        """One for each split."""
        return list(self._requests.values())

    def begin(self, occasion: Occasion) -> None:
        """Room for this process's images."""
        self._device, size = occasion.subject.device, occasion.images.eval_batch_size
        self._kept: dict[Split, dict[str, BatchStorage]] = {}
        for split, request in self._requests.items():
            n = len(occasion.images.loader(split, request.images).sampler.rows)
            batches = [min(size, n - start) for start in range(0, n, size)]
            self._kept[split] = {
                layer: BatchStorage([rows * width for rows in batches], folder=self._folder)
                for layer, width in self._widths.items()
            }

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch, to the host."""
        for request, found in reduced.items():
            for layer, values in found.items():
                self._kept[request.split][layer].put(batch_number, values)

    def finish(self, occasion: Occasion) -> Measured:
        """To the first process; features are no rows."""
        for split, kept in self._kept.items():
            self._found[split] = {}
            for layer, width in self._widths.items():
                whole = kept.pop(layer).on_first()
                self._found[split][layer] = torch.empty(0, width) if whole is None else whole.view(-1, width)
        return Measured()

    def of(self, split: Split) -> "LayerByLayer":
        """Layer to features of a split, (N, D) float32, in the order of its images; N is 0 but on the first process."""
        return LayerByLayer(self._found[split], self._device)


class LayerByLayer(Mapping[str, Tensor]):
    """Features of each layer on the host, brought to the device when they are asked for.

    Args:
        kept: layer to its features.
        device: of what is handed out.
    """

    def __init__(self, kept: Mapping[str, Tensor], device: torch.device) -> None:
        self._kept, self._device = kept, device

    def __getitem__(self, layer: str) -> Tensor:
        return self._kept[layer].to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
