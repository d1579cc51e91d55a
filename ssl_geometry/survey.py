"""Survey many models: manifold graph metrics, which models are similar, and what predicts their transfer.

    python -m ssl_geometry.survey --models simclr=runs/c10/simclr swav dino-vits16 random:resnet50 --data.dataset PATH
    python -m ssl_geometry.survey --models ... --neighbors.settings [policy] --targets published

Protocol: every model sees the same measurement images, and the same augmented views of them (at its own size and
normalisation); evaluation mode, float32, features averaged over space; NNK neighbourhoods, solved exactly. One pass
over the images per model, several where the features of all its layers do not fit into memory. The numbers of a model
are written once it is measured: the same command, started again, continues with the missing models. Settings,
normalisation and aggregation are ours, after Cosentino et al. 2022.
"""

import json
import platform
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ssl_geometry.cli import run_command
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.data.images import digest
from ssl_geometry.devices import MOST_OF_FREE, as_size, free_memory
from ssl_geometry.errors import UserError, as_options
from ssl_geometry.files import write_text
from ssl_geometry.launching import by_turns, launch, naming, said_once, together
from ssl_geometry.measure import Neighborhoods, Occasion, Spectrum, Subject, measure_together
from ssl_geometry.measure.engine import layer_widths
from ssl_geometry.measure.neighbors import candidates, jaccard_records
from ssl_geometry.measure.processes import of_each
from ssl_geometry.methods import Method
from ssl_geometry.models.zoo import TABLE
from ssl_geometry.progress import progress_bar
from ssl_geometry.records import Protocol, RecordStore
from ssl_geometry.runs.networks import Loaded, load_networks
from ssl_geometry.shared_options import chosen_layers
from ssl_geometry.survey_options import NOTES, parse, report_small_classes
from ssl_geometry.survey_prediction import UNTRAINED, read_targets, recipes_of
from ssl_geometry.survey_tables import report

WORKING_BYTES = 24
"""For each image and feature of the layer that is measured: three copies in float64 next to what is kept of all."""


