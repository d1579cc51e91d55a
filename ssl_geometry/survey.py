"""Many models side by side: manifold graph metrics, which models are alike, and what predicts how they transfer.

    python -m ssl_geometry.survey --models simclr=runs/c10/simclr swav dino-vits16 random:resnet50 --data.dataset PATH
    python -m ssl_geometry.survey --models ... --neighbors.settings [policy] --targets published

Protocol: every model sees the same measurement images, and the same augmented copies of them (at its own size and
normalisation); evaluation mode, float32, features averaged over space; NNK neighbourhoods, solved exactly. One pass
over the images a model, whose numbers are written at its end: the same command, started again, goes on with the models
that are missing. Settings, normalisation and aggregation are ours, after Cosentino et al. 2022.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.stats import false_discovery_control
from torch import nn

from ssl_geometry.cli import run_command
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError, nearest
from ssl_geometry.geometry.prediction import (
    group,
    least_p,
    leave_one_out,
    predictive_r2,
    rank_correlation,
    unit_means,
)
from ssl_geometry.measure import Neighborhoods, Occasion, Spectrum, Subject, measure_together
from ssl_geometry.measure.engine import as_options
from ssl_geometry.measure.neighbors import CANDIDATES, LEAST_CANDIDATES, SETTINGS, candidates
from ssl_geometry.measure.processes import of_each
from ssl_geometry.methods import Method
from ssl_geometry.models.zoo import TABLE
from ssl_geometry.networks import (
    Sources,
    by_turns,
    chosen_layers,
    launch,
    networks_parser,
    parse_networks,
    together,
    unchanged,
)
from ssl_geometry.ranges import at_least
from ssl_geometry.records import Protocol, RecordStore, read_records
from ssl_geometry.records.store import write_whole
from ssl_geometry.report.figures import save_figure
from ssl_geometry.report.models import (
    collapse_curves,
    collapse_over_training,
    correlation_map,
    depth_profiles,
    model_map,
    model_tree,
    prediction_scatter,
)
from ssl_geometry.report.tables import latex, markdown
from ssl_geometry.runs import load_networks, network_names, split_seeds

SEMANTIC = "semantic"
METRICS = {"neighbors": "number of neighbours", "diameter": "diameter", "affinity": "affinity"}
STATISTICS = ("mean", "std", "median")
LAYERS = ("stages", "pooled")
SOURCES: Sources = {
    "neighbors.layers": {"neighbors.layers": unchanged, "spectrum.layers": unchanged},
    **{f"neighbors.{name}": {f"neighbors.{name}": unchanged} for name in ("k", "settings", "copies")},
    "spectrum.copies": {"spectrum.copies": unchanged},
}
"""Options of the monitors that measured the same."""
UNTRAINED = "untrained"
LEAST_OF_A_CLASS = 3
"""Images of a class with fewer have no two neighbours, and no manifold."""
LEAST_MODELS = 4
"""Fewer are not mapped; fewer recipes are not correlated, nor predicted from each other."""
PUBLISHED = Path(__file__).parent / "models" / "transfer_targets.csv"


def survey_model(
    name: str, method: Method, epoch: int, data: DataModule, options: Any, fabric: L.Fabric, progress: Progress
) -> tuple[list[dict[str, Any]], list[Protocol]]:
    """One pass over this process's share of the images: the records of one model, and their protocols.

    Raises:
        UserError: features that are not finite, or too few images.
    """
    subject, measurements = Subject.of(method, name), _measurements(method, options)
    task = progress.add_task(name, total=len(data.loader("measure")), visible=fabric.is_global_zero)
    try:
        for measurement in measurements:
            measurement.prepare(subject, data)
        occasion = Occasion(subject, data, options.out.name, epoch)
        found = measure_together(measurements, occasion, lambda: progress.advance(task), lambda: together(options))
    except ValueError as error:
        raise UserError(f"--models {name}: {error}") from error
    progress.remove_task(task)
    rows = [row for measured in found for row in measured.rows]
    return rows, [protocol for measured in found for protocol in measured.protocols]


def _measurements(method: Method, options: Any) -> tuple[Neighborhoods, Spectrum]:
    """What is measured of one model."""
    names, asked = chosen_layers(method.backbone, options), options.neighbors
    neighborhoods = Neighborhoods(None, names, options.k, asked.settings, asked.copies)
    return neighborhoods, Spectrum(None, names, options.spectrum.copies)


def fingerprint(method: nn.Module) -> str:
    """Hash of all weights and buffers: a model that has changed is measured again."""
    digest = hashlib.sha256()
    for name, value in method.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# -- from records to tables --------------------------------------------------------------------------------------------


def metric_table(frame: pd.DataFrame, layer: Mapping[str, str], manifolds: Sequence[str]) -> pd.DataFrame:
    """The manifold graph metrics of every model: one row a model, columns (manifold, metric, statistic).

    Args:
        frame: records of a survey.
        layer: model to the layer that is looked at, the encoder's last; in the order of the rows.
        manifolds: kinds, in the order of the columns. What was not measured, or has no value, is NaN.

    Example:
        >>> common = {"model": "a", "layer": "pooled", "view": "crop"}
        >>> rows = [{**common, "metric": "diameter", "value": 0.5, "low": 0.4},
        ...         {**common, "metric": "diameter_std", "value": 0.1, "low": None},
        ...         {**common, "metric": "diameter_quantile", "value": 0.6, "low": 0.5}]
        >>> metric_table(pd.DataFrame(rows), {"a": "pooled"}, ["crop"]).iloc[0].dropna().to_list()
        [0.5, 0.1, 0.6]
    """
    at = frame[frame["layer"] == frame["model"].map(layer)]
    parts = {}
    for metric in METRICS:
        medians = at[(at["metric"] == f"{metric}_quantile") & (at["low"] == 0.5)]
        for statistic, rows in zip(
            STATISTICS, (at[at["metric"] == metric], at[at["metric"] == f"{metric}_std"], medians), strict=True
        ):
            for view, values in rows.groupby("view", sort=False):
                parts[view, metric, statistic] = values.set_index("model")["value"]
    columns = pd.MultiIndex.from_product([manifolds, METRICS, STATISTICS], names=["manifold", "metric", "statistic"])
    empty = pd.Series(dtype=float)
    cells = [parts.get(key, empty).reindex(list(layer)).to_numpy() for key in columns]
    return pd.DataFrame(np.transpose(cells), index=list(layer), columns=columns)


def readable(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The same as text, a table a metric, a column a manifold: mean ± spread over images (median)."""
    tables = {}
    for metric, title in METRICS.items():
        part, form = table.xs(metric, axis=1, level="metric"), ("{:.1f}" if metric == "neighbors" else "{:.3f}").format
        tables[title.capitalize()] = text = pd.DataFrame(index=table.index)
        for view in part.columns.unique("manifold"):
            numbers = part[view].map(form)
            text[view] = numbers["mean"] + " ± " + numbers["std"] + " (" + numbers["median"] + ")"
            text.loc[part[view]["mean"].isna(), view] = "–"
    return tables


