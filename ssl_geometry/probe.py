"""Evaluate frozen networks: linear probes of every layer, nearest neighbours, few labels, fine-tuning.

    python -m ssl_geometry.probe --models simclr=runs/cifar10/simclr supervised=runs/cifar10/supervised
    python -m ssl_geometry.probe --models simclr=RUN,RUN,RUN --evaluations [layers, knn]     # seeds of one method

Protocol: the encoder is frozen, in evaluation mode, float32; features are averaged over space; training images are the
clean labelled ones of the run, test images the whole test split, evaluated once. Hyper-parameters are selected on a
fixed validation split (10 % of the training images). The table includes an untrained network and the raw pixels.

Several processes share the forward passes of frozen networks; the first one fits the classifiers and fine-tunes.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from ssl_geometry.cli import OF_THE_MACHINE, run_command
from ssl_geometry.data.datamodule import BANK_SIZE, DataModule
from ssl_geometry.data.images import stratified
from ssl_geometry.data.plan import size_within
from ssl_geometry.devices import MOST_OF_FREE, as_size, free_memory, out_of_memory
from ssl_geometry.errors import ExitCode, Interrupted, UserError, nearest
from ssl_geometry.finetuning import FineTuning
from ssl_geometry.geometry.classification import FEW, FOLDS, check_features
from ssl_geometry.geometry.logistic import converged_probes_bytes
from ssl_geometry.measure.engine import Occasion, as_options, layer_widths, measure_together
from ssl_geometry.measure.features import Features
from ssl_geometry.measure.frozen import (
    POOLED,
    RATES,
    AugmentedLinearEvaluation,
    Evaluation,
    FewLabels,
    Found,
    FrozenFeatures,
    LayerProbes,
    LinearEvaluation,
    NearestNeighbors,
)
from ssl_geometry.measure.probes import (
    LAYERS,
    check_images,
    highest_decay,
    probe_protocol,
    probe_rows,
)
from ssl_geometry.measure.processes import agreeing, alone, is_agreed, of_each, this_process
from ssl_geometry.measure.subject import Subject
from ssl_geometry.methods import Method
from ssl_geometry.methods.raw_pixels import PIXEL_SIDE, RawPixels
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
from ssl_geometry.progress import progress_bar
from ssl_geometry.ranges import above, at_least, between
from ssl_geometry.records import Protocol, RecordStore
from ssl_geometry.report.probes import FIGURE, PIXELS, draw, tables
from ssl_geometry.runs.networks import Loaded, load_networks, split_seeds

logger = logging.getLogger(__name__)

EVALUATIONS = [
    evaluation.name
    for evaluation in (
        LayerProbes,
        NearestNeighbors,
        LinearEvaluation,
        AugmentedLinearEvaluation,
        FewLabels,
        FineTuning,
    )
]
USUAL = [name for name in EVALUATIONS if name != "finetune"]
"""The default of ``--evaluations``."""
SEVERAL_CLASSES = ("layers", "labels")
"""Evaluations of multi-label images, by mean average precision."""
UNTRAINED = "untrained"
SOURCES: Sources = {
    "probes.layers": {"probes.layers": unchanged},
    **{f"data.{name}": {f"data.{name}": unchanged} for name in ("limit_train", "val_fraction")},
}
"""Options of a run that are defaults here. ``--probes.train_images`` is not among them, because measurements during
training use fewer images on purpose."""
NEIGHBORS = (20, 200)
FRACTIONS = (0.01, 0.1, 1.0)
LEAST_STEPS = 10
"""Fewest steps of a linear evaluation that can learn anything."""
UNBALANCED = 1.1
"""Classes are unbalanced where the largest has more than this factor times the test images of the smallest."""


def extract(model: Loaded, options: Any, progress: Any, console: Console) -> FrozenFeatures:
    """Features of clean training and test images; each image is processed once, by one of the processes.

    Raises:
        UserError: features that fit neither into memory nor on the disk.
        ValueError: features that are not finite.
    """
    data, name, method = options.data, model.name, model.method
    wanted = [POOLED] if isinstance(method, RawPixels) else [*chosen_layers(method, options), POOLED]
    subject = Subject.of(method, name)
    layers = subject.layers(wanted, option=options.layers_option)
    with _agreeing(name, options):
        widths = layer_widths(subject, layers, data.image_shape)
    folder = kept_where(name, widths, options, console)
    features = Features(widths, {"bank": options.train_images, "test": None}, folder=folder)
    batches = sum(len(data.loader(*part)) for part in (("bank", options.train_images), ("test", None)))
    task = progress.add_task(f"{name}: features", total=batches)
    occasion = Occasion(subject, data, options.out.name, model.epochs or 0)
    measure_together([features], occasion, lambda: progress.advance(task), lambda: _agreeing(name, options))
    train, test = features.of("bank"), features.of("test")
    for layer in layers:
        check_features(f"layer {layer}", train[layer])
        check_features(f"layer {layer}, test images", test[layer])
    (labels, index), (test_labels, _) = (
        known(data, *part) for part in (("bank", options.train_images), ("test", None))
    )
    labels, index, test_labels = (values.to(options.device) for values in (labels, index, test_labels))
    depths, agree = subject.depths(layers), partial(_agreeing, name, options)
    asked = options.train_images
    return FrozenFeatures(occasion, depths, train, labels, index, test, test_labels, asked, folder, agree)


def known(data: DataModule, split: Any, images: int | None = None) -> tuple[Tensor, Tensor]:
    """Labels and indices of all images of a split, in its order."""
    loader = data.loader(split, images)
    return loader.images.labels[loader.sampler.rows], loader.images.index[loader.sampler.rows]


def kept_where(name: str, widths: Mapping[str, int], options: Any, console: Console) -> Path | None:
    """The folder for features that exceed the free memory of some process; None where they fit into memory.

    Raises:
        UserError: they do not fit on the disk either, or one layer and its classifiers do not fit into memory.
    """
    data, (rank, world_size) = options.data, this_process()
    bank, test = (len(known(data, *part)[0]) for part in (("bank", options.train_images), ("test", None)))
    features, images, widest = sum(widths.values()), bank + test, max(widths.values())
    stored, work = 4 * features * images, 0
    if "linear_augmented" in options.evaluations:
        stored += 4 * widths[POOLED] * bank
    if world_size > 1:
        stored *= 2  # upper bound: all in the first process, and as much in the others of its machine
    if not {"layers", "labels"}.isdisjoint(options.evaluations):
        device = torch.device(options.device).type
        work = converged_probes_bytes(bank, widest, data.num_classes, multi_label=data.multi_label, device=device)
    free, work_bytes = free_memory("cpu"), work if options.device == "cpu" else 0
    is_short = any(of_each(stored + work_bytes > MOST_OF_FREE * free))
    with agreeing():
        if rank == 0:
            asked, there = options.train_images or bank, free_memory(options.device)
            if (needed := 4 * widest * max(bank, test) + work) > MOST_OF_FREE * there:
                raise UserError(
                    f"--train_images {asked}: the widest layer of {name}, {widest:,} features of {max(bank, test):,} "
                    f"images, and the classifiers on it take about {as_size(needed)}, {as_size(there)} are free on "
                    f"{options.device}; {LESS_MEMORY}"
                )
        if rank == 0 and is_short:
            folder = next(path for path in (options.out.absolute(), *options.out.absolute().parents) if path.exists())
            kept, left = f"{features:,} features of {images:,} images", shutil.disk_usage(folder).free
            if stored > MOST_OF_FREE * left:
                raise UserError(
                    f"--train_images {asked}: {kept} of {name} take {as_size(stored)}, {as_size(free)} of memory are "
                    f"free and {as_size(left)} on the disk of --out {options.out}; {LESS_MEMORY}, or an --out on "
                    "another disk"
                )
            message = f"{as_size(free)} of memory are free, so in files in {options.out}, removed at the end"
            console.print(
                f"        kept  {name}: {kept}, {as_size(stored)}; {message}", highlight=False, soft_wrap=True
            )
    return options.out if is_short else None


LESS_MEMORY = "set fewer images, fewer --probes.layers (such as [stages]), or another --device"


def summary(data: DataModule, options: Any) -> str:
    """The protocol in one line, for the head of a table."""
    bank, test = (len(data.loader(*part).sampler.rows) for part in (("bank", options.train_images), ("test", None)))
    chosen = "hyper-parameters selected on a fixed 10 % of them (few labels: on 10 % of each class)"
    if bank < FEW:
        chosen = f"regularisation selected by {FOLDS}-fold cross-validation, learning rates on a fixed 10 % of them"
    return (
        "Protocol: frozen network (but for fine-tuning) in evaluation mode, float32, averaged over space; "
        f"{bank:,} clean training images, {chosen}; the whole test split, {test:,} images"
    )


def evaluations(options: Any) -> list[Evaluation]:
    """The evaluations that the options ask for."""
    data, linear = options.data, (options.linear_epochs, options.linear_weight_decay)
    fractions, view = options.label_fractions, options.augment
    tuning = (options.finetune_epochs, options.finetune_lr, view, data.batch_size, options.data_options)
    known = [
        LayerProbes(),
        NearestNeighbors(options.k),
        LinearEvaluation(*linear, data.batch_size),
        AugmentedLinearEvaluation(*linear, data.eval_batch_size, view),
        FewLabels(fractions, options.draws),
        FineTuning(fractions, *tuning),
    ]
    by_name = {evaluation.name: evaluation for evaluation in known}
    return [by_name[name] for name in options.evaluations]


def _parse(args: Sequence[str]) -> Any:
    parser = networks_parser(
        "probe",
        "Evaluate frozen networks: linear probes of every layer, linear evaluation, nearest neighbours, few labels, "
        "fine-tuning. Several paths of one NAME, separated by commas, are seeds: the table gives mean and standard "
        "deviation. An untrained network and the raw pixels are included. Several processes (--devices, "
        "or srun) share the forward passes of frozen networks; the first one fits the classifiers and fine-tunes.",
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
        help="number of clean training images, at most (default: 50,000)",
    )
    parser.add_argument(
        "--k",
        type=list[Annotated[int, at_least(1)]] | None,
        help="numbers of neighbours (default: 20 and 200, at most the number of training images)",
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
        help="fractions of the labels to train on",
    )
    parser.add_argument(
        "--draws",
        type=Annotated[int, at_least(1)],
        default=5,
        help="random subsets per fraction of the labels below 1",
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
            raise UserError(f"--{name} []: expected at least one, such as {known[0]}")
    return options


def _check_data(options: Any, data: DataModule) -> None:
    """Training images that are too few for what was asked for stop the command before it measures."""
    asked = set(options.evaluations)
    n = len(data.loader("bank", options.train_images).sampler.rows)
    has_validation = check_images(
        data, options.train_images, f"--train_images {options.train_images or n}", selects="layers" in asked
    )
    by_steps = [name for name in ("linear", "linear_augmented") if name in asked]
    if by_steps and not has_validation:
        message = (
            f"{', '.join(by_steps)}: none of {n} training images falls into the validation split that selects learning "
            "rates"
        )
        if options.evaluations != USUAL:
            raise UserError(f"--evaluations {message}; leave out {' and '.join(by_steps)}, or give more images")
        logger.info(f"left out  {message}")
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
        message = (
            f"--label_fractions {fraction:g}: {round(fraction * n)} of {n} images for {data.num_classes} classes; at "
            "least two a class are needed, one to learn from and one to choose by, and two classes"
        )
        if options.label_fractions != list(FRACTIONS) or len(small) == len(options.label_fractions):
            raise UserError(message)
        console.print(f"left out  {message}", highlight=False, soft_wrap=True)
    options.label_fractions = [fraction for fraction in options.label_fractions if fraction not in small]


def _as_list(layers: str | Sequence[str]) -> list[str]:
    return [layers] if isinstance(layers, str) else list(layers)


def load_subjects(options: Any) -> dict[str, Loaded]:
    """The networks of ``--models`` and the two baselines, by name."""
    networks = load_networks(options.models)
    for model in networks.values():
        if model.given == PIXELS or (model.given == UNTRAINED and model.epochs is not None):
            raise UserError(f"--models {model.given}=…: a baseline that is measured too has that name; set another")
    trained = [model for model in networks.values() if model.epochs is not None]
    first = trained[0] if trained else next(iter(networks.values()))
    if len(trained) == len(networks):
        name, spec = next(iter(split_seeds(options.models)[0].items()))
        networks[UNTRAINED] = load_networks([f"{name}={spec}", f"{UNTRAINED}=random"])[UNTRAINED]
    known = Method(backbone="resnet10").init_args
    base = {key: value for key, value in first.method.init_args.items() if key in known}
    networks[PIXELS] = Loaded(PIXELS, RawPixels(**base), None, PIXELS)
    return networks


@as_options
@said_once
def probe(args: Sequence[str]) -> Path:
    """Measure, write records, draw the figure and print the tables.

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
    networks = by_turns(lambda: load_subjects(options), options, fabric)
    groups = {name: model.given for name, model in networks.items()}
    by_turns(options.data.prepare_data, options, fabric)
    with together(options):
        _check(options, networks, console)
        if is_first:
            _remove_results(out)
    store = RecordStore(out / "records")
    protocol_of: dict[str, dict[str, Protocol]] = {}
    failed: dict[str, str] = {}
    with progress_bar(shown=fabric.is_global_zero) as progress:
        for name in list(networks):
            model = networks.pop(name)  # one network at a time on the device
            try:
                with _agreeing(name, options):
                    model.method.to(options.device)
                    protocol_of[name] = measure(model, store, options, progress, console)
            except (UserError, Interrupted) as error:
                if not is_agreed(error) or (isinstance(error, Interrupted) and error.code != ExitCode.MISTAKE):
                    raise  # another process has ended, or the program has a fault
                failed[name] = str(error)
            del model  # before the next one is on the device
            for task in progress.task_ids:
                progress.remove_task(task)
            message = "not measured" if name in failed else "    measured"
            console.print(f"{message}  {name}", highlight=False, soft_wrap=True)
    with together(options):
        groups = {name: group for name, group in groups.items() if name not in failed}
        if not groups:
            raise UserError(next(iter(failed.values())))
        if is_first and not (frame := store.read()).empty:  # raw pixels, which are not fine-tuned, may be what is left
            _report(frame, groups, protocol_of, options, console)
        if failed:
            raise UserError(f"{', '.join(failed)}: not measured, the tables are without; {'; '.join(failed.values())}")
    return out


