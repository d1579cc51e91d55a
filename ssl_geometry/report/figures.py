"""Pictures drawn from records. A picture never computes: each value that it shows is a row."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

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
"""Letters that stand above a picture of curves."""
MANIFOLDS = ("neighbors", "diameter", "affinity", "affinity_random", "angle", "angle_random")
"""Numbers whose view names a kind of manifold."""
BLOCK = r"layer\d+\.\d+|blocks\.\d+"  # names of post-residual layers, as the taps give them
HEAD = r"head(\..+)?"
STAGE = r"layer(\d+)\."
LETTER = 0.055
"""Width of a letter of 7 points, in inches."""
DOTS = "white dots: for each layer (row) the most similar layer of the other network"


def is_drawn(layers: pd.Series, models: pd.Series) -> pd.Series:
    """Whether curves over depth show each layer: block outputs; of a network with none of them, all but its head.

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
    """Keep a picture as PNG and PDF.

    Args:
        figure: the picture.
        path: without a suffix; its folder is made.

    Returns:
        The PNG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("pdf", "png"):
        figure.savefig(f"{path}.{suffix}")
    return Path(f"{path}.png")


def cka_heatmap(rows: Rows, title: str | None = None) -> Figure:
    """The map of CKA between the layers of two networks, both axes from the first layer to the last.

    Args:
        rows: records of one metric for one pair of networks at one moment.
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
    itself = first["model"] == first["model_other"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 + 0.16 * frame["layer_other"].nunique(), 2.0 + 0.16 * frame["layer"].nunique()))
        axes = figure.add_subplot()
        image = _map(axes, frame, dots=not itself)
        other = "itself" if itself else first["model_other"]
        axes.set_title(title or f"CKA of {first['model']} with {other}\n{_when(first)}{first['n']} images")
        figure.colorbar(image, ax=axes, label=described("cka").axis, shrink=0.8)
        if not itself:
            figure.supxlabel(textwrap.fill(DOTS, int(figure.get_figwidth() / LETTER)), fontsize=7)
    return figure


def _map(axes: Axes, frame: pd.DataFrame, dots: bool) -> AxesImage:
    table = frame.pivot(index="layer", columns="layer_other", values="value")
    table = table.loc[
        frame.drop_duplicates("layer").sort_values("depth", kind="stable")["layer"],
        frame.drop_duplicates("layer_other").sort_values("depth_other", kind="stable")["layer_other"],
    ]
    values = table.to_numpy()
    axes.set_facecolor("0.8")
    axes.patch.set_hatch("///")
    lowest = float(np.nanmin(values, initial=0.0))
    image = axes.imshow(values, origin="lower", cmap="magma", vmin=min(0.0, lowest), vmax=1, aspect="auto")
    if dots:
        seen = np.flatnonzero(~np.isnan(values).all(1))
        axes.scatter(np.nanargmax(values[seen], 1), seen, s=7, color="white", edgecolor="black", linewidth=0.4)
    _layer_ticks(axes.yaxis, list(table.index))
    _layer_ticks(axes.xaxis, list(table.columns), rotation=90)
    axes.set_ylabel(f"layer of {frame['model'].iloc[0]}")
    axes.set_xlabel(f"layer of {frame['model_other'].iloc[0]}")
    axes.spines[:].set_visible(False)
    return image


