"""For ``survey``: how well manifold graph metrics predict results on other tasks, recipe by recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from ssl_geometry.errors import UserError, did_you_mean, first_line
from ssl_geometry.geometry.prediction import leave_one_out, predictive_r2, rank_correlation, unit_means
from ssl_geometry.records import read_records
from ssl_geometry.runs.networks import Loaded

UNTRAINED = "untrained"
LEAST_MODELS = 4
"""Fewest models of a map, and fewest recipes of correlations and predictions."""
PUBLISHED = Path(__file__).parent / "models" / "transfer_targets.csv"


def recipes_of(networks: Mapping[str, Loaded], named: Mapping[str, str]) -> dict[str, str]:
    """Which models are seeds or versions of one recipe, and count once in predictions.

    Args:
        networks: name to network.
        named: recipes of some models, or of the name that several were given.

    Returns:
        Model to the first model of its recipe: that of ``--recipes``; else models given as ``NAME=RUN,RUN`` are one
        recipe; else the recipe of the network itself (:attr:`Method.recipe`; untrained networks by architecture).

    Raises:
        UserError: a recipe of a model that is not there.
    """
    known: dict[str, str] = {}
    for name, model in networks.items():
        itself = model.method.recipe if model.epochs is not None else f"{UNTRAINED} {model.architecture}"
        known[name] = named.get(name) or named.get(model.given) or (model.given if model.given != name else itself)
    if strange := [name for name in named if name not in known and name not in {m.given for m in networks.values()}]:
        raise UserError(f"--recipes.{strange[0]}: no such model; {did_you_mean(strange[0], known)}")
    first = {recipe: name for name, recipe in reversed(known.items())}
    return {name: first[recipe] for name, recipe in known.items()}


def read_targets(sources: Sequence[str], models: Mapping[str, str], recipes: Mapping[str, str]) -> pd.DataFrame:
    """What models reached on tasks.

    Args:
        sources: ``published``, CSV files with the columns task, dataset, model, value, or folders that
            ``python -m ssl_geometry.probe`` wrote.
        models: those of the survey, each with the published checkpoint that it is, if it is one. Published results are
            of checkpoints, all others of the names that the survey gives; what is of other models is left out.
        recipes: of :func:`recipes_of`.

    Returns:
        Columns task, dataset, model, value.

    Raises:
        UserError: no such file, columns that are missing, or results of too few of the recipes.
    """
    parts = []
    for source in sources:
        path = PUBLISHED if source == "published" else Path(source)
        if path.is_dir():
            try:
                frame = read_records(path)
            except FileNotFoundError as error:
                raise UserError(f"--targets {error}") from error
            kept = (frame["layer"] == "pooled") & (frame["split"] == "test") & frame["low"].notna()  # accuracies
            frame = frame[kept].assign(task=frame["metric"], dataset=path.name)
        else:
            try:
                frame = pd.read_csv(path)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else first_line(error)
                raise UserError(f"--targets {source}: cannot be read as a table ({reason})") from error
        if missing := [name for name in ("task", "dataset", "model", "value") if name not in frame]:
            raise UserError(
                f"--targets {source}: no column {missing[0]!r}; {did_you_mean(missing[0], list(frame.columns))}"
            )
        if "metric" in frame and not path.is_dir():  # two metrics of a data set are two tasks, never averaged
            several = frame.groupby(["task", "dataset"])["metric"].transform("nunique") > 1
            frame["task"] = frame["task"].where(~several, frame["task"] + " (" + frame["metric"] + ")")
        if source == "published":
            frame["model"] = frame["model"].map({checkpoint: name for name, checkpoint in models.items()})
        parts.append(frame[["task", "dataset", "model", "value"]])
    targets = pd.concat(parts, ignore_index=True)
    known = targets[targets["model"].isin(models)]
    if known.empty:
        there = sorted(targets["model"].dropna().unique()) or ["other checkpoints"]
        raise UserError(f"--targets {' '.join(sources)}: results of none of these models; they have {', '.join(there)}")
    most = known["model"].map(recipes).groupby([known["task"], known["dataset"]]).nunique().max()
    if most < LEAST_MODELS:
        raise UserError(
            f"--targets {' '.join(sources)}: no task has results of {LEAST_MODELS} recipes, which a prediction of each "
            f"from the others needs: {most} at most, since seeds and versions of one recipe count once (--recipes)"
        )
    return known


def predict(
    table: pd.DataFrame, targets: pd.DataFrame, baseline: Mapping[str, float], recipes: Mapping[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Which metrics predict each task, and how well a ridge regression does, next to ImageNet accuracy.

    Models of one recipe are averaged first: recipes are what is permuted and what is left out.

    Args:
        table: of :func:`metric_table`.
        targets: of :func:`read_targets`.
        baseline: ImageNet linear top-1 of the models for which it is known, percent.
        recipes: of :func:`recipes_of`.

    Returns:
        One row per task and data set, and a mean over data sets where there are several; and the prediction of each
        recipe (under the name of its first model) from the others. Tasks with fewer than four recipes are left out.
    """
    found, predicted = [], []
    targets = targets.assign(title=targets["task"] + ": " + targets["dataset"])
    several = targets.groupby("task").filter(lambda rows: rows["dataset"].nunique() > 1)
    complete = several.groupby(["task", "model"])["value"].agg(["mean", "size"]).reset_index()
    complete = complete[complete["size"] == complete.groupby("task")["size"].transform("max")]
    means = complete.assign(
        title=complete["task"] + ": mean of " + complete["size"].astype(str), value=complete["mean"]
    )
    for title, rows in pd.concat([targets, means]).groupby("title", sort=False):
        of_models = rows.groupby("model", sort=False)["value"].mean()
        units = [recipes[model] for model in of_models.index]
        x = unit_means(table.loc[of_models.index].to_numpy(), units)
        y = unit_means(of_models.to_numpy()[:, None], units)[:, 0]
        if len(y) < LEAST_MODELS or np.ptp(y) == 0:
            continue
        tested = rank_correlation(x, y)
        row: dict[str, Any] = {"task": title, "recipes": len(y), "models": len(of_models)}
        row["metrics"] = int(np.isfinite(tested.rho).sum())
        if row["metrics"]:
            best = int(np.nanargmax(np.abs(tested.rho)))
            row |= {
                "best metric": " ".join(table.columns[best]),
                "rho": tested.rho[best],
                "p": tested.p[best],
                "p (Holm)": tested.adjusted[best],
            }
        complete_columns = np.isfinite(x).all(0)
        if complete_columns.any():
            estimates = leave_one_out(x, y)
            row["ridge Q2"] = predictive_r2(estimates, y)
            predicted += [
                {"task": title, "model": model, "value": value, "predicted": g}
                for model, value, g in zip(dict.fromkeys(units), y, estimates, strict=True)
            ]
        accuracy = unit_means(np.array([[baseline.get(model, np.nan)] for model in of_models.index]), units)
        base = rank_correlation(accuracy, y)  # side by side with the metrics on the same recipes, or not at all
        row |= {"ImageNet rho": base.rho[0], "ImageNet p": base.p[0], "ImageNet Q2": np.nan}
        if np.isfinite(accuracy).all():
            row["ImageNet Q2"] = predictive_r2(leave_one_out(accuracy, y), y)
        found.append(row)
    tasks = pd.DataFrame(found)
    if "p (Holm)" in tasks and (tested_tasks := tasks["p (Holm)"].notna()).any():
        tasks.insert(list(tasks.columns).index("p (Holm)") + 1, "q (BH over tasks)", np.nan)
        tasks.loc[tested_tasks, "q (BH over tasks)"] = false_discovery_control(tasks.loc[tested_tasks, "p (Holm)"])
    return tasks, pd.DataFrame(predicted, columns=["task", "model", "value", "predicted"])


def task_text(tasks: pd.DataFrame) -> pd.DataFrame:
    """The tasks of :func:`predict` as text, one row per task."""
    text = pd.DataFrame(index=tasks["task"])
    for column in tasks.columns.drop("task"):
        digits = 4 if column.startswith("p") or column.endswith(" p") else 2
        text[column] = [
            "–" if pd.isna(value) else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
            for value in tasks[column]
        ]
    return text
