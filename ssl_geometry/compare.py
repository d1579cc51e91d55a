"""Compare networks layer by layer: the figures of Grigg et al. 2021 from runs, checkpoints or random initialisations.

    python -m ssl_geometry.compare --models simclr=runs/cifar10/simclr supervised=runs/cifar10/supervised
    python -m ssl_geometry.compare --models a=RUN,RUN,RUN b=RUN untrained=random --cka.layers blocks --devices 4

Protocol: every network sees the same measurement images and the same augmented views of them, in evaluation mode and
float32. Unbiased minibatch CKA with jackknife error bars over Gram matrices, and the overlap of nearest neighbours,
because a few outliers can dominate CKA. The numbers are those of the monitors of ``fit``, with the same protocol hash,
for any number of processes: these share the images, and the first one does everything else.
"""

import shutil
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from ssl_geometry.cli import run_command
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.data.plan import size_within
from ssl_geometry.devices import MOST_OF_FREE, as_size, free_memory
from ssl_geometry.errors import UserError, as_options
from ssl_geometry.files import write_text, write_whole
from ssl_geometry.findings import SUPERVISED, UNTRAINED, effect, findings, markdown, views_of
from ssl_geometry.geometry.gram import MIN_GRAM_SIZE
from ssl_geometry.geometry.neighbors import nearest
from ssl_geometry.geometry.nnk import nnk
from ssl_geometry.launching import by_turns, launch, naming, said_once, together
from ssl_geometry.measure.cka import GramSize, cka_protocol, warn_of_few
from ssl_geometry.measure.engine import layer_widths, measure_together
from ssl_geometry.measure.invariance import VIEWS, Invariance
from ssl_geometry.measure.measurement import Occasion
from ssl_geometry.measure.processes import of_each
from ssl_geometry.measure.similarity import Kept, Network, compare_pair, gram_pairs
from ssl_geometry.measure.subject import Subject
from ssl_geometry.progress import progress_bar
from ssl_geometry.ranges import at_least, between
from ssl_geometry.records import Protocol, RecordStore
from ssl_geometry.report.comparison import draw, draw_training
from ssl_geometry.report.manifolds import neighbor_figure
from ssl_geometry.report.style import save_figure
from ssl_geometry.runs.compatibility import recipe
from ssl_geometry.runs.networks import Loaded, load_networks, split_seeds
from ssl_geometry.shared_options import Sources, chosen_layers, networks_parser, parse_networks, unchanged

CANDIDATES = 50
"""Nearest images that NNK selects from, for the figures of neighbours."""
SOURCES: Sources = {
    "cka.layers": {"cka.layers": unchanged, "invariance.layers": unchanged},
    "cka.gram_size": {"cka.gram_size": unchanged, "invariance.gram_size": unchanged},
    "invariance.views": {"invariance.views": list},
}
"""Option of this command to the options of ``fit`` that set its default."""
NEIGHBORS = 10
"""Default number of neighbours of mutual kNN."""
LONGEST_GROUP = 40
"""Characters of the names of several networks in a legend."""
MOST_PERMUTATIONS = 10_000  # each keeps a number per pair of layers: 0.1 GB for two ResNet-50s
SHOWN = 10
"""Neighbours in a row of images."""


def storage(widths: Mapping[str, Mapping[str, int]], options: Any) -> tuple[Path | None, str]:
    """Decide where Gram vectors and features are stored, and report their size.

    Returns:
        The folder for their files if they do not fit into memory, else None; and one line for the user.
    """
    n, pairs = (
        options.data.measure_size,
        gram_pairs(options.data.measure_size, options.data.eval_batch_size, options.gram_size),
    )
    vectors = [4 * pairs * len(layers) for layers in widths.values()]
    features = max(4 * n * sum(layers.values()) for layers in widths.values())
    networks = f"{len(widths)} network{'s' * (len(widths) > 1)}"
    line = (
        f"kept until the end: {as_size(sum(vectors))} of Gram vectors of {networks}; "
        f"of one after another {as_size(features)} of features"
    )
    copied = 3 * max(*vectors, 4 * n * max(width for layers in widths.values() for width in layers.values()))
    free = min(of_each(free_memory("cpu")))
    if sum(vectors) + features + copied <= MOST_OF_FREE * free:
        return None, line
    return (
        options.out,
        f"{line}; {as_size(free)} of memory are free, so in files in {options.out}, removed at the end",
    )


