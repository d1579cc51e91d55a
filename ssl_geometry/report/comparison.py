"""Figures of a comparison of networks, from its records alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ssl_geometry.records import RecordStore
from ssl_geometry.report.curves import compare_curves, training_curves
from ssl_geometry.report.heatmaps import view_heatmap
from ssl_geometry.report.pairs import pair_panels
from ssl_geometry.report.style import save_figure

MANIFOLDS = ("neighbors", "diameter", "affinity")
KINDS = ("semantic", "policy")


def draw(frame: pd.DataFrame, groups: Mapping[str, str], training_views: Sequence[str], out: Path) -> list[Path]:
    """Draw all figures, as PNG and PDF; the first measured training view has a panel."""
    figures = {}
    pairs = frame[frame["model_other"].notna()]
    for (a, b), rows in pairs.groupby(["model", "model_other"], sort=False):
        cka, knn, null = (rows[rows["metric"] == name] for name in ("cka", "mutual_knn", "max_cka_null"))
        figures[f"layers_{a}_{b}"] = pair_panels(cka, knn, null)
    layers = frame[frame["model_other"].isna()]
    invariance = layers[layers["metric"] == "invariance"]
    seen = [view for view in training_views if view in set(invariance["view"])]
    shown = {view: f"Invariance under the {view}" for view in seen[:1]}
    shown["own"] = "Invariance under its own training views"
    panels = {title: invariance[invariance["view"] == view] for view, title in shown.items()}
    panels["CKA with the classes"] = layers[layers["metric"] == "class_cka"]
    figures["invariance_and_classes"] = compare_curves(
        {title: rows for title, rows in panels.items() if len(rows)}, groups, f"{int(frame['n'].iloc[0]):,} images"
    )
    for model, rows in invariance.groupby("model", sort=False):
        figures[f"invariance_{model}"] = view_heatmap(rows)
    return [save_figure(figure, out / name) for name, figure in figures.items()]


def draw_training(models: Mapping[str, str], out: Path) -> list[Path]:
    """Manifold graph metrics over the training of the runs that measured them (``--neighbors.every_n_epochs``).

    Args:
        models: network to its source, a run directory or anything else.
        out: folder of the figure.

    Returns:
        The PNG file; none if no run measured them more than once.
    """
    frames = []
    for name, path in models.items():
        if (Path(path) / "records" / "neighbors").is_dir():
            frame = RecordStore(Path(path) / "records").read()
            shown = frame["metric"].isin(MANIFOLDS) & (frame["layer"] == "pooled") & frame["view"].isin(KINDS)
            frames.append(frame[shown].assign(model=name))
    rows = pd.concat(frames) if frames else pd.DataFrame({"epoch": [], "layer": []})
    if rows["epoch"].nunique() < 2:
        return []
    title = f"Manifolds in the pooled features over training, {int(rows['n'].max()):,} images"
    return [save_figure(training_curves(rows, MANIFOLDS, KINDS, "pooled", title), out / "manifolds_training")]