def recipes_of(networks: Mapping[str, tuple[Method, int | None]], options: Any) -> dict[str, str]:
    """Which models are seeds or versions of one recipe, and count once where something is predicted.

    Args:
        networks: name to network and its epochs.
        options: of the command: ``recipes`` names those of some models, ``seeds`` the name that each was given.

    Returns:
        Model to the first model of its recipe: what ``--recipes`` says; else models given as ``NAME=RUN,RUN`` are one
        recipe; else what the network says of itself (:attr:`Method.recipe`; untrained networks by architecture).

    Raises:
        UserError: a recipe of a model that is not there.
    """
    known: dict[str, str] = {}
    for name, (method, epoch) in networks.items():
        itself = method.recipe if epoch is not None else f"{UNTRAINED} {method.init_args.get('backbone')}"
        given = options.seeds.get(name, name)
        known[name] = options.recipes.get(name) or options.recipes.get(given) or (given if given != name else itself)
    if strange := [name for name in options.recipes if name not in known and name not in options.seeds.values()]:
        raise UserError(f"--recipes.{strange[0]}: no such model; {nearest(strange[0], known)}")
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
                reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
                raise UserError(f"--targets {source}: cannot be read as a table ({reason})") from error
        if missing := [name for name in ("task", "dataset", "model", "value") if name not in frame]:
            raise UserError(f"--targets {source}: no column {missing[0]!r}; {nearest(missing[0], list(frame.columns))}")
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
    """Which metrics predict each task, and how well a ridge regression does, beside ImageNet accuracy.

    Models of one recipe are averaged first: recipes are what is permuted and what is left out.

    Args:
        table: of :func:`metric_table`.
        targets: of :func:`read_targets`.
        baseline: ImageNet linear top-1 of the models for which it is known, percent.
        recipes: of :func:`recipes_of`.

    Returns:
        One row a task and data set, and a mean over data sets where there are several; and the prediction of each
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
            guess = leave_one_out(x, y)
            row["ridge Q2"] = predictive_r2(guess, y)
            predicted += [
                {"task": title, "model": model, "value": value, "predicted": g}
                for model, value, g in zip(dict.fromkeys(units), y, guess, strict=True)
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


def _write_table(table: pd.DataFrame, texts: Mapping[str, pd.DataFrame], path: Path, note: str) -> Path:
    """Numbers as Parquet, and their texts, by title, as Markdown and LaTeX; the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = table.set_axis([" ".join(key) if isinstance(key, tuple) else str(key) for key in table.columns], axis=1)
    write_whole(path.with_suffix(".parquet"), flat.to_parquet)
    pages = "\n".join(f"# {title}\n\n{note}\n\n{markdown(text)}\n" for title, text in texts.items())
    path.with_suffix(".md").write_text(pages, encoding="utf-8")
    path.with_suffix(".tex").write_text(
        "\n".join(latex(text, f"{title}. {note}") for title, text in texts.items()), encoding="utf-8"
    )
    return path.with_suffix(".md")