def _layer_ticks(axis: Any, names: list[str], rotation: float = 0) -> None:
    step = -(-len(names) // MANY_LAYERS)
    axis.set_ticks(range(0, len(names), step), names[::step], rotation=rotation, fontsize=6)


def cka_curves(rows: Rows, against: Literal["depth", "epoch"], title: str | None = None) -> Figure:
    """CKA of corresponding layers of two networks, over training; see :func:`layer_curves`."""
    first = _first(rows)
    other = "its initialisation" if first["model_other"] == "init" else first["model_other"]
    return layer_curves(rows, against, title or f"CKA of {first['model']}'s layers with {other}, {first['n']} images")


def layer_curves(rows: Rows, against: Literal["depth", "epoch"], title: str | None = None) -> Figure:
    """One number of each layer, over training.

    Args:
        rows: records of one metric of one network, one row a layer and moment.
        against: "depth" draws one line a moment over the network's depth, "epoch" one line a layer over the epochs.
        title: written above; by default says which metric, view and network.

    Returns:
        A figure, lines coloured by what is not on the horizontal axis.

    Raises:
        ValueError: no rows.
    """
    frame, first = pd.DataFrame(rows), _first(rows)
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
        axes.set_title(_wrapped(title or _what(frame)))
    return figure


def view_heatmap(rows: Rows, title: str | None = None) -> Figure:
    """The invariance of every layer to every augmentation.

    Args:
        rows: records of metric ``invariance`` of one network at one moment.
        title: written above; by default says which network and when.

    Returns:
        A figure: layers from below to above, augmentations from left to right in the order of the rows. Views of one
        protocol are the same images under several names: one column.
    """
    first = _first(rows)
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
        axes.set_facecolor("0.8")
        image = axes.imshow(
            values,
            origin="lower",
            cmap="magma",
            vmin=min(0.0, float(np.nanmin(values, initial=0.0))),
            vmax=1,
            aspect="auto",
        )
        _layer_ticks(axes.yaxis, list(table.index))
        axes.set_xticks(range(values.shape[1]), list(table.columns), rotation=45, ha="right", fontsize=7)
        axes.set_ylabel("layer")
        axes.set_xlabel("augmentation of both views")
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, label=described("invariance").axis, shrink=0.8)
        axes.set_title(title or f"Invariance of {first['model']}\n{_when(first)}{first['n']} images")
    return figure


def manifold_violins(rows: Rows, metric: str, title: str | None = None) -> Figure:
    """How one number of the manifold around each image is distributed, layer by layer, a panel a kind of manifold.

    Args:
        rows: records of one network at one moment, with the quantiles of the metric.
        metric: neighbors, diameter, affinity, ...
        title: written above; by default says which network and when.

    Returns:
        A figure: violins drawn through the quantiles, a white dot at the median, a bar from quarter to quarter.
    """
    frame = pd.DataFrame(rows)
    frame = frame[frame["metric"] == f"{metric}_quantile"]
    first = _first(frame)
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
        figure.suptitle(title or f"{first['model']}, {_when(first)}{frame['n'].max()} images")
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


def training_curves(rows: Rows, metrics: Sequence[str], views: Sequence[str], layer: str, title: str) -> Figure:
    """Numbers of one layer of several networks over their training: a line a network, with its error band.

    Args:
        rows: records of the networks.
        metrics: one column of panels each.
        views: one row of panels each.
        layer: which layer.
        title: written above.

    Returns:
        A figure.

    Raises:
        ValueError: no rows.
    """
    frame = pd.DataFrame(rows)
    frame = frame[(frame["layer"] == layer) & frame["metric"].isin(metrics) & frame["view"].isin(views)]
    _first(frame)
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


def neighbor_pictures(pictures: Sequence[tuple[np.ndarray, str, bool]], columns: int, title: str) -> Figure:
    """Pictures in a grid, some framed: an image and its neighbours.

    Args:
        pictures: (H,W,3) uint8, what stands above it, and whether it is framed, row by row.
        columns: pictures in a row.
        title: written above.

    Returns:
        A figure.
    """
    rows = -(-len(pictures) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.2 + 0.82 * columns, 0.7 + 1.02 * rows))
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for axes, (picture, text, framed) in zip(panels.flat, pictures, strict=False):
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(text, fontsize=5.5, pad=2)
            if framed:
                axes.set_axis_on()
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set(visible=True, color="tab:orange", linewidth=2.2)
        figure.suptitle(title, fontsize=8)
    return figure


