"""Evaluation of frozen features while a network trains: nearest neighbours vote on held-out images."""

from collections.abc import Iterable
from typing import Any, Literal, TypedDict

import lightning as L
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torchmetrics import Metric

from ssl_geometry.data.plan import size_within
from ssl_geometry.data.views import View
from ssl_geometry.geometry.precision import full_float32
from ssl_geometry.metrics import KNNAccuracy

NEIGHBORS = 20
"""Nearest training images that vote on an image to be classified."""
SharedBank = tuple[int, Iterable[tuple[Tensor, Tensor]]]
"""How many of the first images of the bank another one runs through the network; features and labels of each batch."""
NOT_SHARED: SharedBank = (0, ())
Precision = Literal["float32", "training"]


class Batch(TypedDict):
    """What the datamodule yields, the same for every method."""

    image: UInt8[Tensor, "B 3 H W"]
    label: Int64[Tensor, " B"]
    index: Int64[Tensor, " B"]


class KNNEvaluation(L.LightningModule):
    """Validation and test of every method."""

    network: Any
    """What is evaluated; it has a backbone."""
    num_features: int
    """How many features that gives."""
    clean_view: View
    """How images are seen when they are measured."""
    knn: KNNAccuracy
    shared_bank: SharedBank = NOT_SHARED
    """What the next evaluation takes over of its bank: float32 features, from a pass that serves others too."""

    def features(self, images: UInt8[Tensor, "B 3 H W"], precision: Precision = "float32") -> Float[Tensor, "B D"]:
        """Pooled backbone features of clean images, without gradients; evaluation mode is the caller's.

        Args:
            images: uint8 (B, 3, H, W).
            precision: that the backbone computes in; "training" is that of the trainer.

        Returns:
            float32 (B, D).
        """
        autocast_off = torch.autocast(self.device.type, enabled=False)
        # eagerly: the same numbers, compiled or not, and no second graph
        with torch.no_grad(), autocast_off, torch.compiler.set_stance("force_eager"):
            index = torch.arange(len(images), device=images.device)
            views = self._in_format(self.clean_view(images, index, seed=0, epoch=0, view=0))
            if precision == "float32":
                with full_float32():
                    return self.network.backbone(views).float()
            with self.trainer.precision_plugin.forward_context():
                return self.network.backbone(views).float()

    def _in_format(self, images: Tensor) -> Tensor:
        images = images.to(self.dtype)
        return images.contiguous(memory_format=torch.channels_last) if self.hparams["channels_last"] else images

    def _fill_bank(self, precision: Precision) -> None:
        """Features of the clean training images that vote on the images to be classified."""
        (first, shared), self.shared_bank = self.shared_bank, NOT_SHARED
        self.knn.reset()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.multi_label:
            return  # neighbours vote for one class
        n = len(data.loader("bank").sampler.rows)
        if self.knn.k != min(NEIGHBORS, n):  # said once, and not at every validation
            there = f"there are {n} labelled training images"
            self.knn.k = size_within("nearest neighbours that vote:", None, NEIGHBORS, n, there)
        for features, labels in shared:
            self.knn.update_bank(features, labels)
        for batch in data.loader("bank", after=first):
            features = self.features(batch["image"].to(self.device), precision)
            self.knn.update_bank(features, batch["label"].to(self.device))
        if not self.knn.bank:  # of several processes, this one had no batch
            none = torch.empty(0, self.num_features, device=self.device)
            self.knn.update_bank(none, none[:, 0].long())

    def on_validation_epoch_start(self) -> None:
        """The bank is filled again: the backbone has moved."""
        self._fill_bank(self.hparams["eval_precision"])

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self._fill_bank("float32")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate a batch of held-out training images."""
        with torch.autocast(self.device.type, enabled=False):
            self.evaluate(self.features(batch["image"], self.hparams["eval_precision"]), batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate a batch of test images."""
        with torch.autocast(self.device.type, enabled=False):
            self.evaluate(self.features(batch["image"]), batch, "test")

    def log_evaluated(self, split: str, name: str, value: Metric) -> None:
        """Log what was computed from features; its name says so where they were not float32.

        Args:
            split: "val" or "test".
            name: such as ``knn``, logged as ``val/knn``, or ``val/knn_bf16-mixed``.
            value: the metric.
        """
        precision = str(self.trainer.precision)
        mixed = split == "val" and self.hparams["eval_precision"] == "training" and precision.endswith("mixed")
        self.log(f"{split}/{name}_{precision}" if mixed else f"{split}/{name}", value)

    def evaluate(self, features: Float[Tensor, "B D"], batch: Batch, split: str) -> None:
        """Log what frozen features of clean images are worth; a method may add to it.

        Args:
            features: pooled backbone features, float32.
            batch: the batch that they were computed from.
            split: "val" or "test"; prefix of the logged names.
        """
        if batch["label"].ndim == 1:
            self.knn.update(features, batch["label"])
            self.log_evaluated(split, "knn", self.knn)