def report(out: Path, facts: Mapping[str, Mapping[str, Any]], recipes: Mapping[str, str], options: Any) -> list[Path]:
    """All tables and pictures, from the records alone.

    Args:
        out: folder of the survey.
        facts: model to its family, last layer, ...; in the order of the tables.
        recipes: of :func:`recipes_of`.
        options: of the command.

    Returns:
        The files for a reader: pictures and Markdown.
    """
    frame = RecordStore(out / "records").read()
    frame = frame[frame["model"].isin(facts)]
    families = {name: fact["family"] for name, fact in facts.items()}
    n = int(frame["n"].max())
    table = metric_table(frame, {name: fact["layer"] for name, fact in facts.items()}, options.manifolds)
    note = (
        f"Features of the encoder's last layer, {n:,} images of {Path(options.data.dataset).name}; mean ± standard "
        f"deviation over images (median). k = {options.k}, {options.neighbors.copies} augmented views."
    )
    made, pictures = [_write_table(table, readable(table), out / "tables" / "mgm", note)], {}
    title = f"Manifold graph metrics over depth, {n:,} images"
    pictures["profiles"] = depth_profiles(frame, options.manifolds, list(METRICS), families, title)
    pictures["collapse"] = collapse_curves(frame, families, f"Collapse over depth, {n:,} images")
    if len(facts) >= LEAST_MODELS:
        try:
            tables, figures = _alike(table, families, n, options.clusters, out / "tables")
            made, pictures = made + tables, pictures | figures
        except ValueError as error:  # all models are the same, or collapsed
            Console(stderr=True).print(f"no map of models: {error}", highlight=False)
    several = len({recipes[model] for model in facts})
    if several >= LEAST_MODELS:
        tables, figures = _together(table, recipes, out / "tables")
        made, pictures = made + tables, pictures | figures
    else:
        for stale in (*(out / "tables").glob("correlation.*"), *(out / "figures").glob("correlation.*")):
            stale.unlink()  # of more models
        told = f"no correlations of metrics: {several} of the {LEAST_MODELS} recipes that they need (--recipes)"
        Console(stderr=True).print(told, highlight=False, soft_wrap=True)
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
        text = {"Prediction of transfer": _task_text(tasks)}
        made.append(_write_table(tasks.set_index("task"), text, out / "tables" / "prediction", note))
        write_whole(out / "tables" / "predicted.parquet", predicted.to_parquet)
        shown = tasks[tasks["task"].str.contains("mean of")] if len(tasks) > 9 else tasks
        shown = shown if len(shown) else tasks.head(9)
        titles = {
            row["task"]: f"{row['task']}\nQ² {row['ridge Q2']:.2f}, {row['recipes']} recipes ({row['models']} models)"
            for row in shown.to_dict("records")
            if row["task"] in set(predicted["task"])
        }
        if titles:
            pictures["prediction"] = prediction_scatter(predicted, families, titles)
    pictures |= _training(network_names(options.models))
    return made + [save_figure(figure, out / "figures" / name) for name, figure in pictures.items()]


