"""Options of ``probe``, and what the images allow of them."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from rich.console import Console

from ssl_geometry.data.datamodule import BANK_SIZE, DataModule
from ssl_geometry.data.images import stratified
from ssl_geometry.data.plan import size_within
from ssl_geometry.errors import UserError, did_you_mean
from ssl_geometry.finetuning import FineTuning
from ssl_geometry.measure.frozen import (
    RATES,
    AugmentedLinearEvaluation,
    Evaluation,
    FewLabels,
    LayerProbes,
    LinearEvaluation,
    NearestNeighbors,
)
from ssl_geometry.measure.probes import LAYERS, check_images, highest_decay
from ssl_geometry.measure.subject import Subject
from ssl_geometry.methods.raw_pixels import RawPixels
from ssl_geometry.ranges import above, at_least, between
from ssl_geometry.runs.networks import Loaded
from ssl_geometry.shared_options import Sources, chosen_layers, networks_parser, parse_networks, unchanged

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


def parse(args: Sequence[str]) -> Any:
    """The options of the command line; see :func:`parse_networks`.

    Raises:
        UserError: a mistake in the options.
    """
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
        help=f"evaluations to run, some of {', '.join(EVALUATIONS)}",
    )
    parser.add_argument(
        "--train_images",
        type=Annotated[int, between(1, BANK_SIZE)] | None,
        help="clean training images for the classifiers, at most (default: 50,000)",
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
        help="random subsets of the labels per fraction below 1",
    )
    parser.add_argument("--finetune_epochs", type=Annotated[int, at_least(1)], default=30, help="epochs of fine-tuning")
    parser.add_argument(
        "--finetune_lr",
        type=Annotated[float, above(0)],
        default=0.05,
        help="learning rate of fine-tuning for a batch of 256 images",
    )
    options = parse_networks(parser, "probe", args, "probes", LAYERS, SOURCES)
    if isinstance(options.evaluations, str):
        options.evaluations = [options.evaluations]
    for name in options.evaluations:
        if name not in EVALUATIONS:
            raise UserError(f"--evaluations {name}: {did_you_mean(name, EVALUATIONS)}")
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
        console.print(f"left out  {message}")
    options.label_fractions = [fraction for fraction in options.label_fractions if fraction not in small]


def check(options: Any, networks: Mapping[str, Loaded], console: Console) -> None:
    """Find a mistake before anything is deleted; leave out what was not asked for and cannot be evaluated.

    Raises:
        UserError: layers, views or images that do not suit what was asked for.
    """
    data = options.data
    for model in networks.values():
        if not isinstance(model.method, RawPixels):
            chosen_layers(model.method.network, options)
        Subject.of(model.method).view(options.augment)
    data.setup("test")
    if data.multi_label:
        options.evaluations = [name for name in options.evaluations if name in SEVERAL_CLASSES]
    if not options.evaluations:
        raise UserError(f"--evaluations: none is left; images of several classes allow {', '.join(SEVERAL_CLASSES)}")
    _check_data(options, data)
    _check_fractions(options, data, console)