def measure_network(
    model: Loaded, kept: Kept, options: Any, store: RecordStore, fabric: L.Fabric, progress: Progress
) -> Network:
    """Measure one network in a pass over this process's share of the images, and write its records."""
    name, method = model.name, model.method
    names, data = chosen_layers(method.network, options), options.data
    subject = Subject.of(method, name)
    # the training views of published networks are not known
    views = [view for view in options.views if view != "own" or method.view.ops]
    invariance = Invariance(names, gram_size=options.gram_size, views=views)
    task = progress.add_task(name, total=len(data.loader("measure")), visible=fabric.is_global_zero)
    occasion = Occasion(subject, data, options.out.name, model.epochs or 0)
    _, found = measure_together(
        [kept, invariance], occasion, lambda: progress.advance(task), lambda: together(options, name)
    )
    errors = torch.cat([metric.deviations().T for _, _, metric in invariance.metrics])  # in the order of the rows
    if fabric.is_global_zero:
        store.write(f"layers/{name}", found.rows, found.protocols)
    return Network(
        name,
        None if model.epochs is None else method.learns_from_labels,
        model.epochs,
        model.architecture,
        subject.depths(names),
        kept.vectors,
        kept.neighbors,
        (kept.neighbors < 0).flatten(1).all(1),  # no image has neighbours
        pd.DataFrame(found.rows).assign(deviations=list(errors.cpu().numpy())),
        kept.features,
    )


def _shown_layer(names: Sequence[str], options: Any) -> str | None:
    """The layer whose neighbours are shown: the last of the backbone."""
    shown = [layer for layer in names if not layer.startswith("head")][-1:] or list(names[-1:])
    return shown[0] if options.show_neighbors else None


def groups_of(networks: Mapping[str, Loaded]) -> dict[str, str]:
    """Which networks are runs of one recipe, and are shown as one band.

    Returns:
        Network to group: those of ``NAME=RUN,RUN`` are NAME; runs whose options differ in the seed alone, after as many
        epochs, and untrained networks of one architecture are one group, which has their names; any other network is
        its own.

    Raises:
        UserError: a network named ``untrained`` or ``supervised`` that is not; the findings use these names.
    """
    members: dict[Hashable, list[str]] = defaultdict(list)
    for name, model in networks.items():
        # published checkpoints of one recipe are not its seeds: they may be versions
        trained = model.method.recipe, model.source, model.epochs, recipe(model.config or {})
        same = trained if model.epochs is not None else (UNTRAINED, model.architecture)
        members[model.given if model.given != name else same].append(name)
    groups: dict[str, str] = {}
    for key, names in members.items():
        whole = " + ".join(names)
        several = whole if len(whole) <= LONGEST_GROUP else f"{names[0]} + {len(names) - 1} more"
        groups |= dict.fromkeys(names, key if isinstance(key, str) else several)
    for name, model in networks.items():
        untrained = model.epochs is None
        is_what = {UNTRAINED: untrained, SUPERVISED: untrained or model.method.learns_from_labels is not False}
        if not is_what.get(groups[name], True):
            raise UserError(f"--models {groups[name]}=…: the findings call others so, and this one is not; rename it")
    return {name: groups[name] for name in networks}


