"""Common parts of figures: style, layer names, titles, saving."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssl_geometry.files import naming
from ssl_geometry.records.catalogue import described

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
TITLE_WIDTH = 60
"""Characters per line of a title above curves."""
MANIFOLDS = ("neighbors", "diameter", "affinity", "affinity_random", "angle", "angle_random")
"""Metrics whose view is a kind of manifold."""
BLOCK = r"layer\d+\.\d+|blocks\.\d+"  # names of post-residual layers, as the taps give them
HEAD = r"head(\..+)?"
STAGE = r"layer(\d+)\."
LETTER = 0.055
"""Width of a character in 7 points, in inches."""


def is_drawn(layers: pd.Series, models: pd.Series) -> pd.Series:
    """Which layers curves over depth show: block outputs; for networks without blocks, all layers but the head.

    Args:
        layers: names of layers.
        models: the network of each.

    Example:
        >>> layers = pd.Series(["stem", "layer1.0", "layer1.0.residual", "stem", "pooled", "head.0"])
        >>> is_drawn(layers, pd.Series(["a", "a", "a", "b", "b", "b"])).tolist()
        [False, True, False, True, True, False]
    """
    block = layers.str.fullmatch(BLOCK)
    without = ~block.groupby(models).transform("any").astype(bool)
    return block | (without & ~layers.str.fullmatch(HEAD))


def save_figure(figure: Figure, path: Path) -> Path:
    """Save a figure as PNG and PDF.

    Args:
        figure: to save.
        path: without a suffix; its folder is created.

    Returns:
        The PNG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("pdf", "png"):
        with naming(Path(f"{path}.{suffix}")):
            figure.savefig(f"{path}.{suffix}")
    return Path(f"{path}.png")


def layer_ticks(axis: Any, names: list[str], rotation: float = 0) -> None:
    """Layer names on an axis; of many layers, every n-th."""
    step = -(-len(names) // MANY_LAYERS)
    axis.set_ticks(range(0, len(names), step), names[::step], rotation=rotation, fontsize=6)


def places_of(frame: pd.DataFrame) -> pd.Series:
    """Positions of layers on a shared axis: by layer for backbones with the same layers, otherwise by depth.

    Heads of any length follow the backbones.
    """
    head = frame["layer"].str.startswith("head")
    backbones = frame[~head].drop_duplicates(["model", "layer"]).groupby("model")["layer"].apply(tuple)
    if backbones.nunique() > 1:
        return frame["depth"] * backbones.map(len).max()
    order = {layer: place for place, layer in enumerate(frame[~head].sort_values("depth")["layer"].drop_duplicates())}
    last = frame[head].groupby("model")["depth"].rank("dense")
    share = last / last.groupby(frame["model"]).transform("max")
    return frame["layer"].map(order).fillna(len(order) - 1 + 2 * share)


def mark_stages(axes: Axes, frame: pd.DataFrame) -> None:
    """Mark the block groups and the head of the network with the most layers."""
    longest = frame["model"].value_counts().index[0]
    layers = frame[frame["model"] == longest].drop_duplicates("layer")
    marks = layers["layer"].str.extract(STAGE)[0].radd("BG").fillna(layers["layer"].str.extract("^(head)")[0])
    for number, (mark, places) in enumerate(layers["place"].groupby(marks, sort=False)):
        if number % 2:
            axes.axvspan(places.min() - 0.4, places.max() + 0.4, color="0.94", zorder=0)
        middle = (places.min() + places.max()) / 2
        style: Any = {"ha": "center", "va": "top", "fontsize": 7, "clip_on": True}  # a panel may have no values
        axes.text(middle, 1.0, str(mark), transform=axes.get_xaxis_transform(), **style)


def first_row(rows: Rows) -> Any:
    """The first record, from which titles take names; raises if there is none."""
    frame = pd.DataFrame(rows)
    if frame.empty:
        raise ValueError("no rows to draw")
    return frame.iloc[0]


def when_measured(row: Any) -> str:
    """The epoch of a network that is or was trained here; empty for others."""
    return f"epoch {row['epoch']}, " if pd.notna(row["step"]) or row["epoch"] else ""


def what_is_shown(frame: pd.DataFrame) -> str:
    """Metric, view or manifold, model and number of images, for titles."""
    row, n = frame.iloc[0], int(frame["n"].max())  # n of a row counts images with a value
    kind = "manifolds" if row["metric"] in MANIFOLDS else "views"
    seen = "" if row["view"] in (None, "clean") else f", {row['view']} {kind}"
    return f"{described(row['metric']).label}{seen}\n{row['model']}, {n} images"


def wrapped(title: str) -> str:
    """A title, wrapped to the width of a figure of curves."""
    return "\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, TITLE_WIDTH))
