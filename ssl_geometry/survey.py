"""Many models side by side: manifold graph metrics, which models are alike, and what predicts how they transfer.

    python -m ssl_geometry.survey --models simclr=runs/c10/simclr swav dino-vits16 random:resnet50 --data.dataset PATH
    python -m ssl_geometry.survey --models ... --neighbors.settings [policy] --targets published

Protocol: every model sees the same measurement images, and the same augmented copies of them (at its own size and
normalisation); evaluation mode, float32, features averaged over space; NNK neighbourhoods, solved exactly. One pass
over the images per model, several where the features of all its layers do not fit into memory. Its numbers are written
at its end: the same command, started again, goes on with the models that are missing. Settings, normalisation and
aggregation are ours, after Cosentino et al. 2022.
"""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ssl_geometry.cli import run_command
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.data.images import digest
from ssl_geometry.devices import MOST_OF_FREE, as_size, free_memory
from ssl_geometry.errors import UserError, nearest
from ssl_geometry.files import write_text, write_whole
from ssl_geometry.geometry.prediction import group, least_p, unit_means
from ssl_geometry.measure import Neighborhoods, Occasion, Spectrum, Subject, measure_together
from ssl_geometry.measure.engine import as_options, layer_widths
from ssl_geometry.measure.neighbors import CANDIDATES, LEAST_CANDIDATES, SETTINGS, candidates, jaccard_records
from ssl_geometry.measure.processes import of_each
from ssl_geometry.methods import Method
from ssl_geometry.models.zoo import TABLE
from ssl_geometry.networks import (
    Sources,
    by_turns,
    chosen_layers,
    launch,
    naming,
    networks_parser,
    parse_networks,
    said_once,
    together,
    unchanged,
)
from ssl_geometry.prediction import LEAST_MODELS, UNTRAINED, predict, read_targets, recipes_of, task_text
from ssl_geometry.progress import progress_bar
from ssl_geometry.ranges import at_least
from ssl_geometry.records import Protocol, RecordStore
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
from ssl_geometry.runs.networks import Loaded, load_networks, split_seeds

SEMANTIC = "semantic"
LAYERS = ("stages", "pooled")
SOURCES: Sources = {
    "neighbors.layers": {"neighbors.layers": unchanged, "spectrum.layers": unchanged},
    **{f"neighbors.{name}": {f"neighbors.{name}": unchanged} for name in ("k", "settings", "copies")},
    "spectrum.copies": {"spectrum.copies": unchanged},
}
"""Options of the monitors that measured the same."""
WORKING_BYTES = 24
"""For each image and feature of the layer that is measured: three copies in float64 next to what is kept of all."""
LEAST_OF_A_CLASS = 3
"""Images of a class with fewer have no two neighbours, and no manifold."""


def survey_model(
    model: Loaded, groups: Sequence[list[str]], options: Any, fabric: L.Fabric, progress: Progress
) -> tuple[list[dict[str, Any]], list[Protocol]]:
    """The records of one model, and their protocols, from a pass over this process's share of the images per group.

    Args:
        model: on its device.
        groups: of :func:`layer_groups`.
        options: of the command.
        fabric: knows the processes.
        progress: shows how far it is.

    Raises:
        UserError: features that are not finite, or too few images.
    """
    name, data, subject = model.name, options.data, Subject.of(model.method, model.name)
    total = len(groups) * len(data.loader("measure"))
    task = progress.add_task(name, total=total, visible=fabric.is_global_zero)
    occasion = Occasion(subject, data, options.out.name, model.epochs or 0)
    rows: list[dict[str, Any]] = []
    protocols: list[Protocol] = []
    graphs: dict[str, Tensor] = {}
    with naming(name):
        for layers in groups:
            measurements = _measurements(layers, options)
            for measurement in measurements:
                measurement.prepare(subject, data)
            found = measure_together(
                measurements, occasion, lambda: progress.advance(task), lambda: together(options, name)
            )
            graphs |= measurements[0].graphs
            rows += [row for measured in found for row in measured.rows]
            protocols = [protocol for measured in found for protocol in measured.protocols]
    progress.remove_task(task)
    if len(groups) > 1:  # pairs of layers, over all groups
        common = {**occasion.columns, "protocol": protocols[0].hash}
        rows = [row for row in rows if row["metric"] != "nnk_jaccard"]
        rows += jaccard_records(graphs, subject.depths(list(graphs)), **common)
    return rows, protocols


