"""How far each layer ignores augmentations, and how far it shows the classes, while a network trains.

Protocol: the CKA of a layer with itself under two augmented copies of the same measurement images (Grigg et al. 2021,
figures 3 and 5), for the method's own policy, the standard policies, and each augmentation alone (that split is
ours); and the CKA of a layer on clean images with the one-hot labels. Every network and every moment sees the same
copies.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ssl_geometry.callbacks.cka import GramSize, GramVector, cka_protocol, gram_sizes, run_name, warn_of_few
from ssl_geometry.callbacks.measure import Epochs, Findings, Moment, Monitor, Reduced, Request
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError
from ssl_geometry.metrics import ClassCKA, InvarianceCKA
from ssl_geometry.metrics.cka import LONELY
from ssl_geometry.models.taps import layer_depths
from ssl_geometry.ranges import check_arguments
from ssl_geometry.records import Protocol, record
from ssl_geometry.report.moments import Row, curve_rows, pictures, scalars

VIEWS = ("own", "simclr", "supervised", "crop", "flip", "color", "gray", "blur", "rotate", "translate")


def distinct_views(method: Any, views: Sequence[str]) -> dict[str, str]:
    """For each view, the first of the list that makes the same pictures: each picture is made and measured once."""
    specs = {name: method.measuring_view(name).spec for name in views}
    return {name: next(other for other in views if specs[other] == spec) for name, spec in specs.items()}


def check_views(method: Any, views: Sequence[str], option: str) -> None:
    """Refuse a view that no method knows and this one does not either.

    Args:
        method: that makes them.
        views: their names.
        option: that gave them.

    Raises:
        UserError: with the option as it was typed.
    """
    for name in views:
        try:
            method.measuring_view(name)
        except UserError as error:
            raise UserError(f"{option} [{name}]: {str(error).removeprefix('augment: ')}") from error


def invariance_requests(method: Any, layers: tuple[str, ...], gram_size: int, views: Sequence[str]) -> list[Request]:
    """Two augmented copies for each distinct view."""
    distinct = dict.fromkeys(distinct_views(method, views).values())
    return [Request(layers, GramVector(gram_size), view, draw) for view in distinct for draw in (0, 1)]


class InvarianceMonitor(Monitor):
    """CKA between two augmented copies of the images, layer by layer and augmentation by augmentation; class CKA.

    Args:
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches it off.
        layers: which layers; see ``--cka.layers``.
        gram_size: images in a Gram matrix.
        views: augmentations: own (the method's training views), policies (simclr, supervised) and single operations.
    """

    options = "invariance"

    def __init__(
        self,
        every_n_epochs: Epochs = 0,
        layers: str | list[str] = "all",
        gram_size: GramSize = 64,
        views: Sequence[str] = VIEWS,
    ) -> None:
        check_arguments(InvarianceMonitor, locals(), "--invariance.")
        super().__init__(every_n_epochs)
        self.layers, self.gram_size, self.views = layers, gram_size, tuple(views)
        self.curves: list[Row] = []  # the rows of `own` and of class CKA over training

    def check(self, method: Any) -> None:
        """The views too.

        Raises:
            UserError: with the option.
        """
        super().check(method)
        if self.every_n_epochs:
            check_views(method, self.views, "--invariance.views")

    def requests(self, method: L.LightningModule) -> Sequence[Request]:
        """Clean images for class CKA, which other monitors ask for too, and two copies a view."""
        names = self.layer_names(method)
        self._depths = layer_depths(method, names)
        self._distinct = distinct_views(method, self.views)
        self._clean = Request(names, GramVector(self.gram_size))
        return [self._clean, *invariance_requests(method, names, self.gram_size, self.views)]

    def begin(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        """Fresh sums."""
        layers = list(self._depths)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.global_step == 0:
            warn_of_few(data, self.gram_size, "--invariance.gram_size")
        self._grams_in_batch = len(gram_sizes(data.eval_batch_size, data.eval_batch_size, self.gram_size))
        self._invariance = {
            view: InvarianceCKA(layers, self.gram_size).to(method.device) for view in set(self._distinct.values())
        }
        self._classes = ClassCKA(layers, data.num_classes, self.gram_size, sizes=data.measure_sizes).to(method.device)
        self._images = torch.zeros((), dtype=torch.long, device=method.device)

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch: all views of it."""
        looks = {(request.view, request.draw): layers for request, layers in reduced.items()}
        first_gram = batch_number * self._grams_in_batch
        for view, metric in self._invariance.items():
            metric.update(looks[view, 0], looks[view, 1], first_gram)
        self._classes.update(looks["clean", 0], batch["label"], first_gram)
        self._images += len(batch["index"])

    def finish(self, trainer: L.Trainer, method: L.LightningModule, moment: Moment) -> Findings:
        """A row for each layer and view, with an error bar from the jackknife over Gram matrices."""
        images = int(trainer.strategy.reduce(self._images, reduce_op="sum"))
        common = {
            "run": run_name(trainer),
            "model": run_name(trainer),
            "split": "measure",
            "epoch": moment.epoch,
            "step": moment.step,
            "n": images,
        }
        invariance = {view: self._invariance[self._distinct[view]] for view in self.views}
        data = trainer.datamodule  # type: ignore[attr-defined]
        rows, protocols = layer_records(method, data, self._depths, self.gram_size, invariance, self._classes, **common)
        rows.sort(key=lambda row: row["metric"] == "class_cka")
        self.curves += curve_rows(rows)
        return Findings(rows, scalars(rows), pictures(rows, self.curves), protocols)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {"curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint left."""
        self.curves = state_dict["curves"]


def layer_records(
    method: Any,
    data: DataModule,
    depths: Mapping[str, float],
    gram_size: int,
    invariance: Mapping[str, InvarianceCKA],
    classes: ClassCKA,
    **common: Any,
) -> tuple[list[dict[str, Any]], list[Protocol]]:
    """Rows for each layer, its invariance under each view and its class CKA, with its error bar; live or not.

    Args:
        method: the network that was measured.
        data: whose measurement images it saw.
        depths: layer to depth, in the order of the metrics' layers.
        gram_size: images in a Gram matrix.
        invariance: what was measured under each view.
        classes: what was measured against the labels.
        common: what all rows share.

    Returns:
        The rows, and a protocol for each view.
    """
    measured = [("class_cka", "clean", classes), *(("invariance", view, metric) for view, metric in invariance.items())]
    rows, protocols = [], []
    for name, view, metric in measured:
        protocol = cka_protocol(data, gram_size, method, {name: method.measuring_view(view).spec})
        if metric is classes and metric.sizes is not None:
            weighed = "one-hot; pairs of images of a class of n_c images count n_c/(n_c - 1) times; no more than "
            weighed += f"{LONELY:.0%} of them may be those of classes of a single image"
            protocol = Protocol({**protocol.what, "classes": weighed})
        protocols.append(protocol)
        found = (tensor.reshape(-1).tolist() for tensor in (metric.compute(), *metric.interval()))
        for (layer, depth), value, low, high in zip(depths.items(), *found, strict=True):
            bar = {"value": value, "low": low, "high": high}
            place = {"layer": layer, "depth": depth, "view": view}
            rows.append(record(**common, **place, **bar, metric=name, protocol=protocol.hash))
    return rows, protocols
