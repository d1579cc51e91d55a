"""Neighbourhoods of images in the feature space of each layer, over batches and ranks.

The state is features, and numbers of single images: nothing is averaged before ``compute``.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from ssl_geometry.geometry.dimension import levina_bickel, two_nn
from ssl_geometry.geometry.duplicates import first_rows, row_keys
from ssl_geometry.geometry.graph import graph_statistics
from ssl_geometry.geometry.manifold import augmentation_metrics, manifold_metrics_and_errors, same_class_ids
from ssl_geometry.geometry.neighbors import nearest
from ssl_geometry.geometry.nnk import nnk
from ssl_geometry.geometry.overlap import is_degenerate
from ssl_geometry.metrics.features import KeptRows, LayerFeatures

DIMENSION_K = 20
"""Neighbours from which the intrinsic dimension is estimated, at most the number of candidates."""
MIN_IMAGES = 4  # with fewer there are no three neighbours, hence no dimension
MANIFOLD_METRICS = ("neighbors", "diameter", "affinity", "affinity_random", "angle", "angle_random")
"""Metrics of the manifold around each image; see :mod:`ssl_geometry.geometry.manifold`."""


class LayerNeighbors(NamedTuple):
    """The neighbourhoods of one layer."""

    ids: Int64[Tensor, "N k"]
    """Nearest neighbours of each image, most similar first, in the order of the images' index; -1 for none."""
    nnk_ids: Int64[Tensor, "N k"]
    """The same, with -1 for those that NNK does not select."""
    semantic: dict[str, Float[Tensor, " N"]]
    """Manifold graph metrics of each image among those of its class."""
    statistics: dict[str, float]
    """Of the whole graph: purity, hubness, reciprocal edges, components, intrinsic dimensions."""
    semantic_errors: dict[str, float]
    """Standard error of the mean of each manifold graph metric, for values that are not independent."""


class Neighborhoods(LayerFeatures):
    """Nearest neighbours and NNK neighbours of images in each layer, and the manifold of each class.

    Args:
        layers: names of the layers.
        k: candidates of each image, by cosine similarity.

    Raises:
        ValueError: other labels than images, a layer of more or fewer images than the index, or of another width than
            before.

    References:
        Shekkizhar & Ortega, *Graph construction from data by non-negative kernel regression*, 2020; Cosentino et al.,
        *The geometry of self-supervised learning models and its impact on transfer learning*, 2022.

    Example:
        >>> neighborhoods = Neighborhoods(["layer"], k=5)
        >>> labels = torch.arange(60) % 2
        >>> features = torch.randn(60, 3) + 9 * torch.eye(3)[labels]
        >>> neighborhoods.update({"layer": features}, labels, index=torch.arange(60))
        >>> neighborhoods.compute()["layer"].statistics["purity"]
        1.0
    """

    labels: list[Tensor]

    def __init__(self, layers: Sequence[str], k: int = 50) -> None:
        super().__init__(layers, ["labels"])
        self.layers, self.k = list(layers), k

    def update(
        self,
        features: Mapping[str, Float[Tensor, "B D"]],
        labels: Int64[Tensor, " B"],
        index: Int64[Tensor, " B"],
    ) -> None:
        """Add one batch.

        Args:
            features: of each layer.
            labels: class of each image.
            index: index of each image, unique over all batches and ranks.
        """
        self._add([features[layer] for layer in self.layers], index=index, labels=labels)

    def compute(self) -> dict[str, LayerNeighbors]:
        """Layer to its neighbourhoods; empty and NaN, with one warning that names them, for degenerate layers.

        Raises:
            ValueError: features that are not finite (with the layer's name), or an image fed twice.
        """
        order = self._order()
        labels = dim_zero_cat(self.labels)[order]
        found, degenerate = {}, []
        for number, layer in enumerate(self.layers):
            features = self._features(number, order)
            directed = (features != 0).any(1).nonzero().squeeze(1)  # NaN is kept, and reported
            if len(directed) < len(order):
                warnings.warn(
                    f"layer {layer}: {len(order) - len(directed)} of {len(order)} images are all zero and have no "
                    "neighbours by cosine",
                    stacklevel=2,
                )
            if len(directed) and bool(features.isfinite().all()) and is_degenerate(features[directed]):
                degenerate.append(layer)
                directed = directed[:0]
            try:
                found[layer] = self._measure(features, labels, directed)
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}") from error
        if degenerate:
            warnings.warn(
                f"Neighbourhoods are NaN for layers whose direction does not vary: {', '.join(degenerate)}",
                stacklevel=2,
            )
        return found

    def _measure(self, features: Tensor, labels: Tensor, rows: Int64[Tensor, " M"]) -> LayerNeighbors:
        """Neighbourhoods among the given rows, with the indices of all images; NaN where too few images are left."""
        n = len(features)
        nothing = torch.full((n, self.k), -1, device=features.device)
        unknown = torch.full((n,), torch.nan, dtype=torch.float64, device=features.device)
        if len(rows) < MIN_IMAGES:
            statistics = dict.fromkeys(graph_statistics(nothing, labels), torch.nan)
            statistics |= {f"nnk_{name}": torch.nan for name in statistics}
            statistics |= dict.fromkeys(("two_nn", "levina_bickel", "nnk_residual"), torch.nan)
            return LayerNeighbors(nothing, nothing, dict.fromkeys(MANIFOLD_METRICS, unknown), statistics, {})
        features, labels = features[rows], labels[rows]
        k = min(self.k, len(rows) - 1)
        cosine, euclidean = nearest(features, k=k), nearest(features, k=min(k, DIMENSION_K), metric="l2")
        solved = nnk(features, cosine.ids)
        nnk_ids = cosine.ids.where(solved.active, -1)
        same = same_class_ids(features, labels, k)
        semantic, errors = manifold_metrics_and_errors(features, same, nnk(features, same), labels)
        distances = euclidean.values[first_rows(row_keys(features.float()))]  # duplicates count once
        statistics = {
            **graph_statistics(cosine.ids, labels),
            **{f"nnk_{name}": value for name, value in graph_statistics(nnk_ids, labels).items()},
            "two_nn": float(two_nn(distances)),
            "levina_bickel": float(levina_bickel(distances)),
            "nnk_residual": float(solved.residual.nan_to_num(0).max()),  # of the queries that are solved
        }

        def of_all(ids: Int64[Tensor, "M k"]) -> Int64[Tensor, "N K"]:
            scattered = nothing.clone()
            scattered[rows, :k] = rows[ids].where(ids >= 0, -1)
            return scattered

        values = {name: unknown.index_copy(0, rows, value.double()) for name, value in semantic.items()}
        return LayerNeighbors(
            of_all(cosine.ids), of_all(nnk_ids), values, statistics, {k: float(e) for k, e in errors.items()}
        )


