"""Compare networks layer by layer: the figures of Grigg et al. 2021 from runs, checkpoints or random initialisations.

    python -m ssl_geometry.compare --models simclr=runs/cifar10/simclr supervised=runs/cifar10/supervised
    python -m ssl_geometry.compare --models a=RUN,RUN,RUN b=RUN untrained=random --cka.layers blocks

Protocol: every network sees the same measurement images, and the same augmented copies of them; evaluation mode,
float32. Unbiased minibatch CKA with jackknife error bars over Gram matrices; the overlap of nearest neighbours stands
beside it, because CKA alone can be moved by a few outlying images. The numbers are those of the monitors of ``fit``,
with the same protocol hash.
"""

import re
import shutil
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ssl_geometry.cli import run_command
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.data.loader import size_within
from ssl_geometry.devices import check_alone, memory_for_measuring
from ssl_geometry.errors import UserError
from ssl_geometry.findings import SUPERVISED, UNTRAINED, findings, views_of
from ssl_geometry.geometry.cka import MIN_GRAM_SIZE, permutation_p, permuted_cka
from ssl_geometry.geometry.contrast import LEVEL, SMALLEST
from ssl_geometry.geometry.neighbors import nearest
from ssl_geometry.geometry.nnk import nnk
from ssl_geometry.geometry.overlap import ALIKE, NEAREST, mutual_knn, neighbor_ids
from ssl_geometry.measure.cka import GramSize, cka_protocol, cka_rows, warn_of_few
from ssl_geometry.measure.engine import Measured, Measurement, Occasion, as_options, measure_together
from ssl_geometry.measure.invariance import VIEWS, Invariance
from ssl_geometry.measure.requests import GramVector, Reduced, Request, pooled
from ssl_geometry.measure.subject import Subject
from ssl_geometry.methods import Method
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.networks import Sources, chosen_layers, networks_parser, parse_networks, unchanged
from ssl_geometry.ranges import at_least, between
from ssl_geometry.records import Protocol, RecordStore, record
from ssl_geometry.report.figures import (
    BLOCK,
    compare_curves,
    neighbor_pictures,
    pair_panels,
    save_figure,
    training_curves,
    view_heatmap,
)
from ssl_geometry.resume import recipe
from ssl_geometry.runs import load_networks, network_names, split_seeds

CANDIDATES = 50
"""Nearest images of which NNK chooses, where neighbours are shown."""
SOURCES: Sources = {
    "cka.layers": {"cka.layers": unchanged, "invariance.layers": unchanged},
    "cka.gram_size": {"cka.gram_size": unchanged, "invariance.gram_size": unchanged},
    "invariance.views": {"invariance.views": list},
}
"""Options of the monitors that measured the same."""
NEIGHBORS = 10
"""Nearest images that mutual kNN compares, unless others are asked for."""
MANIFOLDS = ("neighbors", "diameter", "affinity")
KINDS = ("semantic", "policy")
LONGEST_GROUP = 40
"""Characters of the names of several networks in a legend."""
SEED, CHANCE = 0, 0.95
"""Of the permutations, and the quantile of theirs that a search over layers is held against."""
MOST_PERMUTATIONS = 10_000  # each keeps a number per pair of layers: 0.1 GB for two ResNet-50s
SHOWN = 10
"""Neighbours in a row of pictures."""


@dataclass
class Network:
    """One network of the comparison, and what is kept of it: no activations, no weights."""

    name: str
    learns_from_labels: bool | None
    """None where that is not known, or it was not trained."""
    epoch: int | None
    """Completed epochs; None was not trained."""
    architecture: str
    depths: dict[str, float]
    vectors: list[Tensor]
    """For each batch, the Gram vectors of the layers, (L, P)."""
    neighbors: Tensor
    """Of each layer and image, the k nearest images, (L, N, k)."""
    alike: Tensor
    """Layers whose direction does not vary, (L,): they have no neighbours."""
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The records of its invariance and class CKA, and their jackknife deviations over blocks of images."""
    features: Tensor | None = None
    """Of the last layer of the backbone, (N, D), where neighbours are to be shown."""


class Kept(Measurement):
    """What pairs of networks are compared by: the Gram vectors and the pooled features of each layer, clean images.

    Args:
        layers: their names.
        gram_size: images in a Gram matrix.
    """

    def __init__(self, layers: Sequence[str], gram_size: int) -> None:
        super().__init__()
        self._clean = Request(tuple(layers), GramVector(gram_size))
        self._pooled = Request(tuple(layers), pooled)
        self.vectors: list[Tensor] = []
        self._features: dict[str, list[Tensor]] = defaultdict(list)

    def requests(self, subject: Subject) -> Sequence[Request]:
        """Of clean images."""
        return [self._clean, self._pooled]

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch, to the host."""
        self.vectors.append(torch.stack(list(reduced[self._clean].values())).cpu())
        for layer, value in reduced[self._pooled].items():
            self._features[layer].append(value.cpu())

    def finish(self, occasion: Occasion) -> Measured:
        """Pairs have rows, a single network has none."""
        return Measured()

    def features(self) -> dict[str, Tensor]:
        """Layer to pooled features, (N, D); handed over."""
        return {layer: torch.cat(self._features.pop(layer)) for layer in self._pooled.layers}


