"""Neighbourhoods of images in each layer: manifold graph metrics.

Protocol: average-pooled activations of each layer; for every image its k most similar images (cosine), and among them
those with positive weight in non-negative kernel regression (NNK, solved exactly). **Semantic** manifolds consist of
clean images of one class, **augmentation** manifolds of augmented views of one image, under five settings. Settings,
normalisation and aggregation are this project's, after Cosentino et al. 2022. The overlap of nearest images between two
views is measured under each setting.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Int64
from scipy.special import stdtrit
from torch import Tensor

from ssl_geometry import __version__, metrics
from ssl_geometry.data.plan import size_within
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.dimension import DISCARD
from ssl_geometry.geometry.manifold import DIRECTIONS, SEED
from ssl_geometry.geometry.neighbors import EXACT_ROWS, PROBED, RANKING
from ssl_geometry.geometry.nnk import COARSE, RESOLUTION
from ssl_geometry.geometry.nnk_solver import ACTIVE, INDEPENDENT, OPTIMAL
from ssl_geometry.geometry.overlap import DEGENERATE, NEAREST, jaccard, mutual_knn
from ssl_geometry.measure.measurement import Epochs, ImageSource, Measured, Measurement, Occasion
from ssl_geometry.measure.requests import Reduced, Request, pooled
from ssl_geometry.measure.subject import Subject
from ssl_geometry.metrics import AugmentationManifolds, InvarianceKNN
from ssl_geometry.metrics.neighborhoods import DIMENSION_K, MIN_IMAGES, LayerNeighbors
from ssl_geometry.ranges import at_least, check_arguments
from ssl_geometry.records import Protocol, record

LAYERS = ("stages", "pooled", "head")
CANDIDATES, LEAST_CANDIDATES = 50, 3
"""Default number of nearest images that NNK selects from, and its minimum."""
SETTINGS = {"policy": "simclr", "crop": "crop", "color": "color", "rotate": "rotate", "translate": "translate"}
"""Setting of an augmentation manifold to the augmentation of its views."""
QUANTILES = tuple(share / 20 for share in range(21))
OF_CLASSES = ("purity", "nnk_purity")
"""Metrics that need labels, in addition to semantic manifolds."""
OVERLAP_K = 10
"""Neighbours in the overlap between two views, at most the number of other images."""


class Neighborhoods(Measurement):
    """Manifold graph metrics of each layer: neighbours, diameter, affinity, and how graphs change.

    Args:
        layers: which layers, as for CKA; by default stages, pooled features and head, as far as the network has them.
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches it off.
        k: nearest images that NNK selects from; by default 50, or all others where there are fewer.
        settings: manifolds of augmented views of an image, in addition to those of a class: policy (the views of
            SimCLR), crop, color, rotate, translate.
        copies: augmented views of each image.
    """

    group = "neighbors"
    default_layers = LAYERS

    def __init__(
        self,
        layers: str | list[str] | None = None,
        every_n_epochs: Epochs | None = None,
        k: Annotated[int, at_least(LEAST_CANDIDATES)] | None = None,
        settings: Sequence[str] = tuple(SETTINGS),
        copies: Annotated[int, at_least(3)] = 10,
    ) -> None:
        check_arguments(Neighborhoods, locals(), self.option(""))
        super().__init__(every_n_epochs)
        if unknown := [name for name in settings if name not in SETTINGS]:
            raise UserError(f"{self.option('settings')} {unknown[0]}: expected some of {', '.join(SETTINGS)}")
        self.layers, self.settings, self.copies = layers, tuple(dict.fromkeys(settings)), copies
        self._asked_k = k
        self.graphs: dict[str, Tensor] = {}
        """NNK neighbours of each layer of the last measurement, on the host."""
        self.last: dict[str, Tensor] = {}  # neighbours at the last measurement, for `kept_since_last`

    def check(self, subject: Subject) -> None:
        """Check layers and views.

        Raises:
            UserError: with the option as typed.
        """
        super().check(subject)
        for setting in self.settings:
            try:
                subject.view(SETTINGS[setting])
            except UserError as error:
                option = f"{self.option('settings')} [{setting}]"
                raise UserError(f"{option}: {error}, or leave them out: settings=[]") from error

    def prepare(self, subject: Subject, images: ImageSource) -> None:
        """Check k against the number of images."""
        if images.multi_label:
            raise UserError(f"{self.option('settings')}: manifolds of classes need one class per image; leave it out")
        self.k = candidates(self.option("k"), self._asked_k, images)

    def requests(self, subject: Subject) -> Sequence[Request]:
        """Pooled features of clean images, and of all augmented views."""
        names = self.chosen(subject)
        self._depths = subject.depths(names)
        self._clean = Request(names, pooled)
        self._views = {
            setting: [Request(names, pooled, SETTINGS[setting], draw) for draw in range(self.copies)]
            for setting in self.settings
        }
        return [self._clean, *(request for draws in self._views.values() for request in draws)]

    @property
    def kept_bytes(self) -> int:
        """Bytes stored per image and feature of a layer: the feature, and two views per setting."""
        return 4 * (1 + 2 * len(self.settings))

    def begin(self, occasion: Occasion) -> None:
        """Reset the metrics."""
        device, layers = occasion.subject.device, list(self._depths)
        self._labelled = occasion.images.num_classes > 0
        self._neighborhoods = metrics.Neighborhoods(layers, self.k).to(device)
        self._manifolds = AugmentationManifolds(layers, self.settings).to(device)
        k = _overlap_k(occasion.images)
        self._overlaps = {setting: InvarianceKNN(layers, k).to(device) for setting in self.settings}

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """Add one batch: clean features are stored, manifolds of augmented views are measured immediately."""
        labels = batch["label"] if self._labelled else batch["index"]  # a class per image gives no rows
        self._neighborhoods.update(reduced[self._clean], labels, batch["index"])
        self._manifolds.update(
            {
                setting: {layer: torch.stack([reduced[draw][layer] for draw in draws], 1) for layer in self._depths}
                for setting, draws in self._views.items()
            }
        )
        for setting, overlap in self._overlaps.items():
            first, second = self._views[setting][:2]
            overlap.update(reduced[first], reduced[second], index=batch["index"])

    def finish(self, occasion: Occasion) -> Measured:
        """Rows for each manifold and layer (mean, standard deviation, quantiles), and for the graph of each layer."""
        layers = self._neighborhoods.compute()
        semantic = {("semantic", layer): found.semantic for layer, found in layers.items() if self._labelled}
        protocol = self.protocol(occasion.subject, occasion.images)
        common = {**occasion.columns, "protocol": protocol.hash}
        rows = manifold_records(semantic | self._manifolds.compute(), layers, self._depths, **common)
        rows += graph_records(layers, self._depths, **common)
        self.graphs = {layer: found.nnk_ids.cpu() for layer, found in layers.items()}
        rows += jaccard_records(self.graphs, self._depths, **common)
        if not self._labelled:
            rows = [row for row in rows if row["metric"] not in OF_CLASSES]
        rows += self._kept_since_last(layers, common)
        for setting, overlap in self._overlaps.items():
            for (layer, depth), value in zip(self._depths.items(), overlap.compute().reshape(-1).tolist(), strict=True):
                place = {"view": setting, "layer": layer, "depth": depth, "n": occasion.images.measure_size}
                rows.append(record(**common, **place, metric="mutual_knn", value=value))
        return Measured(rows, [protocol])

    def _kept_since_last(self, layers: Mapping[str, LayerNeighbors], common: Mapping[str, Any]) -> list[dict[str, Any]]:
        rows = []
        for layer, found in layers.items():
            ids, last = found.ids.cpu(), self.last.get(layer)
            if last is not None and last.shape == ids.shape:
                kept = float(mutual_knn(ids[None], last[None]))
                place = {"layer": layer, "depth": self._depths[layer], "view": "clean", "n": len(ids)}
                rows.append(record(**common, **place, metric="kept_since_last", value=kept))
            self.last[layer] = ids
        return rows

    def protocol(self, subject: Subject, images: ImageSource) -> Protocol:
        """Everything that affects a neighbourhood, the same live and offline.

        Args:
            subject: the measured network, with its precision and views.
            images: source of the measurement images.
        """
        return Protocol(
            {
                "metric": "manifold graph metrics (NNK, normalised cosine kernel, exact), after Cosentino et al. 2022",
                "nearest": f"cosine, {RANKING}; beyond {EXACT_ROWS:,} images on a CPU in 1 of {PROBED} inverted lists",
                "nearest of a class": f"cosine, {RANKING}",
                "no neighbours": f"fewer than {MIN_IMAGES} images, or directions within {DEGENERATE} roundings",
                "nnk": {
                    "posed": "in the differences between a query and its candidates, "
                    f"in float64 where the nearest is within {COARSE:g}",
                    "enters": f"above {OPTIMAL:g}, independent above {INDEPENDENT:g}",
                    "is a neighbour": f"above {ACTIVE:g} of the largest weight",
                    "is solved": f"radius of {RESOLUTION} roundings",
                },
                "directions": f"squared singular value of at least {DIRECTIONS:g} of the largest",
                "random pairs": f"seed {SEED}",
                "pooling": "average over space",
                "network": f"evaluation mode, {subject.dtype}",
                "views": {
                    "clean": subject.view("clean").spec,
                    **{name: subject.view(SETTINGS[name]).spec for name in self.settings},
                },
                "images": images.measure_ids,
                "n": images.measure_size,
                "batch": images.eval_batch_size,  # the random baselines of affinity and angle come from one batch
                "overlap": {"k": _overlap_k(images), "nearest": NEAREST},
                "intervals": "Student's t, n - 1; semantic: pairs of images that share an image are not independent",
                "intrinsic dimension": f"{min(DIMENSION_K, self.k)} neighbours, of equal images one counts",
                "two_nn": f"without the largest {DISCARD:g} of the ratios",
                "k": self.k,
                "copies": self.copies,
                "settings": self.settings,
                "versions": {"ssl_geometry": __version__, "torch": torch.__version__},
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """The graph of the last measurement."""
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.last = state["last"]


def candidates(option: str, asked: int | None, images: ImageSource) -> int:
    """Number of nearest images that NNK selects from.

    Args:
        option: the option as typed.
        asked: its value; None takes the default, or all others where there are fewer.
        images: source of the measurement images.

    Raises:
        UserError: not fewer than images, or too few images for a neighbourhood.
    """
    there = f"each of {images.measure_size} measurement images has {images.measure_size - 1} others"
    k = size_within(option, asked, CANDIDATES, images.measure_size - 1, there)
    if k < LEAST_CANDIDATES:
        raise UserError(f"{option}: {there}, {LEAST_CANDIDATES} are needed; raise {images.size_option}")
    return k


def manifold_records(
    manifolds: Mapping[tuple[str, str], Mapping[str, Tensor]],
    layers: Mapping[str, LayerNeighbors],
    depths: Mapping[str, float],
    **common: Any,
) -> list[dict[str, Any]]:
    """Rows for each manifold, layer and metric: the mean with its 95 % interval, standard deviation and quantiles.

    The interval is Student's t with n - 1 degrees of freedom. Augmentation manifolds of different images are
    independent; those of semantic manifolds have the errors of
    :func:`~ssl_geometry.geometry.manifold.manifold_metrics_and_errors`. An image without a metric is left out.
    """
    rows = []
    for (kind, layer), of_images in manifolds.items():
        for metric, values in of_images.items():
            values = values[values.isfinite()].double().cpu()
            place = {**common, "layer": layer, "depth": depths[layer], "view": kind, "n": len(values)}
            mean = float(values.mean())
            deviation = float(values.std()) if len(values) > 1 else float("nan")
            error = deviation / max(len(values), 1) ** 0.5
            if kind == "semantic":
                error = layers[layer].semantic_errors.get(metric, float("nan"))
            error *= float(stdtrit(max(len(values) - 1, 1), 0.975))
            rows.append(record(**place, metric=metric, value=mean, low=mean - error, high=mean + error))
            rows.append(record(**place, metric=f"{metric}_std", value=deviation))
            if len(values):
                levels = torch.tensor(QUANTILES, dtype=torch.float64)
                for level, value in zip(QUANTILES, values.quantile(levels).tolist(), strict=True):
                    rows.append(record(**place, metric=f"{metric}_quantile", low=level, value=value))
    return rows


def graph_records(
    layers: Mapping[str, LayerNeighbors], depths: Mapping[str, float], **common: Any
) -> list[dict[str, Any]]:
    """Rows for the graph of each layer."""
    rows = []
    for layer, found in layers.items():
        place = {**common, "layer": layer, "depth": depths[layer], "view": "clean", "n": len(found.ids)}
        rows += [record(**place, metric=name, value=value) for name, value in found.statistics.items()]
    return rows


def jaccard_records(
    graphs: Mapping[str, Int64[Tensor, "N k"]], depths: Mapping[str, float], **common: Any
) -> list[dict[str, Any]]:
    """Rows for the Jaccard overlap of the NNK graphs of each pair of layers."""
    rows, stacked = [], torch.stack(list(graphs.values()))
    for layer, values in zip(graphs, jaccard(stacked, stacked).tolist(), strict=True):
        for other, value in zip(graphs, values, strict=True):
            pair = {"layer": layer, "layer_other": other, "depth": depths[layer], "depth_other": depths[other]}
            rows.append(
                record(
                    **common,
                    **pair,
                    model_other=common["model"],
                    metric="nnk_jaccard",
                    view="clean",
                    n=stacked.shape[1],
                    value=value,
                )
            )
    return rows


def _overlap_k(images: ImageSource) -> int:
    return min(OVERLAP_K, images.measure_size - 1)
