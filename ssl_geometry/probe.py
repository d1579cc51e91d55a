"""What can be read off frozen networks: linear classifiers on every layer, nearest neighbours, few labels, fine-tuning.

    python -m ssl_geometry.probe --models simclr=runs/cifar10/simclr supervised=runs/cifar10/supervised
    python -m ssl_geometry.probe --models simclr=RUN,RUN,RUN --evaluations [layers, knn]     # seeds of one method

Protocol: the encoder is frozen, in evaluation mode, float32; features are averaged over space; training images are the
clean labelled ones of the run, test images the whole test split, read once. Hyper-parameters are chosen on a fixed
tenth of the training images. An untrained network and the raw pixels stand in the same table.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ssl_geometry.callbacks import FitProgress, StopOnNaN
from ssl_geometry.callbacks.measure import Request, forward_pass, measuring, pooled
from ssl_geometry.callbacks.probes import LAYERS, layer_widths, probe_protocol, probe_rows
from ssl_geometry.cli import networks_parser, parse_networks, run_command
from ssl_geometry.data.datamodule import BANK_SIZE, DataModule
from ssl_geometry.data.datasets import stratified
from ssl_geometry.errors import UserError, nearest
from ssl_geometry.geometry.probes import (
    L2,
    accuracies,
    converged_probes,
    held_out,
    knn_predict,
    one_hot,
    ridge_probe,
    ridge_sums,
)
from ssl_geometry.methods import Method, Supervised
from ssl_geometry.metrics import ProbeBank
from ssl_geometry.models.taps import layer_depths, layer_names
from ssl_geometry.records import Protocol, RecordStore
from ssl_geometry.report.figures import BLOCK, compare_curves, save_figure
from ssl_geometry.report.tables import latex, markdown, seed_table
from ssl_geometry.runs import load_networks, network_names

EVALUATIONS = ("layers", "knn", "linear", "linear_augmented", "labels", "finetune")
SEVERAL_CLASSES = ("layers", "labels")
"""Those that pictures with several classes allow; they are judged by mean average precision."""
POOLED = "pooled"
"""The layer that everything but the curve over layers is read off: the input of a classifier on top."""
UNTRAINED, PIXELS = "untrained", "raw pixels"
FRACTIONS = (0.01, 0.1, 1.0)
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Learning rates of linear evaluation, on features of the probe bank's scale."""
PIXEL_SIDE = 32
"""Raw pixels of larger pictures are averaged down to this side."""


class RawPixels(Method):
    """The baseline without a network: its pooled features are the pixels.

    Args:
        kwargs: of a trained method, for its views.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "backbone": "resnet10", "width": 0.25, "channels_last": False, "compile": False})
        side = min(kwargs["image_size"], PIXEL_SIDE)
        pixels = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
        self.backbone = nn.Sequential()  # in place of the small network that the base built
        self.backbone.add_module(POOLED, pixels)
        self.num_features = 3 * side**2


@dataclass
class Subject:
    """One network, and the features of all images, on the device that measures."""

    name: str
    method: Method
    epoch: int
    depths: dict[str, float]
    train: dict[str, Tensor]
    train_labels: Tensor
    train_index: Tensor
    test: dict[str, Tensor]
    test_labels: Tensor

    def share(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Pooled features and labels of some training images."""
        return {POOLED: self.train[POOLED][rows]}, self.train_labels[rows]


Found = Mapping[str, Mapping[str, Sequence[float]]]
"""Metric to what was found for each layer (``top1``, ...)."""