def _alike(
    table: pd.DataFrame, families: Mapping[str, str], n: int, clusters: int, folder: Path
) -> tuple[list[Path], dict[str, Figure]]:
    """Which models are alike: table and figures."""
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
    made = [_write_table(place, {"Which models are alike": text}, folder / "map", note)]
    title = f"{len(table)} models by {used} manifold graph metrics, {n:,} images"
    return made, {
        "tree": model_tree(found.merges, list(table.index), families, title),
        "map": model_map(found.place, found.explained, found.labels.tolist(), families, title),
    }


def _together(table: pd.DataFrame, recipes: Mapping[str, str], folder: Path) -> tuple[list[Path], dict[str, Figure]]:
    """Which metrics say the same over recipes: table and figure."""
    means = table.xs("mean", axis=1, level="statistic")
    of_recipes = unit_means(means.to_numpy(), [recipes[model] for model in table.index])
    correlation = pd.DataFrame(of_recipes, columns=means.columns.map(" ".join))
    correlation = correlation.corr("spearman", min_periods=LEAST_MODELS)
    text = correlation.map(lambda value: "–" if np.isnan(value) else f"{value:.2f}")
    note = f"Spearman correlations of means over {len(of_recipes)} recipes ({len(table)} models)."
    made = [_write_table(correlation, {"Metrics that go together": text}, folder / "correlation", note)]
    return made, {"correlation": correlation_map(correlation, len(of_recipes), "Manifold graph metrics (means)")}


def _training(models: Mapping[str, str]) -> dict[str, Figure]:
    """Of the runs among the specifications that measured spectra while they learned: the collapse over training."""
    parts = []
    for name, spec in models.items():
        if (Path(spec) / "records").is_dir():
            frame = read_records(spec)
            frame = frame[frame["metric"].isin(["mean_cosine", "rankme", "diameter"])]
            parts.append(frame.assign(model=name))
    frame = pd.concat(parts) if parts else pd.DataFrame(columns=["metric", "epoch"])
    if frame.loc[frame["metric"] == "mean_cosine", "epoch"].nunique() < 2:
        return {}
    return {"collapse_training": collapse_over_training(frame, "pooled", "Collapse over training, pooled features")}


def _task_text(tasks: pd.DataFrame) -> pd.DataFrame:
    text = pd.DataFrame(index=tasks["task"])
    for column in tasks.columns.drop("task"):
        digits = 4 if column.startswith("p") or column.endswith(" p") else 2
        text[column] = [
            "–" if pd.isna(value) else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
            for value in tasks[column]
        ]
    return text


# -- the command -------------------------------------------------------------------------------------------------------


