"""Figures of many models: dendrogram, map, correlations, profiles over depth, predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator
from scipy.cluster.hierarchy import dendrogram

from ssl_geometry.records.catalogue import described
from ssl_geometry.report.style import STYLE

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""After Okabe & Ito, safe for colour-blind readers; further families share colours, but not markers."""
MARKERS = "osD^vPX*"
COLLAPSE = (("mean_cosine", "clean"), ("diameter", "semantic"), ("rankme", "clean"))
"""Metrics and views that show a collapse."""
DASHES = ("-", "--", ":", "-.")


def family_styles(families: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each family, in order of first use."""
    names = dict.fromkeys(families.values())
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)]}
        for i, name in enumerate(names)
    }


def model_tree(merges: np.ndarray, names: Sequence[str], families: Mapping[str, str], title: str) -> Figure:
    """A dendrogram of models.

    Returns:
        A figure; the closer to their names two models are joined, the more similar they are.
    """
    styles = family_styles(families)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.1 + 0.24 * len(names)))
        axes = figure.add_subplot()
        tree = dendrogram(
            merges,
            labels=list(names),
            orientation="right",
            ax=axes,
            color_threshold=0,
            above_threshold_color="0.35",
            leaf_font_size=8,
        )
        for label in axes.get_ymajorticklabels():
            label.set_color(styles[families[label.get_text()]]["color"])
        for place, name in enumerate(tree["ivl"]):
            axes.plot(0, 10 * place + 5, markersize=6, clip_on=False, **styles[families[name]])
        _family_legend(figure, styles)
        axes.set_xlabel("distance at which groups are merged (Ward, standardised metrics)")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, pad=8)
        axes.set_title(title)
    return figure


def model_map(
    place: np.ndarray, explained: np.ndarray, labels: Sequence[int], families: Mapping[str, str], title: str
) -> Figure:
    """Models on the first two principal components of their metrics.

    Args:
        place: (n, 2), in the order of ``families``.
        explained: share of the variance along each component.
        labels: cluster of each model, written next to its name.
        families: model to family.
        title: of the figure.
    """
    styles = family_styles(families)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.6))
        axes = figure.add_subplot()
        for family, (x, y) in zip(families.values(), place, strict=True):
            axes.plot(x, y, linestyle="", markersize=7, **styles[family])
        texts = [f"{name} ({label})" for name, label in zip(families, labels, strict=True)]
        axes.margins(0.18, 0.1)
        _place_names(axes, place, texts)
        axes.axhline(0, color="0.85", zorder=0)
        axes.axvline(0, color="0.85", zorder=0)
        axes.set_xlabel(f"first component ({explained[0]:.0%} of the variance)")
        axes.set_ylabel(f"second component ({explained[1]:.0%} of the variance)")
        _family_legend(figure, styles)
        axes.set_title(f"{title}; in brackets the cluster")
    return figure


def _place_names(axes: Any, place: np.ndarray, texts: Sequence[str]) -> None:
    """Names to the right of their points, moved down to avoid overlaps."""
    height = np.ptp(axes.get_ylim()) * 0.042
    width = np.ptp(axes.get_xlim()) * 0.017
    taken: list[tuple[float, float, float]] = []
    for i in np.argsort(-place[:, 1], kind="stable"):
        x, y = place[i] + (0.012 * np.ptp(axes.get_xlim()), 0.0)
        end = x + width * len(texts[i])
        while any(x < right and left < end and abs(y - there) < height for left, right, there in taken):
            y -= height / 4
        taken.append((x, end, y))
        axes.annotate(
            texts[i],
            place[i],
            (x, y),
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.5} if y < place[i, 1] - height else None,
        )


def correlation_map(table: pd.DataFrame, n: int, title: str) -> Figure:
    """Rank correlations of metrics over recipes."""
    with mpl.rc_context(STYLE):
        size = max(4.2, 2.2 + 0.2 * len(table))  # the colour bar's label needs its room
        figure = Figure(figsize=(size + 0.8, size))
        axes = figure.add_subplot()
        axes.set_facecolor("0.8")
        image = axes.imshow(table.to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_xticks(range(len(table)), table.columns, rotation=90, fontsize=6)
        axes.set_yticks(range(len(table)), table.index, fontsize=6)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, label=f"Spearman correlation over {n} recipes", shrink=0.8)
        axes.set_title(title)
    return figure


def depth_profiles(
    frame: pd.DataFrame, rows: Sequence[str], metrics: Sequence[str], families: Mapping[str, str], title: str
) -> Figure:
    """Metrics of every model over depth: one row of panels per kind of manifold, one column per metric.

    Args:
        frame: records of one epoch per model.
        rows: views (kinds of manifold).
        metrics: names.
        families: model to family, which determines colour and marker; models of a family differ by their dashes.
        title: of the figure.
    """
    styles = family_styles(families)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 3 * len(metrics), 0.9 + 1.9 * len(rows)))
        panels = figure.subplots(len(rows), len(metrics), sharex=True, squeeze=False)
        for line, view in zip(panels, rows, strict=True):
            for axes, metric in zip(line, metrics, strict=True):
                shown = frame[(frame["metric"] == metric) & (frame["view"] == view)]
                _model_lines(axes, shown, families, styles)
                axes.set_title(f"{view}: {described(metric).axis}", fontsize=8)
        for axes in panels[-1]:
            axes.set_xlabel("depth in the backbone")
        _model_legend(figure, families, styles)
        figure.suptitle(title)
    return figure


def collapse_curves(frame: pd.DataFrame, families: Mapping[str, str], title: str) -> Figure:
    """Collapse of features over depth: mean cosine, semantic diameter, RankMe."""
    styles = family_styles(families)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.2, 3.6))
        for axes, (metric, view) in zip(figure.subplots(1, 3, sharex=True), COLLAPSE, strict=True):
            shown = frame[(frame["metric"] == metric) & (frame["view"] == view)]
            _model_lines(axes, shown, families, styles)
            axes.set_title(_collapse_title(metric, view), fontsize=9)
            axes.set_xlabel("depth in the backbone")
            if metric == "rankme":
                axes.set_yscale("log")
                for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                    formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        _model_legend(figure, families, styles)
        figure.suptitle(title)
    return figure


def prediction_scatter(frame: pd.DataFrame, families: Mapping[str, str], titles: Mapping[str, str]) -> Figure:
    """Measured against predicted results of each model, one panel per task.

    Args:
        frame: columns task, model (the first of a recipe), value, predicted (each from the other recipes alone).
        families: model to family.
        titles: task to the title of its panel.
    """
    styles = family_styles(families)
    with mpl.rc_context(STYLE):
        columns = min(3, len(titles))
        rows = -(-len(titles) // columns)
        figure = Figure(figsize=(1.9 + 3.0 * columns, 0.5 + 3.0 * rows))
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for (task, title), axes in zip(
            titles.items(), panels, strict=False
        ):  # leaves the remaining panels in the iterator
            shown = frame[frame["task"] == task]
            for row in shown.to_dict("records"):
                axes.plot(row["predicted"], row["value"], markersize=5, **styles[families[row["model"]]])
            ends = [shown[["value", "predicted"]].min(axis=None), shown[["value", "predicted"]].max(axis=None)]
            axes.plot(ends, ends, color="0.6", linewidth=0.8, zorder=0)
            axes.set_title(title, fontsize=7)
            axes.set_xlabel("predicted without the recipe", fontsize=7)
            axes.set_ylabel("measured", fontsize=7)
        for axes in panels:  # unused panels
            axes.set_axis_off()
        used = {name: styles[name] for name in dict.fromkeys(families[model] for model in frame["model"])}
        _family_legend(figure, used)
    return figure


def collapse_over_training(frame: pd.DataFrame, layer: str, title: str) -> Figure:
    """Mean cosine, semantic diameter and RankMe of one layer over training, where they were measured."""
    frame = frame[frame["layer"] == layer]
    lines = {key: part for key, part in frame.groupby(["metric", "view"]) if key in COLLAPSE}
    shown = [key for key in COLLAPSE if key in lines]
    models = list(frame["model"].unique())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1 + 3 * len(shown), 3.2))
        handles: dict[str, Any] = {}
        for axes, key in zip(figure.subplots(1, len(shown), sharex=True, squeeze=False)[0], shown, strict=True):
            for model, line in lines[key].sort_values("epoch").groupby("model", sort=False):
                number = models.index(model)
                style = {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number // len(COLORS) % 4]}
                (handles[str(model)],) = axes.plot(line["epoch"], line["value"], marker=".", **style)
            axes.set_title(_collapse_title(*key), fontsize=9)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=7)
        figure.suptitle(title)
    return figure


def _collapse_title(metric: str, view: str) -> str:
    return described(metric).axis + ("" if view == "clean" else f"\n{view} manifolds")


def _model_lines(axes: Any, frame: pd.DataFrame, families: Mapping[str, str], styles: Mapping[str, Any]) -> None:
    for model, (style, dash) in _model_styles(families, styles).items():
        line = frame[frame["model"] == model].sort_values("depth", kind="stable")
        axes.plot(line["depth"], line["value"], linestyle=dash, linewidth=1.1, markersize=3.5, **style)
    axes.grid(alpha=0.25)


def _model_styles(families: Mapping[str, str], styles: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    seen: dict[str, int] = {}
    found = {}
    for model, family in families.items():
        found[model] = styles[family], DASHES[seen.get(family, 0) % len(DASHES)]
        seen[family] = seen.get(family, 0) + 1
    return found


def _model_legend(figure: Figure, families: Mapping[str, str], styles: Mapping[str, Any]) -> None:
    handles: list[Any] = [
        Line2D([], [], linestyle=dash, markersize=4, label=model, **style)  # type: ignore[arg-type]
        for model, (style, dash) in _model_styles(families, styles).items()
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7)


def _handles(styles: Mapping[str, Any]) -> list[Any]:
    return [Line2D([], [], linestyle="", label=name, **style) for name, style in styles.items()]


def _family_legend(figure: Figure, styles: Mapping[str, Any]) -> None:
    figure.legend(handles=_handles(styles), title="family", fontsize=7, title_fontsize=7, loc="outside right upper")
