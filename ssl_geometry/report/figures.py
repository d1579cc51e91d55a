"""Pictures drawn from records. A picture never computes: each value that it shows is a row."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Rows = pd.DataFrame | Sequence[Mapping[str, Any]]

STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
MANY_LAYERS = 24


def cka_heatmap(rows: Rows, title: str | None = None) -> Figure:
    """The map of CKA between the layers of two networks, both axes from the first layer to the last.

    Args:
        rows: records of metric ``cka`` for one pair of networks at one moment.
        title: written above; by default says which networks, when, and on how many images.

    Returns:
        A figure. Cells that could not be computed are hatched grey. On a map of two networks a white dot marks, for
        each layer on the vertical axis, the most similar layer of the other.

    Raises:
        ValueError: no rows, or rows of several moments or pairs.
    """
    frame = pd.DataFrame(rows)
    if frame.empty or any(frame[column].nunique(dropna=False) > 1 for column in ("model", "model_other", "epoch")):
        raise ValueError("a CKA map shows one pair of networks at one moment: select one model, model_other and epoch")
    first = frame.iloc[0]
    table = frame.pivot(index="layer", columns="layer_other", values="value")
    table = table.loc[
        frame.drop_duplicates("layer").sort_values("depth", kind="stable")["layer"],
        frame.drop_duplicates("layer_other").sort_values("depth_other", kind="stable")["layer_other"],
    ]
    values = table.to_numpy()
    itself = first["model"] == first["model_other"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 + 0.16 * values.shape[1], 2.0 + 0.16 * values.shape[0]))
        axes = figure.add_subplot()
        axes.set_facecolor("0.8")
        axes.patch.set_hatch("///")
        image = axes.imshow(values, origin="lower", cmap="magma", vmin=min(0.0, np.nanmin(values, initial=0.0)), vmax=1)
        if not itself:
            seen = np.flatnonzero(~np.isnan(values).all(1))
            axes.scatter(np.nanargmax(values[seen], 1), seen, s=7, color="white", edgecolor="black", linewidth=0.4)
        _layer_ticks(axes.yaxis, list(table.index))
        _layer_ticks(axes.xaxis, list(table.columns), rotation=90)
        axes.set_ylabel(f"layer of {first['model']}")
        axes.set_xlabel(f"layer of {first['model_other']}")
        other = "itself" if itself else first["model_other"]
        axes.set_title(title or f"CKA of {first['model']} with {other}\nepoch {first['epoch']}, {first['n']} images")
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, label="CKA (unbiased)", shrink=0.8)
    return figure


def _layer_ticks(axis: Any, names: list[str], rotation: float = 0) -> None:
    step = -(-len(names) // MANY_LAYERS)
    axis.set_ticks(range(0, len(names), step), names[::step], rotation=rotation, fontsize=6)


def cka_curves(rows: Rows, against: Literal["depth", "epoch"], title: str | None = None) -> Figure:
    """CKA of corresponding layers of two networks, over training.

    Args:
        rows: records of metric ``cka`` of one network with another one, one row a layer and moment.
        against: "depth" draws one line a moment over the network's depth, "epoch" one line a layer over the epochs.
        title: written above; by default says which networks.

    Returns:
        A figure, lines coloured by what is not on the horizontal axis.

    Raises:
        ValueError: no rows.
    """
    frame = pd.DataFrame(rows)
    if frame.empty:
        raise ValueError("no rows to draw")
    first = frame.iloc[0]
    along, lines = ("depth", "epoch") if against == "depth" else ("epoch", "depth")
    limits = (frame[lines].min(), max(frame[lines].max(), frame[lines].min() + 1e-9))
    colors = mpl.cm.ScalarMappable(mpl.colors.Normalize(*limits), "viridis")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2))
        axes = figure.add_subplot()
        for key in sorted(frame[lines].unique()):
            line = frame[frame[lines] == key].sort_values(along)
            axes.plot(
                line[along], line["value"], color=colors.cmap(colors.norm(key)), marker=".", markersize=4, linewidth=1.2
            )
        axes.set_ylim(min(0, frame["value"].min()) - 0.02, 1.02)
        axes.set_ylabel("CKA (unbiased)")
        axes.grid(alpha=0.25)
        if against == "depth":
            axes.set_xlabel("depth of the layer (0 = stem, 1 = last)")
            figure.colorbar(colors, ax=axes, label="epoch", ticks=MaxNLocator(integer=True))
        else:
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            figure.colorbar(colors, ax=axes, label="depth of the layer")
        other = "its initialisation" if first["model_other"] == "init" else first["model_other"]
        axes.set_title(title or f"CKA of {first['model']}'s layers with {other}, {first['n']} images")
    return figure