def measure_network(
    name: str, method: Method, epoch: int | None, data: DataModule, options: Any, store: RecordStore, progress: Any
) -> Network:
    """One pass over the measurement images: Gram vectors, neighbours, invariance and class CKA of one network."""
    names = chosen_layers(method, options)
    subject = Subject.of(method, name)
    views = [view for view in options.views if view != "own" or method.view.ops]  # a published one's are not known
    kept, invariance = Kept(names, options.gram_size), Invariance(None, names, options.gram_size, views)
    task = progress.add_task(name, total=len(data.loader("measure")))
    occasion = Occasion(subject, data, options.out.name, epoch or 0)
    _, found = measure_together([kept, invariance], occasion, lambda: progress.advance(task))
    store.write(f"layers/{name}", found.rows, found.protocols)
    by_layer = kept.features()
    neighbors = torch.stack([neighbor_ids(value, options.k) for value in by_layer.values()])
    alike = (neighbors < 0).flatten(1).all(1)  # no image has any
    shown = [layer for layer in names if not layer.startswith("head")][-1:] or names[-1:]
    kept_features = by_layer[shown[0]] if options.show_neighbors else None
    labels = None if epoch is None else method.learns_from_labels
    architecture = str(method.init_args.get("backbone"))
    depths = subject.depths(names)
    network = Network(name, labels, epoch, architecture, depths, kept.vectors, neighbors, alike, features=kept_features)
    errors = torch.cat([metric.deviations().T for _, _, metric in invariance.metrics])  # in the order of the rows
    network.layers = pd.DataFrame(found.rows).assign(deviations=list(errors.cpu().numpy()))
    return network


def groups_of(networks: Mapping[str, tuple[Method, int | None]], options: Any) -> dict[str, str]:
    """Which networks are runs of one recipe, and are shown as one band.

    Args:
        networks: name to network and its epochs, None where it was not trained.
        options: of the command: ``seeds`` is the name that each was given, ``configs`` that of each run.

    Returns:
        Network to group: those of ``NAME=RUN,RUN`` are NAME; runs whose options differ in the seed alone, after as many
        epochs, and untrained networks of one architecture are one group, which has their names; any other network is
        its own.

    Raises:
        UserError: a network by the name of what it is not, ``untrained`` or ``supervised``, which findings speak of.
    """
    members: dict[Hashable, list[str]] = defaultdict(list)
    for name, (method, epoch) in networks.items():
        source = getattr(method, "source", "")  # versions of a published recipe are no seeds of it
        trained = method.recipe, source, epoch, recipe(options.configs.get(name, {}))
        same = trained if epoch is not None else (UNTRAINED, method.init_args.get("backbone"))
        members[options.seeds[name] if options.seeds[name] != name else same].append(name)
    groups: dict[str, str] = {}
    for key, names in members.items():
        whole = " + ".join(names)
        several = whole if len(whole) <= LONGEST_GROUP else f"{names[0]} + {len(names) - 1} more"
        groups |= dict.fromkeys(names, key if isinstance(key, str) else several)
    for name, (method, epoch) in networks.items():
        is_what = {UNTRAINED: epoch is None, SUPERVISED: epoch is None or method.learns_from_labels is not False}
        if not is_what.get(groups[name], True):
            raise UserError(f"--models {groups[name]}=…: the findings call others so, and this one is not; rename it")
    return {name: groups[name] for name in networks}