def _measurements(layers: list[str], options: Any) -> tuple[Neighborhoods, Spectrum]:
    """What is measured of one model."""
    asked = options.neighbors
    neighborhoods = Neighborhoods(layers, k=options.k, settings=asked.settings, copies=asked.copies)
    return neighborhoods, Spectrum(layers, copies=options.spectrum.copies)


def layer_groups(model: Loaded, room: float, options: Any) -> tuple[list[list[str]], int]:
    """The layers of a model in groups whose features stay in memory together, each measured in a pass of its own.

    Args:
        model: its layers are those that the options ask for.
        room: bytes that it may take.
        options: of the command.

    Returns:
        Layers of each group, in forward order; and the bytes that the largest group takes.

    Raises:
        UserError: the widest layer does not fit.
    """
    subject, layers = Subject.of(model.method, model.name), chosen_layers(model.method.backbone, options)
    widths = layer_widths(subject, subject.layers(layers, option=options.layers_option), options.data.image_shape)
    each = options.data.measure_size * sum(measurement.kept_bytes for measurement in _measurements(layers, options))
    widest = max(widths, key=widths.__getitem__)
    room -= WORKING_BYTES * options.data.measure_size * widths[widest]
    if each * widths[widest] > room:
        raise UserError(
            f"--data.measure_size {options.data.measure_size}: layer {widest} of {model.name} keeps "
            f"{as_size(each * widths[widest])} of features, {as_size(max(room, 0))} may be taken on {options.device}; "
            "measure fewer images, fewer --neighbors.settings, or on another --device"
        )
    groups: list[list[str]] = [[]]
    sizes = [0]
    for layer, width in widths.items():
        if sizes[-1] + each * width > room:
            groups.append([])
            sizes.append(0)
        groups[-1].append(layer)
        sizes[-1] += each * width
    return groups, max(sizes)


def _room(options: Any) -> float:
    """Bytes that a model may take in each process; every process must call it, outside of :func:`together`."""
    found = of_each((platform.node(), free_memory(options.device)))
    free = min(free for _, free in found)
    if options.device == "cpu":  # whose memory the processes of a machine share
        free /= max(Counter(host for host, _ in found).values())
    return MOST_OF_FREE * free / min(len(found), 2)  # several hold their own features next to those of all


def _plan(networks: Mapping[str, Loaded], room: float, options: Any, console: Console) -> dict[str, list[list[str]]]:
    """The groups of layers of every model; says how much they take."""
    plans = {name: layer_groups(model, room, options) for name, model in networks.items()}
    largest = max(plans, key=lambda name: plans[name][1])
    line = f"kept of one model after another: at most {as_size(plans[largest][1])} of features of {largest}"
    console.print(line, highlight=False, soft_wrap=True)
    for name, (groups, _) in plans.items():
        if len(groups) > 1:
            console.print(
                f"{name}: {as_size(room)} of memory may be taken, so its layers are measured in {len(groups)} passes",
                highlight=False,
                soft_wrap=True,
            )
    return {name: groups for name, (groups, _) in plans.items()}


def fingerprint(method: nn.Module) -> str:
    """Hash of all weights and buffers: a model that has changed is measured again."""
    return digest(part for name_and_value in method.state_dict().items() for part in name_and_value)


# -- from records to tables --------------------------------------------------------------------------------------------


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
            Console(stderr=True).print(f"no map of models: {error}", highlight=False)
    several = len({recipes[model] for model in facts})
    if several >= LEAST_MODELS:
        tables, figures = _together(table, recipes, out / "tables")
        made, drawn = made + tables, drawn | figures
    else:
        for stale in (*(out / "tables").glob("correlation.*"), *(out / "figures").glob("correlation.*")):
            stale.unlink()  # of more models
        message = f"no correlations of metrics: {several} of the {LEAST_MODELS} recipes that they need (--recipes)"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
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
    made = [write_table(place, {"Which models are alike": text}, folder / "map", note)]
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
    made = [write_table(correlation, {"Metrics that go together": text}, folder / "correlation", note)]
    return made, {"correlation": correlation_map(correlation, len(of_recipes), "Manifold graph metrics (means)")}


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
        help="manifolds of augmented views of an image, next to those of images of a class: policy (the views of "
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
        type=dict | list | str,  # what is no dictionary is reported in one line
        default={},
        help="model to the name of its recipe, such as {a: x, b: x}, for models that do not tell by themselves; models "
        "of one recipe count once where something is predicted",
    )
    options = parse_networks(parser, "survey", args, "neighbors", LAYERS, SOURCES)
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
        message = (
            f"no class has {LEAST_OF_A_CLASS} of the {data.measure_size} measurement images, so none has a manifold"
        )
        if not options.neighbors.settings:
            raise UserError(
                f"--neighbors.settings []: {message}; choose some, or measure more images (--data.measure_size)"
            )
        console.print(f"left out  semantic manifolds: {message}", highlight=False, soft_wrap=True)
        options.manifolds = list(options.neighbors.settings)
    elif few:
        console.print(
            f"{len(few)} of {data.num_classes} classes have fewer than {LEAST_OF_A_CLASS} measurement images and no "
            f"manifold, the first is {data.class_names[few[0]]}: --data.measure_size {data.measure_size}",
            highlight=False,
            soft_wrap=True,
        )


