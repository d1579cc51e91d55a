"""Linear probe accuracy of each layer while the network trains.

Two kinds of linear classifiers, on globally average-pooled activations of each layer:

* **online**: a bank of classifiers with many learning rates and weight decays, trained on the activations of the
  training step's own forward pass. They need no extra pass and never affect the network: they have their own tensors
  and optimiser, and their state belongs to the callback.
* **converged**: in each measured epoch, ridge regression (and optionally logistic regression) on clean training
  images, from the pass that all measurements share.

Both select their hyper-parameters on a fixed validation split (10 % of the training images) and are evaluated on the
measurement images in each measured epoch.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from scipy.stats import binomtest
from torch import Tensor

from ssl_geometry import __version__
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.classification import FEW, FOLDS, VALIDATION_ONE_IN, in_validation_split, validation_folds
from ssl_geometry.geometry.logistic import ITERATIONS, TOLERANCE
from ssl_geometry.measure.engine import layer_widths
from ssl_geometry.measure.measurement import Epochs, ImageSource, Measured, Measurement, Occasion
from ssl_geometry.measure.processes import is_of_the_first, summed, this_process
from ssl_geometry.measure.requests import Reduced, Request, pooled
from ssl_geometry.measure.subject import Subject
from ssl_geometry.metrics import LogisticProbe, ProbeBank, RidgeProbe
from ssl_geometry.metrics.probe_bank import LEARNING_RATES, MEMORY, WEIGHT_DECAYS
from ssl_geometry.models.taps import Taps
from ssl_geometry.ranges import above, at_least, check_arguments
from ssl_geometry.records import Protocol, record

logger = logging.getLogger(__name__)
logger.addFilter(is_of_the_first)

LAYERS = ("post_residual", "pooled", "head")
SELECTION = f"accuracy on one of {VALIDATION_ONE_IN} training images, chosen by index; ties broken by the loss there"
FEW_SELECTION = f"; of fewer than {FEW} training images, by {FOLDS}-fold cross-validation"
SOLVER = f"L-BFGS until an entry of the gradient is at most {TOLERANCE:g} of the objective, {ITERATIONS} steps at most"
STATISTICS = f"features standardised by running statistics, which keep {MEMORY} from step to step"
MOST_IN_FLOAT32 = 32 * 2**20
"""Gradients of more bytes than this are reduced over processes in bfloat16 by default."""
HIGHEST_RATE = 7.0
"""Largest learning rate at which SGD with momentum 0.9 is stable on the features of a :class:`ProbeBank`."""


def highest_decay(learning_rate: float) -> float:
    """Largest weight decay at which SGD with momentum 0.9 is stable on the features of a :class:`ProbeBank`.

    A step is stable where the learning rate times the curvature, at most 1/2 plus the decay, is below 2 (1 + 0.9).

    Example:
        >>> [round(highest_decay(rate), 2) for rate in (3.0, 7.0)]
        [0.77, 0.04]
    """
    return 3.8 / learning_rate - 0.5


def check_images(data: ImageSource, images: int | None, option: str, selects: bool = True, otherwise: str = "") -> bool:
    """Refuse training images that no classifier can be fitted to, before any work is done.

    Args:
        data: source of the images.
        images: number of labelled training images, at most.
        option: the option and value that limit them, for the message.
        selects: whether hyper-parameters are selected, on a validation split or by cross-validation.
        otherwise: an alternative for the user, for the message.

    Returns:
        Whether the validation split has an image, which online classifiers need.

    Raises:
        UserError: fewer images to learn from than classes, images of one class only, or no validation image.
    """
    loader = data.loader("bank", images)
    rows = loader.sampler.rows
    labels, index = loader.images.labels[rows], loader.images.index[rows]
    n, validation = len(labels), in_validation_split(index)
    learned = labels[~validation] if selects and n >= FEW else labels
    if data.multi_label:
        few = not len(learned)
    else:
        few = len(learned) < data.num_classes
        if n > 1 and len(labels.unique()) == 1:
            raise UserError(
                f"{data.origin}: all {n} labelled training images are of one class; a classifier needs at least two"
                f"{otherwise}"
            )
    if few:
        raise UserError(
            f"{option}: {len(learned)} labelled training images to learn from for {data.num_classes} classes; a "
            f"classifier needs at least one per class{otherwise}"
        )
    if selects:
        try:
            validation_folds(labels, validation, data.num_classes)
        except ValueError as error:
            raise UserError(f"{option}: {n} labelled training images are too few: {error}{otherwise}") from error
    return bool(validation.any())


class Probes(Measurement):
    """Linear probes on every layer: online ones that learn along with the network, and converged ones.

    Args:
        layers: which layers, as for CKA; by default block outputs, pooled features and head, as far as the network
            has them.
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches probes off, the
            online ones included.
        online: train classifiers on the activations of the training steps (for single-label images in batches of this
            package).
        online_sent_in: dtype in which processes reduce the gradients of the online classifiers in every step:
            float32, bfloat16 (half the bytes; accuracies then depend on the number of processes, within rounding), or
            auto: bfloat16 where they exceed 32 MiB in float32.
        logistic: fit logistic regression at each measured epoch, next to the ridge regression.
        train_images: clean training images for the converged classifiers, at most.
        learning_rates: of the online classifiers, at most 7 (the limit of stability).
        weight_decays: of the online classifiers, each with every learning rate.
    """

    group = "probes"
    default_layers = LAYERS

    def __init__(
        self,
        layers: str | list[str] | None = None,
        every_n_epochs: Epochs | None = None,
        online: bool = True,
        online_sent_in: Literal["auto", "float32", "bfloat16"] = "auto",
        logistic: bool = False,
        train_images: Annotated[int, at_least(1)] = 10_000,
        learning_rates: Sequence[Annotated[float, above(0, at_most=HIGHEST_RATE)]] = LEARNING_RATES,
        weight_decays: Sequence[Annotated[float, at_least(0)]] = WEIGHT_DECAYS,
    ) -> None:
        check_arguments(Probes, locals(), self.option(""))
        super().__init__(every_n_epochs)
        for name, values in {"learning_rates": learning_rates, "weight_decays": weight_decays}.items():
            if not values:
                raise UserError(f"{self.option(name)} []: expected at least one")
        most = highest_decay(max(learning_rates))
        if max(weight_decays) > most:
            raise UserError(
                f"{self.option('weight_decays')} {list(weight_decays)}: expected numbers from 0 to {most:.2g}, the "
                f"limit of stability with a learning rate of {max(learning_rates):g}"
            )
        self.layers, self.online, self.logistic, self.train_images = layers, online, logistic, train_images
        self.online_sent_in = online_sent_in
        self.learning_rates, self.weight_decays = tuple(learning_rates), tuple(weight_decays)
        self.bank: ProbeBank | None = None
        self.of_training: dict[str, Any] = {}
        """What the online classifiers learn from, for their protocol; set by the training loop."""
        self._bank_state: dict[str, Any] | None = None
        self._bank_of: dict[str, Any] = {}
        self._taps: Taps | None = None

    def prepare(self, subject: Subject, images: ImageSource) -> None:
        """Refuse images that no classifier can be fitted to; find the widths of the layers."""
        off = f", or leave probes out ({self.option('every_n_epochs')} 0)"
        asked = f"{self.option('train_images')} {self.train_images}"
        self._has_validation = check_images(images, self.train_images, asked, otherwise=off)
        self._widths = layer_widths(subject, self.chosen(subject), images.image_shape)

    # -- online: the training loop calls these ---------------------------------------------------------------------

    def create_online(self, subject: Subject, images: ImageSource, of_training: Mapping[str, Any]) -> None:
        """Create the online classifiers, or restore those of the checkpoint.

        Args:
            subject: the network that is trained.
            images: source of the images, with their classes.
            of_training: what the classifiers learn from, for their protocol.
        """
        if not self.online or images.multi_label:
            return
        if not self._has_validation:
            logger.info("online probes are off: no training image falls into their validation split")
            return
        self.of_training = dict(of_training)
        heads = len(self.learning_rates) * len(self.weight_decays)
        sent = heads * images.num_classes * sum(self._widths.values())
        few = self.online_sent_in == "auto" and 4 * sent <= MOST_IN_FLOAT32
        sent_in = torch.float32 if few or self.online_sent_in == "float32" else torch.bfloat16
        bank = ProbeBank(self._widths, images.num_classes, self.learning_rates, self.weight_decays, sent_in=sent_in)
        if self._bank_state is not None and self._bank_of != self._bank_options(images.num_classes):
            logger.info("online probes start again: their layers or options differ from those in the checkpoint")
        elif self._bank_state is not None:
            bank.load_state_dict(self._bank_state)
        self._bank_state, self._bank_of = None, self._bank_options(images.num_classes)
        self.bank = bank.to(subject.device)
        megabytes = 3 * bank.weight.numel() * bank.weight.element_size() / 2**20
        several = this_process()[1] > 1
        each_step = f", {sent * sent_in.itemsize / 2**20:,.1f} MB between processes in every step"
        logger.info(
            f"online probes: {len(self._widths)} layers x {heads} classifiers, {megabytes:,.0f} MB"
            + each_step * several
        )

    def attach(self, subject: Subject) -> None:
        """Install the taps that capture the training steps of this network, and remove those of another."""
        self.detach()
        if self.bank is not None:
            self._taps = Taps(subject.network, list(self._widths), lambda _, output: pooled(output)).__enter__()

    def step_starts(self) -> None:
        """Capture the activations of the step that starts."""
        if self._taps is not None:
            self._taps.captured = {}

    @property
    def layers_not_run(self) -> list[str]:
        """Layers that have not run in this step."""
        features = None if self._taps is None else self._taps.captured
        return [] if features is None else [layer for layer in self._widths if layer not in features]

    def step_ends(self, batch: Mapping[str, Tensor]) -> None:
        """Step all online classifiers on the activations of the network's training step.

        Args:
            batch: of the step, with ``label`` and ``index``.
        """
        if self._taps is None or self.bank is None:
            return
        if missing := self.layers_not_run:
            raise UserError(
                f"{self.option('layers')} {missing[0]}: it does not run in a training step; leave it out, or set "
                f"{self.option('online')} false"
            )
        features, self._taps.captured = self._taps.captured, None
        if features is None:  # the taps were installed during this step
            return
        with torch.autocast(self.bank.weight.device.type, enabled=False):
            self.bank.step(features, batch["label"], batch["index"])

    def detach(self) -> None:
        """Remove the taps."""
        if self._taps is not None:
            self._taps.__exit__()
            self._taps = None

    # -- measuring -------------------------------------------------------------------------------------------------

    def requests(self, subject: Subject) -> Sequence[Request]:
        """Pooled features of clean training and measurement images."""
        names = self.chosen(subject)
        self._depths = subject.depths(names)
        self._test = Request(names, pooled)
        self._train = Request(names, pooled, split="bank", images=self.train_images)
        return [self._train, self._test]

    def begin(self, occasion: Occasion) -> None:
        """Reset the classifiers and counts."""
        images, device = occasion.images, occasion.subject.device
        kinds = {"ridge_probe": RidgeProbe, **({"logistic_probe": LogisticProbe} if self.logistic else {})}
        self._probes = {
            name: kind(self._widths, images.num_classes, multi_label=images.multi_label).to(device)
            for name, kind in kinds.items()
        }
        shape = len(self._widths) + 1, images.num_classes  # per layer and class; the last row counts images
        self._correct = torch.zeros(shape, dtype=torch.float64, device=device)
        # whether the online classifiers of all layers can select their hyper-parameters yet
        self._online_is_evaluated = self.bank is not None and bool((self.bank.validated > 0).all())

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch of training or of measurement images."""
        if self._train in reduced:
            for probe in self._probes.values():
                probe.update_bank(reduced[self._train], batch["label"], batch["index"])
            return
        features, labels = reduced[self._test], batch["label"]
        for probe in self._probes.values():
            probe.update(features, labels)
        if self._online_is_evaluated:
            assert self.bank is not None
            self._correct[-1].index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
            correct = (self.bank.logits(features).argmax(2) == labels).double()
            self._correct[:-1].index_add_(1, labels, correct)

    def finish(self, occasion: Occasion) -> Measured:
        """Rows for each layer and kind of classifier: accuracy and selected hyper-parameters."""
        correct, images, subject = summed(self._correct), occasion.images, occasion.subject
        measured = Measured()

        def add(name: str, found: Mapping[str, Sequence[float]], options: Mapping[str, Any]) -> None:
            protocol = probe_protocol(name, images, subject, "measure", **options)
            common = {**occasion.columns, "view": "clean", "protocol": protocol.hash}
            measured.rows += probe_rows(name, self._depths, found, images.measure_size, **common)
            measured.protocols.append(protocol)

        for name, probe in self._probes.items():
            options: dict[str, Any] = {"train_images": self.train_images, "l2": list(probe.l2)}
            if name == "logistic_probe":
                options["solver"] = SOLVER
            add(name, {key: value.reshape(-1).tolist() for key, value in probe.compute().items()}, options)
        if self._online_is_evaluated:
            assert self.bank is not None
            learned = {**self.of_training}
            precision = learned.pop("precision")
            options = {
                "network": "trained on: training mode, batch norm with the statistics of each batch, precision "
                f"{precision}; evaluated: evaluation mode, {subject.dtype}",
                "selection": f"{SELECTION}, summed since the last measurement",
                **learned,
                "momentum": self.bank.momentum,
                "statistics": STATISTICS,
                **self._online_options,
            }
            _, processes = this_process()
            if self.bank.sent_in != torch.float32 and processes > 1:
                dtype = str(self.bank.sent_in).removeprefix("torch.")
                options["gradients"] = f"sent between {processes} processes in {dtype}"
            best, there = self.bank.best(), correct[-1] > 0
            found = {
                "top1": (correct[:-1].sum(1) / correct[-1].sum()).tolist(),
                "mean_per_class": (correct[:-1] / correct[-1])[:, there].mean(1).tolist(),
                "learning_rate": self.bank.learning_rate[best].tolist(),
                "weight_decay": self.bank.weight_decay[best].tolist(),
            }
            add("online_probe", found, options)
            self.bank.forget()
        return measured

    @property
    def _online_options(self) -> dict[str, Any]:
        return {"learning_rates": list(self.learning_rates), "weight_decays": list(self.weight_decays)}

    def state_dict(self) -> dict[str, Any]:
        """The online classifiers."""
        return {"bank": None if self.bank is None else self.bank.state_dict(), "bank_of": self._bank_of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the online classifiers, once they are created."""
        self._bank_state, self._bank_of = state["bank"], state["bank_of"]

    def _bank_options(self, num_classes: int) -> dict[str, Any]:
        return {"widths": dict(self._widths), "num_classes": num_classes, **self._online_options}


def probe_rows(
    name: str, depths: Mapping[str, float], found: Mapping[str, Sequence[float]], images: int, **common: Any
) -> list[dict[str, Any]]:
    """Rows for each layer: the accuracy with its 95 % Wilson interval, and further numbers.

    Args:
        name: metric of the accuracy (mAP for multi-label images), and prefix of the other metrics.
        depths: layer to depth, in the order of ``found``.
        found: ``top1`` or ``mAP``, and further numbers of each layer (``mean_per_class``, ``l2``, ...).
        images: number of images that were classified.
        common: columns that all rows share.

    References:
        Wilson, *Probable inference, the law of succession, and statistical inference*, 1927.
    """
    rows = []
    for key, values in found.items():
        for (layer, depth), value in zip(depths.items(), values, strict=True):
            bar = {}
            if key == "top1" and not math.isnan(value):
                interval = binomtest(round(value * images), images).proportion_ci(method="wilson")
                bar = {"low": float(interval.low), "high": float(interval.high)}
            metric = name if key in ("top1", "mAP") else f"{name}_{key}"
            rows.append(record(**common, metric=metric, layer=layer, depth=depth, value=value, n=images, **bar))
    return rows


def probe_protocol(
    name: str, images: ImageSource, subject: Subject, split: Literal["measure", "test"], **options: Any
) -> Protocol:
    """Everything that affects the accuracy of a classifier, the same live and offline.

    Args:
        name: kind of classifier.
        images: source of the images.
        subject: the measured network, with its precision and views.
        split: which images were classified. The measurement images are the first of its stratified order.
        options: of the classifier; they override the entries set here.
    """
    return Protocol(
        {
            "metric": name,
            "pooling": "average over space",
            "network": f"evaluation mode, {subject.dtype}",
            "views": {"clean": subject.view("clean").spec},
            "test images": {**images.tested(split), "hash of the measurement images": images.measure_ids},
            "training images": images.trained_on,
            "selection": SELECTION + FEW_SELECTION,
            **options,
            "versions": {"ssl_geometry": __version__, "torch": torch.__version__},
        }
    )