def extract(name: str, method: Method, epoch: int | None, data: DataModule, options: Any, progress: Any) -> Subject:
    """Features of clean training and test images, each image seen once.

    Raises:
        UserError: features that do not fit into memory, or are not finite.
    """
    wanted = [POOLED] if isinstance(method, RawPixels) else [*_as_list(options.layers), POOLED]
    layers = tuple(layer_names(method, wanted, option="--layers"))
    widths = layer_widths(method, layers, data.image_shape)
    _check_memory(sum(widths.values()), data, options)
    request = Request(layers, pooled)
    taken: dict[str, Any] = {}
    with measuring(method):
        for split, images in (("bank", options.train_images), ("test", None)):
            batches = data.loader(split, images)  # type: ignore[arg-type]
            task = progress.add_task(
                f"{name}: features ({'training' if split == 'bank' else 'test'})", total=len(batches)
            )
            parts: dict[str, list[Tensor]] = {layer: [] for layer in (*layers, "label", "index")}
            for batch, reduced in forward_pass(method, batches, [request]):
                for layer, value in {**reduced[request], "label": batch["label"], "index": batch["index"]}.items():
                    parts[layer].append(value)
                progress.advance(task)
            taken[split] = {layer: torch.cat(parts.pop(layer)) for layer in list(parts)}
    train, test = taken["bank"], taken["test"]
    labels, index, test_labels = train.pop("label"), train.pop("index"), test.pop("label")
    del test["index"]
    depths = layer_depths(method, layers)
    for layer, values in {**train, **{f"{layer} (test)": values for layer, values in test.items()}}.items():
        if broken := int((~values.isfinite().all(1)).sum()):
            raise UserError(f"--models {name}: layer {layer}: features of {broken} images are not finite")
    return Subject(name, method, epoch or 0, depths, train, labels, index, test, test_labels)


def _check_memory(features: int, data: DataModule, options: Any) -> None:
    images = len(data.loader("bank", options.train_images).sampler.rows) + len(data.loader("test").sampler.rows)
    needed, free = 4 * features * images, _free_memory(options.device)
    if needed > 0.6 * free:  # the classifiers need some as well
        raise UserError(
            f"--train_images {options.train_images}: {features:,} features of {images:,} images take "
            f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {options.device}; set fewer images, fewer "
            "--layers (such as [stages]), or --device cpu"
        )


def _free_memory(device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # no Linux: what is free, without the cache
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


# -- evaluations: each gives what it found, by metric ------------------------------------------------------------------


def evaluate_layers(subject: Subject, data: DataModule, options: Any, progress: Any) -> Found:
    """Converged classifiers on every layer: figure 3, left, of Grigg et al. 2021."""
    held = held_out(subject.train_index)
    targets = one_hot(subject.train_labels, data.num_classes)
    task = progress.add_task(f"{subject.name}: logistic regression, {len(subject.train)} layers", total=1)
    logistic = converged_probes(subject.train, subject.train_labels, held, data.num_classes, L2)
    ridge = {}
    for layer, x in subject.train.items():
        fit, chosen_by = (ridge_sums(x[part], targets[part]) for part in (~held, held))
        ridge[layer] = ridge_probe(fit, chosen_by, x[held], subject.train_labels[held], L2)
    progress.advance(task)
    found: dict[str, dict[str, list[float]]] = {}
    for metric, probes in (("logistic_probe", logistic), ("ridge_probe", ridge)):
        found[metric] = {}
        for layer, probe in probes.items():
            (scores,) = probe.scores(subject.test[layer])
            numbers = accuracies(scores, subject.test_labels)
            numbers |= {"l2": probe.l2[0], "gradient_norm": probe.gradient_norm[0]}
            for key, value in numbers.items():
                found[metric].setdefault(key, []).append(float(value))
    return found


def evaluate_knn(subject: Subject, data: DataModule, options: Any, progress: Any) -> Found:
    """Votes of the nearest training images, weighted (temperature 0.07) and by heads."""
    found = {}
    for k in options.k:
        for temperature, kind in ((0.07, ""), (None, "_majority")):
            predicted = knn_predict(
                subject.test[POOLED], subject.train[POOLED], subject.train_labels, data.num_classes, k, temperature
            )
            found[f"knn{k}{kind}"] = {"top1": [float((predicted == subject.test_labels).double().mean())]}
    return found


Batches = Callable[[int], Iterable[tuple[Tensor, Tensor, Tensor]]]
"""Epoch to batches of features, labels and indices."""


def linear_evaluation(
    subject: Subject, batches: Batches, steps: int, data: DataModule, options: Any, progress: Any, title: str
) -> float:
    """SGD on pooled features with a cosine schedule, all learning rates at once.

    Two banks learn side by side: one without the held-out tenth, which chooses the learning rate; one from all images,
    whose classifier of that learning rate is tested.
    """
    widths = {POOLED: subject.train[POOLED].shape[1]}
    choosing, final = (
        ProbeBank(widths, data.num_classes, RATES, [options.linear_weight_decay]).to(options.device) for _ in range(2)
    )
    task = progress.add_task(f"{subject.name}: {title}", total=steps * options.linear_epochs)
    step = 0
    for epoch in range(options.linear_epochs):
        choosing.forget()
        for features, labels, index in batches(epoch):
            rate = (1 + math.cos(math.pi * step / (steps * options.linear_epochs))) / 2
            choosing.step({POOLED: features}, labels, index, rate)
            final.step({POOLED: features}, labels, None, rate)
            step += 1
            progress.advance(task)
    (scores,) = final.scores({POOLED: subject.test[POOLED]}, choosing.best())
    return float((scores.argmax(1) == subject.test_labels).double().mean())


def evaluate_linear(subject: Subject, data: DataModule, options: Any, progress: Any) -> Found:
    """Linear evaluation without augmentation: features are computed once."""
    features, n, size = subject.train[POOLED], len(subject.train_labels), data.batch_size

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).to(features.device)
        for rows in order.split(size):
            yield features[rows], subject.train_labels[rows], subject.train_index[rows]

    steps = math.ceil(n / size)
    value = linear_evaluation(subject, batches, steps, data, options, progress, "linear evaluation")
    return {"linear_eval": {"top1": [value]}}


