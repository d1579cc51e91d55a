"""What can be read off each layer by a linear classifier, while the network trains.

Two kinds of classifiers, on averages over space of each layer's activations:

* **online**: a bank of classifiers with many learning rates and weight decays, which learn from the activations of the
  training step's own forward. They cost no pass and never touch the network: they have their own tensors, their own
  optimiser, and their state lies with the callback.
* **converged**: at measuring moments, ridge regression (and, by choice, logistic regression) on clean training images,
  from the pass that all monitors share.

Both choose their hyper-parameters on a fixed tenth of the training images and are judged on the measurement images, at
every moment.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import lightning as L
import torch
from scipy.stats import binomtest
from torch import Tensor

from ssl_geometry import __version__
from ssl_geometry.callbacks.cka import run_name
from ssl_geometry.callbacks.measure import Epochs, Findings, Moment, Monitor, Reduced, Request, measuring, pooled
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.probes import FEW, FOLDS, HELD_OUT, ITERATIONS, TOLERANCE, choosing_folds, held_out
from ssl_geometry.metrics import LogisticProbe, ProbeBank, RidgeProbe
from ssl_geometry.metrics.probe_bank import LEARNING_RATES, MEMORY, WEIGHT_DECAYS
from ssl_geometry.models.taps import Taps, layer_depths
from ssl_geometry.ranges import above, at_least, check_arguments
from ssl_geometry.records import Protocol, record
from ssl_geometry.report.moments import Row, curve_rows, pictures, scalars

logger = logging.getLogger(__name__)

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


def check_images(data: DataModule, images: int | None, option: str, choosing: bool = True, otherwise: str = "") -> bool:
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
    learnt = labels[~tenth] if choosing and n >= FEW else labels
    if data.multi_label:
        few = not len(learnt)
    else:
        few = len(learnt) < data.num_classes
        if n > 1 and len(labels.unique()) == 1:
            raise UserError(
                f"--data.dataset {data.dataset}: all {n} labelled training images are of one class; a classifier needs "
                f"two at least{otherwise}"
            )
    if few:
        raise UserError(
            f"{option}: {len(learnt)} labelled training images to learn from for {data.num_classes} classes; a "
            f"classifier needs one a class at least{otherwise}"
        )
    if choosing:
        try:
            choosing_folds(labels, tenth, data.num_classes)
        except ValueError as error:
            raise UserError(f"{option}: {n} labelled training images are too few: {error}{otherwise}") from error
    return bool(tenth.any())


def layer_widths(method: Any, layers: Sequence[str], image_shape: Sequence[int]) -> dict[str, int]:
    """How many features each layer has once pooled, from one forward of a black picture.

    Args:
        method: the network.
        layers: names of layers.
        image_shape: (3, H, W) of the pictures.
    """
    with measuring(method), Taps(method, list(layers), lambda _, output: pooled(output).shape[1]) as taps:
        blank = torch.zeros(1, *image_shape, dtype=torch.uint8, device=method.device)
        index = torch.zeros(1, dtype=torch.long, device=method.device)
        return taps(method.clean_view(blank, index, seed=0, epoch=0, view=0))


class ProbeMonitor(Monitor):
    """Linear classifiers on every layer: online ones that learn beside the network, and converged ones.

    Args:
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches it off, online
            classifiers as well.
        layers: which layers; see ``--cka.layers``. None takes block outputs, pooled features and head, as far as the
            network has them.
        online: train classifiers on the activations of the training steps (where a picture shows one class).
        online_sent_in: dtype in which processes send each other the gradients of the online classifiers in every step:
            float32, bfloat16 (half the bytes; accuracies then depend on the number of processes, within rounding), or
            auto: bfloat16 where they are above 32 MiB in float32.
        logistic: fit logistic regression at each measuring moment, beside the ridge regression.
        train_images: clean training images that converged classifiers learn from, at most.
        learning_rates: of the online classifiers; up to 7 they are stable.
        weight_decays: of the online classifiers, each with every learning rate.
    """

    options = "probes"

    def __init__(
        self,
        every_n_epochs: Epochs = 5,
        layers: str | list[str] | None = None,
        online: bool = True,
        online_sent_in: Literal["auto", "float32", "bfloat16"] = "auto",
        logistic: bool = False,
        train_images: Annotated[int, at_least(1)] = 10_000,
        learning_rates: Sequence[Annotated[float, above(0, at_most=HIGHEST_RATE)]] = LEARNING_RATES,
        weight_decays: Sequence[Annotated[float, at_least(0)]] = WEIGHT_DECAYS,
    ) -> None:
        check_arguments(ProbeMonitor, locals(), "--probes.")
        super().__init__(every_n_epochs)
        for name, values in {"learning_rates": learning_rates, "weight_decays": weight_decays}.items():
            if not values:
                raise UserError(f"--probes.{name} []: expected one at least")
        most = highest_decay(max(learning_rates))
        if max(weight_decays) > most:
            raise UserError(
                f"--probes.weight_decays {list(weight_decays)}: expected numbers from 0 to {most:.2g}, up to which "
                f"they are stable with a learning rate of {max(learning_rates):g}"
            )
        self.layers, self.online, self.logistic, self.train_images = layers, online, logistic, train_images
        self.online_sent_in = online_sent_in
        self.learning_rates, self.weight_decays = tuple(learning_rates), tuple(weight_decays)
        self.curves: list[Row] = []  # the accuracy of each layer over training
        self.bank: ProbeBank | None = None
        self._bank_state: dict[str, Tensor] | None = None
        self._bank_of: dict[str, Any] = {}
        self._taps: Taps | None = None

    # -- online ------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the online classifiers, or go on with those of the checkpoint."""
        if self.every_n_epochs <= 0 or not hasattr(pl_module, "measuring_view"):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        off = ", or switch probes off (--probes.every_n_epochs 0)"
        has_tenth = check_images(data, self.train_images, f"--probes.train_images {self.train_images}", otherwise=off)
        names = self.layer_names(pl_module, LAYERS)
        self._widths = layer_widths(pl_module, names, data.image_shape)
        if self.online and not has_tenth:
            logger.info("online probes are left out: no training image is in the fixed tenth that chooses among them")
        elif self.online and not data.multi_label:
            heads = len(self.learning_rates) * len(self.weight_decays)
            sent = heads * data.num_classes * sum(self._widths.values())
            few = self.online_sent_in == "auto" and 4 * sent <= MOST_IN_FLOAT32
            sent_in = torch.float32 if few or self.online_sent_in == "float32" else torch.bfloat16
            bank = ProbeBank(self._widths, data.num_classes, self.learning_rates, self.weight_decays, sent_in=sent_in)
            if self._bank_state is not None and self._bank_of != self._bank_options(data.num_classes):
                logger.info("online probes start anew: their layers or options are others than in the checkpoint")
            elif self._bank_state is not None:
                bank.load_state_dict(self._bank_state)
            self._bank_of = self._bank_options(data.num_classes)
            self.bank = bank.to(pl_module.device)
            megabytes = 3 * bank.weight.numel() * bank.weight.element_size() / 2**20
            each_step = f", {sent * sent_in.itemsize / 2**20:,.1f} MB between processes in every step"
            logger.info(
                f"online probes: {len(names)} layers x {heads} classifiers, {megabytes:,.0f} MB"
                + each_step * (trainer.world_size > 1)
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the initialisation, then listen to the steps."""
        super().on_train_start(trainer, pl_module)
        if self.bank is not None:
            self._taps = Taps(pl_module, list(self._widths), lambda _, output: pooled(output)).__enter__()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """The step's forward is to be heard."""
        if self._taps is not None:
            self._taps.captured = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of all online classifiers on what the network's own step computed."""
        if self._taps is not None and self.bank is not None:
            features, self._taps.captured = self._taps.captured, None
            assert features is not None
            if silent := [layer for layer in self._widths if layer not in features]:
                raise UserError(
                    f"--probes.layers {silent[0]}: it does not run in a training step of "
                    f"{type(pl_module).__name__}; leave it out, or set --probes.online false"
                )
            with torch.autocast(pl_module.device.type, enabled=False):
                self.bank.step(features, batch["label"], batch["index"])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Training failed or was stopped."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the network as it was, however training ended."""
        if self._taps is not None:
            self._taps.__exit__()
            self._taps = None

    # -- measuring ---------------------------------------------------------------------------------------------------

    def requests(self, method: L.LightningModule) -> Sequence[Request]:
        """Pooled features of clean training and measurement images."""
        names = self.layer_names(method, LAYERS)
        self._depths = layer_depths(method, names)
        self._test = Request(names, pooled)
        self._train = Request(names, pooled, split="bank", images=self.train_images)
        return [self._train, self._test]

    def begin(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        """Fresh sums."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        kinds = {"ridge_probe": RidgeProbe, **({"logistic_probe": LogisticProbe} if self.logistic else {})}
        self._probes = {
            name: kind(self._widths, data.num_classes, multi_label=data.multi_label).to(method.device)
            for name, kind in kinds.items()
        }
        shape = len(self._widths) + 1, data.num_classes  # of each layer and class; the last row counts images
        self._right = torch.zeros(shape, dtype=torch.float64, device=method.device)

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch of training or of measurement images."""
        if self._train in reduced:
            for probe in self._probes.values():
                probe.update_bank(reduced[self._train], batch["label"], batch["index"])
            return
        features, labels = reduced[self._test], batch["label"]
        for probe in self._probes.values():
            probe.update(features, labels)
        if labels.ndim == 2:
            self._right[-1, 0] += len(labels)
            return
        self._right[-1].index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        if self._online_is_judged:
            assert self.bank is not None
            right = (self.bank.scores(features).argmax(2) == labels).double()
            self._right[:-1].index_add_(1, labels, right)

    @property
    def _online_is_judged(self) -> bool:
        """Whether the online classifiers of all layers have been held against images yet."""
        return self.bank is not None and bool((self.bank.held > 0).all())

    def finish(self, trainer: L.Trainer, method: L.LightningModule, moment: Moment) -> Findings:
        """A row for each layer and kind of classifier, and what it chose."""
        right = trainer.strategy.reduce(self._right, reduce_op="sum")
        images = int(right[-1].sum())
        run = run_name(trainer)
        common = {
            "run": run,
            "model": run,
            "view": "clean",
            "split": "measure",
            "epoch": moment.epoch,
            "step": moment.step,
        }
        data = trainer.datamodule  # type: ignore[attr-defined]
        rows: list[dict[str, Any]] = []
        protocols = []
        for name, probe in self._probes.items():
            options: dict[str, Any] = {"train_images": self.train_images, "l2": list(probe.l2)}
            if name == "logistic_probe":
                options["solver"] = SOLVER
            protocol = probe_protocol(name, data, method, "measure", **options)
            try:
                found = {key: value.reshape(-1).tolist() for key, value in probe.compute().items()}
            except ValueError as error:  # features or labels that no classifier can learn from
                raise UserError(f"probes after {moment.epoch} epochs: {error}") from error
            rows += probe_rows(name, self._depths, found, images, protocol=protocol.hash, **common)
            protocols.append(protocol)
        if self._online_is_judged:
            assert self.bank is not None
            options = {
                "network": "learnt from: training mode, batch norm with the statistics of each batch, precision "
                f"{trainer.precision}; judged: evaluation mode, {method.dtype}",
                "selection": f"{SELECTION}, summed since the last moment",
                "training views": method.view.spec,  # type: ignore[union-attr]
                "views an image": method.num_views,
                "batch": data.batch_size,
                "momentum": self.bank.momentum,
                "statistics": STATISTICS,
                **self._online_options,
            }
            if self.bank.sent_in != torch.float32 and trainer.world_size > 1:
                dtype = str(self.bank.sent_in).removeprefix("torch.")
                options["gradients"] = f"sent between {trainer.world_size} processes in {dtype}"
            protocol = probe_protocol("online_probe", data, method, "measure", **options)
            best = self.bank.best()
            there = right[-1] > 0
            found = {
                "top1": (right[:-1].sum(1) / right[-1].sum()).tolist(),
                "mean_per_class": (right[:-1] / right[-1])[:, there].mean(1).tolist(),
                "learning_rate": self.bank.learning_rate[best].tolist(),
                "weight_decay": self.bank.weight_decay[best].tolist(),
            }
            rows += probe_rows("online_probe", self._depths, found, images, protocol=protocol.hash, **common)
            protocols.append(protocol)
            self.bank.forget()
        self.curves += curve_rows(rows)
        return Findings(rows, scalars(rows), pictures(rows, self.curves), protocols)

    @property
    def _online_options(self) -> dict[str, Any]:
        return {"learning_rates": list(self.learning_rates), "weight_decays": list(self.weight_decays)}

    # -- a resumed run -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, and the online classifiers."""
        bank = None if self.bank is None else self.bank.state_dict()
        return {"curves": self.curves, "bank": bank, "bank_of": self._bank_of}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint left."""
        self.curves, self._bank_state = state_dict["curves"], state_dict["bank"]
        self._bank_of = state_dict["bank_of"]

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
    name: str, data: DataModule, method: L.LightningModule, split: Literal["measure", "test"], **options: Any
) -> Protocol:
    """All that changes the accuracy of a classifier, the same live and afterwards.

    Args:
        name: kind of classifier.
        data: whose images were seen.
        method: what was measured; its precision and its views count.
        split: which images were classified. The measurement images are the first of its stratified order.
        options: of the classifier; they replace what is said here for most.
    """
    tested: dict[str, Any] = {"split": split, "n": len(data.loader(split).sampler.rows)}
    if split == "test":
        tested |= {"limit_test": data.limit_test, "measurement images": data.measure_size}
    return Protocol(
        {
            "metric": name,
            "pooling": "average over space",
            "network": f"evaluation mode, {method.dtype}",
            "views": {"clean": method.clean_view.spec},  # type: ignore[union-attr]
            "test images": {**tested, "hash of the measurement images": data.measure_ids},
            "training images": {
                "dataset": data.dataset,
                "seed": data.seed,
                "val_fraction": data.val_fraction,
                "limit_train": data.limit_train,
                "dataset_args": data.dataset_args or {},
            },
            "selection": SELECTION + FEW_SELECTION,
            **options,
            "versions": {"ssl_geometry": __version__, "torch": torch.__version__},
        }
    )