def pair_panels(cka: Rows, knn: Rows, null: Rows = (), title: str | None = None) -> Figure:
    """Two networks layer by layer: maps of all, residual (odd) and post-residual (even) layers, and how alike they
    are.

    The panels of figures 1, 2 and 4 of Grigg et al. 2021, with the overlap of nearest neighbours below the CKA.

    Args:
        cka: records of metric ``cka`` of one pair of networks.
        knn: records of metric ``mutual_knn`` of the same pair.
        null: records of metric ``max_cka_null`` of the same pair, drawn below the curve of the most similar layer.
        title: written above.

    Returns:
        A figure of two rows. In the maps a white dot marks, for each layer on the vertical axis, the most similar
        layer of the other network; the curves show the similarity to the layer at the same place (*diag*) and to the
        most similar layer (*max*); see :func:`is_drawn` for which layers.
    """
    first = _first(cka)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 7.2))
        grid = figure.subplots(2, 4)
        for panels, rows, label in zip(grid, (cka, knn), ("CKA", "mutual kNN"), strict=True):
            frame = pd.DataFrame(rows)
            for axes, (name, kept) in zip(panels, _parity(frame).items(), strict=False):
                axes.set_title(f"{label}: {name}")
                if kept.empty:
                    axes.set_axis_off()
                    continue
                image = _map(axes, kept, dots=first["model"] != first["model_other"])
                figure.colorbar(image, ax=axes, shrink=0.8)
            shown = frame[
                is_drawn(frame["layer"], frame["model"]) & is_drawn(frame["layer_other"], frame["model_other"])
            ]
            lines = diag_and_max(shown)
            for name, style in SAME_AND_LARGEST.items():  # the same layer is often the most similar one: both are seen
                panels[3].plot(lines[name].index, lines[name].to_numpy(), label=name, **style)
            if label == "CKA" and len(null):
                chance = pd.DataFrame(null)
                chance = chance[is_drawn(chance["layer"], chance["model"])]
                panels[3].plot(chance["depth"], chance["value"], "k--", label="max, images permuted (95 %)")
            blocks = shown["layer"].str.fullmatch(BLOCK).all() and shown["layer_other"].str.fullmatch(BLOCK).all()
            panels[3].set_title(f"{label}: post-residual layers" if blocks else f"{label}: layers of the backbones")
            panels[3].set_xlabel(f"depth of the layer of {first['model']}")
            panels[3].set_ylim(np.nanmin([0, *shown["value"]]), 1.02)
            panels[3].grid(alpha=0.25)
            panels[3].legend()
        figure.suptitle(title or f"{first['model']} and {first['model_other']}, {first['n']} images")
        if first["model"] != first["model_other"]:
            figure.supxlabel(DOTS, fontsize=8)
    return figure


SAME, LARGEST = "same layer (diag)", "most similar layer (max)"
SAME_AND_LARGEST: dict[str, dict[str, Any]] = {
    LARGEST: {"color": "C1", "linewidth": 4, "alpha": 0.45, "marker": "o", "markersize": 7, "markeredgewidth": 0},
    SAME: {"color": "C0", "linewidth": 1.2, "marker": "o", "markersize": 3},
}
"""How the curves of :func:`diag_and_max` are drawn, the wider one first."""


def _parity(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of all, odd (residual) and even (post-residual) layers; names as the taps give them."""

    def odd(names: pd.Series) -> pd.Series:
        return names.str.endswith(".residual")

    def even(names: pd.Series) -> pd.Series:
        return names.str.fullmatch(BLOCK)

    return {
        "all": frame,
        "residual (odd)": frame[odd(frame["layer"]) & odd(frame["layer_other"])],
        "post-residual (even)": frame[even(frame["layer"]) & even(frame["layer_other"])],
    }


def diag_and_max(rows: Rows) -> dict[str, pd.Series]:
    """For each layer of the first network, over its depth: the value at the layer in the same place, and the largest.

    Args:
        rows: records of one pair of networks. The same place is the same name, else the nearest depth.

    Returns:
        Two series indexed by depth, of the layers that there are.
    """
    frame = pd.DataFrame(rows)
    frame = frame.assign(
        away=np.where(frame["layer"] == frame["layer_other"], -1, (frame["depth"] - frame["depth_other"]).abs())
    )
    by_layer = frame.sort_values("away", kind="stable").groupby("depth")["value"]
    same = by_layer.agg(lambda values: values.iloc[0])  # NaN stays NaN
    return {SAME: same, LARGEST: by_layer.max()}


def compare_curves(
    panels: Mapping[str, Rows],
    groups: Mapping[str, str],
    title: str | None = None,
    label: str = "CKA (unbiased)",
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Numbers of each layer of several networks over depth; networks of one group (seeds of a method) give a band.

    The panels of figures 3 and 5 of Grigg et al. 2021.

    Args:
        panels: title of each panel, and its rows: one row a network and layer.
        groups: network to group.
        title: written above.
        label: what the vertical axis shows.
        levels: named values without layers, drawn as dotted lines.

    Returns:
        A figure: a line per group (the mean), a band from the lowest to the highest network; a single network's band is
        its error bar, cut off where the catalogue says. Layers of :func:`is_drawn` and of heads, which are hollow;
        stages of a ResNet are shaded in turn.

    Raises:
        ValueError: a panel without rows.
    """
    colors = {group: f"C{number}" for number, group in enumerate(dict.fromkeys(groups.values()))}
    for rows in panels.values():
        _first(rows)
    heights = list((levels or {}).values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1 + 4.6 * len(panels), 3.8))
        for axes, (name, rows) in zip(
            np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels.items(), strict=True
        ):
            frame = pd.DataFrame(rows)
            in_head = frame["layer"].str.fullmatch(HEAD)
            frame = frame[in_head | is_drawn(frame["layer"], frame["model"])]
            frame = frame.assign(group=frame["model"].map(groups), place=_places(frame))
            _mark_stages(axes, frame)
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
                heights += _heights(mean, low, high, str(_first(rows)["metric"]))
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
    """What a vertical axis shows of curves: their values, and their error bars to where the catalogue cuts them off."""
    known, (bottom, top) = values.dropna().tolist(), described(metric).bars or (-np.inf, np.inf)
    return [*known, *pd.concat([low, high]).clip(min(bottom, *known, top), max(bottom, *known, top))]