def _parse(args: Sequence[str]) -> Any:
    parser = networks_parser(
        "survey",
        "Measure the manifolds of many models, and say which models are alike and what predicts how they transfer. "
        "Started again, the same command goes on with the models that are missing.",
        "neighbors",
        layers="stages and pooled features; heads differ, and published models have none",
        resumable=True,
        several=True,
    )
    parser.add_argument(
        "--neighbors.settings",
        type=list[str],
        default=list(SETTINGS),
        help="manifolds of augmented views of an image, beside those of images of a class: policy (the views of "
        "SimCLR), crop, color, rotate, translate",
    )
    parser.add_argument(
        "--neighbors.k",
        type=Annotated[int, at_least(LEAST_CANDIDATES)] | None,
        help=f"nearest images of which NNK chooses (default: {CANDIDATES}, or all others where there are fewer)",
    )
    parser.add_argument(
        "--neighbors.copies", type=Annotated[int, at_least(3)], default=10, help="augmented views of each image"
    )
    parser.add_argument(
        "--spectrum.copies",
        type=Annotated[int, at_least(2, also=0)],
        default=10,
        help="augmented views of each image that LiDAR compares; 0 leaves LiDAR and alignment out",
    )
    parser.add_argument(
        "--clusters", type=Annotated[int, at_least(2)], default=3, help="groups that the models are cut into"
    )
    parser.add_argument(
        "--targets",
        type=list[str],
        default=[],
        help="results to predict: published (of the benchmark's checkpoints), CSV files with the columns task, "
        "dataset, model, value, or folders that ssl_geometry.probe wrote",
    )
    parser.add_argument(
        "--recipes",
        type=dict | list | str,  # what is no dictionary is told in one line
        default={},
        help="model to the name of its recipe, such as {a: x, b: x}, for models that do not tell by themselves; models "
        "of one recipe count once where something is predicted",
    )
    options = parse_networks(parser, "survey", args, "neighbors", LAYERS, SOURCES)
    options.models, options.seeds = split_seeds(options.models)
    options.recipes = _named_recipes(options.recipes)
    for name in options.neighbors.settings:
        if name not in SETTINGS:
            raise UserError(f"--neighbors.settings {name}: {nearest(name, SETTINGS)}")
    options.manifolds = [SEMANTIC, *options.neighbors.settings]
    return options


def _named_recipes(given: Any) -> dict[str, str]:
    if not isinstance(given, dict) or any(name is None or isinstance(name, dict | list) for name in given.values()):
        raise UserError(f"--recipes {given}: expected models with the names of their recipes, such as '{{a: x, b: x}}'")
    return {str(model): str(name) for model, name in given.items()}


def _report_small_classes(options: Any, data: DataModule, console: Console) -> None:
    """Say which classes have no manifold; where none has one, semantic manifolds are left out of the tables."""
    few = (data.measure_labels.bincount(minlength=data.num_classes) < LEAST_OF_A_CLASS).nonzero().squeeze(1).tolist()
    if len(few) == data.num_classes:
        told = f"no class has {LEAST_OF_A_CLASS} of the {data.measure_size} measurement images, so none has a manifold"
        if not options.neighbors.settings:
            raise UserError(
                f"--neighbors.settings []: {told}; choose some, or measure more images (--data.measure_size)"
            )
        console.print(f"left out  semantic manifolds: {told}", highlight=False, soft_wrap=True)
        options.manifolds = list(options.neighbors.settings)
    elif few:
        console.print(
            f"{len(few)} of {data.num_classes} classes have fewer than {LEAST_OF_A_CLASS} measurement images and no "
            f"manifold, the first is {data.class_names[few[0]]}: --data.measure_size {data.measure_size}",
            highlight=False,
            soft_wrap=True,
        )