def _common(network: Network, options: Any) -> dict[str, Any]:
    return {
        "run": options.out.name,
        "model": network.name,
        "split": "measure",
        "epoch": network.epoch or 0,
        "n": network.neighbors.shape[1],
    }


def compare_pair(a: Network, b: Network, protocol: Protocol, options: Any, store: RecordStore) -> pd.DataFrame:
    """All pairs of layers of two networks: CKA with error bars, and overlap of neighbours.

    Returns:
        The records of CKA, with their jackknife deviations over blocks of images.
    """
    cka = LayerwiseCKA([f"a/{layer}" for layer in a.depths], [f"b/{layer}" for layer in b.depths], options.gram_size)
    for x, y in zip(a.vectors, b.vectors, strict=True):
        cka.update(
            {f"a/{layer}": row for layer, row in zip(a.depths, x, strict=True)},
            {f"b/{layer}": row for layer, row in zip(b.depths, y, strict=True)},
        )
    undefined = a.alike[:, None] | b.alike
    overlap = mutual_knn(a.neighbors, b.neighbors).masked_fill(undefined, torch.nan)
    alike = f"no neighbours where directions are within {ALIKE} roundings"
    metric = f"mutual kNN, k={options.k}, {NEAREST}, pooled features; {alike}"
    knn_protocol = Protocol({**protocol.what, "metric": metric})
    common = {**_common(a, options), "view": "clean"}
    rows = cka_rows(cka, a.depths, b.depths, **common, model_other=b.name, protocol=protocol.hash)
    same_pair = ("model_other", "layer", "layer_other", "depth", "depth_other")
    overlaps = [
        record(
            **common,
            **{column: row[column] for column in same_pair},
            metric="mutual_knn",
            value=shared,
            protocol=knn_protocol.hash,
        )
        for row, shared in zip(rows, overlap.flatten().tolist(), strict=True)
    ]
    searched, protocols = [], [protocol, knn_protocol]
    if a is not b and options.permutations:
        permuted = f"images within Gram matrices, alike in all layers, seed {SEED}; null: quantile {CHANCE:g}"
        what = {"permutations": options.permutations, "permuted": permuted}
        protocols.append(Protocol({**protocol.what, **what}))
        values = torch.tensor([row["value"] for row in rows], dtype=torch.float64).view(len(a.depths), -1)
        searched = against_chance(a, b, values, options, **common, protocol=protocols[-1].hash)
    store.write(f"pairs/{a.name}--{b.name}", rows + overlaps + searched, protocols)
    return pd.DataFrame(rows).assign(deviations=list(cka.deviations().flatten(1).T.numpy()))


def against_chance(
    a: Network, b: Network, values: Float[Tensor, "L M"], options: Any, **common: Any
) -> list[dict[str, Any]]:
    """The most similar layer of the other network for each layer, and what permuted images give such a search.

    Args:
        a: whose layers are the rows.
        b: whose layers are searched: its post-residual ones for a post-residual layer, else all.
        values: their CKA.
        options: ``gram_size`` and ``permutations``.
        common: what all records share.

    Returns:
        For each layer of ``a`` three records: ``max_cka``, with the layer that has it; ``max_cka_null``, which one
        search in twenty exceeds when images are permuted; ``max_cka_p``, how often it reads as much as here.
    """
    null = permuted_cka(a.vectors, b.vectors, options.gram_size, options.permutations, SEED)
    blocks = torch.tensor([bool(re.fullmatch(BLOCK, layer)) for layer in b.depths])
    rows: list[dict[str, Any]] = []
    for layer, row, draws in zip(a.depths, values, null.unbind(1), strict=True):
        among = row.isfinite() & (blocks if re.fullmatch(BLOCK, layer) and blocks.any() else True)
        if not among.any():
            continue
        best = row.masked_fill(~among, -torch.inf).argmax()
        by_chance = draws[:, among].amax(1)
        other = list(b.depths)[best]
        place = {"model_other": b.name, "layer": layer, "layer_other": other}
        place |= {"depth": a.depths[layer], "depth_other": b.depths[other]}
        found = {
            "max_cka": row[best],
            "max_cka_null": by_chance.quantile(CHANCE),
            "max_cka_p": permutation_p(row[best], by_chance),
        }
        rows += [record(**common, **place, metric=name, value=float(value)) for name, value in found.items()]
    return rows