@as_options
@said_once
def survey(args: Sequence[str]) -> Path:
    """Measure the models that are missing, then make all tables and figures.

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
        recipes = recipes_of(networks, options.recipes)
        if options.targets:  # tell mistakes
            read_targets(options.targets, {name: _checkpoint(model) for name, model in networks.items()}, recipes)
        for model in networks.values():
            chosen_layers(model.method.backbone, options)
        data.setup("test")
        if data.multi_label:
            raise UserError(
                f"--data.dataset {data.dataset}: neighbourhoods need one class per image; these have several"
            )
        options.k = candidates("--neighbors.k", options.neighbors.k, data)
        _report_small_classes(options, data, console)
    room = _room(options)
    with together(options):
        plans = _plan(networks, room, options, console)
    console.print(f"{data.measure_size:,} images of {data.dataset}, {len(networks)} models", highlight=False)
    store, notes = RecordStore(out / "records"), out / "models.json"
    known = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    facts: dict[str, dict[str, Any]] = {}
    with progress_bar(shown=fabric.is_global_zero) as progress:
        overall = progress.add_task("all models", total=len(networks))
        for name in list(networks):
            model = networks.pop(name)  # one network at a time on the device
            with together(options):
                fact = facts[name] = _facts(model, data, options)
                is_there = known.get(name) == fact and bool(store.read_part(f"models/{name}"))
            if of_each(is_there)[0]:
                console.print(f"        kept  {name}", highlight=False, soft_wrap=True)
            else:
                with together(options):
                    model.method.to(fabric.device)
                    rows, protocols = survey_model(model, plans[name], options, fabric, progress)
                    if fabric.is_global_zero:
                        store.write(f"models/{name}", rows, protocols)
                        known[name] = fact
                        write_text(notes, json.dumps(known, indent=1) + "\n")
                console.print(f"    measured  {name}", highlight=False, soft_wrap=True)
            del model
            progress.advance(overall)
    with together(options):
        if fabric.is_global_zero:
            for path in report(out, facts, recipes, options):
                kind = "table" if path.suffix == ".md" else "figure"
                console.print(f"{kind:>12}  {path}", highlight=False, soft_wrap=True)
            console.print(f"     records  {out / 'records'}", highlight=False, soft_wrap=True)
    return out


def _facts(model: Loaded, data: DataModule, options: Any) -> dict[str, Any]:
    """What decides whether the numbers of a model stand, and what tables say of it; as JSON gives it back."""
    method, source = model.method, _checkpoint(model)
    names, kind = chosen_layers(method.backbone, options), type(method.backbone).__name__
    facts = {
        "family": f"{UNTRAINED} {kind}" if model.epochs is None else getattr(method, "family", type(method).__name__),
        "epochs": model.epochs,
        "source": source,
        "imagenet_top1": TABLE[source].top1 if source else None,
        "layer": names[-1],
        "layers": names,
        "weights": fingerprint(method),
        "manifolds": options.manifolds,
        "protocols": [protocol.hash for protocol in _protocols(method, data, options)],
    }
    return json.loads(json.dumps(facts))


def _checkpoint(model: Loaded) -> str:
    """The published checkpoint that a model is; empty for any other."""
    return model.source if model.source in TABLE else ""


def _protocols(method: Method, data: DataModule, options: Any) -> list[Protocol]:
    """All that changes a number but the weights."""
    subject, layers = Subject.of(method), chosen_layers(method.backbone, options)
    neighborhoods, spectrum = _measurements(layers, options)
    neighborhoods.k = options.k
    return [neighborhoods.protocol(subject, data), spectrum.protocol(subject, data)]


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.survey``."""
    run_command(survey, args, interrupted="interrupted: the same command goes on with the models that are missing")


if __name__ == "__main__":
    main()