@as_options
def survey(args: Sequence[str]) -> Path:
    """Measure the models that are missing, then make all tables and pictures.

    Args:
        args: command line.

    Returns:
        The folder of the results.

    Raises:
        UserError: a mistake in the options, a model or the data.
    """
    options = _parse(args)
    fabric = launch(options)
    out, data, console = options.out, options.data, Console(quiet=not fabric.is_global_zero)
    networks = by_turns(lambda: load_networks(options.models), options, fabric)
    by_turns(data.prepare_data, options, fabric)
    with together(options):
        recipes = recipes_of(networks, options)
        if options.targets:  # tell mistakes
            read_targets(options.targets, {name: _source(method) for name, (method, _) in networks.items()}, recipes)
        for method, _ in networks.values():
            chosen_layers(method.backbone, options)
        data.setup("test")
        if data.multi_label:
            raise UserError(
                f"--data.dataset {data.dataset}: neighbourhoods need one class a picture; these have several"
            )
        options.k = candidates("--neighbors.k", options.neighbors.k, data)
        _report_small_classes(options, data, console)
    console.print(f"{data.measure_size:,} images of {data.dataset}, {len(networks)} models", highlight=False)
    store, notes = RecordStore(out / "records"), out / "models.json"
    known = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    facts: dict[str, dict[str, Any]] = {}
    columns = (TextColumn("measuring {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = Console(stderr=True, quiet=not fabric.is_global_zero)
    with Progress(*columns, console=quiet) as progress:
        overall = progress.add_task("all models", total=len(networks))
        for name in list(networks):
            method, epoch = networks.pop(name)  # one network at a time on the device
            with together(options):
                fact = facts[name] = _facts(method, epoch, data, options)
                is_there = known.get(name) == fact and bool(store.read_part(f"models/{name}"))
            if of_each(is_there)[0]:
                console.print(f"        kept  {name}", highlight=False, soft_wrap=True)
            else:
                with together(options):
                    there = method.to(fabric.device)
                    rows, protocols = survey_model(name, there, epoch or 0, data, options, fabric, progress)
                    if fabric.is_global_zero:
                        store.write(f"models/{name}", rows, protocols)
                        known[name] = fact
                        write_whole(
                            notes, lambda path: path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                        )
                    del there
                console.print(f"    measured  {name}", highlight=False, soft_wrap=True)
            del method
            progress.advance(overall)
    with together(options):
        if fabric.is_global_zero:
            for path in report(out, facts, recipes, options):
                kind = "table" if path.suffix == ".md" else "picture"
                console.print(f"{kind:>12}  {path}", highlight=False, soft_wrap=True)
            console.print(f"     records  {out / 'records'}", highlight=False, soft_wrap=True)
    return out


def _facts(method: Method, epoch: int | None, data: DataModule, options: Any) -> dict[str, Any]:
    """What decides whether the numbers of a model stand, and what tables say of it; as JSON gives it back."""
    names, kind, source = chosen_layers(method.backbone, options), type(method.backbone).__name__, _source(method)
    facts = {
        "family": f"{UNTRAINED} {kind}" if epoch is None else getattr(method, "family", type(method).__name__),
        "epochs": epoch,
        "source": source,
        "imagenet_top1": TABLE[source].top1 if source else None,
        "layer": names[-1],
        "layers": names,
        "weights": fingerprint(method),
        "manifolds": options.manifolds,
        "protocols": [protocol.hash for protocol in _protocols(method, data, options)],
    }
    return json.loads(json.dumps(facts))


def _source(method: Method) -> str:
    """The published checkpoint that a model is; empty for any other."""
    source = getattr(method, "source", "")
    return source if source in TABLE else ""


def _protocols(method: Method, data: DataModule, options: Any) -> list[Protocol]:
    """All that changes a number but the weights."""
    subject, (neighborhoods, spectrum) = Subject.of(method), _measurements(method, options)
    neighborhoods.k = options.k
    return [neighborhoods.protocol(subject, data), spectrum.protocol(subject, data)]


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.survey``."""
    run_command(survey, args, interrupted="interrupted: the same command goes on with the models that are missing")


if __name__ == "__main__":
    main()