def _check(options: Any, networks: Mapping[str, Loaded], console: Console) -> None:
    """A mistake is found before anything is deleted."""
    data = options.data
    for model in networks.values():
        if not isinstance(model.method, RawPixels):
            chosen_layers(model.method, options)
        Subject.of(model.method).view(options.augment)
    data.setup("test")
    if data.multi_label:
        options.evaluations = [name for name in options.evaluations if name in SEVERAL_CLASSES]
    if not options.evaluations:
        raise UserError(f"--evaluations: none is left; images of several classes allow {', '.join(SEVERAL_CLASSES)}")
    _check_data(options, data)
    _check_fractions(options, data, console)


def _report(
    frame: pd.DataFrame,
    groups: Mapping[str, str],
    protocol_of: Mapping[str, Mapping[str, Protocol]],
    options: Any,
    console: Console,
) -> None:
    """Tables and figure of the networks that were measured."""
    out, data = options.out, options.data
    frame = frame[frame["model"].isin(groups)]
    judged = "mean average precision" if data.multi_label else "accuracy"
    protocol_line = summary(data, options)
    text = tables(frame, groups, protocol_of, out, protocol_line, judged, balanced=_is_balanced(data))
    console.print(f"{text}\n{protocol_line}", markup=False, highlight=False, soft_wrap=True)
    if "layers" in options.evaluations:
        console.print(f"     figure  {draw(frame, groups, out / 'figures', judged)}", highlight=False, soft_wrap=True)
    console.print(f"    records  {out / 'records'}", highlight=False, soft_wrap=True)
    console.print(f"     tables  {out / 'tables.md'}, {out / 'tables.tex'}", highlight=False, soft_wrap=True)


