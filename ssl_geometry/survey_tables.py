"""Tables and figures of ``survey``, from its records: metrics, which models are similar, what predicts transfer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from ssl_geometry.files import write_whole
from ssl_geometry.geometry.prediction import group, least_p, unit_means
from ssl_geometry.records import RecordStore
from ssl_geometry.report.models import (
    collapse_curves,
    correlation_map,
    depth_profiles,
    model_map,
    model_tree,
    prediction_scatter,
)
from ssl_geometry.report.style import save_figure
from ssl_geometry.report.survey import MANIFOLD_METRICS, collapse_in_training, metric_table, readable, write_table
from ssl_geometry.runs.networks import split_seeds
from ssl_geometry.survey_prediction import LEAST_MODELS, predict, read_targets, task_text


def report(out: Path, facts: Mapping[str, Mapping[str, Any]], recipes: Mapping[str, str], options: Any) -> list[Path]:
    """All tables and figures, from the records alone.

    Args:
        out: folder of the survey.
        facts: model to its family, last layer, ...; in the order of the tables.
        recipes: of :func:`recipes_of`.
        options: of the command.

    Returns:
        The files for a reader: figures and Markdown.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    frame = RecordStore(out / "records").read()
    frame = frame[frame["model"].isin(facts)]
    families = {name: fact["family"] for name, fact in facts.items()}
    n = int(frame["n"].max())
    table = metric_table(frame, {name: fact["layer"] for name, fact in facts.items()}, options.manifolds)
    note = (
        f"Features of the encoder's last layer, {n:,} images of {Path(options.data.dataset).name}; mean ± standard "
        f"deviation over images (median). k = {options.k}, {options.neighbors.copies} augmented views."
    )
    made, drawn = [write_table(table, readable(table), out / "tables" / "mgm", note)], {}
    title = f"Manifold graph metrics over depth, {n:,} images"
    drawn["profiles"] = depth_profiles(frame, options.manifolds, MANIFOLD_METRICS, families, title)
    drawn["collapse"] = collapse_curves(frame, families, f"Collapse over depth, {n:,} images")
    if len(facts) >= LEAST_MODELS:
        try:
            tables, figures = _alike(table, families, n, options.clusters, out / "tables")
            made, drawn = made + tables, drawn | figures
        except ValueError as error:  # all models are the same, or collapsed
            console.print(f"no map of models: {error}")
    several = len({recipes[model] for model in facts})
    if several >= LEAST_MODELS:
        tables, figures = _together(table, recipes, out / "tables")
        made, drawn = made + tables, drawn | figures
    else:
        for stale in (*(out / "tables").glob("correlation.*"), *(out / "figures").glob("correlation.*")):
            stale.unlink()  # of more models
        message = f"no correlations of metrics: {several} of the {LEAST_MODELS} recipes that they need (--recipes)"
        console.print(message)
    if options.targets:
        targets = read_targets(options.targets, {name: fact["source"] for name, fact in facts.items()}, recipes)
        baseline = {name: fact["imagenet_top1"] for name, fact in facts.items() if fact["imagenet_top1"] is not None}
        tasks, predicted = predict(table, targets, baseline, recipes)
        few, many = tasks["recipes"].min(), tasks["recipes"].max()
        lowest = least_p(many)
        note = (
            f"{few if few == many else f'{few} to {many}'} recipes ({tasks['models'].max()} models at most); models of "
            "one recipe are averaged, and recipes are permuted and left out as a whole. Best single metric by "
            "Spearman's rho, with its permutation p, Holm's correction for the number of metrics tried in this task, "
            "and over tasks the Benjamini-Hochberg q of Holm's p. Ridge regression on all metrics predicts each recipe "
            "from the others: Q2 = 1 - its squared errors / those of the others' mean, so 0 and below is no better "
            "than that mean. ImageNet: the same with linear accuracy on ImageNet alone, where it is known of all of "
            f"them. With {many} recipes no p can be below {lowest:.2g}, nor below "
            f"{min(1, tasks['metrics'].max() * lowest):.2g} after Holm. With so few, every figure is a hint."
        )
        text = {"Prediction of transfer": task_text(tasks)}
        made.append(write_table(tasks.set_index("task"), text, out / "tables" / "prediction", note))
        write_whole(out / "tables" / "predicted.parquet", predicted.to_parquet)
        shown = tasks[tasks["task"].str.contains("mean of")] if len(tasks) > 9 else tasks
        shown = shown if len(shown) else tasks.head(9)
        titles = {
            row["task"]: f"{row['task']}\nQ² {row['ridge Q2']:.2f}, {row['recipes']} recipes ({row['models']} models)"
            for row in shown.to_dict("records")
            if row["task"] in set(predicted["task"])
        }
        if titles:
            drawn["prediction"] = prediction_scatter(predicted, families, titles)
    drawn |= collapse_in_training(split_seeds(options.models)[0])
    return made + [save_figure(figure, out / "figures" / name) for name, figure in drawn.items()]


def _alike(
    table: pd.DataFrame, families: Mapping[str, str], n: int, clusters: int, folder: Path
) -> tuple[list[Path], dict[str, Figure]]:
    """Table and figures of which models are similar."""
    found = group(table.to_numpy(), clusters)
    place = pd.DataFrame(found.place, index=table.index, columns=["PC1", "PC2"])
    place.insert(0, "cluster", found.labels)
    place.insert(0, "family", list(families.values()))
    used = int(np.isfinite(table.to_numpy()).all(0).sum())
    text = place.assign(**{axis: place[axis].map("{:.2f}".format) for axis in ("PC1", "PC2")}).astype(str)
    note = (
        f"Ward's clusters of {len(table)} models on {used} standardised metrics, and their first two principal "
        f"components ({found.explained[0]:.0%} and {found.explained[1]:.0%} of the variance)."
    )
    made = [write_table(place, {"Which models are similar": text}, folder / "map", note)]
    title = f"{len(table)} models by {used} manifold graph metrics, {n:,} images"
    return made, {
        "tree": model_tree(found.merges, list(table.index), families, title),
        "map": model_map(found.place, found.explained, found.labels.tolist(), families, title),
    }


def _together(table: pd.DataFrame, recipes: Mapping[str, str], folder: Path) -> tuple[list[Path], dict[str, Figure]]:
    """Table and figure of correlated metrics over recipes."""
    means = table.xs("mean", axis=1, level="statistic")
    of_recipes = unit_means(means.to_numpy(), [recipes[model] for model in table.index])
    correlation = pd.DataFrame(of_recipes, columns=means.columns.map(" ".join))
    correlation = correlation.corr("spearman", min_periods=LEAST_MODELS)
    text = correlation.map(lambda value: "–" if np.isnan(value) else f"{value:.2f}")
    note = f"Spearman correlations of means over {len(of_recipes)} recipes ({len(table)} models)."
    made = [write_table(correlation, {"Metrics that go together": text}, folder / "correlation", note)]
    return made, {"correlation": correlation_map(correlation, len(of_recipes), "Manifold graph metrics (means)")}
