"""What can be read off each layer by a linear classifier, while the network trains.

Two kinds of classifiers, on averages over space of each layer's activations:

* **online**: a bank of classifiers with many learning rates and weight decays, which learn from the activations of the
  training step's own forward. They cost no pass and never touch the network: they have their own tensors, their own
  optimiser, and their state lies with the callback.
* **converged**: in epochs that measure, ridge regression (and, by choice, logistic regression) on clean training
  images, from the pass that all monitors share.

Both choose their hyper-parameters on a fixed tenth of the training images and are evaluated on the measurement images,
in every epoch that measures.
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
from ssl_geometry.geometry.classification import FEW, FOLDS, HELD_OUT, choosing_folds, held_out
from ssl_geometry.geometry.logistic import ITERATIONS, TOLERANCE
from ssl_geometry.measure.engine import Epochs, ImageSource, Measured, Measurement, Occasion, layer_widths
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
SELECTION = f"accuracy on one of {HELD_OUT} training images, chosen by index; ties broken by the loss there"
FEW_SELECTION = f"; of fewer than {FEW} training images, by {FOLDS}-fold cross-validation"
SOLVER = f"L-BFGS until an entry of the gradient is at most {TOLERANCE:g} of the objective, {ITERATIONS} steps at most"
STATISTICS = f"features standardised by running statistics, which keep {MEMORY} from step to step"
MOST_IN_FLOAT32 = 32 * 2**20
"""Bytes of gradients that processes send each other in float32 by default; more go in bfloat16."""
HIGHEST_RATE = 7.0
"""Up to this learning rate, SGD with momentum 0.9 is stable on the features of a :class:`ProbeBank`."""


def highest_decay(learning_rate: float) -> float:
    """The weight decay up to which SGD with momentum 0.9 is stable on the features of a :class:`ProbeBank`.

    A step is stable where the learning rate times the curvature, at most 1/2 plus the decay, is below 2 (1 + 0.9).

    Example:
        >>> [round(highest_decay(rate), 2) for rate in (3.0, 7.0)]
        [0.77, 0.04]
    """
    return 3.8 / learning_rate - 0.5


def check_images(
    data: ImageSource, images: int | None, option: str, choosing: bool = True, otherwise: str = ""
) -> bool:
    """Refuse training images that teach no classifier, before any work is done.

    Args:
        data: whose images.
        images: how many of the labelled training images, at most.
        option: that says so, for the message.
        choosing: whether some of them are held out and choose: a fixed tenth, of fewer than 100 images five folds.
        otherwise: what else could be done, for the message.

    Returns:
        Whether some of them are in the fixed tenth, by which classifiers that learn step by step are chosen.

    Raises:
        UserError: fewer images to learn from than classes, images of one class only, or none that chooses.
    """
    loader = data.loader("bank", images)
    rows = loader.sampler.rows
    labels, index = loader.images.labels[rows], loader.images.index[rows]
    n, tenth = len(labels), held_out(index)
    learned = labels[~tenth] if choosing and n >= FEW else labels
    if data.multi_label:
        few = not len(learned)
    else:
        few = len(learned) < data.num_classes
        if n > 1 and len(labels.unique()) == 1:
            raise UserError(
                f"{data.origin}: all {n} labelled training images are of one class; a classifier needs two at least"
                f"{otherwise}"
            )
    if few:
        raise UserError(
            f"{option}: {len(learned)} labelled training images to learn from for {data.num_classes} classes; a "
            f"classifier needs one a class at least{otherwise}"
        )
    if choosing:
        try:
            choosing_folds(labels, tenth, data.num_classes)
        except ValueError as error:
            raise UserError(f"{option}: {n} labelled training images are too few: {error}{otherwise}") from error
    return bool(tenth.any())


class Probes(Measurement):
    """Linear classifiers on every layer: online ones that learn next to the network, and converged ones.

    Args:
        layers: which layers; see ``--cka.layers``. None takes block outputs, pooled features and head, as far as the
            network has them.
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches it off, online
            classifiers as well.
        online: train classifiers on the activations of the training steps (where an image shows one class, and batches
            are this package's).
        online_sent_in: dtype in which processes send each other the gradients of the online classifiers in every step:
            float32, bfloat16 (half the bytes; accuracies then depend on the number of processes, within rounding), or
            auto: bfloat16 where they are above 32 MiB in float32.
        logistic: fit logistic regression at each measured epoch, next to the ridge regression.
        train_images: clean training images that converged classifiers learn from, at most.
        learning_rates: of the online classifiers; up to 7 they are stable.
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
                raise UserError(f"{self.option(name)} []: expected one at least")
        most = highest_decay(max(learning_rates))
        if max(weight_decays) > most:
            raise UserError(
                f"{self.option('weight_decays')} {list(weight_decays)}: expected numbers from 0 to {most:.2g}, up to "
                f"which they are stable with a learning rate of {max(learning_rates):g}"
            )
        self.layers, self.online, self.logistic, self.train_images = layers, online, logistic, train_images
        self.online_sent_in = online_sent_in
        self.learning_rates, self.weight_decays = tuple(learning_rates), tuple(weight_decays)
        self.bank: ProbeBank | None = None
        self.of_training: dict[str, Any] = {}
        """What the online classifiers learn from, for their protocol; whoever trains them says so."""
        self._bank_state: dict[str, Any] | None = None
        self._bank_of: dict[str, Any] = {}
        self._taps: Taps | None = None

    def prepare(self, subject: Subject, images: ImageSource) -> None:
        """Refuse images that teach no classifier; learn the widths of the layers."""
        off = f", or leave probes out ({self.option('every_n_epochs')} 0)"
        asked = f"{self.option('train_images')} {self.train_images}"
        self._has_tenth = check_images(images, self.train_images, asked, otherwise=off)
        self._widths = layer_widths(subject, self.chosen(subject), images.image_shape)

    # -- online: the training loop calls these ---------------------------------------------------------------------

    def listen(self, subject: Subject, images: ImageSource, of_training: Mapping[str, Any]) -> None:
        """Make the online classifiers, or go on with those of the checkpoint, and hear the training steps' forwards.

        Args:
            subject: the network that is trained.
            images: whose classes are learned.
            of_training: what the classifiers learn from, for their protocol.
        """
        if not self.online or images.multi_label:
            return
        if not self._has_tenth:
            logger.info("online probes are left out: no training image is in the fixed tenth that chooses among them")
            return
        self.of_training = dict(of_training)
        heads = len(self.learning_rates) * len(self.weight_decays)
        sent = heads * images.num_classes * sum(self._widths.values())
        few = self.online_sent_in == "auto" and 4 * sent <= MOST_IN_FLOAT32
        sent_in = torch.float32 if few or self.online_sent_in == "float32" else torch.bfloat16
        bank = ProbeBank(self._widths, images.num_classes, self.learning_rates, self.weight_decays, sent_in=sent_in)
        if self._bank_state is not None and self._bank_of != self._bank_options(images.num_classes):
            logger.info("online probes start again: their layers or options are others than in the checkpoint")
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

    def hear(self, subject: Subject) -> None:
        """From now on, forwards of this network's training steps are heard, and of no other's."""
        self.stop_hearing()
        if self.bank is not None:
            self._taps = Taps(subject.network, list(self._widths), lambda _, output: pooled(output)).__enter__()

    def step_starts(self) -> None:
        """The step's forward is to be heard."""
        if self._taps is not None:
            self._taps.captured = {}

    @property
    def silent(self) -> list[str]:
        """Layers that did not run in the step so far."""
        features = None if self._taps is None else self._taps.captured
        return [] if features is None else [layer for layer in self._widths if layer not in features]

    def step_ends(self, batch: Mapping[str, Tensor]) -> None:
        """One step of all online classifiers on what the network's own step computed.

        Args:
            batch: of the step, with ``label`` and ``index``.
        """
        if self._taps is None or self.bank is None:
            return
        if silent := self.silent:
            raise UserError(
                f"{self.option('layers')} {silent[0]}: it does not run in a training step; leave it out, or set "
                f"{self.option('online')} false"
            )
        features, self._taps.captured = self._taps.captured, None
        if features is None:  # it hears this network since this step
            return
        with torch.autocast(self.bank.weight.device.type, enabled=False):
            self.bank.step(features, batch["label"], batch["index"])

    def stop_hearing(self) -> None:
        """Leave the network as it was."""
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
        """Fresh sums."""
        images, device = occasion.images, occasion.subject.device
        kinds = {"ridge_probe": RidgeProbe, **({"logistic_probe": LogisticProbe} if self.logistic else {})}
        self._probes = {
            name: kind(self._widths, images.num_classes, multi_label=images.multi_label).to(device)
            for name, kind in kinds.items()
        }
        shape = len(self._widths) + 1, images.num_classes  # of each layer and class; the last row counts images
        self._correct = torch.zeros(shape, dtype=torch.float64, device=device)
        # whether the online classifiers of all layers have chosen their hyper-parameters yet; no step comes between
        self._online_is_evaluated = self.bank is not None and bool((self.bank.held > 0).all())

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
            correct = (self.bank.scores(features).argmax(2) == labels).double()
            self._correct[:-1].index_add_(1, labels, correct)

    def finish(self, occasion: Occasion) -> Measured:
        """A row for each layer and kind of classifier, and what it chose."""
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
                "network": "learnt from: training mode, batch norm with the statistics of each batch, precision "
                f"{precision}; judged: evaluation mode, {subject.dtype}",
                "selection": f"{SELECTION}, summed since the last moment",
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
        """Go on with them."""
        self._bank_state, self._bank_of = state["bank"], state["bank_of"]

    def _bank_options(self, num_classes: int) -> dict[str, Any]:
        return {"widths": dict(self._widths), "num_classes": num_classes, **self._online_options}


def probe_rows(
    name: str, depths: Mapping[str, float], found: Mapping[str, Sequence[float]], images: int, **common: Any
) -> list[dict[str, Any]]:
    """Rows for each layer: the accuracy with Wilson's interval of 95 %, and what else was found; live or not.

    Args:
        name: metric of the accuracy (of mAP where images show several classes); other metrics are named after it.
        depths: layer to depth, in the order of what was found.
        found: ``top1`` or ``mAP``, and what else there is for each layer (``mean_per_class``, ``l2``, ...).
        images: how many were classified.
        common: what all rows share.

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
    """All that changes the accuracy of a classifier, the same live and afterwards.

    Args:
        name: kind of classifier.
        images: that were seen.
        subject: what was measured; its precision and its views count.
        split: which images were classified. The measurement images are the first of its stratified order.
        options: of the classifier; they replace what is said here for most.
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