class AugmentationManifolds(KeptRows):
    """The manifold of each image's augmented views in each layer.

    Args:
        layers: names of the layers.
        settings: names of the augmentations.

    References:
        Cosentino et al., *The geometry of self-supervised learning models and its impact on transfer learning*, 2022.

    Example:
        >>> manifolds = AugmentationManifolds(["layer"], ["crop"])
        >>> manifolds.update({"crop": {"layer": torch.randn(4, 10, 8)}})  # ten views of four images
        >>> manifolds.compute()["crop", "layer"]["diameter"].shape
        torch.Size([4])
    """

    def __init__(self, layers: Sequence[str], settings: Sequence[str]) -> None:
        super().__init__()
        self.kinds = [(setting, layer) for setting in settings for layer in layers]
        for number in range(len(self.kinds)):
            self._add_rows(f"values{number}", torch.float64)

    def update(self, views: Mapping[str, Mapping[str, Float[Tensor, "B m D"]]]) -> None:
        """Add one batch.

        Args:
            views: setting and layer to the features of m augmented views of each image.
        """
        for number, (setting, layer) in enumerate(self.kinds):
            features = views[setting][layer]
            usable = (features.isfinite().all(2) & (features != 0).any(2)).all(1).nonzero().squeeze(1)
            rows = torch.full((len(features), len(MANIFOLD_METRICS)), torch.nan, dtype=torch.float64)
            rows = rows.to(features.device)
            if len(usable):
                values = augmentation_metrics(features[usable])
                rows[usable] = torch.stack([values[name].double() for name in MANIFOLD_METRICS], 1)
            getattr(self, f"values{number}").append(rows.flatten())

    def compute(self) -> dict[tuple[str, str], dict[str, Float[Tensor, " N"]]]:
        """Setting and layer to each metric of each image, in no particular order; NaN for images with a zero view."""
        found, left_out = {}, []
        for number, kind in enumerate(self.kinds):
            rows = dim_zero_cat(getattr(self, f"values{number}")).view(-1, len(MANIFOLD_METRICS))
            found[kind] = dict(zip(MANIFOLD_METRICS, rows.unbind(1), strict=True))
            if missing := int(found[kind]["diameter"].isnan().sum()):
                left_out.append(f"{' '.join(kind)} {missing} of {len(rows)}")
        if left_out:
            warnings.warn(
                f"images left out, because a view is all zero or not finite: {', '.join(left_out)}", stacklevel=2
            )
        return found
