"""What is watched live of the records of one epoch: the numbers that are logged as curves, and the figures.

Loggers get the same while a network trains and when its records are uploaded later: both come from here.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from ssl_geometry.records.catalogue import METRICS, described
from ssl_geometry.report.curves import cka_curves, layer_curves
from ssl_geometry.report.heatmaps import cka_heatmap, view_heatmap
from ssl_geometry.report.manifolds import manifold_violins
from ssl_geometry.report.style import MANIFOLDS

Row = Mapping[str, Any]
Figures = dict[str, Callable[[], Figure]]

MEASURED = ("cka", "invariance", "probes", "neighbors", "spectrum")
"""Sections of the names that measurements are logged under."""

LASTING = {
    name for name, metric in METRICS.items() if metric.live and (metric.section != "neighbors" or name in MANIFOLDS)
}
"""Metrics that figures of later epochs show again."""


def under_way(name: str) -> bool:
    """Whether Lightning logs a number before it counts the step and the epoch that the number belongs to.

    Example:
        >>> under_way("train/loss"), under_way("val/knn"), under_way("test/knn"), under_way("cka/to_init/pooled")
        (True, True, False, False)
    """
    return name.partition("/")[0] not in ("test", *MEASURED)


def matched_layers(rows: Iterable[Row]) -> list[Row]:
    """Of CKA with other networks, each layer with its match: the layer of the same name, else of the nearest depth.

    Example:
        >>> pair = {"metric": "cka", "model": "a", "model_other": "b", "layer": "x", "depth": 0.0}
        >>> rows = [{**pair, "layer_other": name, "depth_other": 0.0} for name in "yx"]
        >>> [row["layer_other"] for row in matched_layers(rows)]
        ['x']
    """
    best: dict[tuple[Any, ...], tuple[float, Row]] = {}
    for row in rows:
        if row["metric"] == "cka" and row["model_other"] != row["model"]:
            same = row["layer"] == row["layer_other"]
            away = -1.0 if same else abs(row["depth_other"] - row["depth"])
            key = (row["model"], row["model_other"], row["layer"])
            if key not in best or away < best[key][0]:
                best[key] = away, row
    return [row for _, row in best.values()]


def scalars(rows: Sequence[Row]) -> dict[str, float]:
    """The numbers of one epoch that loggers show as curves.

    Args:
        rows: records of one epoch.

    Returns:
        Logged name to value; what the names mean stands in ``docs/wandb.md``. Those of a network that is called
        otherwise than its run, such as a teacher next to the student, have its name behind the first part.

    Example:
        >>> row = {"metric": "ridge_probe", "layer": "pooled", "view": "clean", "value": 0.5, "layer_other": None}
        >>> scalars([{**row, "run": "a", "model": "a"}, {**row, "run": "a", "model": "teacher"}])
        {'probes/ridge/pooled': 0.5, 'probes/teacher/ridge/pooled': 0.5}
    """
    return {
        _of_network(key, network): value
        for network, own in _by_network(rows).items()
        for key, value in _scalars(own).items()
    }


def _by_network(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the name of their network; "" is that of the run."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault("" if row["model"] == row["run"] else row["model"], []).append(row)
    return found


def _of_network(key: str, network: str) -> str:
    section, _, rest = key.partition("/")
    return f"{section}/{network}/{rest}" if network else key


def _scalars(rows: Sequence[Row]) -> dict[str, float]:
    found = {f"cka/to_{row['model_other']}/{row['layer']}": row["value"] for row in matched_layers(rows)}
    layers = [row["layer"] for row in rows if row["metric"] == "invariance"]
    watched = "pooled" if "pooled" in layers else next(reversed(layers), None)
    for row in rows:
        metric, layer, view, value = row["metric"], row["layer"], row["view"], row["value"]
        if metric == "invariance":
            if view == "own":
                found[f"invariance/own/{layer}"] = value
            if layer == watched:
                found[f"invariance/{watched}/{view}"] = value
        elif live := described(metric).live:
            if "{view}" not in live or view in ("semantic", "policy"):
                found[f"{live.format(view=view)}/{layer}"] = value
        elif described(metric).section == "other" and layer is not None and row["layer_other"] is None:
            found[f"{metric}/{layer}"] = value  # of a user's own measurement
    return found


def curve_rows(rows: Sequence[Row]) -> list[Row]:
    """The records of one epoch that figures of later epochs show again, as lines over depth or epochs."""
    others = [
        row for row in rows if row["metric"] in LASTING or (row["metric"] == "invariance" and row["view"] == "own")
    ]
    return [*matched_layers(rows), *others]


def live_figures(rows: Sequence[Row], curves: Sequence[Row]) -> Figures:
    """How to draw the figures of one epoch.

    Args:
        rows: records of this epoch.
        curves: :func:`curve_rows` of this epoch and of all before it.

    Returns:
        Logged name to what draws the figure, network by network as in :func:`scalars`. Only what was measured in this
        epoch has figures.
    """
    before = _by_network(curves)
    return {
        _of_network(key, network): draw
        for network, own in _by_network(rows).items()
        for key, draw in _figures(own, before.get(network, [])).items()
    }


def _figures(rows: Sequence[Row], curves: Sequence[Row]) -> Figures:
    measured = dict.fromkeys(row["metric"] for row in rows)
    found: Figures = {}
    if "cka" in measured:
        found |= _cka(rows, curves)
    if "invariance" in measured:
        found["invariance/views"] = partial(view_heatmap, [row for row in rows if row["metric"] == "invariance"])
        found |= _lines("invariance/own", curves, "invariance")
        found |= _lines("invariance/classes", curves, "class_cka")
    for metric in ("ridge_probe", "logistic_probe", "online_probe"):
        if "ridge_probe" in measured:  # the others come with it, or came before
            found |= _lines(METRICS[metric].live, curves, metric)
    for metric in ("neighbors", "diameter", "affinity"):
        if f"{metric}_quantile" in measured:  # a collapsed network has no manifolds
            found[f"neighbors/{metric}"] = partial(manifold_violins, rows, metric)
            for view in _shown_kinds(rows, metric):
                curve = [row for row in curves if row["metric"] == metric and row["view"] == view]
                found |= _over(f"neighbors/{metric}_{view}_epochs", curve, "epoch", layer_curves)
    for metric in ("rankme", "lidar", "alpha_req", "mean_cosine"):
        if metric in measured:
            found |= _lines(METRICS[metric].live, curves, metric)
    return found


def _shown_kinds(rows: Sequence[Row], metric: str) -> list[str]:
    """Semantic manifolds, which need labels, and the first kind of augmentation manifolds; those that were measured."""
    kinds = dict.fromkeys(row["view"] for row in rows if row["metric"] == metric)
    augmented = [kind for kind in kinds if kind != "semantic"]
    return [*(kind for kind in kinds if kind == "semantic"), *augmented[:1]]


def _lines(name: str, curves: Sequence[Row], metric: str) -> Figures:
    curve = [row for row in curves if row["metric"] == metric]
    return _over(f"{name}_depth", curve, "depth", layer_curves) | _over(f"{name}_epochs", curve, "epoch", layer_curves)


def _over(name: str, curve: Sequence[Row], against: str, draw: Callable[..., Figure]) -> Figures:
    """Lines over depth or epochs, where there is more than a point of each."""
    known = [row for row in curve if row["value"] is not None and not math.isnan(row["value"])]
    return {name: partial(draw, known, against)} if len({row[against] for row in known}) > 1 else {}


def _cka(rows: Sequence[Row], curves: Sequence[Row]) -> Figures:
    found: Figures = {}
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        if row["metric"] == "cka":
            blocks.setdefault(row["model_other"], []).append(row)
    for other, block in blocks.items():
        itself = other == block[0]["model"]
        found[f"cka/map_{'self' if itself else other}"] = partial(cka_heatmap, block)
        if not itself:
            curve = [row for row in curves if row["metric"] == "cka" and row["model_other"] == other]
            found |= _over(f"cka/depth_{other}", curve, "depth", cka_curves)
            found |= _over(f"cka/epochs_{other}", curve, "epoch", cka_curves)
    return found
