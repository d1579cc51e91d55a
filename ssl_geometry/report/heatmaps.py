"""Heat maps of pairs of layers, and of layers under views, from records."""

import textwrap

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ssl_geometry.records.catalogue import described
from ssl_geometry.report.style import LETTER, STYLE, Rows, first_row, layer_ticks, when_measured

DOTS = "white dots: for each layer (row) the most similar layer of the other network"


def cka_heatmap(rows: Rows) -> Figure:
    """Heat map of CKA between the layers of two networks, from the first layer to the last.

    Args:
        rows: records of one metric for one pair of networks at one epoch.

    Returns:
        A figure. Cells that could not be computed are hatched grey. For two networks, a white dot marks the most
        similar layer of the other network for each layer on the vertical axis.

    Raises:
        ValueError: no rows, or rows of several epochs or pairs.
    """
    frame = pd.DataFrame(rows)
    if frame.empty or any(frame[column].nunique(dropna=False) > 1 for column in ("model", "model_other", "epoch")):
        raise ValueError("a CKA map shows one pair of networks at one epoch: select one model, model_other and epoch")
    first = frame.iloc[0]
    itself = first["model"] == first["model_other"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 + 0.16 * frame["layer_other"].nunique(), 2.0 + 0.16 * frame["layer"].nunique()))
        axes = figure.add_subplot()
        image = draw_map(axes, frame, dots=not itself)
        other = "itself" if itself else first["model_other"]
        axes.set_title(f"CKA of {first['model']} with {other}\n{when_measured(first)}{first['n']} images")
        figure.colorbar(image, ax=axes, label=described("cka").axis, shrink=0.8)
        if not itself:
            figure.supxlabel(textwrap.fill(DOTS, int(figure.get_figwidth() / LETTER)), fontsize=7)
    return figure


def draw_map(axes: Axes, frame: pd.DataFrame, dots: bool) -> AxesImage:
    """Draw the values of all pairs of layers, with a dot on the largest of each row if ``dots``."""
    table = frame.pivot(index="layer", columns="layer_other", values="value")
    table = table.loc[
        frame.drop_duplicates("layer").sort_values("depth", kind="stable")["layer"],
        frame.drop_duplicates("layer_other").sort_values("depth_other", kind="stable")["layer_other"],
    ]
    values = table.to_numpy()
    axes.patch.set_hatch("///")
    image = _draw_values(axes, values)
    if dots:
        seen = np.flatnonzero(~np.isnan(values).all(1))
        axes.scatter(np.nanargmax(values[seen], 1), seen, s=7, color="white", edgecolor="black", linewidth=0.4)
    layer_ticks(axes.yaxis, list(table.index))
    layer_ticks(axes.xaxis, list(table.columns), rotation=90)
    axes.set_ylabel(f"layer of {frame['model'].iloc[0]}")
    axes.set_xlabel(f"layer of {frame['model_other'].iloc[0]}")
    return image


def _draw_values(axes: Axes, values: np.ndarray) -> AxesImage:
    """Draw values on a scale from 0, or the smallest negative value, to 1; missing values are grey."""
    axes.set_facecolor("0.8")
    axes.spines[:].set_visible(False)
    lowest = float(np.nanmin(values, initial=0.0))
    return axes.imshow(values, origin="lower", cmap="magma", vmin=min(0.0, lowest), vmax=1, aspect="auto")


def view_heatmap(rows: Rows) -> Figure:
    """Heat map of the invariance of each layer to each augmentation.

    Args:
        rows: records of metric ``invariance`` of one network at one epoch.

    Returns:
        A figure: layers from bottom to top, augmentations from left to right in the order of the rows. Views with the
        same protocol are the same images under several names, and share a column.
    """
    first = first_row(rows)
    frame = pd.DataFrame(rows)
    names = frame.groupby(frame["protocol"].fillna(frame["view"]), sort=False)["view"].unique()
    frame = frame[frame["view"].isin([same[0] for same in names])]
    frame = frame.assign(view=frame["view"].map({same[0]: "\n= ".join(same) for same in names}))
    table = frame.pivot(index="layer", columns="view", values="value")
    layers = frame.drop_duplicates("layer").sort_values("depth", kind="stable")["layer"]
    table = table.loc[layers, list(dict.fromkeys(frame["view"]))]
    values = table.to_numpy()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.4 + 0.36 * values.shape[1], 1.6 + 0.17 * values.shape[0]))
        axes = figure.add_subplot()
        image = _draw_values(axes, values)
        layer_ticks(axes.yaxis, list(table.index))
        axes.set_xticks(range(values.shape[1]), list(table.columns), rotation=45, ha="right", fontsize=7)
        axes.set_ylabel("layer")
        axes.set_xlabel("augmentation of both views")
        figure.colorbar(image, ax=axes, label=described("invariance").axis, shrink=0.8)
        axes.set_title(f"Invariance of {first['model']}\n{when_measured(first)}{first['n']} images")
    return figure
