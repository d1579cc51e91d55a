"""Spectra of the features of each layer, over batches and ranks."""

import math
import warnings
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from ssl_geometry.geometry.spectrum import (
    RANKME_EPS,
    alignment,
    covariance_eigenvalues,
    decay,
    entropy_rank,
    evenness,
    lidar,
    mean_cosine,
    singular_values,
    uniformity,
    view_statistics,
)
from ssl_geometry.metrics.features import LayerFeatures


class Spectrum(LayerFeatures):
    """RankMe, effective rank, participation ratio, alpha-ReQ, LiDAR, alignment, uniformity, mean cosine of each layer.

    Args:
        widths: layer to number of its features.
        views: augmented views of each image for LiDAR, at least 2; 0 leaves LiDAR and alignment out.

    Raises:
        ValueError: one view, or a layer whose images, features or views do not match the index, ``widths`` and
            ``views``.

    Example:
        >>> spectrum = Spectrum({"layer": 6}, views=4)
        >>> images = torch.randn(50, 6)
        >>> views = images[:, None] + 0.1 * torch.randn(50, 4, 6)
        >>> spectrum.update({"layer": images}, {"layer": views}, index=torch.arange(50))
        >>> sorted(spectrum.compute())
        ['alignment', 'alpha_req', 'alpha_req_fit', 'effective_rank', 'lidar', 'mean_cosine', ...]
    """

    def __init__(self, widths: Mapping[str, int], views: int = 10) -> None:
        if views < 0 or views == 1:
            raise ValueError(f"Spectrum: views={views}: expected 0, or at least 2")
        super().__init__(list(widths))
        self.widths, self.views = dict(widths), views
        for number, width in enumerate(self.widths.values()):
            for name in ("means", "alignment"):
                self._add_rows(f"{name}{number}", torch.float64)
            self.add_state(f"scatter{number}", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        features: Mapping[str, Float[Tensor, "B D"]],
        views: Mapping[str, Float[Tensor, "B q D"]] | None,
        index: Int64[Tensor, " B"],
    ) -> None:
        """Add one batch.

        Args:
            features: of each layer, clean images.
            views: of each layer, q augmented views of each image; None where the metric's ``views`` is 0.
            index: index of each image, unique over all batches and ranks.
        """
        if (views is None) == (self.views > 0):
            given = "none are" if views is None else "augmented views are"
            raise ValueError(f"Spectrum: views={self.views}, but {given} given to update()")
        for layer, width in self.widths.items():
            expected: list[tuple[Tensor, tuple[int, ...]]] = [(features[layer], (len(index), width))]
            if views is not None:
                expected.append((views[layer], (len(index), self.views, width)))
            for values, shape in expected:
                if values.shape != shape:
                    raise ValueError(f"Spectrum: layer {layer} has shape {tuple(values.shape)}, expected {shape}")
        self._add([features[layer] for layer in self.widths], index=index)
        for number, layer in enumerate(self.widths):
            if views is not None:
                means, scatter = view_statistics(views[layer])
                getattr(self, f"means{number}").append(means.flatten())
                getattr(self, f"scatter{number}").add_(scatter)
                getattr(self, f"alignment{number}").append(alignment(views[layer][:, 0], views[layer][:, 1]))

    def compute(self) -> dict[str, Float[Tensor, " L"]]:
        """Each metric of each layer, float64; NaN where it cannot be computed.

        Raises:
            ValueError: an image fed twice.
        """
        order = self._order()
        rows = []
        for number, width in enumerate(self.widths.values()):
            features = self._features(number, order)
            values, variances = singular_values(features), covariance_eigenvalues(features)  # decomposed once each
            alpha, fit = decay(variances)
            row = {
                "rankme": entropy_rank(values, RANKME_EPS),
                "effective_rank": entropy_rank(values),
                "participation_ratio": evenness(variances),
                "alpha_req": alpha,
                "alpha_req_fit": fit,
                "uniformity": uniformity(features),
                "mean_cosine": mean_cosine(features),
            }
            if self.views:
                means = dim_zero_cat(getattr(self, f"means{number}")).view(-1, width)[order]
                row["lidar"] = lidar(means, getattr(self, f"scatter{number}"), self.views)
                row["alignment"] = dim_zero_cat(getattr(self, f"alignment{number}")).mean()
            rows.append(row)
        found = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        ratios = zip(self.widths, found["participation_ratio"].tolist(), strict=True)
        if none := [layer for layer, ratio in ratios if math.isnan(ratio)]:
            warnings.warn(
                f"Spectra are NaN for layers that do not vary, or are not finite: {', '.join(none)}", stacklevel=2
            )
        return found