def draw(frame: pd.DataFrame, groups: Mapping[str, str], labels: Mapping[str, bool | None], out: Path) -> list[Path]:
    """All pictures, from the records alone, as PNG and PDF.

    Args:
        frame: the records of a comparison.
        groups: of :func:`groups_of`.
        labels: network to whether it learned from labels, where that is known.
        out: folder.

    Returns:
        The PNG files.
    """
    pictures = {}
    pairs = frame[frame["model_other"].notna()]
    for (a, b), rows in pairs.groupby(["model", "model_other"], sort=False):
        cka, knn, null = (rows[rows["metric"] == name] for name in ("cka", "mutual_knn", "max_cka_null"))
        pictures[f"layers_{a}_{b}"] = pair_panels(cka, knn, null)
    layers = frame[frame["model_other"].isna()]
    invariance = layers[layers["metric"] == "invariance"]
    self_supervised = [name for name in groups if labels[name] is False]
    seen = [view for view in map(views_of, self_supervised) if view in set(invariance["view"])]
    shown = {view: f"Invariance under the {view}" for view in seen[:1]}
    shown["own"] = "Invariance under its own training views"
    panels = {title: invariance[invariance["view"] == view] for view, title in shown.items()}
    panels["CKA with the classes"] = layers[layers["metric"] == "class_cka"]
    pictures["invariance_and_classes"] = compare_curves(
        {title: rows for title, rows in panels.items() if len(rows)}, groups, f"{int(frame['n'].iloc[0]):,} images"
    )
    for model, rows in invariance.groupby("model", sort=False):
        pictures[f"invariance_{model}"] = view_heatmap(rows)
    return [save_figure(figure, out / name) for name, figure in pictures.items()]


def draw_training(models: Sequence[str], out: Path) -> list[Path]:
    """Manifold graph metrics over the training of the runs that measured them (``--neighbors.every_n_epochs``).

    Args:
        models: as given to ``--models``.
        out: folder of the picture.

    Returns:
        The PNG file, or nothing where fewer than one run measured them more than once.
    """
    frames = []
    for name, path in network_names(models).items():
        if (Path(path) / "records" / "neighbors").is_dir():
            frame = RecordStore(Path(path) / "records").read()
            shown = frame["metric"].isin(MANIFOLDS) & (frame["layer"] == "pooled") & frame["view"].isin(KINDS)
            frames.append(frame[shown].assign(model=name))
    rows = pd.concat(frames) if frames else pd.DataFrame({"epoch": [], "layer": []})
    if rows["epoch"].nunique() < 2:
        return []
    title = f"Manifolds in the pooled features over training, {int(rows['n'].max()):,} images"
    return [save_figure(training_curves(rows, MANIFOLDS, KINDS, "pooled", title), out / "manifolds_training")]


def show_neighbors(network: Network, data: DataModule, numbers: Sequence[int]) -> Figure:
    """Images and their neighbours in the last layer of the backbone: the nearest above, those that NNK keeps below.

    Args:
        network: what was measured.
        data: whose measurement images they are.
        numbers: of the images.

    Returns:
        A picture, two rows an image.
    """
    assert network.features is not None
    pixels = torch.cat([batch["image"].cpu() for batch in data.loader("measure")]).movedim(1, -1).numpy()
    labels = torch.cat([batch["label"].cpu() for batch in data.loader("measure")])
    try:
        found = nearest(network.features, k=min(CANDIDATES, len(pixels) - 1))
        chosen = nnk(network.features, found.ids[list(numbers)], network.features[list(numbers)])
    except ValueError as error:
        raise UserError(f"--show_neighbors: {network.name}: {error}") from error
    blank = (np.full_like(pixels[0], 255), "", False)

    def picture(image: int, text: str, framed: bool = False) -> tuple[np.ndarray, str, bool]:
        name = data.class_names[int(labels[image])] if labels.ndim == 1 else ""
        return pixels[image], f"{name[:12]}\n{text}", framed

    pictures = []
    for row, number in enumerate(numbers):
        ids, kept = found.ids[number], chosen.active[row]
        by_weight = chosen.weights[row].masked_fill(~kept, 0).argsort(descending=True)[: int(kept.sum())]
        says = f"NNK keeps {len(by_weight)}\nof {int((ids >= 0).sum())}"
        if len(by_weight) > SHOWN:
            says += f", here the {SHOWN}\nof largest weight"
        there = [j for j in range(min(SHOWN, len(ids))) if ids[j] >= 0]
        above = [picture(int(ids[j]), f"cos {1 - found.values[number, j]:.3f}", bool(kept[j])) for j in there]
        above += [blank] * (SHOWN - len(above))
        below = [picture(int(ids[j]), f"weight {chosen.weights[row, j]:.3f}", True) for j in by_weight[:SHOWN].tolist()]
        below += [blank] * (SHOWN - len(below))
        pictures += [picture(number, f"image {number}"), *above]
        pictures += [(blank[0], says, False), *below]
    return neighbor_pictures(
        pictures,
        SHOWN + 1,
        f"{network.name}: the {SHOWN} nearest of each image (framed: kept by NNK), and its NNK neighbours by weight",
    )


