"""Curves over depth and over training, from records."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssl_geometry.records.catalogue import described
from ssl_geometry.report.style import (
    BLOCK,
    HEAD,
    STAGE,
    STYLE,
    Rows,
    first_row,
    is_drawn,
    mark_stages,
    places_of,
    what_is_shown,
    wrapped,
)


def cka_curves(rows: Rows, against: Literal["depth", "epoch"]) -> Figure:
    """CKA of corresponding layers of two networks, over training; see :func:`layer_curves`."""
    first = first_row(rows)
    other = "its initialisation" if first["model_other"] == "init" else first["model_other"]
    return layer_curves(rows, against, f"CKA of {first['model']}'s layers with {other}, {first['n']} images")


def layer_curves(rows: Rows, against: Literal["depth", "epoch"], title: str | None = None) -> Figure:
    """One metric of each layer, over training.

    Args:
        rows: records of one metric of one network, one row per layer and epoch.
        against: "depth" draws one line per epoch over the network's depth, "epoch" one line per layer over the epochs.
        title: by default, metric, view and network.

    Returns:
        A figure; the colour of a line is its epoch, or its depth.

    Raises:
        ValueError: no rows.
    """
    frame, first = pd.DataFrame(rows), first_row(rows)
    along, lines = ("depth", "epoch") if against == "depth" else ("epoch", "depth")
    colors = mpl.cm.ScalarMappable(mpl.colors.Normalize(frame[lines].min(), frame[lines].max()), "viridis")
    several = frame[lines].nunique() > 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2))
        axes = figure.add_subplot()
        for key in sorted(frame[lines].unique()):
            line, color = frame[frame[lines] == key].sort_values(along), colors.cmap(colors.norm(key))
            axes.plot(line[along], line["value"], color=color, marker=".", markersize=4, linewidth=1.2)
        top = frame["value"].max()
        axes.set_ylim(min(0, frame["value"].min()) - 0.02, 1.02 if not top > 1 else 1.05 * top)
        axes.set_ylabel(described(first["metric"]).axis)
        axes.grid(alpha=0.25)
        if against == "depth":
            axes.set_xlabel("depth of the layer (0 = stem, 1 = end of the backbone)")
            if several:
                figure.colorbar(colors, ax=axes, label="epoch", ticks=MaxNLocator(integer=True))
        else:
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if several:
                figure.colorbar(colors, ax=axes, label="depth of the layer")
        axes.set_title(wrapped(title or what_is_shown(frame)))
    return figure


def training_curves(rows: Rows, metrics: Sequence[str], views: Sequence[str], layer: str, title: str) -> Figure:
    """Metrics of one layer over training: one line per network, with its error band.

    Args:
        rows: records of the networks.
        metrics: one column of panels per metric.
        views: one row of panels per view.
        layer: name of the layer.
        title: of the figure.

    Returns:
        A figure.

    Raises:
        ValueError: no rows.
    """
    frame = pd.DataFrame(rows)
    frame = frame[(frame["layer"] == layer) & frame["metric"].isin(metrics) & frame["view"].isin(views)]
    first_row(frame)
    colors = {model: f"C{number}" for number, model in enumerate(frame["model"].unique())}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1 + 3 * len(metrics), 0.6 + 2.2 * len(views)))
        panels = figure.subplots(len(views), len(metrics), sharex=True, squeeze=False)
        for axes, (view, metric) in zip(panels.flat, itertools.product(views, metrics), strict=True):
            for model, lines in frame[(frame["metric"] == metric) & (frame["view"] == view)].groupby("model"):
                lines = lines.sort_values("epoch")
                axes.plot(lines["epoch"], lines["value"], color=colors[model], marker=".", label=model)
                low, high = lines["low"].astype(float), lines["high"].astype(float)
                axes.fill_between(lines["epoch"], low, high, color=colors[model], alpha=0.2, linewidth=0)
            axes.set_title(f"{view}: {described(metric).axis}", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
        for axes in panels[-1]:
            axes.set_xlabel("epoch")
        panels[0, 0].legend()
        figure.suptitle(title)
    return figure


def compare_curves(
    panels: Mapping[str, Rows],
    groups: Mapping[str, str],
    title: str | None = None,
    label: str = "CKA (unbiased)",
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """A metric of several networks over depth; networks of one group (seeds of a method) are drawn as a band.

    The panels of figures 3 and 5 of Grigg et al. 2021.

    Args:
        panels: title of each panel, and its rows: one row per network and layer.
        groups: network to group.
        title: of the figure.
        label: of the vertical axis.
        levels: named values without layers, drawn as dotted lines.

    Returns:
        A figure: per group a line (the mean) and a band from the lowest to the highest network; the band of a single
        network is its error bar, clipped to the limits of the catalogue. It shows layers of :func:`is_drawn`, and heads
        with hollow points; every other stage of a ResNet is shaded.

    Raises:
        ValueError: a panel without rows.
    """
    colors = {group: f"C{number}" for number, group in enumerate(dict.fromkeys(groups.values()))}
    for rows in panels.values():
        first_row(rows)
    heights = list((levels or {}).values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1 + 4.6 * len(panels), 3.8))
        for axes, (name, rows) in zip(
            np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels.items(), strict=True
        ):
            frame = pd.DataFrame(rows)
            in_head = frame["layer"].str.fullmatch(HEAD)
            frame = frame[in_head | is_drawn(frame["layer"], frame["model"])]
            frame = frame.assign(group=frame["model"].map(groups), place=places_of(frame))
            mark_stages(axes, frame)
            for group, color in colors.items():
                lines = frame[frame["group"] == group]
                by_place = lines.groupby("place")
                mean = by_place["value"].mean()
                single = lines["model"].nunique() == 1
                low, high = (
                    (by_place["low"].min(), by_place["high"].max())
                    if single
                    else (by_place["value"].min(), by_place["value"].max())
                )
                low, high = low.astype(float), high.astype(float)
                heights += _heights(mean, low, high, str(first_row(rows)["metric"]))
                head = by_place["layer"].first().str.startswith("head").to_numpy()
                axes.plot(mean.index, mean, color=color, linewidth=1.4, label=group)
                axes.fill_between(mean.index, low, high, color=color, alpha=0.2, linewidth=0)
                axes.scatter(mean.index[~head], mean[~head], s=14, color=color, zorder=3)
                axes.scatter(mean.index[head], mean[head], s=18, facecolor="white", edgecolor=color, zorder=3)
            for number, (level, value) in enumerate((levels or {}).items()):
                axes.axhline(value, color="0.45", linestyle=(number, (1, 1.5)), linewidth=1.2, label=level)
            axes.set_title(name)
            has_blocks = bool(frame["layer"].str.fullmatch(BLOCK).any())
            axes.set_xlabel("layer (post-residual, then head)" if has_blocks else "layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
            axes.legend(loc="best")
        figure.axes[0].set_ylabel(label)
        figure.axes[0].set_ylim(_around(heights))
        layers = pd.concat([pd.DataFrame(rows)["layer"] for rows in panels.values()])
        notes = {
            "hollow points: layers of the head": layers.str.fullmatch(HEAD),
            "BG: block group": layers.str.match(STAGE),
        }
        figure.supxlabel("; ".join(note for note, there in notes.items() if there.any()), fontsize=7)
        if title:
            figure.suptitle(title)
    return figure


def _heights(values: pd.Series, low: pd.Series, high: pd.Series, metric: str) -> list[float]:
    """Values that the vertical axis must include: the curves, and their error bars within the catalogue's limits."""
    known, (bottom, top) = values.dropna().tolist(), described(metric).bars or (-np.inf, np.inf)
    return [*known, *pd.concat([low, high]).clip(min(bottom, *known, top), max(bottom, *known, top))]


def _around(heights: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that includes these, as on the report page: from 0 if it is near, with a margin at the top."""
    finite = [height for height in heights if np.isfinite(height)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if 0 < low < high / 2:
        low = 0.0
    room = (high - low) or abs(high) or 1.0
    return low - 0.03 * room, high + 0.1 * room
