"""What can be read off each layer by a linear classifier, while the network trains.

Two kinds of classifiers, on averages over space of each layer's activations:

* **online**: a bank of classifiers with many learning rates and weight decays, which learn from the activations of the
  training step's own forward. They cost no pass and never touch the network: they have their own tensors, their own
  optimiser, and their state lies with the callback.
* **converged**: at measuring moments, ridge regression (and, by choice, logistic regression) on clean training images,
  from the pass that all monitors share.

Both choose their hyper-parameters on a fixed tenth of the training images and are judged once on the measurement
images.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ssl_geometry import __version__
from ssl_geometry.callbacks.cka import run_name
from ssl_geometry.callbacks.measure import Findings, Moment, Monitor, Reduced, Request, measuring, pooled
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError
from ssl_geometry.metrics import LogisticProbe, ProbeBank, RidgeProbe
from ssl_geometry.metrics.probe_bank import LEARNING_RATES, WEIGHT_DECAYS
from ssl_geometry.models.taps import Taps, layer_depths
from ssl_geometry.records import Protocol, record
from ssl_geometry.report.moments import Row, curve_rows, pictures, scalars

logger = logging.getLogger(__name__)

LAYERS = ("post_residual", "pooled", "head")
SELECTION = "accuracy on a fixed tenth of the training images, chosen by index"


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
        logistic: fit logistic regression at each measuring moment, beside the ridge regression.
        train_images: clean training images that converged classifiers learn from, at most.
        learning_rates: of the online classifiers; below 7 they are stable.
        weight_decays: of the online classifiers, each with every learning rate.
    """

    options = "probes"

    def __init__(
        self,
        every_n_epochs: int = 5,
        layers: str | list[str] | None = None,
        online: bool = True,
        logistic: bool = False,
        train_images: int = 10_000,
        learning_rates: Sequence[float] = LEARNING_RATES,
        weight_decays: Sequence[float] = WEIGHT_DECAYS,
    ) -> None:
        super().__init__(every_n_epochs)
        self.layers, self.online, self.logistic, self.train_images = layers, online, logistic, train_images
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
        names = self.layer_names(pl_module, LAYERS)
        self._widths = layer_widths(pl_module, names, data.image_shape)
        if self.online and not data.multi_label:
            bank = ProbeBank(self._widths, data.num_classes, self.learning_rates, self.weight_decays)
            if self._bank_state is not None and self._bank_of != self._bank_options(data.num_classes):
                logger.info("online probes start anew: their layers or options are others than in the checkpoint")
            elif self._bank_state is not None:
                bank.load_state_dict(self._bank_state)
            self._bank_of = self._bank_options(data.num_classes)
            self.bank = bank.to(pl_module.device)
            megabytes = 3 * bank.weight.numel() * bank.weight.element_size() / 2**20
            logger.info(
                f"online probes: {len(names)} layers x {len(bank.learning_rate)} classifiers, {megabytes:,.0f} MB"
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
        self._right = torch.zeros(len(self._widths) + 1, dtype=torch.float64, device=method.device)

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch of training or of measurement images."""
        if self._train in reduced:
            for probe in self._probes.values():
                probe.update_bank(reduced[self._train], batch["label"], batch["index"])
            return
        features, labels = reduced[self._test], batch["label"]
        for probe in self._probes.values():
            probe.update(features, labels)
        self._right[-1] += len(labels)
        if self._online_is_judged:
            assert self.bank is not None
            self._right[:-1] += (self.bank.scores(features).argmax(2) == labels).sum(1)

    @property
    def _online_is_judged(self) -> bool:
        """Whether the online classifiers have learnt anything yet."""
        return self.bank is not None and bool(self.bank.held.max() > 0)

    def finish(self, trainer: L.Trainer, method: L.LightningModule, moment: Moment) -> Findings:
        """A row for each layer and kind of classifier, and what it chose."""
        right = trainer.strategy.reduce(self._right, reduce_op="sum")
        images = int(right[-1])
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
            protocol = probe_protocol(name, data, method, train_images=self.train_images, l2=list(probe.l2))
            try:
                found = {key: value.reshape(-1).tolist() for key, value in probe.compute().items()}
            except ValueError as error:  # features or labels that no classifier can learn from
                raise UserError(f"probes after {moment.epoch} epochs: {error}") from error
            rows += probe_rows(name, self._depths, found, images, protocol=protocol.hash, **common)
            protocols.append(protocol)
        if self._online_is_judged:
            assert self.bank is not None
            views = {"training views": method.view.spec, "views an image": method.num_views}  # type: ignore[union-attr]
            options = {**self._online_options, **views, "batch": data.batch_size, "momentum": self.bank.momentum}
            protocol = probe_protocol("online_probe", data, method, **options)
            best = self.bank.best()
            found = {
                "top1": (right[:-1] / right[-1]).tolist(),
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
    """Rows for each layer: the accuracy with 95 % of a binomial error, and what else was found; live or not.

    Args:
        name: metric of the accuracy (of mAP where images show several classes); other metrics are named after it.
        depths: layer to depth, in the order of what was found.
        found: ``top1`` or ``mAP``, and what else there is for each layer (``mean_per_class``, ``l2``, ...).
        images: how many were classified.
        common: what all rows share.
    """
    rows = []
    for key, values in found.items():
        for (layer, depth), value in zip(depths.items(), values, strict=True):
            error = 1.96 * math.sqrt(value * (1 - value) / images) if key == "top1" else None
            bar = {} if error is None else {"low": value - error, "high": value + error}
            metric = name if key in ("top1", "mAP") else f"{name}_{key}"
            rows.append(record(**common, metric=metric, layer=layer, depth=depth, value=value, n=images, **bar))
    return rows


def probe_protocol(name: str, data: DataModule, network: L.LightningModule, **options: Any) -> Protocol:
    """All that changes the accuracy of a classifier, the same live and afterwards.

    Args:
        name: kind of classifier.
        data: whose images were seen.
        network: what was measured; its precision and its views count.
        options: of the classifier.
    """
    return Protocol(
        {
            "metric": name,
            "pooling": "average over space",
            "network": f"evaluation mode, {network.dtype}",
            "views": {"clean": network.clean_view.spec},  # type: ignore[union-attr]
            "test images": data.measure_ids,
            "n": data.measure_size,
            "training images": {
                "dataset": data.dataset,
                "seed": data.seed,
                "val_fraction": data.val_fraction,
                "limit_train": data.limit_train,
                "dataset_args": data.dataset_args or {},
            },
            "selection": SELECTION,
            **options,
            "versions": {"ssl_geometry": __version__, "torch": torch.__version__},
        }
    )
