"""Spectra of each layer's features: rank, decay, LiDAR, alignment, uniformity, mean cosine.

Protocol: average-pooled activations of each layer on clean measurement images; LiDAR and alignment compare augmented
views (those of SimCLR, shared with the neighbourhoods).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from ssl_geometry import __version__, metrics
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.spectrum import (
    CONSTANT,
    FIRST,
    LAST,
    LIDAR_DELTA,
    LIDAR_EPS,
    POTENTIAL,
    RANK_SHARE,
    RANKME_EPS,
)
from ssl_geometry.measure.engine import layer_widths
from ssl_geometry.measure.measurement import Epochs, ImageSource, Measured, Measurement, Occasion
from ssl_geometry.measure.neighbors import LAYERS
from ssl_geometry.measure.requests import Reduced, Request, pooled
from ssl_geometry.measure.subject import Subject
from ssl_geometry.ranges import at_least, check_arguments
from ssl_geometry.records import Protocol, record

VIEW = "simclr"


class Spectrum(Measurement):
    """RankMe, effective rank, participation ratio, alpha-ReQ, LiDAR, alignment, uniformity, mean cosine of each layer.

    Args:
        layers: which layers, as for CKA; by default stages, pooled features and head, as far as the network has them.
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches it off.
        copies: augmented views of each image for LiDAR; 0 leaves LiDAR and alignment out.
    """

    group = "spectrum"
    default_layers = LAYERS

    def __init__(
        self,
        layers: str | list[str] | None = None,
        every_n_epochs: Epochs | None = None,
        copies: Annotated[int, at_least(2, also=0)] = 10,
    ) -> None:
        check_arguments(Spectrum, locals(), self.option(""))
        super().__init__(every_n_epochs)
        self.layers, self.copies = layers, copies

    def check(self, subject: Subject) -> None:
        """Check layers and views.

        Raises:
            UserError: with the option as typed.
        """
        super().check(subject)
        if self.copies:
            try:
                subject.view(VIEW)
            except UserError as error:
                raise UserError(
                    f"{self.option('copies')} {self.copies}: {error}, or leave them out: copies=0"
                ) from error

    def requests(self, subject: Subject) -> Sequence[Request]:
        """Pooled features of clean images and of augmented views."""
        names = self.chosen(subject)
        self._depths = subject.depths(names)
        self._clean = Request(names, pooled)
        self._views = [Request(names, pooled, VIEW, draw) for draw in range(self.copies)]
        return [self._clean, *self._views]

    def prepare(self, subject: Subject, images: ImageSource) -> None:
        """Find the widths of the layers."""
        self._widths = layer_widths(subject, self.chosen(subject), images.image_shape)

    @property
    def kept_bytes(self) -> int:
        """Bytes stored per image and feature of a layer: the feature, and the mean over its views."""
        return 4 + 8 * bool(self.copies)

    def begin(self, occasion: Occasion) -> None:
        """Reset the metric."""
        self._spectrum = metrics.Spectrum(self._widths, self.copies).to(occasion.subject.device)

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """Add one batch."""
        views = None
        if self.copies:
            views = {layer: torch.stack([reduced[draw][layer] for draw in self._views], 1) for layer in self._depths}
        self._spectrum.update(reduced[self._clean], views, batch["index"])

    def finish(self, occasion: Occasion) -> Measured:
        """A row for each layer and metric."""
        protocol = self.protocol(occasion.subject, occasion.images)
        common = {**occasion.columns, "n": occasion.images.measure_size, "protocol": protocol.hash}
        views = dict.fromkeys(("lidar", "alignment"), VIEW)
        rows = [
            record(**common, metric=metric, view=views.get(metric, "clean"), layer=layer, depth=depth, value=value)
            for metric, values in self._spectrum.compute().items()
            for (layer, depth), value in zip(self._depths.items(), values.reshape(-1).tolist(), strict=True)
        ]
        return Measured(rows, [protocol])

    def protocol(self, subject: Subject, images: ImageSource) -> Protocol:
        """Everything that affects a spectrum, the same live and offline.

        Args:
            subject: the measured network, with its precision and views.
            images: source of the measurement images.
        """
        views = {"clean": "clean", **({"copies": VIEW} if self.copies else {})}
        return Protocol(
            {
                "metric": "spectra of features",
                "pooling": "average over space",
                "network": f"evaluation mode, {subject.dtype}",
                "views": {name: subject.view(view).spec for name, view in views.items()},
                "copies": self.copies,
                "rankme": f"eps {RANKME_EPS:g}",
                "lidar": f"{self.copies} views of each image, delta {LIDAR_DELTA:g}, "
                f"eps {LIDAR_EPS:g} for all eigenvalues",
                "alpha_req": f"eigenvalues {FIRST} to {LAST}, at most {RANK_SHARE:g} of the rank; weights 1/i",
                "constant": f"variation within {CONSTANT} roundings of the mean",
                "uniformity": f"t = {POTENTIAL:g}",
                "images": images.measure_ids,
                "n": images.measure_size,
                "versions": {"ssl_geometry": __version__, "torch": torch.__version__},
            }
        )