def _parse(args: Sequence[str]) -> Any:
    parser = networks_parser(
        "compare",
        "Compare networks layer by layer: CKA, nearest neighbours, invariance and classes, with figures.",
        "cka",
        layers="all",
    )
    parser.add_argument("--cka.gram_size", type=GramSize, default=64, help="images in a Gram matrix of CKA")
    parser.add_argument(
        "--permutations",
        type=Annotated[int, between(0, MOST_PERMUTATIONS)],
        default=200,
        help="permutations of the images that say what the most similar layer reads by chance; 0 leaves it out",
    )
    parser.add_argument(
        "--k",
        type=Annotated[int, at_least(1)] | None,
        help=f"neighbours that mutual kNN compares (default: {NEIGHBORS}, or all others where there are fewer images)",
    )
    parser.add_argument(
        "--invariance.views", type=list[str], default=list(VIEWS), help="augmentations whose invariance is measured"
    )
    parser.add_argument(
        "--show_neighbors",
        type=Annotated[int, at_least(0)] | list[Annotated[int, at_least(0)]],
        default=[],
        help="numbers of measurement images whose neighbours are shown, all k nearest beside those that NNK keeps",
    )
    options = parse_networks(parser, "compare", args, "cka", "all", SOURCES)
    options.gram_size, options.views = options.cka.gram_size, options.invariance.views
    options.models, options.seeds = split_seeds(options.models)
    shown = options.show_neighbors if isinstance(options.show_neighbors, list) else [options.show_neighbors]
    options.show_neighbors = list(dict.fromkeys(shown))
    return options


def _hold_to_images(options: Any, n: int) -> None:
    """Options that count images, when their number is known."""
    for number in options.show_neighbors:
        if number >= n:
            raise UserError(f"--show_neighbors {number}: expected 0 to {n - 1}, the numbers of the measurement images")
    if n < MIN_GRAM_SIZE:
        raise UserError(f"--data.measure_size {n}: CKA needs at least {MIN_GRAM_SIZE} images")
    there = f"each of {n} measurement images has {n - 1} others"
    options.k = size_within("--k", options.k, NEIGHBORS, n - 1, there)


