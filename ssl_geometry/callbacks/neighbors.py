"""Neighbourhoods of images in each layer while a network trains: manifold graph metrics, live.

Protocol: averages over space of each layer's activations; of every image its k most similar (cosine), of them those
that non-negative kernel regression keeps (NNK, solved exactly). **Semantic** manifolds are made of images of one class,
on clean images; **augmentation** manifolds of copies of one image, under five settings. Settings, normalisation and
aggregation are ours, after Cosentino et al. 2022. Beside them, how many of its nearest images an image keeps from one
copy to another, under each setting.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import lightning as L
import torch
from scipy.special import stdtrit
from torch import Tensor

from ssl_geometry import __version__
from ssl_geometry.callbacks.cka import run_name
from ssl_geometry.callbacks.measure import Epochs, Findings, Moment, Monitor, Reduced, Request, pooled
from ssl_geometry.data.datamodule import DataModule, size_within
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.dimension import DISCARD
from ssl_geometry.geometry.manifold import DIRECTIONS, SEED
from ssl_geometry.geometry.neighbors import EXACT_ROWS, PROBED, RANKING
from ssl_geometry.geometry.nnk import ACTIVE, COARSE, INDEPENDENT, OPTIMAL, RESOLUTION
from ssl_geometry.geometry.overlap import ALIKE, NEAREST, jaccard, mutual_knn
from ssl_geometry.metrics import AugmentationManifolds, InvarianceKNN, Neighborhoods
from ssl_geometry.metrics.neighborhoods import DIMENSION_K, MIN_IMAGES, LayerNeighbors
from ssl_geometry.models.taps import layer_depths
from ssl_geometry.ranges import at_least, check_arguments
from ssl_geometry.records import Protocol, record
from ssl_geometry.report.moments import Row, curve_rows, pictures, scalars

LAYERS = ("stages", "pooled", "head")
CANDIDATES, LEAST_CANDIDATES = 50, 3
"""Nearest images of which NNK chooses: unless others are asked for, and at least."""
SETTINGS = {"policy": "simclr", "crop": "crop", "color": "color", "rotate": "rotate", "translate": "translate"}
"""Setting of an augmentation manifold to the view that makes the copies."""
QUANTILES = tuple(share / 20 for share in range(21))
OVERLAP_K = 10
"""Nearest images that two copies are compared by, as far as there are so many."""


class NeighborhoodMonitor(Monitor):
    """Manifold graph metrics of each layer: neighbours, diameter, affinity, and how graphs change.

    Args:
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches it off.
        layers: which layers; see ``--cka.layers``. None takes stages, pooled features and head, as far as the network
            has them.
        k: nearest images of which NNK chooses; None takes 50, or all others where there are fewer.
        settings: augmentation manifolds: policy (the views of SimCLR), crop, color, rotate, translate.
        copies: augmented copies of each image.
    """

    options = "neighbors"

    def __init__(
        self,
        every_n_epochs: Epochs = 0,
        layers: str | list[str] | None = None,
        k: Annotated[int, at_least(LEAST_CANDIDATES)] | None = None,
        settings: Sequence[str] = tuple(SETTINGS),
        copies: Annotated[int, at_least(3)] = 10,
    ) -> None:
        check_arguments(NeighborhoodMonitor, locals(), "--neighbors.")
        super().__init__(every_n_epochs)
        if unknown := [name for name in settings if name not in SETTINGS]:
            raise UserError(f"--neighbors.settings {unknown[0]}: expected some of {', '.join(SETTINGS)}")
        self.layers, self.settings, self.copies = layers, tuple(settings), copies
        self._asked_k = k
        self.curves: list[Row] = []  # the means of each manifold over training
        self.last: dict[str, Tensor] = {}  # the graph of the last moment, to see how much of it is left

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold k to the images."""
        if self.every_n_epochs and hasattr(pl_module, "measuring_view"):
            self.k = candidates("--neighbors.k", self._asked_k, trainer.datamodule)  # type: ignore[attr-defined]

    def requests(self, method: L.LightningModule) -> Sequence[Request]:
        """Pooled features of clean images, and of all copies."""
        names = self.layer_names(method, LAYERS)
        self._depths = layer_depths(method, names)
        self._clean = Request(names, pooled)
        self._copies = {
            setting: [Request(names, pooled, SETTINGS[setting], draw) for draw in range(self.copies)]
            for setting in self.settings
        }
        return [self._clean, *(request for draws in self._copies.values() for request in draws)]

    def begin(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        """Fresh sums."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.multi_label:
            raise UserError(
                "--neighbors: semantic manifolds need one class a picture; set --neighbors.every_n_epochs 0"
            )
        self._neighborhoods = Neighborhoods(list(self._depths), self.k).to(method.device)
        self._manifolds = AugmentationManifolds(list(self._depths), self.settings).to(method.device)
        self._overlaps = view_overlaps(self._depths, self.settings, data, method.device)

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch: clean images are kept, manifolds of copies are measured at once."""
        self._neighborhoods.update(reduced[self._clean], batch["label"], batch["index"])
        self._manifolds.update(
            {
                setting: {layer: torch.stack([reduced[draw][layer] for draw in draws], 1) for layer in self._depths}
                for setting, draws in self._copies.items()
            }
        )
        for setting, overlap in self._overlaps.items():
            first, second = self._copies[setting][:2]
            overlap.update(reduced[first], reduced[second], index=batch["index"])

    def finish(self, trainer: L.Trainer, method: L.LightningModule, moment: Moment) -> Findings:
        """Means, spreads and quantiles of each manifold and layer; what the graph looks like, and what is left."""
        try:
            layers = self._neighborhoods.compute()
        except ValueError as error:
            raise UserError(f"neighbourhoods after {moment.epoch} epochs: {error}") from error
        manifolds = {("semantic", layer): found.semantic for layer, found in layers.items()} | self._manifolds.compute()
        data = trainer.datamodule  # type: ignore[attr-defined]
        protocol = neighbor_protocol(data, method, k=self.k, copies=self.copies, settings=self.settings)
        run = run_name(trainer)
        common = {
            "run": run,
            "model": run,
            "split": "measure",
            "epoch": moment.epoch,
            "step": moment.step,
            "protocol": protocol.hash,
        }
        rows = manifold_records(manifolds, layers, self._depths, **common)
        rows += graph_records(layers, self._depths, **common)
        rows += self._left_of_the_last(layers, common)
        overlaps = {setting: overlap.compute() for setting, overlap in self._overlaps.items()}
        rows += overlap_records(overlaps, self._depths, **common, n=data.measure_size)
        self.curves += curve_rows(rows)
        return Findings(rows, scalars(rows), pictures(rows, self.curves), [protocol])

    def _left_of_the_last(
        self, layers: Mapping[str, LayerNeighbors], common: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        rows = []
        for layer, found in layers.items():
            ids, last = found.ids.cpu(), self.last.get(layer)
            if last is not None and last.shape == ids.shape:
                kept = float(mutual_knn(ids[None], last[None]))
                place = {"layer": layer, "depth": self._depths[layer], "view": "clean", "n": len(ids)}
                rows.append(record(**common, **place, metric="kept_since_last", value=kept))
            self.last[layer] = ids
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, and the graph of the last moment."""
        return {"curves": self.curves, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint left."""
        self.curves, self.last = state_dict["curves"], state_dict["last"]


def candidates(option: str, asked: int | None, data: DataModule) -> int:
    """Nearest images of which NNK chooses.

    Args:
        option: as it is typed.
        asked: how many were asked for; None takes the default, or all others where there are fewer.
        data: whose measurement images they are.

    Raises:
        UserError: as many as there are images, or images too few for a neighbourhood.
    """
    there = f"each of {data.measure_size} measurement images has {data.measure_size - 1} others"
    k = size_within(option, asked, CANDIDATES, data.measure_size - 1, there)
    if k < LEAST_CANDIDATES:
        raise UserError(f"{option}: {there}, {LEAST_CANDIDATES} are needed; raise --data.measure_size")
    return k


def manifold_records(
    manifolds: Mapping[tuple[str, str], Mapping[str, Tensor]],
    layers: Mapping[str, LayerNeighbors],
    depths: Mapping[str, float],
    **common: Any,
) -> list[dict[str, Any]]:
    """Rows for each manifold, layer and metric: the mean with its interval of 95 %, spread and quantiles.

    The interval is Student's t with n - 1 degrees of freedom. Augmentation manifolds of different images are
    independent; those of semantic manifolds have the errors of
    :func:`~ssl_geometry.geometry.manifold.manifold_metrics_and_errors`.

    Args:
        manifolds: kind of manifold and layer to each metric of each image, NaN where an image has none.
        layers: layer to its neighbourhoods.
        depths: layer to depth.
        common: what all rows share.
    """
    rows = []
    for (kind, layer), metrics in manifolds.items():
        for metric, values in metrics.items():
            values = values[values.isfinite()].double().cpu()
            place = {**common, "layer": layer, "depth": depths[layer], "view": kind, "n": len(values)}
            mean = float(values.mean())
            spread = float(values.std()) if len(values) > 1 else float("nan")
            error = spread / max(len(values), 1) ** 0.5
            if kind == "semantic":
                error = layers[layer].semantic_errors.get(metric, float("nan"))
            error *= float(stdtrit(max(len(values) - 1, 1), 0.975))
            rows.append(record(**place, metric=metric, value=mean, low=mean - error, high=mean + error))
            rows.append(record(**place, metric=f"{metric}_std", value=spread))
            if len(values):
                levels = torch.tensor(QUANTILES, dtype=torch.float64)
                for level, value in zip(QUANTILES, values.quantile(levels).tolist(), strict=True):
                    rows.append(record(**place, metric=f"{metric}_quantile", low=level, value=value))
    return rows


def graph_records(
    layers: Mapping[str, LayerNeighbors], depths: Mapping[str, float], **common: Any
) -> list[dict[str, Any]]:
    """Rows for the graph of each layer, and for the Jaccard overlap of the NNK graphs of each pair of layers.

    Args:
        layers: layer to its neighbourhoods.
        depths: layer to depth.
        common: what all rows share.
    """
    rows = []
    for layer, found in layers.items():
        place = {**common, "layer": layer, "depth": depths[layer], "view": "clean", "n": len(found.ids)}
        rows += [record(**place, metric=name, value=value) for name, value in found.statistics.items()]
    graphs = torch.stack([found.nnk_ids.cpu() for found in layers.values()])
    overlap = jaccard(graphs, graphs).tolist()
    for layer, values in zip(layers, overlap, strict=True):
        for other, value in zip(layers, values, strict=True):
            pair = {"layer": layer, "layer_other": other, "depth": depths[layer], "depth_other": depths[other]}
            rows.append(
                record(
                    **common,
                    **pair,
                    model_other=common["model"],
                    metric="nnk_jaccard",
                    view="clean",
                    n=graphs.shape[1],
                    value=value,
                )
            )
    return rows


def view_overlaps(
    layers: Iterable[str], settings: Iterable[str], data: DataModule, device: torch.device
) -> dict[str, InvarianceKNN]:
    """For each setting, what compares the nearest images of two copies; see :func:`overlap_records`."""
    return {setting: InvarianceKNN(list(layers), _overlap_k(data)).to(device) for setting in settings}


def overlap_records(overlaps: Mapping[str, Tensor], depths: Mapping[str, float], **common: Any) -> list[dict[str, Any]]:
    """Rows for the mutual kNN overlap of two copies of all images, of each setting and layer.

    Args:
        overlaps: setting to the overlap of each layer.
        depths: layer to depth, in the order of the values.
        common: what all rows share.
    """
    return [
        record(**common, metric="mutual_knn", view=setting, layer=layer, depth=depth, value=value)
        for setting, values in overlaps.items()
        for (layer, depth), value in zip(depths.items(), values.reshape(-1).tolist(), strict=True)
    ]


def _overlap_k(data: DataModule) -> int:
    return min(OVERLAP_K, data.measure_size - 1)


def neighbor_protocol(data: DataModule, network: Any, **options: Any) -> Protocol:
    """All that changes a neighbourhood, the same live and afterwards.

    Args:
        data: whose measurement images were seen.
        network: what was measured; its precision and its views count.
        options: of the monitor.
    """
    views = {name: network.measuring_view(view).spec for name, view in SETTINGS.items()}
    return Protocol(
        {
            "metric": "manifold graph metrics (NNK, normalised cosine kernel, exact), after Cosentino et al. 2022",
            "nearest": f"cosine, {RANKING}; beyond {EXACT_ROWS:,} images on a CPU in 1 of {PROBED} inverted lists",
            "no neighbours": f"fewer than {MIN_IMAGES} images, or directions within {ALIKE} roundings",
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
            "network": f"evaluation mode, {network.dtype}",
            "views": {"clean": network.clean_view.spec, **views},
            "images": data.measure_ids,
            "n": data.measure_size,
            "batch": data.eval_batch_size,  # the random baselines of affinity and angle come from one batch
            "overlap": {"k": _overlap_k(data), "nearest": NEAREST},
            "intervals": "Student's t, n - 1; semantic: pairs of images that share an image are not independent",
            "intrinsic dimension": f"{DIMENSION_K} neighbours, of equal images one counts",
            "two_nn": f"without the largest {DISCARD:g} of the ratios",
            **options,
            "versions": {"ssl_geometry": __version__, "torch": torch.__version__},
        }
    )
