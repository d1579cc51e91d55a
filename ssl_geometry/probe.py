"""What can be read off frozen networks: linear classifiers on every layer, nearest neighbours, few labels, fine-tuning.

    python -m ssl_geometry.probe --models simclr=runs/cifar10/simclr supervised=runs/cifar10/supervised
    python -m ssl_geometry.probe --models simclr=RUN,RUN,RUN --evaluations [layers, knn]     # seeds of one method

Protocol: the encoder is frozen, in evaluation mode, float32; features are averaged over space; training images are the
clean labelled ones of the run, test images the whole test split, read once. Hyper-parameters are chosen on a fixed
tenth of the training images. An untrained network and the raw pixels stand in the same table.

Several processes share the images wherever a frozen network runs over them; the first one learns the classifiers, and
fine-tunes.
"""

import logging
import math
import re
import shutil
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import pandas as pd
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ssl_geometry.callbacks import FitProgress, StopOnNaN
from ssl_geometry.cli import OF_THE_MACHINE, run_command
from ssl_geometry.data.datamodule import BANK_SIZE, BATCH_SIZE, DataModule
from ssl_geometry.data.datasets import stratified
from ssl_geometry.data.loader import BatchPlan, size_within
from ssl_geometry.devices import free_memory, out_of_memory
from ssl_geometry.errors import ExitCode, Interrupted, UserError, nearest
from ssl_geometry.geometry.knn import directions_vary, knn_search, knn_vote
from ssl_geometry.geometry.neighbors import RANKING
from ssl_geometry.geometry.probes import (
    FEW,
    FOLDS,
    L2,
    accuracies,
    check_features,
    converged_probes,
    converged_probes_bytes,
    held_out,
    one_hot,
    ridge_probe,
    ridge_probe_of_few,
    ridge_sums,
)
from ssl_geometry.measure.engine import Occasion, as_options, layer_widths, measure_together
from ssl_geometry.measure.features import Features
from ssl_geometry.measure.probes import (
    FEW_SELECTION,
    LAYERS,
    SOLVER,
    STATISTICS,
    check_images,
    highest_decay,
    probe_protocol,
    probe_rows,
)
from ssl_geometry.measure.processes import agreeing, alone, is_agreed, of_each, this_process
from ssl_geometry.measure.subject import Subject
from ssl_geometry.methods import Method, Supervised
from ssl_geometry.metrics import ProbeBank
from ssl_geometry.metrics.probe_bank import MOMENTUM
from ssl_geometry.networks import (
    Sources,
    by_turns,
    chosen_layers,
    launch,
    networks_parser,
    parse_networks,
    said_once,
    together,
    unchanged,
)
from ssl_geometry.ranges import above, at_least, between
from ssl_geometry.records import Protocol, RecordStore
from ssl_geometry.records.store import write_whole
from ssl_geometry.report.figures import compare_curves, save_figure
from ssl_geometry.report.tables import latex, markdown, seed_table
from ssl_geometry.runs import load_networks, split_seeds

logger = logging.getLogger(__name__)

EVALUATIONS = ("layers", "knn", "linear", "linear_augmented", "labels", "finetune")
USUAL = [name for name in EVALUATIONS if name != "finetune"]
"""What is evaluated unless the command line says otherwise."""
SEVERAL_CLASSES = ("layers", "labels")
"""Those that pictures with several classes allow; they are judged by mean average precision."""
POOLED = "pooled"
"""The layer that everything but the curve over layers is read off: the input of a classifier on top."""
UNTRAINED, PIXELS = "untrained", "raw pixels"
SOURCES: Sources = {
    "probes.layers": {"probes.layers": unchanged},
    **{f"data.{name}": {f"data.{name}": unchanged} for name in ("limit_train", "val_fraction")},
}
"""Options of the monitor that measured the same, and of the images that classifiers learn from. How many these are
(``--probes.train_images``) is no such option: live they are fewer on purpose."""
NEIGHBORS = (20, 200)
FRACTIONS = (0.01, 0.1, 1.0)
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Learning rates of linear evaluation, on features of the probe bank's scale."""
PIXEL_SIDE = 32
"""Raw pixels of larger pictures are averaged down to this side."""
TEMPERATURE = 0.07
"""Of the votes of nearest neighbours."""
SEED = 0
"""Of the head and the views of fine-tuning."""
FINETUNING: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "warmup_epochs": 0}
LEAST_STEPS = 10
"""Of linear evaluation: with fewer, nothing was learnt yet."""
PICTURE = "linear_probes"
UNBALANCED = 1.1
"""Classes are of unequal size where the largest has more than so many times the test images of the smallest."""


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


class LabelledImages(DataModule):
    """Trains on the first of the labelled training images, which hold the classes in proportion.

    Args:
        images: how many of them.
        kwargs: of the data module.
    """

    def __init__(self, images: int, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "batch_size": min(kwargs.get("batch_size") or BATCH_SIZE, images)})
        self.images = images

    def setup(self, stage: str | None = None) -> None:
        """Read the data set, and leave images without a label out of training."""
        super().setup(stage)
        self._rows["train"] = self._rows["bank"][: self.images]
        self.num_train = len(self._rows["train"])