@as_options
def compare(args: Sequence[str]) -> Path:
    """Measure, write records, draw pictures and print the findings.

    Args:
        args: command line.

    Returns:
        The folder of the results.

    Raises:
        UserError: a mistake in the options, a network or the data.
    """
    check_alone("compare")
    options = _parse(args)
    out, data = options.out, options.data
    networks = load_networks(options.models)
    groups = groups_of(networks, options)
    for method, _ in networks.values():
        chosen_layers(method, options)  # a mistake is told before anything is deleted
        _check_views(method, options.views)
    data.prepare_data()
    data.setup("test")
    _hold_to_images(options, data.measure_size)
    warn_of_few(data, options.gram_size, "--cka.gram_size")
    shutil.rmtree(out / "records", ignore_errors=True)
    store, console = RecordStore(out / "records"), Console()
    console.print(f"{data.measure_size} images of {data.dataset}", highlight=False)
    trained = {name: method.view.spec["augment"] for name, (method, epoch) in networks.items() if epoch is not None}
    others = {views_of(name): augment for name, augment in trained.items() if augment}
    options.views = [*options.views, *others]  # every network sees every network's training views
    columns = (TextColumn("measuring {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    measured: list[Network] = []
    protocols = {}
    with memory_for_measuring(options), Progress(*columns, console=Console(stderr=True)) as progress:
        for name in list(networks):
            method, epoch = networks.pop(name)  # one network at a time on the device
            method.named_views = {**method.named_views, **others}
            protocols[name] = cka_protocol(data, options.gram_size, Subject.of(method), {"clean": "clean"})
            measured.append(measure_network(name, method.to(options.device), epoch, data, options, store, progress))
    pairs = []
    for a, b in combinations_with_replacement(measured, 2):
        protocol, other = protocols[a.name], protocols[b.name].what["views"]["clean"]
        if other != protocol.what["views"]["clean"]:
            protocol = Protocol({**protocol.what, "views of the other": other})
        pairs.append(compare_pair(a, b, protocol, options, store))
    labels = {network.name: network.learns_from_labels for network in measured}
    frame = store.read()
    methods = {network.name: UNTRAINED if network.epoch is None else groups[network.name] for network in measured}
    architectures = {network.name: network.architecture for network in measured}
    table = findings(pd.concat([*pairs, *(network.layers for network in measured)]), methods, labels, architectures)
    table.to_parquet(out / "findings.parquet")
    (out / "findings.md").write_text(_markdown(table, options, int(frame["n"].iloc[0])), encoding="utf-8")
    pictures = draw(frame, groups, labels, out / "figures")
    pictures += [
        save_figure(
            show_neighbors(network, data, options.show_neighbors), out / "figures" / f"neighbors_{network.name}"
        )
        for network in measured
        if options.show_neighbors
    ]
    pictures += draw_training(options.models, out / "figures")
    for claim, rows in table.groupby("claim", sort=False):
        decided, baseline = rows["verdict"].iloc[0], rows["baseline"].iloc[0]
        aside = "" if baseline else " (without baseline)"
        console.print(f"[bold]{decided:>11}[/bold]  {claim}{aside}", highlight=False, soft_wrap=True)
        for row in rows.to_dict("records"):
            console.print(f"{'':>13}{row['contrast']}: {_effect(row)}", markup=False, highlight=False, soft_wrap=True)
    for picture in pictures:
        console.print(f"    picture  {picture}", highlight=False, soft_wrap=True)
    console.print(f"    records  {out / 'records'}", highlight=False, soft_wrap=True)
    return out


def _check_views(method: Method, views: Sequence[str]) -> None:
    for name in views:
        try:
            Subject.of(method).view(name)
        except UserError as error:
            raise UserError(f"--invariance.views [{name}]: {str(error).removeprefix('augment: ')}") from error


def _effect(row: Mapping[Hashable, Any]) -> str:
    """A contrast and its interval, as text."""
    if not np.isfinite(row["effect"]):
        return "–"
    if not np.isfinite(row["low"]):
        return f"{row['effect']:+.3f}, no interval over {row['over']}"
    return f"{row['effect']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] over {row['over']}"


def _markdown(table: pd.DataFrame, options: Any, n: int) -> str:
    lines = [
        "# What this comparison decides about the findings of Grigg et al. 2021",
        "",
        f"Networks: {', '.join(options.models)}; {n} images. These are numbers of these runs, not the paper's. A claim "
        f"is supported if the {LEVEL:.0%} intervals of all of its contrasts lie above {SMALLEST}, and contradicted if "
        f"one of k lies below -{SMALLEST} at a level of {LEVEL:.0%} for all k; else it is undecided, which more images "
        "(--data.measure_size), and more runs with other seeds where intervals are over runs, may decide. An interval "
        "over images alone speaks of these networks, not of their methods; where one kind of network has several runs, "
        "a single network of another kind has no interval. The criteria: docs/cka.md.",
        "",
        "| claim | contrast (positive where the claim holds) | numbers | effect, 95 % interval | baseline | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for claim, rows in table.groupby("claim", sort=False):
        for place, row in enumerate(rows.to_dict("records")):
            ends = (claim, row["baseline"] or "none", row["verdict"]) if place == 0 else ("", "", "")
            cells = (ends[0], row["contrast"], row["numbers"], _effect(row), *ends[1:])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.compare``."""
    run_command(compare, args, interrupted="interrupted: run the same command again, with --overwrite true")


if __name__ == "__main__":
    main()
