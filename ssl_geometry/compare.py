"""Compare networks layer by layer: the figures of Grigg et al. 2021 from runs, checkpoints or random initialisations.

    python -m ssl_geometry.compare --models simclr=runs/cifar10/simclr supervised=runs/cifar10/supervised
    python -m ssl_geometry.compare --models a=RUN b=RUN untrained=random --out runs/compare/abc --layers blocks

Protocol: every network sees the same measurement images, and the same augmented copies of them; evaluation mode,
float32. Unbiased minibatch CKA with jackknife error bars over Gram matrices; the overlap of nearest neighbours stands
beside it, because CKA alone can be moved by a few outlying images. The numbers are those of the monitors of ``fit``,
with the same protocol hash.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ssl_geometry.callbacks.cka import GramVector, cka_protocol
from ssl_geometry.callbacks.invariance import VIEWS, distinct_views, invariance_requests, layer_records
from ssl_geometry.callbacks.measure import Request, forward_pass, measuring, pooled
from ssl_geometry.cli import networks_parser, parse_networks, run_command
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.devices import memory_for_measuring
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.cka import MIN_GRAM_SIZE
from ssl_geometry.geometry.neighbors import nearest
from ssl_geometry.geometry.nnk import nnk
from ssl_geometry.geometry.overlap import all_alike, mutual_knn, neighbor_ids
from ssl_geometry.methods import Method
from ssl_geometry.metrics import ClassCKA, InvarianceCKA, LayerwiseCKA
from ssl_geometry.models.taps import layer_depths, layer_names
from ssl_geometry.records import Protocol, RecordStore, record
from ssl_geometry.report.figures import (
    BLOCK,
    compare_curves,
    diag_and_max,
    neighbor_pictures,
    pair_panels,
    save_figure,
    training_curves,
    view_heatmap,
)
from ssl_geometry.runs import load_networks, network_names

UNTRAINED = "untrained"
CANDIDATES = 50
"""Nearest images of which NNK chooses, where neighbours are shown."""
MANIFOLDS = ("neighbors", "diameter", "affinity")
KINDS = ("semantic", "policy")
SHOWN = 10
"""Neighbours in a row of pictures."""


@dataclass
class Network:
    """One network of the comparison, and what is kept of it: no activations, no weights."""

    name: str
    group: str
    """The method, by which seeds are put together."""
    epoch: int | None
    depths: dict[str, float]
    vectors: list[Tensor]
    """For each batch, the Gram vectors of the layers, (L, P)."""
    neighbors: Tensor
    """Of each layer and image, the k nearest images, (L, N, k)."""
    alike: Tensor
    """Layers whose direction does not vary, (L,): they have no neighbours."""
    features: Tensor | None = None
    """Of the last layer of the backbone, (N, D), where neighbours are to be shown."""


def measure_network(
    name: str, method: Method, epoch: int | None, data: DataModule, options: Any, store: RecordStore, progress: Any
) -> Network:
    """One pass over the measurement images: Gram vectors, neighbours, invariance and class CKA of one network."""
    names = tuple(layer_names(method, options.layers, option="--layers"))
    depths = layer_depths(method, names)
    clean, features = Request(names, GramVector(options.gram_size)), Request(names, pooled)
    views = [view for view in options.views if view != "own" or method.view.ops]  # a published one's are not known
    requests = [clean, features, *invariance_requests(method, names, options.gram_size, views)]
    distinct = distinct_views(method, views)
    invariance = {view: InvarianceCKA(names, options.gram_size) for view in set(distinct.values())}
    classes = ClassCKA(names, data.num_classes, options.gram_size, sizes=data.measure_sizes)
    vectors, kept = [], defaultdict(list)
    task = progress.add_task(name, total=len(data.loader("measure")))
    with measuring(method):
        for number, (batch, reduced) in enumerate(forward_pass(method, data.loader("measure"), requests)):
            vectors.append(torch.stack(list(reduced[clean].values())).cpu())
            for layer, value in reduced[features].items():
                kept[layer].append(value.cpu())
            looks = {
                (request.view, request.draw): layers for request, layers in reduced.items() if request is not features
            }
            for view, metric in invariance.items():
                metric.to(method.device).update(looks[view, 0], looks[view, 1], batch=number)
            classes.to(method.device).update(reduced[clean], batch["label"], batch=number)
            progress.advance(task)
    group = UNTRAINED if epoch is None else method.group
    by_layer = {layer: torch.cat(kept.pop(layer)) for layer in names}
    neighbors = torch.stack([neighbor_ids(value, options.k) for value in by_layer.values()])
    alike = torch.tensor([all_alike(value) for value in by_layer.values()])
    shown = [layer for layer in names if not layer.startswith("head")][-1:] or names[-1:]
    kept_features = by_layer[shown[0]] if options.show_neighbors else None
    network = Network(name, group, epoch, depths, vectors, neighbors, alike, kept_features)
    seen = {view: invariance[distinct[view]] for view in views}
    rows, protocols = layer_records(method, data, depths, options.gram_size, seen, classes, **_common(network, options))
    store.write(f"layers/{name}", rows, protocols)
    return network


def views_of(name: str) -> str:
    """The name, in the records, of the views that a network of the comparison was trained on."""
    return f"views of {name}"


def _common(network: Network, options: Any) -> dict[str, Any]:
    return {
        "run": options.out.name,
        "model": network.name,
        "split": "measure",
        "epoch": network.epoch or 0,
        "n": network.neighbors.shape[1],
    }


def compare_pair(a: Network, b: Network, protocol: Protocol, options: Any, store: RecordStore) -> None:
    """All pairs of layers of two networks: CKA with error bars, and overlap of neighbours."""
    cka = LayerwiseCKA([f"a/{layer}" for layer in a.depths], [f"b/{layer}" for layer in b.depths], options.gram_size)
    for number, (x, y) in enumerate(zip(a.vectors, b.vectors, strict=True)):
        cka.update(
            {f"a/{layer}": row for layer, row in zip(a.depths, x, strict=True)},
            {f"b/{layer}": row for layer, row in zip(b.depths, y, strict=True)},
            batch=number,
        )
    shape = len(a.depths), len(b.depths)
    found = torch.stack([matrix.reshape(shape) for matrix in (cka.compute(), *cka.interval())], 2).tolist()
    undefined = a.alike[:, None] | b.alike
    overlap = mutual_knn(a.neighbors, b.neighbors).masked_fill(undefined, torch.nan)
    knn_protocol = Protocol({**protocol.what, "metric": f"mutual kNN, k={options.k}, cosine, pooled features"})
    rows, common = [], {**_common(a, options), "view": "clean"}
    for i, (layer, depth) in enumerate(a.depths.items()):
        for j, (layer_other, depth_other) in enumerate(b.depths.items()):
            pair = {
                "model_other": b.name,
                "layer": layer,
                "layer_other": layer_other,
                "depth": depth,
                "depth_other": depth_other,
            }
            similarity = dict(zip(("value", "low", "high"), found[i][j], strict=True))
            rows.append(record(**common, **pair, metric="cka", **similarity, protocol=protocol.hash))
            shared = float(overlap[i, j])
            rows.append(record(**common, **pair, metric="mutual_knn", value=shared, protocol=knn_protocol.hash))
    store.write(f"pairs/{a.name}--{b.name}", rows, [protocol, knn_protocol])


def draw(frame: pd.DataFrame, groups: Mapping[str, str], out: Path) -> list[Path]:
    """All pictures, from the records alone, as PNG and PDF.

    Args:
        frame: the records of a comparison.
        groups: network to method.
        out: folder.

    Returns:
        The PNG files.
    """
    pictures = {}
    pairs = frame[frame["model_other"].notna()]
    for (a, b), rows in pairs.groupby(["model", "model_other"], sort=False):
        pictures[f"layers_{a}_{b}"] = pair_panels(rows[rows["metric"] == "cka"], rows[rows["metric"] == "mutual_knn"])
    layers = frame[frame["model_other"].isna()]
    even = layers[layers["layer"].str.fullmatch(f"{BLOCK}|head.*")]
    classes = even[even["metric"] == "class_cka"]
    invariance = even[even["metric"] == "invariance"]
    self_supervised = [name for name, group in groups.items() if group not in ("Supervised", UNTRAINED)]
    seen = [view for view in map(views_of, self_supervised) if view in set(invariance["view"])]
    shown = {view: f"Invariance under the {view}" for view in seen[:1]}
    shown["own"] = "Invariance under its own training views"
    panels = {title: invariance[invariance["view"] == view] for view, title in shown.items()}
    panels = {title: rows for title, rows in panels.items() if len(rows)}
    n = int(frame["n"].iloc[0])
    pictures["invariance_and_classes"] = compare_curves(
        {**panels, "CKA with the classes": classes}, groups, f"Post-residual and head layers, {n} images"
    )
    for model, rows in layers[layers["metric"] == "invariance"].groupby("model", sort=False):
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


def findings(frame: pd.DataFrame, groups: Mapping[str, str]) -> pd.DataFrame:
    """What the records say about the findings of Grigg et al. 2021, each with the numbers behind it.

    Args:
        frame: the records of a comparison.
        groups: network to method.

    Returns:
        One row a finding: the claim, the figures, and whether they support or contradict it by the rule that stands
        beside them. A claim whose networks or layers are not there is left out.
    """
    found: list[dict[str, str]] = []

    def say(claim: str, rule: str, figures: Mapping[str, float], supports: bool) -> None:
        if not all(map(math.isfinite, figures.values())):  # no verdict without numbers
            return
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        found.append(
            {"claim": claim, "figures": shown, "rule": rule, "says": "supports" if supports else "contradicts"}
        )

    ssl = [model for model, group in groups.items() if group not in ("Supervised", UNTRAINED)]
    supervised = [model for model, group in groups.items() if group == "Supervised"]
    untrained = [model for model, group in groups.items() if group == UNTRAINED]
    cka = frame[frame["metric"] == "cka"]
    between = cka[
        (cka["model"].isin(ssl) & cka["model_other"].isin(supervised))
        | (cka["model"].isin(supervised) & cka["model_other"].isin(ssl))
    ]
    pairs = [rows for _, rows in between.groupby(["model", "model_other"])]
    even = [_middle_and_last(rows[_is_block(rows["layer"]) & _is_block(rows["layer_other"])]) for rows in pairs]
    branches = [
        rows["layer"].str.endswith(".residual") & rows["layer_other"].str.endswith(".residual") for rows in pairs
    ]
    odd = [_middle_and_last(rows[chosen]) for rows, chosen in zip(pairs, branches, strict=True)]
    if pairs:
        middle, last = (float(np.mean(values)) for values in zip(*even, strict=True))
        inside = float(np.mean([values[0] for values in odd]))
        say(
            "intermediate representations are similar, and diverge in the last layers",
            "mean CKA of the middle half of the blocks, same layer, is above that of the last block",
            {"middle blocks": middle, "last block": last},
            middle > last,
        )
        say(
            "they become similar by dissimilar means",
            "in the middle half, residual branches are less alike than the blocks' outputs",
            {"residual branches": inside, "block outputs": middle},
            inside < middle,
        )
    layers = frame[frame["model_other"].isna()]

    def value(models: Sequence[str], metric: str, view: str, where: str) -> float:
        rows = layers[layers["model"].isin(models) & (layers["metric"] == metric) & (layers["view"] == view)]
        rows = rows.sort_values("depth")
        chosen = rows if where == "head" else rows[_is_block(rows["layer"])]
        picks: dict[str, Any] = {
            "first": lambda v: v.iloc[0],
            "last": lambda v: v.iloc[-1],
            "head": lambda v: v.iloc[-1],
            "max": max,
        }
        return float(chosen.groupby("model")["value"].agg(picks[where]).mean()) if len(chosen) else math.nan

    known = [view for view in map(views_of, ssl) if view in set(layers["view"])]
    seen = known[0] if known else ""  # what the supervised network may or may not become invariant to
    if ssl and supervised:
        ours, theirs = value(ssl, "invariance", seen, "head"), value(supervised, "invariance", seen, "head")
        say(
            "the last layer of SimCLR fits augmentation invariance",
            f"the last layer's invariance under the {seen} is above the supervised network's",
            {"self-supervised": ours, "supervised": theirs},
            ours > theirs,
        )
        ours, theirs = value(ssl, "class_cka", "clean", "last"), value(supervised, "class_cka", "clean", "last")
        say(
            "the last layers of the supervised network fit the classes",
            "the last block's CKA with the classes is above that of the self-supervised network's",
            {"supervised": theirs, "self-supervised": ours},
            theirs > ours,
        )
    if ssl:
        best, first = value(ssl, "class_cka", "clean", "max"), value(ssl, "class_cka", "clean", "first")
        figures = {"best block": best, "first block": first}
        if untrained:
            figures["untrained, best block"] = value(untrained, "class_cka", "clean", "max")
        say(
            "SimCLR fits the classes implicitly in intermediate layers",
            "a block's CKA with the classes is above the first block's and the untrained network's",
            figures,
            best > max(list(figures.values())[1:]),
        )
    if ssl and supervised:
        first, last = (
            value(supervised, "invariance", seen, "first"),
            value(supervised, "invariance", seen, "last"),
        )
        figures = {"first block": first, "last block": last}
        if untrained:
            figures["untrained, last block"] = value(untrained, "invariance", seen, "last")
        say(
            "the supervised network does not become augmentation invariant",
            f"the last block is not more invariant under the {seen} than the others named",
            figures,
            last <= max(value for name, value in figures.items() if name != "last block"),
        )
    return pd.DataFrame(found, columns=["claim", "figures", "rule", "says"])


def _middle_and_last(rows: pd.DataFrame) -> tuple[float, float]:
    """Of one pair of networks, same layers: the mean of the middle half of the layers, and the last one."""
    if rows.empty:
        return math.nan, math.nan
    diag = diag_and_max(rows)["same layer (diag)"]
    place = (diag.index - diag.index.min()) / max(diag.index.max() - diag.index.min(), 1e-9)
    return float(diag[(place > 0.25) & (place < 0.75)].mean()), float(diag.iloc[-1])


def _is_block(names: pd.Series) -> pd.Series:
    return names.str.fullmatch(BLOCK)


def _parse(args: Sequence[str]) -> Any:
    parser = networks_parser(
        "compare",
        "Compare networks layer by layer: CKA, nearest neighbours, invariance and classes, with pictures.",
        args,
        layers="all",
    )
    parser.add_argument("--gram_size", type=int, default=64, help="images in a Gram matrix of CKA")
    parser.add_argument("--k", type=int, default=10, help="neighbours that mutual kNN compares")
    parser.add_argument(
        "--views", type=list[str], default=list(VIEWS), help="augmentations whose invariance is measured"
    )
    parser.add_argument(
        "--show_neighbors",
        type=int | list[int],
        default=[],
        help="numbers of measurement images whose neighbours are shown, all k nearest beside those that NNK keeps",
    )
    options = parse_networks(parser, "compare", args)
    shown = options.show_neighbors if isinstance(options.show_neighbors, list) else [options.show_neighbors]
    options.show_neighbors = list(dict.fromkeys(shown))
    for number in options.show_neighbors:
        if not 0 <= number < options.data.measure_size:
            raise UserError(f"--show_neighbors {number}: expected 0 to {options.data.measure_size - 1}")
    if options.gram_size < MIN_GRAM_SIZE:
        raise UserError(f"--gram_size {options.gram_size}: unbiased CKA needs at least {MIN_GRAM_SIZE} images")
    if not 1 <= options.k < options.data.measure_size:
        raise UserError(
            f"--k {options.k}: expected at least 1 and fewer than --data.measure_size {options.data.measure_size}"
        )
    return options


def compare(args: Sequence[str]) -> Path:
    """Measure, write records, draw pictures and print the findings.

    Args:
        args: command line.

    Returns:
        The folder of the results.

    Raises:
        UserError: a mistake in the options, a network or the data.
    """
    options = _parse(args)
    out, data = options.out, options.data
    networks = load_networks(options.models)
    for method, _ in networks.values():
        layer_names(method, options.layers, option="--layers")  # a mistake is told before anything is deleted
    data.prepare_data()
    data.setup("test")
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
            protocols[name] = cka_protocol(data, options.gram_size, method, {"clean": method.clean_view.spec})
            measured.append(measure_network(name, method.to(options.device), epoch, data, options, store, progress))
    for a, b in combinations_with_replacement(measured, 2):
        protocol, other = protocols[a.name], protocols[b.name].what["views"]["clean"]
        if other != protocol.what["views"]["clean"]:
            protocol = Protocol({**protocol.what, "views of the other": other})
        compare_pair(a, b, protocol, options, store)
    groups = {network.name: network.group for network in measured}
    frame = store.read()
    table = findings(frame, groups)
    (out / "findings.md").write_text(_markdown(table, options, int(frame["n"].iloc[0])))
    pictures = draw(frame, groups, out / "figures")
    pictures += [
        save_figure(
            show_neighbors(network, data, options.show_neighbors), out / "figures" / f"neighbors_{network.name}"
        )
        for network in measured
        if options.show_neighbors
    ]
    pictures += draw_training(options.models, out / "figures")
    for row in table.to_dict("records"):
        console.print(
            f"[bold]{row['says']:>11}[/bold]  {row['claim']}: {row['figures']}", highlight=False, soft_wrap=True
        )
    for picture in pictures:
        console.print(f"    picture  {picture}", highlight=False, soft_wrap=True)
    console.print(f"    records  {out / 'records'}", highlight=False, soft_wrap=True)
    return out


def _markdown(table: pd.DataFrame, options: Any, n: int) -> str:
    lines = [
        "# What this comparison says about the findings of Grigg et al. 2021",
        "",
        f"Networks: {', '.join(options.models)}; {n} images. These are figures of these runs, not of the paper.",
        "",
        "| claim | figures | rule | says |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['claim']} | {row['figures']} | {row['rule']} | {row['says']} |" for row in table.to_dict("records")
    ]
    return "\n".join(lines) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.compare``."""
    run_command(compare, args, interrupted="interrupted: run the same command again, with --overwrite true")


if __name__ == "__main__":
    main()