def show_neighbors(network: Network, data: DataModule, numbers: Sequence[int]) -> Figure:
    """Images and their neighbours in the last layer of the backbone: the nearest above, those that NNK keeps below.

    Returns:
        A figure, two rows per image.
    """
    assert network.features is not None
    with naming(network.name):
        found = nearest(network.features, k=min(CANDIDATES, len(network.features) - 1))
        chosen = nnk(network.features, found.ids[list(numbers)], network.features[list(numbers)])
    blank = (np.full((*data.image_shape[1:], 3), 255, np.uint8), "", False)

    def tile(image: int, text: str, framed: bool = False) -> tuple[np.ndarray, str, bool]:
        seen = data.measured([image])
        name = data.class_names[int(seen["label"])] if seen["label"].ndim == 1 else ""
        return seen["image"][0].movedim(0, -1).cpu().numpy(), f"{name[:12]}\n{text}", framed

    tiles = []
    for row, number in enumerate(numbers):
        ids, kept = found.ids[number], chosen.active[row]
        by_weight = chosen.weights[row].masked_fill(~kept, 0).argsort(descending=True)[: int(kept.sum())]
        caption = f"NNK keeps {len(by_weight)}\nof {int((ids >= 0).sum())}"
        if len(by_weight) > SHOWN:
            caption += f", here the {SHOWN}\nof largest weight"
        there = [j for j in range(min(SHOWN, len(ids))) if ids[j] >= 0]
        above = [tile(int(ids[j]), f"cos {1 - found.values[number, j]:.3f}", bool(kept[j])) for j in there]
        above += [blank] * (SHOWN - len(above))
        below = [tile(int(ids[j]), f"weight {chosen.weights[row, j]:.3f}", True) for j in by_weight[:SHOWN].tolist()]
        below += [blank] * (SHOWN - len(below))
        tiles += [tile(number, f"image {number}"), *above]
        tiles += [(blank[0], caption, False), *below]
    return neighbor_figure(
        tiles,
        SHOWN + 1,
        f"{network.name}: the {SHOWN} nearest of each image (framed: kept by NNK), and its NNK neighbours by weight",
    )


def parse(args: Sequence[str]) -> Any:
    """The options of the command line; see :func:`parse_networks`.

    Raises:
        UserError: a mistake in the options.
    """
    parser = networks_parser(
        "compare",
        "Compare networks layer by layer: CKA, nearest neighbours, invariance and classes, with figures.",
        "cka",
        layers="all",
        several=True,
    )
    parser.add_argument(
        "--cka.gram_size", type=GramSize, default=64, help="images per Gram matrix; the cost grows with it"
    )
    parser.add_argument(
        "--permutations",
        type=Annotated[int, between(0, MOST_PERMUTATIONS)],
        default=200,
        help="permutations of the images for the null of the most similar layer; 0 leaves it out",
    )
    parser.add_argument(
        "--k",
        type=Annotated[int, at_least(1)] | None,
        help=f"neighbours in mutual kNN (default: {NEIGHBORS}, or all others where there are fewer images)",
    )
    parser.add_argument(
        "--invariance.views",
        type=list[str],
        default=list(VIEWS),
        help="augmentations: own (each network's training views), policies (simclr, supervised) and single operations",
    )
    parser.add_argument(
        "--show_neighbors",
        type=Annotated[int, at_least(0)] | list[Annotated[int, at_least(0)]],
        default=[],
        help="indices of measurement images whose neighbours are shown: the nearest ones, and those that NNK selects",
    )
    options = parse_networks(parser, "compare", args, "cka", "all", SOURCES)
    options.gram_size, options.views = options.cka.gram_size, list(dict.fromkeys(options.invariance.views))
    shown = options.show_neighbors if isinstance(options.show_neighbors, list) else [options.show_neighbors]
    options.show_neighbors = list(dict.fromkeys(shown))
    return options


def _check_against_images(options: Any, n: int) -> None:
    """Check options that depend on the number of images."""
    for number in options.show_neighbors:
        if number >= n:
            raise UserError(f"--show_neighbors {number}: expected 0 to {n - 1}, the numbers of the measurement images")
    if n < MIN_GRAM_SIZE:
        raise UserError(f"--data.measure_size {n}: CKA needs at least {MIN_GRAM_SIZE} images")
    there = f"each of {n} measurement images has {n - 1} others"
    options.k = size_within("--k", options.k, NEIGHBORS, n - 1, there)


