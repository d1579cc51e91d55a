"""Figures of a pair of networks, from records."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ssl_geometry.report.heatmaps import DOTS, draw_map
from ssl_geometry.report.style import BLOCK, STYLE, Rows, first_row, is_drawn


def pair_panels(cka: Rows, knn: Rows, null: Rows = ()) -> Figure:
    """Two networks layer by layer: maps of all, residual (odd) and post-residual (even) layers, and curves over depth.

    The panels of figures 1, 2 and 4 of Grigg et al. 2021, with the overlap of nearest neighbours below the CKA.

    Args:
        cka: records of metric ``cka`` of one pair of networks.
        knn: records of metric ``mutual_knn`` of the same pair.
        null: records of metric ``max_cka_null`` of the same pair, the baseline of the curve of the most similar layer.

    Returns:
        A figure of two rows. In the maps a white dot marks, for each layer on the vertical axis, the most similar
        layer of the other network; the curves show the similarity to the matched layer (*diag*) and to the most similar
        layer (*max*), for the layers of :func:`is_drawn`.
    """
    first = first_row(cka)
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
                image = draw_map(axes, kept, dots=first["model"] != first["model_other"])
                figure.colorbar(image, ax=axes, shrink=0.8)
            shown = frame[
                is_drawn(frame["layer"], frame["model"]) & is_drawn(frame["layer_other"], frame["model_other"])
            ]
            lines = diag_and_max(shown)
            for name, style in SAME_AND_LARGEST.items():  # the two often coincide: the wider line stays visible
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
        figure.suptitle(f"{first['model']} and {first['model_other']}, {first['n']} images")
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
    """Rows of all, odd (residual) and even (post-residual) layers."""

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
    """For each layer of the first network, over its depth: the value at the matched layer, and the largest.

    Args:
        rows: records of one pair of networks. Layers match by name, else by the nearest depth.

    Returns:
        Two series indexed by depth.
    """
    frame = pd.DataFrame(rows)
    frame = frame.assign(
        away=np.where(frame["layer"] == frame["layer_other"], -1, (frame["depth"] - frame["depth_other"]).abs())
    )
    by_layer = frame.sort_values("away", kind="stable").groupby("depth")["value"]
    same = by_layer.agg(lambda values: values.iloc[0])  # NaN stays NaN
    return {SAME: same, LARGEST: by_layer.max()}
