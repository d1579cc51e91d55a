"""A whole network trained on labels, from its weights on: the evaluation that does not leave it frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from typing_extensions import override

from ssl_geometry.callbacks import FitProgress, StopOnNaN
from ssl_geometry.data.datamodule import BATCH_SIZE, DataModule
from ssl_geometry.data.views import ViewSpec
from ssl_geometry.errors import UserError
from ssl_geometry.measure import Occasion, Subject, measure_together
from ssl_geometry.measure.features import Features
from ssl_geometry.measure.frozen import Evaluation, Found, FrozenFeatures
from ssl_geometry.methods import Method, Supervised
from ssl_geometry.methods.raw_pixels import RawPixels

SEED = 0
"""Of the head and the views."""
SETTINGS: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "warmup_epochs": 0}


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
class FineTuning(Evaluation):
    """The whole network trained on labels from its weights; an untrained network is trained from scratch.

    Args:
        fractions: of the labels.
        epochs: of training.
        learning_rate: for a batch of 256 images.
        view: the training views.
        batch_size: images in a step.
        data: options of the data module.
    """

    fractions: Sequence[float]
    epochs: int
    learning_rate: float
    view: str
    batch_size: int
    data: Mapping[str, Any]
    name: ClassVar[str] = "finetune"

    @override
    def protocol(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "learning_rate for 256 images": self.learning_rate,
            "batch": self.batch_size,
            "training views": self.view,
            "fractions": list(self.fractions),
            "seed": SEED,
            **SETTINGS,
            "selection": "none",
            "encoder": "trained as well, in training mode",
        }

    @override
    def evaluate(self, frozen: FrozenFeatures, progress: Any) -> Found:
        found: dict[str, dict[str, list[float]]] = {}
        method = frozen.method
        if isinstance(method, RawPixels):
            return found
        assert isinstance(method, Method)
        for fraction in self.fractions:
            share = f"{100 * fraction:g}%"
            progress.console.print(f"fine-tuning {frozen.name} on {share} of the labels", highlight=False)
            network = self._trained(method, frozen, fraction, share)
            tested = Features({"head": frozen.num_classes}, {"test": None})
            occasion = frozen.occasion
            measure_together([tested], Occasion(Subject.of(network), occasion.images, occasion.run))
            scores = tested.of("test")["head"]
            if not bool(scores.isfinite().all()):  # corrupted by the last step, which has no loss after it
                raise self._diverged(frozen.name, share)
            found[f"finetune_{share}"] = frozen.accuracies(scores)
        return found

    def _trained(self, method: Method, frozen: FrozenFeatures, fraction: float, share: str) -> Supervised:
        """On the device of the features."""
        given, device = method.hparams, frozen.train_labels.device
        shared = ("backbone", "stem", "width", "patch_size", "image_size", "normalize", "center_crop", "channels_last")
        torch.manual_seed(SEED)
        network = Supervised(
            frozen.num_classes,
            views=[ViewSpec(augment=self.view)],
            lr=self.learning_rate,
            **SETTINGS,
            compile=False,  # a new network for each share of the labels: compiling takes longer than it saves
            **{key: given[key] for key in shared},
        )
        network.backbone.load_state_dict(method.network.backbone.state_dict())
        images = LabelledImages(round(fraction * len(frozen.train_labels)), **self.data)
        is_cuda = device.type == "cuda"
        trainer = L.Trainer(
            max_epochs=self.epochs,
            accelerator="gpu" if is_cuda else "cpu",
            devices=[device.index or 0] if is_cuda else 1,
            callbacks=[FitProgress(), StopOnNaN()],
            plugins=[LightningEnvironment()],  # alone, whatever the job has more tasks for
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        try:
            trainer.fit(network, images)
        except UserError as error:
            raise (self._diverged(frozen.name, share) if "NaN" in str(error) else error) from error
        return network.to(device)

    def _diverged(self, name: str, share: str) -> UserError:
        became = f"the loss of {name} became NaN or infinite on {share} of the labels"
        return UserError(f"--finetune_lr {self.learning_rate:g}: {became}; set less")