@as_options
@said_once
def compare(args: Sequence[str]) -> Path:
    """Measure, write records, draw figures and print the findings.

    Raises:
        UserError: a mistake in the options, a network or the data.
    """
    options = parse(args)
    fabric = launch(options)
    is_first = fabric.is_global_zero
    data, console = options.data, Console(quiet=not is_first, highlight=False, soft_wrap=True)
    networks = by_turns(lambda: load_networks(options.models), options, fabric)
    with together(options):
        groups = groups_of(networks)
        for model in networks.values():
            chosen_layers(model.method.network, options)  # a mistake is reported before anything is deleted
            Invariance(views=options.views).check(Subject.of(model.method))
    by_turns(data.prepare_data, options, fabric)
    with together(options):
        data.setup("test")
        _check_against_images(options, data.measure_size)
        warn_of_few(data, options.gram_size, "--cka.gram_size")
        widths = {
            name: layer_widths(Subject.of(method, name), chosen_layers(method.network, options), data.image_shape)
            for name, method in ((model.name, model.method) for model in networks.values())
        }
    folder, line = storage(widths, options)
    store = RecordStore(options.out / "records")
    console.print(f"{data.measure_size} images of {data.dataset}")
    console.print(line)
    trained = {name: m.method.view.spec["augment"] for name, m in networks.items() if m.epochs is not None}
    others = {views_of(name): augment for name, augment in trained.items() if augment}
    options.views = [*options.views, *others]  # every network sees every network's training views
    with together(options):
        if is_first:
            shutil.rmtree(store.directory, ignore_errors=True)
    measured: list[Network] = []
    protocols = {}
    with progress_bar(shown=fabric.is_global_zero) as progress:
        for name in list(networks):
            model = networks.pop(name)  # one network at a time on the device
            method = model.method
            method.named_views = {**method.named_views, **others}
            protocols[name] = cka_protocol(data, options.gram_size, Subject.of(method), {"clean": "clean"})
            shown = _shown_layer(list(widths[name]), options)
            kept = Kept(widths[name], options.gram_size, options.k, shown, folder)
            with together(options, name):
                method.to(fabric.device)
                measured.append(measure_network(model, kept, options, store, fabric, progress))
            del model, method
    with together(options):
        if is_first:
            _report(measured, protocols, groups, store, options, console)
    return options.out


def _report(
    measured: Sequence[Network],
    protocols: Mapping[str, Protocol],
    groups: Mapping[str, str],
    store: RecordStore,
    options: Any,
    console: Console,
) -> None:
    """Compare the pairs, write and print findings, and draw."""
    out = options.out
    pairs = []
    for a, b in combinations_with_replacement(measured, 2):
        protocol, other = protocols[a.name], protocols[b.name].what["views"]["clean"]
        if other != protocol.what["views"]["clean"]:
            protocol = Protocol({**protocol.what, "views of the other": other})
        found, rows = compare_pair(a, b, protocol, out.name, options.gram_size, options.k, options.permutations)
        store.write(f"pairs/{a.name}--{b.name}", found.rows, found.protocols)
        pairs.append(rows)
    labels = {network.name: network.learns_from_labels for network in measured}
    frame = store.read()
    methods = {network.name: UNTRAINED if network.epoch is None else groups[network.name] for network in measured}
    architectures = {network.name: network.architecture for network in measured}
    table = findings(pd.concat([*pairs, *(network.layers for network in measured)]), methods, labels, architectures)
    write_whole(out / "findings.parquet", table.to_parquet)
    write_text(out / "findings.md", markdown(table, options.models, int(frame["n"].iloc[0])))
    self_supervised = [views_of(network.name) for network in measured if network.learns_from_labels is False]
    figures = draw(frame, groups, self_supervised, out / "figures")
    figures += [
        save_figure(
            show_neighbors(network, options.data, options.show_neighbors),
            out / "figures" / f"neighbors_{network.name}",
        )
        for network in measured
        if options.show_neighbors
    ]
    figures += draw_training(split_seeds(options.models)[0], out / "figures")
    for claim, rows in table.groupby("claim", sort=False):
        decided, baseline = rows["verdict"].iloc[0], rows["baseline"].iloc[0]
        aside = "" if baseline else " (without baseline)"
        console.print(f"[bold]{decided:>11}[/bold]  {claim}{aside}")
        for row in rows.to_dict("records"):
            console.print(f"{'':>13}{row['contrast']}: {effect(row)}", markup=False)
    for figure in figures:
        console.print(f"     figure  {figure}")
    console.print(f"    records  {out / 'records'}")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.compare``."""
    run_command(compare, args, interrupted="interrupted: run the same command again, with --overwrite")


if __name__ == "__main__":
    main()
