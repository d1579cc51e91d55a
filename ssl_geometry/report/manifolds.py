"""Figures of neighbourhoods, from records: distributions over images, and the images themselves."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssl_geometry.records.catalogue import described
from ssl_geometry.report.style import STYLE, Rows, first_row, when_measured


def manifold_violins(rows: Rows, metric: str) -> Figure:
    """Distribution over images of a manifold graph metric, per layer; one panel per kind of manifold.

    Args:
        rows: records of one network at one epoch, with the quantiles of the metric.
        metric: neighbors, diameter, affinity, ...

    Returns:
        A figure: violins from the quantiles, with a white dot at the median and a bar between the quartiles.
    """
    frame = pd.DataFrame(rows)
    frame = frame[frame["metric"] == f"{metric}_quantile"]
    first = first_row(frame)
    layers = frame.drop_duplicates("layer").sort_values("depth", kind="stable")["layer"].tolist()
    kinds = frame["view"].unique()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1 + 3.2 * min(3, len(kinds)), 0.8 + 2.3 * -(-len(kinds) // 3)))
        panels = figure.subplots(-(-len(kinds) // 3), min(3, len(kinds)), sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(kinds) :]:
            axes.set_axis_off()
        for number, (axes, kind) in enumerate(zip(panels.flat, kinds, strict=False)):
            for place, layer in enumerate(layers):
                shown = frame[(frame["view"] == kind) & (frame["layer"] == layer)].sort_values("low")
                if len(shown):
                    _violin(axes, place, shown["value"].to_numpy(), f"C{number}")
            axes.set_title(kind)
            axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
            axes.grid(axis="y", alpha=0.25)
        for axes in panels[:, 0]:
            axes.set_ylabel(described(metric).axis, fontsize=7)
        figure.suptitle(f"{first['model']}, {when_measured(first)}{frame['n'].max()} images")
    return figure


def _violin(axes: Axes, place: float, quantiles: np.ndarray, color: str) -> None:
    points = (quantiles[1:] + quantiles[:-1]) / 2
    width = 1.06 * points.std() * len(points) ** -0.2  # Scott's rule
    if width > 1e-9:
        heights = np.linspace(quantiles[0], quantiles[-1], 80)
        density = np.exp(-(((heights[:, None] - points) / width) ** 2) / 2).sum(1)
        half = 0.42 * density / density.max()
        axes.fill_betweenx(heights, place - half, place + half, color=color, alpha=0.45, linewidth=0)
    quarter = (len(quantiles) - 1) // 4
    axes.plot([place] * 2, quantiles[[quarter, -1 - quarter]], color="0.25", linewidth=2.4, solid_capstyle="butt")
    axes.plot(place, quantiles[(len(quantiles) - 1) // 2], "o", color="white", markeredgecolor="0.25", markersize=3.5)


def neighbor_figure(tiles: Sequence[tuple[np.ndarray, str, bool]], columns: int, title: str) -> Figure:
    """Images in a grid, some framed: each query and its neighbours.

    Args:
        tiles: row by row, image (H,W,3) uint8, its title, and whether it is framed.
        columns: images per row.
        title: of the figure.

    Returns:
        A figure.
    """
    rows = -(-len(tiles) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.2 + 0.82 * columns, 0.7 + 1.02 * rows))
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for axes, (image, text, framed) in zip(panels.flat, tiles, strict=False):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(text, fontsize=5.5, pad=2)
            if framed:
                axes.set_axis_on()
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set(visible=True, color="tab:orange", linewidth=2.2)
        figure.suptitle(title, fontsize=8)
    return figure
