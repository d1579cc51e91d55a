"""The supervised twin: the same backbone, data and monitors, trained on labels."""

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.errors import UserError
from ssl_geometry.methods.base import Batch, Decay, Method, Optimizer, Rate
from ssl_geometry.ranges import at_least, check_arguments

VIEWS = [ViewSpec(augment="supervised")]


class Supervised(Method):
    """Cross-entropy on labels, with the recipe that is standard on CIFAR-10.

    Args:
        num_classes: classes of the data set; None takes them from it.
        views: how the images are augmented, such as [{augment: [crop, flip]}].
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.
    """

    learns_from_labels = True

    def __init__(
        self,
        num_classes: Annotated[int, at_least(2)] | None = None,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "sgd",
        lr: Rate = 0.2,
        weight_decay: Decay = 5e-4,
        **kwargs: Any,
    ) -> None:
        check_arguments(Supervised, locals(), "--model.")
        super().__init__(views=views, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)
        if num_classes is not None:
            self._classify(num_classes)

    def _classify(self, num_classes: int) -> None:
        self.hparams["num_classes"] = num_classes  # the checkpoint names it
        self.head = nn.Linear(self.num_features, num_classes)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def setup(self, stage: str) -> None:
        """Take the number of classes from the data set, or refuse one with another number before any work is done."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.multi_label:
            raise UserError("--model Supervised: it learns one class per image; images of this data set show several")
        if data.num_unlabelled:
            raise UserError(
                f"--model Supervised: {data.num_unlabelled} of {data.num_train} training images have no label; leave "
                "them out, of stl10 by --data.dataset_args {split: train}"
            )
        classes, mine = data.num_classes, self.hparams["num_classes"]
        if classes < 2:
            raise UserError("--model Supervised: all images of the data set are of one class")
        if mine is None:
            with torch.random.fork_rng(devices=[]):  # processes come here with other random numbers than one alone
                torch.default_generator.manual_seed(self.hparams["seed"] + 1)
                self._classify(classes)
        elif classes != mine:
            raise UserError(
                f"--model.num_classes {mine}: the data set has {classes} classes; set {classes}, or null for as many "
                "as it has"
            )

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Cross-entropy; logs the accuracy on the augmented images."""
        (logits,) = outputs
        self.log_mean("train/acc", (logits.argmax(1) == batch["label"]).float().mean())
        return F.cross_entropy(logits, batch["label"])

    def evaluate(self, features: Tensor, batch: Batch, split: str) -> None:
        """The classifier's accuracy next to that of the nearest neighbours."""
        super().evaluate(features, batch, split)
        self.accuracy.update(self.head(features.to(self.dtype)), batch["label"])
        self.log_evaluated(split, "acc", self.accuracy)
