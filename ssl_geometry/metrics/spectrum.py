"""Spectra of the features of each layer, over batches and ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ssl_geometry.geometry.spectrum import (
    alignment,
    alpha_req,
    lidar,
    mean_cosine,
    participation_ratio,
    rankme,
    uniformity,
    view_statistics,
)


class Spectrum(Metric):
    """RankMe, effective rank, participation ratio, alpha-ReQ, LiDAR, alignment, uniformity, mean cosine of each layer.

    Args:
        widths: layer to number of its features.
        views: augmented copies of each image that LiDAR compares; 0 leaves LiDAR and alignment out.

    Example:
        >>> spectrum = Spectrum({"layer": 6}, views=4)
        >>> images = torch.randn(50, 6)
        >>> copies = images[:, None] + 0.1 * torch.randn(50, 4, 6)
        >>> spectrum.update({"layer": images}, {"layer": copies}, index=torch.arange(50))
        >>> sorted(spectrum.compute())
        ['alignment', 'alpha_req', 'alpha_req_fit', 'effective_rank', 'lidar', 'mean_cosine', ...]
    """

    full_state_update = False
    is_differentiable = False
    index: list[Tensor]

    def __init__(self, widths: Mapping[str, int], views: int = 10) -> None:
        super().__init__()
        self.widths, self.views = dict(widths), views
        self.add_state("index", [], dist_reduce_fx="cat")
        for number, width in enumerate(self.widths.values()):
            # Features are kept flat: a rank that saw no image then joins in with nothing, whatever the width.
            for name in ("features", "means", "alignment"):
                self.add_state(f"{name}{number}", [], dist_reduce_fx="cat")
            self.add_state(f"scatter{number}", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        features: Mapping[str, Float[Tensor, "B D"]],
        copies: Mapping[str, Float[Tensor, "B q D"]] | None,
        index: Int64[Tensor, " B"],
    ) -> None:
        """Add one batch.

        Args:
            features: of each layer, clean images.
            copies: of each layer, q augmented copies of each image; None where ``views`` is 0.
            index: the images' numbers, each once over all batches and ranks.
        """
        self.index.append(index)
        for number, layer in enumerate(self.widths):
            getattr(self, f"features{number}").append(features[layer].detach().float().flatten())
            if copies is not None:
                means, scatter = view_statistics(copies[layer])
                getattr(self, f"means{number}").append(means.flatten())
                getattr(self, f"scatter{number}").add_(scatter)
                getattr(self, f"alignment{number}").append(alignment(copies[layer][:, 0], copies[layer][:, 1]))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather over ranks; one without images joins in with empty tensors of the right type."""
        if not self.index:
            self.index.append(torch.empty(0, dtype=torch.long, device=self.device))
            for number in range(len(self.widths)):
                for name in ("means", "alignment") if self.views else ():
                    getattr(self, f"{name}{number}").append(torch.empty(0, dtype=torch.float64, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Float[Tensor, " L"]]:
        """Each number for each layer, float64; NaN where it cannot be computed."""
        order = dim_zero_cat(self.index).argsort()
        rows = []
        for number, width in enumerate(self.widths.values()):
            features = dim_zero_cat(getattr(self, f"features{number}")).view(-1, width)[order]
            alpha, fit = alpha_req(features)
            row = {
                "rankme": rankme(features),
                "effective_rank": rankme(features, eps=0),
                "participation_ratio": participation_ratio(features),
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
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