@dataclass
class FrozenFeatures:
    """One network, and the features of all images, on the device that measures; in the first process, that is."""

    name: str
    method: Method
    epoch: int
    depths: dict[str, float]
    train: Mapping[str, Tensor]
    train_labels: Tensor
    train_index: Tensor
    test: Mapping[str, Tensor]
    test_labels: Tensor
    folder: Path | None = None
    """Where features are kept that do not fit into memory."""

    def share(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Pooled features and labels of some training images."""
        return {POOLED: self.train[POOLED][rows]}, self.train_labels[rows]


Found = Mapping[str, Mapping[str, Sequence[float]]]
"""Metric to what was found for each layer (``top1``, ...)."""


def extract(
    name: str, method: Method, epoch: int | None, options: Any, progress: Any, console: Console
) -> FrozenFeatures:
    """Features of clean training and test images, each image seen once, by one of the processes.

    Raises:
        UserError: features that fit neither into memory nor on the disk.
        ValueError: features that are not finite.
    """
    data = options.data
    wanted = [POOLED] if isinstance(method, RawPixels) else [*chosen_layers(method, options), POOLED]
    subject = Subject.of(method, name)
    layers = subject.layers(wanted, option=options.layers_option)
    with _agreeing(name, options):
        widths = layer_widths(subject, layers, data.image_shape)
    folder = kept_where(name, widths, options, console)
    features = Features(widths, {"bank": options.train_images, "test": None}, folder=folder)
    batches = sum(len(data.loader(*part)) for part in (("bank", options.train_images), ("test", None)))
    task = progress.add_task(f"{name}: features", total=batches)
    occasion = Occasion(subject, data, options.out.name, epoch or 0)
    measure_together([features], occasion, lambda: progress.advance(task), lambda: _agreeing(name, options))
    train, test = features.of("bank"), features.of("test")
    for layer in layers:
        check_features(f"layer {layer}", train[layer])
        check_features(f"layer {layer}, test images", test[layer])
    (labels, index), (test_labels, _) = (
        known(data, *part) for part in (("bank", options.train_images), ("test", None))
    )
    labels, index, test_labels = (values.to(options.device) for values in (labels, index, test_labels))
    return FrozenFeatures(
        name, method, epoch or 0, subject.depths(layers), train, labels, index, test, test_labels, folder
    )


def known(data: DataModule, split: Any, images: int | None = None) -> tuple[Tensor, Tensor]:
    """Labels and numbers of all images of a split, in its order."""
    loader = data.loader(split, images)
    return loader.images.labels[loader.sampler.rows], loader.images.index[loader.sampler.rows]


def kept_where(name: str, widths: Mapping[str, int], options: Any, console: Console) -> Path | None:
    """The folder for features that do not fit into the free memory of some process; None where they fit.

    Raises:
        UserError: they do not fit on the disk either, or one layer and its classifiers not into memory.
    """
    data, (rank, world_size) = options.data, this_process()
    bank, test = (len(known(data, *part)[0]) for part in (("bank", options.train_images), ("test", None)))
    features, images, widest = sum(widths.values()), bank + test, max(widths.values())
    stored, work = 4 * features * images, 0
    if "linear_augmented" in options.evaluations:
        stored += 4 * widths[POOLED] * bank
    if world_size > 1:
        stored *= 2  # at most: the first process has all, the others of its machine have as much together
    if not {"layers", "labels"}.isdisjoint(options.evaluations):
        device = torch.device(options.device).type
        work = converged_probes_bytes(bank, widest, data.num_classes, multi_label=data.multi_label, device=device)
    free, beside = free_memory("cpu"), work if options.device == "cpu" else 0
    is_short = any(of_each(stored + beside > FULL * free))
    with agreeing():
        if rank == 0:
            asked, there = options.train_images or bank, free_memory(options.device)
            if (needed := 4 * widest * max(bank, test) + work) > FULL * there:
                raise UserError(
                    f"--train_images {asked}: the widest layer of {name}, {widest:,} features of {max(bank, test):,} "
                    f"images, and the classifiers on it take about {_gib(needed)}, {_gib(there)} are free on "
                    f"{options.device}; {LESS_MEMORY}"
                )
        if rank == 0 and is_short:
            folder = next(path for path in (options.out.absolute(), *options.out.absolute().parents) if path.exists())
            kept, left = f"{features:,} features of {images:,} images", shutil.disk_usage(folder).free
            if stored > FULL * left:
                raise UserError(
                    f"--train_images {asked}: {kept} of {name} take {_gib(stored)}, {_gib(free)} of memory are free "
                    f"and {_gib(left)} on the disk of --out {options.out}; {LESS_MEMORY}, or an --out on another disk"
                )
            told = f"{_gib(free)} of memory are free, so in files in {options.out}, removed at the end"
            console.print(f"        kept  {name}: {kept}, {_gib(stored)}; {told}", highlight=False, soft_wrap=True)
    return options.out if is_short else None


FULL = 0.9
"""Share of what is free that features may take."""
LESS_MEMORY = "set fewer images, fewer --probes.layers (such as [stages]), or another --device"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


# -- evaluations: each gives what it found, by metric ------------------------------------------------------------------


def evaluate_layers(frozen: FrozenFeatures, data: DataModule, options: Any, progress: Any) -> Found:
    """Converged classifiers on every layer: figure 3, left, of Grigg et al. 2021."""
    held = held_out(frozen.train_index)
    targets = one_hot(frozen.train_labels, data.num_classes)
    task = progress.add_task(f"{frozen.name}: logistic regression, {len(frozen.train)} layers", total=1)
    logistic = converged_probes(frozen.train, frozen.train_labels, held, data.num_classes, L2)
    ridge = {}
    for layer, x in frozen.train.items():
        if len(x) < FEW:
            ridge[layer] = ridge_probe_of_few(x, frozen.train_labels, data.num_classes, L2)
            continue
        fit, chosen_by = (ridge_sums(x[part], targets[part]) for part in (~held, held))
        ridge[layer] = ridge_probe(fit, chosen_by, x[held], frozen.train_labels[held], L2)
    progress.advance(task)
    found: dict[str, dict[str, list[float]]] = {}
    for metric, probes in (("logistic_probe", logistic), ("ridge_probe", ridge)):
        found[metric] = {}
        for layer, probe in probes.items():
            (scores,) = probe.scores(frozen.test[layer])
            numbers = accuracies(scores, frozen.test_labels)
            numbers |= {"l2": probe.l2[0], "gradient_norm": probe.gradient_norm[0]}
            for key, value in numbers.items():
                found[metric].setdefault(key, []).append(float(value))
    return found


def evaluate_knn(frozen: FrozenFeatures, data: DataModule, options: Any, progress: Any) -> Found:
    """Votes of the nearest training images, weighted by similarity and each counting one."""
    found = {}
    classes, vary = data.num_classes, directions_vary(frozen.train[POOLED])
    distances, neighbours = knn_search(frozen.test[POOLED], frozen.train[POOLED], max(options.k))
    for k in options.k:
        for temperature, kind in ((TEMPERATURE, ""), (None, "_majority")):
            predicted = knn_vote(distances[:, :k], neighbours[:, :k], frozen.train_labels, classes, temperature)
            # One column more than classes: of the images that have no neighbour.
            numbers = _numbers(one_hot(predicted % (classes + 1), classes + 1), frozen)
            found[f"knn{k}{kind}"] = numbers if vary else {key: [math.nan] for key in numbers}
    if not vary:
        reason = "features of all training images point one way"
        warnings.warn(f"{frozen.name}: accuracy of nearest neighbours is NaN: {reason}", stacklevel=2)
    return found


def _numbers(scores: Tensor, frozen: FrozenFeatures) -> dict[str, list[float]]:
    """How right the scores of the test images are."""
    return {key: [float(value)] for key, value in accuracies(scores, frozen.test_labels).items()}


Batches = Callable[[int], Iterable[tuple[Tensor, Tensor, Tensor]]]
"""Epoch to batches of features, labels and indices."""


def linear_evaluation(
    frozen: FrozenFeatures, batches: Batches, steps: int, data: DataModule, options: Any, progress: Any, title: str
) -> dict[str, list[float]]:
    """SGD on pooled features with a cosine schedule, all learning rates at once.

    Two banks learn side by side: one without the held-out tenth, which chooses the learning rate; one from all images,
    whose classifier of that learning rate is tested. Other processes may have a part in the batches, not in the steps.
    """
    widths = {POOLED: frozen.train[POOLED].shape[1]}
    choosing, final = (
        ProbeBank(widths, data.num_classes, RATES, [options.linear_weight_decay]).to(options.device) for _ in range(2)
    )
    task = progress.add_task(f"{frozen.name}: {title}", total=steps * options.linear_epochs)
    step = 0
    for epoch in range(options.linear_epochs):
        choosing.forget()
        of_epoch = batches(epoch)
        with alone():
            for features, labels, index in of_epoch:
                rate = (1 + math.cos(math.pi * step / (steps * options.linear_epochs))) / 2
                choosing.step({POOLED: features}, labels, index, rate)
                final.step({POOLED: features}, labels, None, rate)
                step += 1
                progress.advance(task)
    best = choosing.best()
    (scores,) = final.scores({POOLED: frozen.test[POOLED]}, best)
    return {**_numbers(scores, frozen), "learning_rate": final.learning_rate[best].tolist()}


def evaluate_linear(frozen: FrozenFeatures, data: DataModule, options: Any, progress: Any) -> Found:
    """Linear evaluation without augmentation: features are computed once."""
    features, n, size = frozen.train[POOLED], len(frozen.train_labels), data.batch_size

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).to(features.device)
        for rows in order.split(size):
            yield features[rows], frozen.train_labels[rows], frozen.train_index[rows]

    steps = math.ceil(n / size)
    return {"linear_eval": linear_evaluation(frozen, batches, steps, data, options, progress, "linear evaluation")}


def evaluate_linear_augmented(frozen: FrozenFeatures, data: DataModule, options: Any, progress: Any) -> Found:
    """Linear evaluation on newly augmented images in every epoch; every process must call it, and sees its share."""
    n, size = len(frozen.train_labels), data.eval_batch_size
    plan, subject = BatchPlan(torch.arange(n), [], seed=0), Subject.of(frozen.method, frozen.name)
    widths = {POOLED: frozen.train[POOLED].shape[1]}

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        augmented = Features(widths, {"bank": options.train_images}, options.augment, epoch, frozen.folder)
        occasion = Occasion(subject, data, options.out.name, frozen.epoch)
        measure_together([augmented], occasion, together=lambda: _agreeing(frozen.name, options))
        features = augmented.of("bank")[POOLED]
        plan.set_epoch(epoch)
        order = plan.order().to(features.device)
        return ((features[rows], frozen.train_labels[rows], frozen.train_index[rows]) for rows in order.split(size))

    rank, _ = this_process()
    if rank:
        for epoch in range(options.linear_epochs):
            batches(epoch)
        return {}
    title, steps = f"linear evaluation, {options.augment} views", math.ceil(n / size)
    return {"linear_eval_augmented": linear_evaluation(frozen, batches, steps, data, options, progress, title)}


def evaluate_labels(frozen: FrozenFeatures, data: DataModule, options: Any, progress: Any) -> Found:
    """Logistic regression on a share of the labels, the classes in proportion: mean and spread over draws."""
    found: dict[str, dict[str, list[float]]] = {}
    n = len(frozen.train_labels)
    task = progress.add_task(f"{frozen.name}: few labels", total=len(options.label_fractions))
    for fraction in options.label_fractions:
        images = round(fraction * n)
        values, chosen = [], {}
        for draw in range(options.draws if fraction < 1 else 1):
            rows = stratified(frozen.train_labels.cpu(), draw)[:images].to(options.device)
            features, labels = frozen.share(rows)
            probe = converged_probes(features, labels, held_of_each_class(labels), data.num_classes, L2)[POOLED]
            (scores,) = probe.scores(frozen.test[POOLED])
            values.append(_numbers(scores, frozen))
            chosen[f"l2_draw{draw + 1}"] = [float(probe.l2[0])]
        several = {key: [value[key][0] for value in values] for key in values[0]}
        numbers = {key: [statistics.mean(draws)] for key, draws in several.items()}
        if len(values) > 1:
            numbers["sd"] = [statistics.stdev(next(iter(several.values())))]
        found[f"labels_{100 * fraction:g}%"] = {**numbers, **chosen}
        progress.advance(task)
    return found


def held_of_each_class(labels: Tensor) -> Tensor:
    """A tenth of the images of each class, one image at least; a class of one image is learnt from.

    Args:
        labels: class of each image, (N,) int64; where images show several, (N,C), a tenth of all images is held out.

    Returns:
        Which images are held out, (N,) bool: the last of each class.

    Example:
        >>> held_of_each_class(torch.tensor([0, 0, 1, 2, 1, 1])).tolist()
        [False, True, False, False, False, True]
    """
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    parts = [labels == value for value in labels.unique()] if labels.ndim == 1 else [~held]
    for part in parts:
        rows = part.nonzero().squeeze(1)
        if len(rows) > 1:
            held[rows[-max(1, len(rows) // 10) :]] = True
    return held


def evaluate_finetune(frozen: FrozenFeatures, data: DataModule, options: Any, progress: Any) -> Found:
    """The whole network trained on labels from these weights; an untrained network is trained from scratch."""
    found: dict[str, dict[str, list[float]]] = {}
    if isinstance(frozen.method, RawPixels):
        return found
    given = frozen.method.init_args
    shared = ("backbone", "stem", "width", "image_size", "normalize", "center_crop", "channels_last")
    for fraction in options.label_fractions:
        progress.console.print(f"fine-tuning {frozen.name} on {100 * fraction:g}% of the labels", highlight=False)
        torch.manual_seed(SEED)
        network = Supervised(
            data.num_classes,
            augment=options.augment,
            lr=options.finetune_lr,
            **FINETUNING,
            compile=False,  # a new network for each share of the labels: compiling takes longer than it saves
            **{key: given[key] for key in shared},
        )
        network.backbone.load_state_dict(frozen.method.backbone.state_dict())
        images = LabelledImages(round(fraction * len(frozen.train_labels)), **options.data_options)
        trainer = L.Trainer(
            max_epochs=options.finetune_epochs,
            accelerator="gpu" if options.device.startswith("cuda") else "cpu",
            devices=[torch.device(options.device).index or 0] if options.device.startswith("cuda") else 1,
            callbacks=[FitProgress(), StopOnNaN()],
            plugins=[LightningEnvironment()],  # alone, whatever the job has more tasks for
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        failed = UserError(
            f"--finetune_lr {options.finetune_lr:g}: the loss of {frozen.name} became NaN or infinite on "
            f"{100 * fraction:g}% of the labels; set less"
        )
        try:
            trainer.fit(network, images)
        except UserError as error:
            raise (failed if "NaN" in str(error) else error) from error
        tested = Features({"head": data.num_classes}, {"test": None})
        measure_together([tested], Occasion(Subject.of(network.to(options.device)), data, options.out.name))
        scores = tested.of("test")["head"]
        if not bool(scores.isfinite().all()):  # spoilt by the last step, which has no loss after it
            raise failed
        found[f"finetune_{100 * fraction:g}%"] = _numbers(scores, frozen)
    return found


BY_THE_FIRST: dict[str, Callable[[FrozenFeatures, DataModule, Any, Any], Found]] = {
    "layers": evaluate_layers,
    "knn": evaluate_knn,
    "linear": evaluate_linear,
    "labels": evaluate_labels,
    "finetune": evaluate_finetune,
}


def protocols(data: DataModule, method: Method, options: Any) -> dict[str, Protocol]:
    """For each evaluation, all that changes its numbers."""
    chosen = {
        "layers": {"l2": list(L2), "solver": f"logistic regression: {SOLVER}"},
        "knn": {"similarity": f"cosine, {RANKING}", "k": options.k, "temperature": TEMPERATURE},
        "linear": {
            "epochs": options.linear_epochs,
            "batch": data.batch_size,
            "weight_decay": options.linear_weight_decay,
            "learning_rates": list(RATES),
            "schedule": "cosine",
            "momentum": MOMENTUM,
            "statistics": STATISTICS,
        },
        "labels": {"l2": list(L2), "solver": SOLVER, "fractions": options.label_fractions, "draws": options.draws},
        "finetune": {
            "epochs": options.finetune_epochs,
            "learning_rate for 256 images": options.finetune_lr,
            "batch": data.batch_size,
            "training views": options.augment,
            "fractions": options.label_fractions,
            "seed": SEED,
            **FINETUNING,
        },
    }
    chosen["linear_augmented"] = {**chosen["linear"], "batch": data.eval_batch_size, "training views": options.augment}
    chosen["knn"]["selection"] = "none"
    chosen["labels"]["selection"] = (
        "accuracy on a tenth of each class of a subset, one image at least; a class of one image is learnt from"
        f"{FEW_SELECTION}"
    )
    chosen["finetune"] |= {"selection": "none", "encoder": "trained as well, in training mode"}
    bank: dict[str, Any] = {"clean training images": len(data.loader("bank", options.train_images).sampler.rows)}
    if isinstance(method, RawPixels):
        bank["pixels"] = f"averaged down to {PIXEL_SIDE} x {PIXEL_SIDE}"
    return {
        name: probe_protocol(name, data, Subject.of(method), "test", **bank, **chosen[name])
        for name in options.evaluations
    }


def summary(data: DataModule, options: Any) -> str:
    """The protocol in one line, to stand with a table."""
    bank, test = (len(data.loader(*part).sampler.rows) for part in (("bank", options.train_images), ("test", None)))
    chosen = "a fixed tenth of which chooses hyper-parameters (few labels: a tenth of each class)"
    if bank < FEW:
        chosen = f"{FOLDS}-fold cross-validation chooses penalties, a fixed tenth learning rates"
    return (
        "Protocol: frozen network (but for fine-tuning) in evaluation mode, float32, averaged over space; "
        f"{bank:,} clean training images, {chosen}; the whole test split, {test:,} images"
    )


# -- the command -------------------------------------------------------------------------------------------------------


def _parse(args: Sequence[str]) -> Any:
    parser = networks_parser(
        "probe",
        "Read classes off frozen networks: linear classifiers on every layer, linear evaluation, nearest neighbours, "
        "few labels, fine-tuning. Several paths of one NAME, separated by commas, are seeds: the table gives mean and "
        "standard deviation. An untrained network and the raw pixels stand beside them. Several processes (--devices, "
        "or srun) share the images that frozen networks see; the first one learns the classifiers, and fine-tunes.",
        "probes",
        layers="block outputs, pooled features and head",
        several=True,
    )
    parser.add_argument(
        "--evaluations",
        type=str | list[str],
        default=list(USUAL),
        help=f"which of {', '.join(EVALUATIONS)}",
    )
    parser.add_argument(
        "--train_images",
        type=Annotated[int, between(1, BANK_SIZE)] | None,
        help="clean training images to learn from, at most (default: 50,000)",
    )
    parser.add_argument(
        "--k",
        type=list[Annotated[int, at_least(1)]] | None,
        help="neighbours that vote (default: 20 and 200, as far as there are so many training images)",
    )
    parser.add_argument(
        "--linear_epochs", type=Annotated[int, at_least(1)], default=100, help="epochs of SGD in linear evaluation"
    )
    parser.add_argument(
        "--linear_weight_decay",
        type=Annotated[float, at_least(0)],
        default=0.0,
        help="weight decay of linear evaluation",
    )
    parser.add_argument(
        "--augment", type=str, default="supervised", help="training views of linear_augmented and finetune"
    )
    parser.add_argument(
        "--label_fractions",
        type=list[Annotated[float, above(0, at_most=1)]],
        default=list(FRACTIONS),
        help="shares of the labels to learn from",
    )
    parser.add_argument(
        "--draws",
        type=Annotated[int, at_least(1)],
        default=5,
        help="random subsets for each share of the labels below 1",
    )
    parser.add_argument("--finetune_epochs", type=Annotated[int, at_least(1)], default=30, help="epochs of fine-tuning")
    parser.add_argument(
        "--finetune_lr",
        type=Annotated[float, above(0)],
        default=0.05,
        help="learning rate of fine-tuning for a batch of 256 images",
    )
    options = parse_networks(parser, "probe", args, "probes", LAYERS, SOURCES)
    options.evaluations = _as_list(options.evaluations)
    for name in options.evaluations:
        if name not in EVALUATIONS:
            raise UserError(f"--evaluations {name}: {nearest(name, EVALUATIONS)}")
    if options.linear_weight_decay > highest_decay(max(RATES)):
        raise UserError(
            f"--linear_weight_decay {options.linear_weight_decay}: expected 0 to {highest_decay(max(RATES)):.2g}, up "
            f"to which a learning rate of {max(RATES):g} is stable"
        )
    for name, known in {"evaluations": EVALUATIONS, "label_fractions": FRACTIONS, "k": NEIGHBORS}.items():
        if getattr(options, name) in ([], ()):
            raise UserError(f"--{name} []: expected one at least, such as {known[0]}")
    return options


def _check_data(options: Any, data: DataModule) -> None:
    """Training images that are too few for what was asked for stop the command before it measures."""
    asked = set(options.evaluations)
    n = len(data.loader("bank", options.train_images).sampler.rows)
    has_tenth = check_images(
        data, options.train_images, f"--train_images {options.train_images or n}", choosing="layers" in asked
    )
    by_steps = [name for name in ("linear", "linear_augmented") if name in asked]
    if by_steps and not has_tenth:
        told = f"{', '.join(by_steps)}: none of {n} training images is in the fixed tenth that chooses learning rates"
        if options.evaluations != USUAL:
            raise UserError(f"--evaluations {told}; leave out {' and '.join(by_steps)}, or give more images")
        logger.info(f"left out  {told}")
        options.evaluations = [name for name in options.evaluations if name not in by_steps]
        asked -= set(by_steps)
    there = f"there are {n} training images"
    if options.k is None:
        options.k = sorted({size_within("--k", None, k, n, there) for k in NEIGHBORS})
    if "knn" in asked and max(options.k) > n:
        raise UserError(
            f"--k {options.k}: {max(options.k)} neighbours cannot vote where there are {n} training images; set {n} at "
            "most, or more images"
        )
    for name, batch in {"linear": data.batch_size, "linear_augmented": data.eval_batch_size}.items():
        steps = math.ceil(n / batch) * options.linear_epochs
        if name in asked and steps < LEAST_STEPS:
            raise UserError(
                f"--linear_epochs {options.linear_epochs}: {name} makes {steps} steps on {n} images in batches of "
                f"{batch}; at least {LEAST_STEPS} are needed, set more epochs"
            )


def _check_fractions(options: Any, data: DataModule, console: Console) -> None:
    """Shares of the labels that are too small stop the command where they were asked for, else they are left out."""
    loader = data.loader("bank", options.train_images)
    labels = loader.images.labels[loader.sampler.rows].cpu()
    n, least = len(labels), max(10, 2 * data.num_classes)

    def is_small(fraction: float) -> bool:
        draws = [stratified(labels, draw)[: round(fraction * n)] for draw in range(options.draws)]
        return len(draws[0]) < least or (labels.ndim == 1 and any(len(labels[rows].unique()) < 2 for rows in draws))

    small = [fraction for fraction in options.label_fractions if is_small(fraction)]
    for fraction in small if not {"labels", "finetune"}.isdisjoint(options.evaluations) else ():
        told = (
            f"--label_fractions {fraction:g}: {round(fraction * n)} of {n} images for {data.num_classes} classes; at "
            "least two a class are needed, one to learn from and one to choose by, and two classes"
        )
        if options.label_fractions != list(FRACTIONS) or len(small) == len(options.label_fractions):
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
    named, groups = split_seeds(options.models)
    networks = load_networks(named)
    for seed, (_, epoch) in networks.items():
        if groups[seed] == PIXELS or (groups[seed] == UNTRAINED and epoch is not None):
            raise UserError(f"--models {groups[seed]}=…: a baseline that is measured too has that name; set another")
    trained = [method for method, epoch in networks.values() if epoch is not None]
    first = trained[0] if trained else next(iter(networks.values()))[0]
    if len(trained) == len(networks):
        networks |= load_networks([named[0], f"{UNTRAINED}=random"])
        groups[UNTRAINED] = UNTRAINED
    known = Method(backbone="resnet10").init_args
    base = {key: value for key, value in first.init_args.items() if key in known}
    networks[PIXELS] = RawPixels(**base), None
    groups[PIXELS] = PIXELS
    return networks, groups


@as_options
@said_once
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
    fabric = launch(options)
    options.device, is_first = str(fabric.device), fabric.is_global_zero
    out, console = options.out, Console(quiet=not is_first)
    networks, groups = by_turns(lambda: load_subjects(options), options, fabric)
    by_turns(options.data.prepare_data, options, fabric)
    with together(options):
        _check(options, networks, console)
        if is_first:
            _remove_results(out)
    store = RecordStore(out / "records")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    protocol_of: dict[str, dict[str, Protocol]] = {}
    failed: dict[str, str] = {}
    with Progress(*columns, console=Console(stderr=True, quiet=not is_first)) as progress:
        for name in list(networks):
            method, epoch = networks.pop(name)  # one network at a time on the device
            try:
                with _agreeing(name, options):
                    method = method.to(options.device)
                    protocol_of[name] = measure(name, method, epoch, store, options, progress, console)
            except (UserError, Interrupted) as error:
                if not is_agreed(error) or (isinstance(error, Interrupted) and error.code != ExitCode.MISTAKE):
                    raise  # another process has ended, or the program has a fault
                failed[name] = str(error)
            del method  # before the next one is on the device
            for task in progress.task_ids:
                progress.remove_task(task)
            told = "not measured" if name in failed else "    measured"
            console.print(f"{told}  {name}", highlight=False, soft_wrap=True)
    with together(options):
        groups = {name: group for name, group in groups.items() if name not in failed}
        if not groups:
            raise UserError(next(iter(failed.values())))
        if is_first and not (frame := store.read()).empty:  # raw pixels, which are not fine-tuned, may be what is left
            _report(frame, groups, protocol_of, options, console)
        if failed:
            raise UserError(f"{', '.join(failed)}: not measured, the tables are without; {'; '.join(failed.values())}")
    return out


def _check(options: Any, networks: Mapping[str, tuple[Method, int | None]], console: Console) -> None:
    """A mistake is found before anything is deleted."""
    data = options.data
    for method, _ in networks.values():
        if not isinstance(method, RawPixels):
            chosen_layers(method, options)
        Subject.of(method).view(options.augment)
    data.setup("test")
    if data.multi_label:
        options.evaluations = [name for name in options.evaluations if name in SEVERAL_CLASSES]
    if not options.evaluations:
        raise UserError(f"--evaluations: none is left; pictures of several classes allow {', '.join(SEVERAL_CLASSES)}")
    _check_data(options, data)
    _check_fractions(options, data, console)


def _report(
    frame: pd.DataFrame,
    groups: Mapping[str, str],
    protocol_of: Mapping[str, Mapping[str, Protocol]],
    options: Any,
    console: Console,
) -> None:
    """Tables and picture of the networks that were measured."""
    out, data = options.out, options.data
    frame = frame[frame["model"].isin(groups)]
    judged = "mean average precision" if data.multi_label else "accuracy"
    said = summary(data, options)
    text = tables(frame, groups, protocol_of, out, said, judged, balanced=_is_balanced(data))
    console.print(f"{text}\n{said}", markup=False, highlight=False, soft_wrap=True)
    if "layers" in options.evaluations:
        console.print(f"    picture  {draw(frame, groups, out / 'figures', judged)}", highlight=False, soft_wrap=True)
    console.print(f"    records  {out / 'records'}", highlight=False, soft_wrap=True)
    console.print(f"     tables  {out / 'tables.md'}, {out / 'tables.tex'}", highlight=False, soft_wrap=True)


def measure(
    name: str,
    method: Method,
    epoch: int | None,
    store: RecordStore,
    options: Any,
    progress: Any,
    console: Console,
) -> dict[str, Protocol]:
    """Everything about one network, into the records; every process must call it.

    Args:
        name: of the network.
        method: the network, on the device.
        epoch: its completed epochs.
        store: where records go.
        options: of the command.
        progress: of the command.
        console: of the command.

    Returns:
        Evaluation to protocol.

    Raises:
        ValueError: features or labels that no classifier can learn from.
    """
    data, (rank, _) = options.data, this_process()
    frozen = extract(name, method, epoch, options, progress, console)
    chosen = protocols(data, method, options)
    for evaluation in options.evaluations:
        found: Found = {}
        if evaluation == "linear_augmented":
            found = evaluate_linear_augmented(frozen, data, options, progress)
        elif rank == 0:
            with alone():
                found = BY_THE_FIRST[evaluation](frozen, data, options, progress)
        if rank:
            continue
        common = {
            "run": options.out.name,
            "model": name,
            "view": "clean",
            "split": "test",
            "epoch": frozen.epoch,
            "protocol": chosen[evaluation].hash,
        }
        rows = []
        for metric, numbers in found.items():
            depths = frozen.depths if evaluation == "layers" else {POOLED: frozen.depths[POOLED]}
            rows += probe_rows(metric, depths, numbers, len(frozen.test_labels), **common)
        store.write(f"{evaluation}/{name}", rows, [chosen[evaluation]])
    return chosen


@contextmanager
def _agreeing(name: str, options: Any) -> Iterator[None]:
    """A part of what is done about a network, which all processes come to the end of, or none of them."""
    with agreeing():
        try:
            yield
        except (ValueError, RuntimeError, MemoryError, OSError) as error:
            if is_agreed(error):
                raise
            raise UserError(_reason(name, error, options)) from error


def _reason(name: str, error: Exception, options: Any) -> str:
    """Why a network was not measured; an error of the program is none."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        batch = f"lower --data.eval_batch_size {options.data.eval_batch_size}"
        return f"--models {name}: the memory of {options.device} is full; {batch}, {LESS_MEMORY}"
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if isinstance(error, ValueError):  # features or labels that no classifier can learn from
        return f"--models {name}: {error}"
    raise error


def _remove_results(out: Path) -> None:
    """What an earlier run of this command left; other files stay."""
    shutil.rmtree(out / "records", ignore_errors=True)
    for path in ("tables.md", "tables.tex", f"figures/{PICTURE}.png", f"figures/{PICTURE}.pdf"):
        (out / path).unlink(missing_ok=True)


def _is_balanced(data: DataModule) -> bool:
    loader = data.loader("test")
    labels = loader.images.labels[loader.sampler.rows]
    if data.multi_label:  # judged class by class already
        return True
    counts = labels[labels >= 0].bincount()
    return int(counts.max()) <= UNBALANCED * int(counts[counts > 0].min())


def tables(
    frame: pd.DataFrame,
    groups: Mapping[str, str],
    protocol_of: Mapping[str, Mapping[str, Protocol]],
    out: Path,
    said: str,
    judged: str = "accuracy",
    balanced: bool = True,
) -> str:
    """The tables of a probe from its records, as Markdown and LaTeX, each with its protocols.

    Args:
        frame: the records.
        groups: network to the name that was given for it.
        protocol_of: network to evaluation to protocol.
        out: folder of ``tables.md`` and ``tables.tex``.
        said: the protocol in one line, which stands under each table.
        judged: what the numbers are.
        balanced: whether the classes are of one size; if not, there are tables of the mean over classes.

    Returns:
        The tables of pooled features, in Markdown.
    """
    n = int(frame["n"].iloc[0])
    images = f"in percent on {n:,} test images; mean and standard deviation over networks"
    kinds = {"": judged} if balanced else {"": judged, "_mean_per_class": f"mean per-class {judged}"}
    on_pooled, on_layers = [], []
    for suffix, what in kinds.items():
        mine = frame[frame["metric"].str.endswith(suffix)]
        mine = mine.assign(metric=mine["metric"].str.removesuffix(suffix))
        rows = mine[mine["layer"] == POOLED]
        columns = {metric: _title(metric) for metric in sorted(rows["metric"].unique(), key=_place) if _title(metric)}
        on_pooled.append((f"Pooled features: {what} {images}", seed_table(rows, columns, groups)))
        for metric, kind in (("logistic_probe", "Logistic regression"), ("ridge_probe", "Ridge regression")):
            rows = mine[mine["metric"] == metric].sort_values("depth", kind="stable")
            if len(rows):
                by_layer = rows.assign(metric=rows["layer"])
                layers = seed_table(by_layer, {layer: layer for layer in rows["layer"].unique()}, groups).T
                on_layers.append((f"{kind} on each layer: {what} {images}", layers))
    parts = [*on_pooled, *on_layers]
    shown = [f"## {title}\n\n{markdown(table)}\n" for title, table in parts]
    texts = _distinct(protocol_of)
    lines = [f"{part}\n{said}.\n" for part in shown]
    lines += ["## Protocols\n", *(f"### {title}\n\n```json\n{text}\n```\n" for title, text in texts.items())]
    write_whole(out / "tables.md", lambda path: path.write_text("\n".join(lines), encoding="utf-8"))
    comments = [f"% {line}" for title, text in texts.items() for line in (title, *text.splitlines(), "")]
    latexes = [latex(table, f"{title}. {said}.") for title, table in parts]
    write_whole(out / "tables.tex", lambda path: path.write_text("\n".join([*comments, *latexes]), encoding="utf-8"))
    return "\n".join(shown[: len(on_pooled)])


def _distinct(protocol_of: Mapping[str, Mapping[str, Protocol]]) -> dict[str, str]:
    """Each protocol once: its evaluation, hash and networks to its text."""
    networks: dict[tuple[str, str], list[str]] = {}
    texts = {}
    for network, by_evaluation in protocol_of.items():
        for evaluation, protocol in by_evaluation.items():
            networks.setdefault((evaluation, protocol.hash), []).append(network)
            texts[protocol.hash] = protocol.text
    return {f"{name} {digest} ({', '.join(who)})": texts[digest] for (name, digest), who in networks.items()}


def _place(metric: str) -> int:
    order = ("linear", "logistic", "ridge", "knn", "labels", "finetune")
    return next(number for number, start in enumerate(order) if metric.startswith(start))


def _title(metric: str) -> str:
    """The column of a metric; empty for what is in the records alone."""
    fixed = {
        "linear_eval": "linear",
        "linear_eval_augmented": "linear, augmented",
        "logistic_probe": "logistic",
        "ridge_probe": "ridge",
    }
    for pattern, title in {
        r"knn(\d+)": "{}-NN",
        r"knn(\d+)_majority": "{}-NN, majority",
        r"labels_([^_]+)": "{} labels",
        r"labels_([^_]+)_sd": "{} labels, deviation over draws",
        r"finetune_([^_]+)": "fine-tuned, {} labels",
    }.items():
        if match := re.fullmatch(pattern, metric):
            return title.format(match[1])
    return fixed.get(metric, "")


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
    curves = rows[rows["model"] != PIXELS]
    pixels = rows[rows["model"] == PIXELS]["value"]
    figure = compare_curves(
        {f"Logistic regression on pooled features, {int(frame['n'].iloc[0]):,} test images": curves},
        {name: group for name, group in groups.items() if name != PIXELS},
        label=judged,
        levels={} if pixels.empty else {PIXELS: float(pixels.iloc[0])},
    )
    return save_figure(figure, folder / PICTURE)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.probe``."""
    run_command(probe, args, interrupted="interrupted: run the same command again, with --overwrite true")


if __name__ == "__main__":
    main()