def measure(model: Loaded, store: RecordStore, options: Any, progress: Any, console: Console) -> dict[str, Protocol]:
    """Everything about one network, into the records; every process must call it.

    Args:
        model: the network, on the device.
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
    frozen = extract(model, options, progress, console)
    protocols: dict[str, Protocol] = {}
    bank: dict[str, Any] = {"clean training images": len(frozen.train_labels)}
    if isinstance(model.method, RawPixels):
        bank["pixels"] = f"averaged down to {PIXEL_SIDE} x {PIXEL_SIDE}"
    for evaluation in evaluations(options):
        kind = evaluation.name
        protocols[kind] = probe_protocol(kind, data, frozen.occasion.subject, "test", **bank, **evaluation.protocol())
        found: Found = {}
        if evaluation.on_every_process:
            found = evaluation.evaluate(frozen, progress)
        elif rank == 0:
            with alone():
                found = evaluation.evaluate(frozen, progress)
        if rank:
            continue
        common = {
            "run": options.out.name,
            "model": model.name,
            "view": "clean",
            "split": "test",
            "epoch": model.epochs or 0,
            "protocol": protocols[kind].hash,
        }
        rows = []
        for metric, numbers in found.items():
            depths = frozen.depths if kind == LayerProbes.name else {POOLED: frozen.depths[POOLED]}
            rows += probe_rows(metric, depths, numbers, len(frozen.test_labels), **common)
        store.write(f"{kind}/{model.name}", rows, [protocols[kind]])
    return protocols


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
    for path in ("tables.md", "tables.tex", f"figures/{FIGURE}.png", f"figures/{FIGURE}.pdf"):
        (out / path).unlink(missing_ok=True)


def _is_balanced(data: DataModule) -> bool:
    loader = data.loader("test")
    labels = loader.images.labels[loader.sampler.rows]
    if data.multi_label:  # judged class by class already
        return True
    counts = labels[labels >= 0].bincount()
    return int(counts.max()) <= UNBALANCED * int(counts[counts > 0].min())


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.probe``."""
    run_command(probe, args, interrupted="interrupted: run the same command again, with --overwrite")


if __name__ == "__main__":
    main()