def _around(heights: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that shows these, as on the report page: from 0 if they lie near; above is room for names."""
    finite = [height for height in heights if np.isfinite(height)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if 0 < low < high / 2:
        low = 0.0
    room = (high - low) or abs(high) or 1.0
    return low - 0.03 * room, high + 0.1 * room


def _places(frame: pd.DataFrame) -> pd.Series:
    """Where layers stand on a shared axis: backbones of the same layers line up, heads of any length come after.

    Backbones of different layers are put on the axis by depth.
    """
    head = frame["layer"].str.startswith("head")
    backbones = frame[~head].drop_duplicates(["model", "layer"]).groupby("model")["layer"].apply(tuple)
    if backbones.nunique() > 1:
        return frame["depth"] * backbones.map(len).max()
    order = {layer: place for place, layer in enumerate(frame[~head].sort_values("depth")["layer"].drop_duplicates())}
    last = frame[head].groupby("model")["depth"].rank("dense")
    share = last / last.groupby(frame["model"]).transform("max")
    return frame["layer"].map(order).fillna(len(order) - 1 + 2 * share)


def _mark_stages(axes: Axes, frame: pd.DataFrame) -> None:
    """Block groups and head of the network with the most layers."""
    longest = frame["model"].value_counts().index[0]
    layers = frame[frame["model"] == longest].drop_duplicates("layer")
    marks = layers["layer"].str.extract(STAGE)[0].radd("BG").fillna(layers["layer"].str.extract("^(head)")[0])
    for number, (mark, places) in enumerate(layers["place"].groupby(marks, sort=False)):
        if number % 2:
            axes.axvspan(places.min() - 0.4, places.max() + 0.4, color="0.94", zorder=0)
        middle = (places.min() + places.max()) / 2
        style: Any = {"ha": "center", "va": "top", "fontsize": 7, "clip_on": True}  # a panel may have no values
        axes.text(middle, 1.0, str(mark), transform=axes.get_xaxis_transform(), **style)


def _first(rows: Rows) -> Any:
    frame = pd.DataFrame(rows)
    if frame.empty:
        raise ValueError("no rows to draw")
    return frame.iloc[0]


def _when(row: Any) -> str:
    """The epoch of a network in training, or that was trained here; of any other there is none to name."""
    return f"epoch {row['epoch']}, " if pd.notna(row["step"]) or row["epoch"] else ""


def _what(frame: pd.DataFrame) -> str:
    row, n = frame.iloc[0], int(frame["n"].max())  # rows know how many images had a value
    kind = "manifolds" if row["metric"] in MANIFOLDS else "views"
    seen = "" if row["view"] in (None, "clean") else f", {row['view']} {kind}"
    return f"{described(row['metric']).label}{seen}\n{row['model']}, {n} images"


def _wrapped(title: str) -> str:
    return "\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, TITLE_WIDTH))