def survey_model(
    model: Loaded, groups: Sequence[list[str]], options: Any, fabric: L.Fabric, progress: Progress
) -> tuple[list[dict[str, Any]], list[Protocol]]:
    """The records of one model, and their protocols, from a pass over this process's share of the images per group.

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


def layer_groups(model: Loaded, memory: float, options: Any) -> tuple[list[list[str]], int]:
    """The layers of a model in groups whose features stay in memory together, each measured in a pass of its own.

    Args:
        model: its layers are those that the options ask for.
        memory: bytes that it may take.
        options: of the command.

    Returns:
        Layers of each group, in forward order; and the bytes that the largest group takes.

    Raises:
        UserError: the widest layer does not fit.
    """
    subject, layers = Subject.of(model.method, model.name), chosen_layers(model.method.network.backbone, options)
    widths = layer_widths(subject, subject.layers(layers, option=options.layers_option), options.data.image_shape)
    each = options.data.measure_size * sum(measurement.kept_bytes for measurement in _measurements(layers, options))
    widest = max(widths, key=widths.__getitem__)
    memory -= WORKING_BYTES * options.data.measure_size * widths[widest]
    if each * widths[widest] > memory:
        raise UserError(
            f"--data.measure_size {options.data.measure_size}: layer {widest} of {model.name} keeps "
            f"{as_size(each * widths[widest])} of features, {as_size(max(memory, 0))} may be taken on "
            f"{options.device}; measure fewer images, fewer --neighbors.settings, or on another --device"
        )
    groups: list[list[str]] = [[]]
    sizes = [0]
    for layer, width in widths.items():
        if sizes[-1] + each * width > memory:
            groups.append([])
            sizes.append(0)
        groups[-1].append(layer)
        sizes[-1] += each * width
    return groups, max(sizes)


def _memory_per_process(options: Any) -> float:
    """Bytes that a model may take in each process; every process must call it, outside of :func:`together`."""
    found = of_each((platform.node(), free_memory(options.device)))
    free = min(free for _, free in found)
    if options.device == "cpu":  # whose memory the processes of a machine share
        free /= max(Counter(host for host, _ in found).values())
    return MOST_OF_FREE * free / min(len(found), 2)  # several hold their own features next to those of all


def _plan(networks: Mapping[str, Loaded], memory: float, options: Any, console: Console) -> dict[str, list[list[str]]]:
    """The groups of layers of every model, with a message about their memory."""
    plans = {name: layer_groups(model, memory, options) for name, model in networks.items()}
    largest = max(plans, key=lambda name: plans[name][1])
    line = f"kept of one model after another: at most {as_size(plans[largest][1])} of features of {largest}"
    console.print(line)
    for name, (groups, _) in plans.items():
        if len(groups) > 1:
            console.print(
                f"{name}: {as_size(memory)} of memory may be taken, so its layers are measured in {len(groups)} passes"
            )
    return {name: groups for name, (groups, _) in plans.items()}


def fingerprint(method: nn.Module) -> str:
    """Hash of all weights and buffers, by which a changed model is measured again."""
    return digest(part for name_and_value in method.state_dict().items() for part in name_and_value)


@as_options
@said_once
def survey(args: Sequence[str]) -> Path:
    """Measure the models that are missing, then make all tables and figures.

    Raises:
        UserError: a mistake in the options, a model or the data.
    """
    options = parse(args)
    fabric = launch(options)
    out, data, console = (
        options.out,
        options.data,
        Console(quiet=not fabric.is_global_zero, highlight=False, soft_wrap=True),
    )
    networks = by_turns(lambda: load_networks(options.models), options, fabric)
    by_turns(data.prepare_data, options, fabric)
    with together(options):
        recipes = recipes_of(networks, options.recipes)
        if options.targets:  # report mistakes early
            read_targets(options.targets, {name: _checkpoint(model) for name, model in networks.items()}, recipes)
        for model in networks.values():
            chosen_layers(model.method.network.backbone, options)
        data.setup("test")
        if data.multi_label:
            raise UserError(
                f"--data.dataset {data.dataset}: neighbourhoods need one class per image; these have several"
            )
        options.k = candidates("--neighbors.k", options.neighbors.k, data)
        report_small_classes(options, data, console)
    memory = _memory_per_process(options)
    with together(options):
        plans = _plan(networks, memory, options, console)
    console.print(f"{data.measure_size:,} images of {data.dataset}, {len(networks)} models")
    store, notes = RecordStore(out / "records"), out / NOTES
    with together(options):
        if fabric.is_global_zero and options.overwrite:
            shutil.rmtree(store.directory, ignore_errors=True)
            notes.unlink(missing_ok=True)
        if fabric.is_global_zero and not notes.exists():  # before any result: by this file a survey recognises its own
            write_text(notes, "{}\n")
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
                console.print(f"        kept  {name}")
            else:
                with together(options):
                    model.method.to(fabric.device)
                    rows, protocols = survey_model(model, plans[name], options, fabric, progress)
                    if fabric.is_global_zero:
                        store.write(f"models/{name}", rows, protocols)
                        known[name] = fact
                        write_text(notes, json.dumps(known, indent=1) + "\n")
                console.print(f"    measured  {name}")
            del model
            progress.advance(overall)
    with together(options):
        if fabric.is_global_zero:
            for path in report(out, facts, recipes, options):
                kind = "table" if path.suffix == ".md" else "figure"
                console.print(f"{kind:>12}  {path}")
            console.print(f"     records  {out / 'records'}")
    return out


def _facts(model: Loaded, data: DataModule, options: Any) -> dict[str, Any]:
    """What determines whether a model is up to date, and its description in tables; as plain JSON data."""
    method, source = model.method, _checkpoint(model)
    names, kind = chosen_layers(method.network.backbone, options), type(method.network.backbone).__name__
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
    """The protocols of the measurements: all that changes a number, except for the weights."""
    subject, layers = Subject.of(method), chosen_layers(method.network.backbone, options)
    neighborhoods, spectrum = _measurements(layers, options)
    neighborhoods.k = options.k
    return [neighborhoods.protocol(subject, data), spectrum.protocol(subject, data)]


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.survey``."""
    run_command(survey, args, interrupted="interrupted: the same command goes on with the models that are missing")


if __name__ == "__main__":
    main()