def evaluate_linear_augmented(subject: Subject, data: DataModule, options: Any, progress: Any) -> Found:
    """Linear evaluation on newly augmented images in every epoch."""
    loader = data.loader("bank", options.train_images, seed=0)

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        loader.sampler.set_epoch(epoch)
        request = Request((POOLED,), pooled, options.augment, draw=epoch)
        with measuring(subject.method):
            for batch, reduced in forward_pass(subject.method, loader, [request]):
                yield reduced[request][POOLED], batch["label"], batch["index"]

    title = f"linear evaluation, {options.augment} views"
    value = linear_evaluation(subject, batches, len(loader), data, options, progress, title)
    return {"linear_eval_augmented": {"top1": [value]}}


def evaluate_labels(subject: Subject, data: DataModule, options: Any, progress: Any) -> Found:
    """Logistic regression on a share of the labels, the classes in proportion; the mean over draws."""
    found = {}
    n = len(subject.train_labels)
    task = progress.add_task(f"{subject.name}: few labels", total=len(options.label_fractions))
    for fraction in options.label_fractions:
        images = round(fraction * n)
        values = []
        for draw in range(options.draws if fraction < 1 else 1):
            rows = stratified(subject.train_labels.cpu(), draw)[:images].to(options.device)
            held = torch.arange(images, device=options.device) >= images - max(data.num_classes, images // 10)
            probes = converged_probes(*subject.share(rows), held, data.num_classes, L2)
            (scores,) = probes[POOLED].scores(subject.test[POOLED])
            values.append(accuracies(scores, subject.test_labels))
        key = "mAP" if data.multi_label else "top1"
        found[f"labels_{100 * fraction:g}%"] = {key: [sum(float(value[key]) for value in values) / len(values)]}
        progress.advance(task)
    return found


def evaluate_finetune(subject: Subject, data: DataModule, options: Any, progress: Any) -> Found:
    """The whole network trained on labels from these weights; an untrained network is trained from scratch."""
    found: dict[str, dict[str, list[float]]] = {}
    if isinstance(subject.method, RawPixels):
        return found
    given = subject.method.init_args
    shared = ("backbone", "stem", "width", "image_size", "normalize", "center_crop", "channels_last")
    for fraction in options.label_fractions:
        progress.console.print(f"fine-tuning {subject.name} on {100 * fraction:g}% of the labels", highlight=False)
        torch.manual_seed(0)
        network = Supervised(
            data.num_classes,
            augment=options.augment,
            lr=options.finetune_lr,
            weight_decay=0.0,
            warmup_epochs=0,
            **{key: given[key] for key in shared},
        )
        network.backbone.load_state_dict(subject.method.backbone.state_dict())
        images = DataModule(
            **{**options.data_options, "limit_train": max(2, round(fraction * len(subject.train_labels)))}
        )
        images.batch_size = min(images.batch_size, images.limit_train or images.batch_size)
        trainer = L.Trainer(
            max_epochs=options.finetune_epochs,
            accelerator="gpu" if options.device.startswith("cuda") else "cpu",
            devices=[torch.device(options.device).index or 0] if options.device.startswith("cuda") else 1,
            callbacks=[FitProgress(), StopOnNaN()],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        trainer.fit(network, images)
        (result,) = trainer.test(network, images, verbose=False)
        found[f"finetune_{100 * fraction:g}%"] = {"top1": [result["test/acc"]]}
    return found


RUN: dict[str, Callable[[Subject, DataModule, Any, Any], Found]] = {
    "layers": evaluate_layers,
    "knn": evaluate_knn,
    "linear": evaluate_linear,
    "linear_augmented": evaluate_linear_augmented,
    "labels": evaluate_labels,
    "finetune": evaluate_finetune,
}


def protocols(data: DataModule, method: Method, options: Any) -> dict[str, Protocol]:
    """For each evaluation, all that changes its numbers."""
    chosen = {
        "layers": {"l2": list(L2)},
        "knn": {"similarity": "cosine", "k": options.k, "temperature": 0.07},
        "linear": {
            "epochs": options.linear_epochs,
            "batch": data.batch_size,
            "weight_decay": options.linear_weight_decay,
            "learning_rates": list(RATES),
            "schedule": "cosine",
            "momentum": 0.9,
        },
        "labels": {"l2": list(L2), "fractions": options.label_fractions, "draws": options.draws},
        "finetune": {
            "epochs": options.finetune_epochs,
            "learning_rate for 256 images": options.finetune_lr,
            "batch": data.batch_size,
            "views": options.augment,
            "fractions": options.label_fractions,
        },
    }
    chosen["linear_augmented"] = {**chosen["linear"], "batch": data.eval_batch_size, "training views": options.augment}
    chosen["knn"]["selection"] = "none"
    chosen["labels"]["selection"] = "accuracy on the last tenth of each subset (one image a class at least)"
    chosen["finetune"] |= {"selection": "none", "encoder": "trained as well"}
    bank = len(data.loader("bank", options.train_images).sampler.rows)
    common = {"clean training images": bank, "test": f"the whole split, {len(data.loader('test').sampler.rows)} images"}
    return {name: probe_protocol(name, data, method, **common, **chosen[name]) for name in options.evaluations}


# -- the command -------------------------------------------------------------------------------------------------------


def _parse(args: Sequence[str]) -> Any:
    parser = networks_parser(
        "probe",
        "Read classes off frozen networks: linear classifiers on every layer, linear evaluation, nearest neighbours, "
        "few labels, fine-tuning. Several paths of one NAME, separated by commas, are seeds: the table gives mean and "
        "standard deviation. An untrained network and the raw pixels stand beside them.",
        args,
        layers=list(LAYERS),
    )
    parser.add_argument(
        "--evaluations",
        type=list[str],
        default=[name for name in EVALUATIONS if name != "finetune"],
        help=f"which of {', '.join(EVALUATIONS)}",
    )
    parser.add_argument(
        "--train_images", type=int | None, help="clean training images to learn from, at most (default: 50,000)"
    )
    parser.add_argument("--k", type=list[int], default=[20, 200], help="neighbours that vote")
    parser.add_argument("--linear_epochs", type=int, default=100, help="epochs of SGD in linear evaluation")
    parser.add_argument("--linear_weight_decay", type=float, default=0.0, help="weight decay of linear evaluation")
    parser.add_argument(
        "--augment", type=str, default="supervised", help="training views of linear_augmented and finetune"
    )
    parser.add_argument(
        "--label_fractions", type=list[float], default=list(FRACTIONS), help="shares of the labels to learn from"
    )
    parser.add_argument("--draws", type=int, default=5, help="random subsets for each share of the labels below 1")
    parser.add_argument("--finetune_epochs", type=int, default=30, help="epochs of fine-tuning")
    parser.add_argument("--finetune_lr", type=float, default=0.05, help="learning rate of fine-tuning for 256 images")
    options = parse_networks(parser, "probe", args)
    for name in options.evaluations:
        if name not in EVALUATIONS:
            raise UserError(f"--evaluations {name}: {nearest(name, EVALUATIONS)}")
    for name, low in {"train_images": 1, "linear_epochs": 1, "draws": 1, "finetune_epochs": 1}.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise UserError(f"--{name} {value}: expected at least {low}")
    if options.train_images is not None and options.train_images > BANK_SIZE:
        raise UserError(f"--train_images {options.train_images}: at most {BANK_SIZE:,} are read")
    if not all(0 < fraction <= 1 for fraction in options.label_fractions):
        raise UserError(f"--label_fractions {options.label_fractions}: expected shares above 0, at most 1")
    if not all(k >= 1 for k in options.k):
        raise UserError(f"--k {options.k}: expected whole numbers of at least 1")
    return options


def _check_fractions(options: Any, data: DataModule, console: Console) -> None:
    """Shares of the labels that are too small stop the command where they were asked for, else they are left out."""
    n = len(data.loader("bank", options.train_images).sampler.rows)
    least = max(10, 2 * data.num_classes)
    small = [fraction for fraction in options.label_fractions if round(fraction * n) < least]
    if small and not {"labels", "finetune"}.isdisjoint(options.evaluations):
        told = (
            f"--label_fractions {small[0]:g}: {round(small[0] * n)} of {n} images for {data.num_classes} classes; at "
            "least two a class are needed, one to learn from and one to choose by"
        )
        if options.label_fractions != list(FRACTIONS):
            raise UserError(told)
        console.print(f"left out  {told}", highlight=False, soft_wrap=True)
    options.label_fractions = [fraction for fraction in options.label_fractions if fraction not in small]


def _as_list(layers: str | Sequence[str]) -> list[str]:
    return [layers] if isinstance(layers, str) else list(layers)


def load_subjects(options: Any) -> tuple[dict[str, tuple[Method, int | None]], dict[str, str]]:
    """The networks of ``--models`` and the two baselines, and the group that each belongs to.

    Returns:
        Name to network and its completed epochs, and name to group: the name that was given, without a seed's number.
    """
    named, groups = [], {}
    for name, paths in network_names(options.models).items():
        several = paths.split(",")
        for number, path in enumerate(several):
            seed = f"{name}-{number + 1}" if len(several) > 1 else name
            named.append(f"{seed}={path}")
            groups[seed] = name
    networks = load_networks(named)
    trained = [method for method, epoch in networks.values() if epoch is not None]
    first = trained[0] if trained else next(iter(networks.values()))[0]
    if len(trained) == len(networks):
        networks |= load_networks([named[0], f"{UNTRAINED}=random"])
        groups[UNTRAINED] = UNTRAINED
    base = {key: value for key, value in first.init_args.items() if key in Method(backbone="resnet10").init_args}
    networks[PIXELS] = RawPixels(**base), None
    groups[PIXELS] = PIXELS
    return networks, groups


def probe(args: Sequence[str]) -> Path:
    """Measure, write records, draw the picture and print the tables.

    Args:
        args: command line.

    Returns:
        The folder of the results.

    Raises:
        UserError: a mistake in the options, a network or the data.
    """
    options = _parse(args)
    out, data = options.out, options.data
    networks, groups = load_subjects(options)
    for method, _ in networks.values():
        if not isinstance(method, RawPixels):
            layer_names(method, options.layers, option="--layers")  # a mistake is told before anything is deleted
        method.measuring_view(options.augment)
    data.prepare_data()
    data.setup("test")
    if data.multi_label:
        options.evaluations = [name for name in options.evaluations if name in SEVERAL_CLASSES]
    if not options.evaluations:
        raise UserError(f"--evaluations: none is left; pictures of several classes allow {', '.join(SEVERAL_CLASSES)}")
    _check_fractions(options, data, console := Console())
    shutil.rmtree(out / "records", ignore_errors=True)
    store = RecordStore(out / "records")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    texts: dict[str, Protocol] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in list(networks):
            method, epoch = networks.pop(name)  # one network at a time on the device
            subject = extract(name, method.to(options.device), epoch, data, options, progress)
            chosen = protocols(data, method, options)
            for evaluation in options.evaluations:
                try:
                    found = RUN[evaluation](subject, data, options, progress)
                except ValueError as error:  # features or labels that no classifier can learn from
                    raise UserError(f"--models {name}: {error}") from error
                common = {
                    "run": out.name,
                    "model": name,
                    "view": "clean",
                    "split": "test",
                    "epoch": subject.epoch,
                    "protocol": chosen[evaluation].hash,
                }
                rows = []
                for metric, numbers in found.items():
                    depths = subject.depths if evaluation == "layers" else {POOLED: subject.depths[POOLED]}
                    rows += probe_rows(metric, depths, numbers, len(subject.test_labels), **common)
                store.write(f"{evaluation}/{name}", rows, [chosen[evaluation]])
            texts = texts or chosen
            del subject, method  # before the next one is on the device
            for task in progress.task_ids:
                progress.remove_task(task)
            console.print(f"    measured  {name}", highlight=False, soft_wrap=True)
    frame = store.read()
    judged = "mean average precision" if data.multi_label else "accuracy"
    text = tables(frame, groups, texts, out, judged)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if "layers" in options.evaluations and frame["layer"].str.fullmatch(f"{BLOCK}|head.*").any():
        console.print(f"    picture  {draw(frame, groups, out / 'figures', judged)}", highlight=False, soft_wrap=True)
    console.print(f"    records  {out / 'records'}", highlight=False, soft_wrap=True)
    console.print(f"     tables  {out / 'tables.md'}, {out / 'tables.tex'}", highlight=False, soft_wrap=True)
    return out


def tables(
    frame: pd.DataFrame, groups: Mapping[str, str], texts: Mapping[str, Protocol], out: Path, judged: str = "accuracy"
) -> str:
    """The tables of a probe from its records, as Markdown and LaTeX, each with its protocol.

    Args:
        frame: the records.
        groups: network to the name that was given for it.
        texts: evaluation to protocol.
        out: folder of ``tables.md`` and ``tables.tex``.
        judged: what the numbers are.

    Returns:
        The table of pooled features, in Markdown.
    """
    n = int(frame["n"].iloc[0])
    images = f"{judged} in percent on {n:,} test images; mean and standard deviation over networks"
    on_pooled = frame[frame["layer"] == POOLED]
    metrics = sorted(on_pooled["metric"].unique(), key=_place)
    columns = {metric: _title(metric) for metric in metrics if _title(metric)}
    parts = [(f"Pooled features: {images}", seed_table(on_pooled, columns, groups))]
    for metric, kind in (("logistic_probe", "Logistic regression"), ("ridge_probe", "Ridge regression")):
        rows = frame[frame["metric"] == metric].sort_values("depth", kind="stable")
        if len(rows):
            by_layer = rows.assign(metric=rows["layer"])
            layers = seed_table(by_layer, {layer: layer for layer in rows["layer"].unique()}, groups).T
            parts.append((f"{kind} on each layer: {images}", layers))
    lines = [f"## {title}\n\n{markdown(table)}\n" for title, table in parts]
    lines += ["## Protocols\n", *(f"### {name}\n\n```json\n{protocol.text}\n```\n" for name, protocol in texts.items())]
    (out / "tables.md").write_text("\n".join(lines))
    (out / "tables.tex").write_text("\n".join(latex(table, title) for title, table in parts))
    return lines[0]


def _place(metric: str) -> int:
    order = ("linear", "logistic", "ridge", "knn", "labels", "finetune")
    return next(number for number, start in enumerate(order) if metric.startswith(start))


def _title(metric: str) -> str:
    """The column of a metric; empty for what is in the records alone."""
    fixed = {
        "linear_eval": "linear",
        "linear_eval_augmented": "linear, augmented",
        "logistic_probe": "logistic",
        "logistic_probe_mean_per_class": "logistic, mean per class",
        "ridge_probe": "ridge",
    }
    kind, _, rest = metric.partition("_")
    if kind.startswith("knn"):
        return f"{kind.removeprefix('knn')}-NN{', majority' if rest else ''}"
    return fixed.get(metric) or {"labels": f"{rest} labels", "finetune": f"fine-tuned, {rest} labels"}.get(kind, "")


def draw(frame: pd.DataFrame, groups: Mapping[str, str], folder: Path, judged: str = "accuracy") -> Path:
    """Accuracy against depth, figure 3 left of Grigg et al. 2021, as PNG and PDF.

    Args:
        frame: the records of a probe.
        groups: network to the name that was given for it.
        folder: of the pictures.
        judged: what the numbers are.

    Returns:
        The PNG file.
    """
    rows = frame[frame["metric"] == "logistic_probe"]
    curves = rows[rows["layer"].str.fullmatch(f"{BLOCK}|head.*") & (rows["model"] != PIXELS)]
    pixels = rows[rows["model"] == PIXELS]["value"]
    figure = compare_curves(
        {"Linear probe of each layer": curves},
        {name: group for name, group in groups.items() if name != PIXELS},
        f"Logistic regression on pooled features, {int(frame['n'].iloc[0]):,} test images",
        label=judged,
        levels={PIXELS: float(pixels.iloc[0])},
    )
    return save_figure(figure, folder / "linear_probes")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.probe``."""
    run_command(probe, args, interrupted="interrupted: run the same command again, with --overwrite true")


if __name__ == "__main__":
    main()
