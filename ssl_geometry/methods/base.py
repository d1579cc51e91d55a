"""What every method shares: backbone, views, optimiser, schedule, evaluation. A method adds a loss.

One training step: the batch's images become ``num_views`` views on the device; all views go through backbone and head
in ONE forward (so batch norm sees them together); ``loss`` gets the head's outputs, one tensor per view. Nothing in the
step waits for the device: metrics stay tensors until a logger reads them, once in ``log_every_n_steps``. On CUDA it is
compiled.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypedDict

import lightning as L
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64, UInt8
from lightly.utils.scheduler import cosine_warmup_schedule
from torch import Tensor, nn
from torchmetrics import Metric

from ssl_geometry.data.plan import size_within
from ssl_geometry.data.views import Augment, View
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.precision import full_float32
from ssl_geometry.methods.compilation import is_compiled
from ssl_geometry.methods.lars import LARS
from ssl_geometry.metrics import KNNAccuracy
from ssl_geometry.models import build_backbone
from ssl_geometry.ranges import Pixels, Seed, above, at_least, between, check_arguments

logger = logging.getLogger(__name__)

SINGLE: dict[str, Augment] = {
    "flip": {"flip": {"p": 0.5}},
    "color": {"color": {"p": 1.0}},
    "gray": {"gray": {"p": 0.5}},
    "blur": {"blur": {"p": 1.0}},
}
"""Single augmentations whose share of changed images differs from the policies'.

A colour or a blur acts on every image; a flip and a grey on half of them, because two copies that are both flipped, or
both grey, do not differ.
"""

NEIGHBORS = 20
"""Nearest training images that vote on an image to be classified."""
NOT_THE_RECIPE = {"seed", "channels_last", "compile"}
"""Options of a method that seeds of one recipe may differ in."""

SharedBank = tuple[int, Iterable[tuple[Tensor, Tensor]]]
"""How many of the first images of the bank another one runs through the network; features and labels of each batch."""
NOT_SHARED: SharedBank = (0, ())

Optimizer = Literal["lars", "sgd", "adamw"]
Precision = Literal["float32", "training"]
Rate = Annotated[float, at_least(0)]
Decay = Annotated[float, at_least(0)]


class Batch(TypedDict):
    """What the datamodule yields, the same for every method."""

    image: UInt8[Tensor, "B 3 H W"]
    label: Int64[Tensor, " B"]
    index: Int64[Tensor, " B"]


class Method(L.LightningModule):
    """Base of all methods: subclass it in one file, build ``self.head``, and give ``loss``.

    Args:
        backbone: resnet10, resnet18, resnet34, resnet50, resnet101, or a vision transformer of timm such as
            vit_small_patch16_224.
        stem: first layers of a ResNet: "cifar" (3x3 convolution, no pooling) or "imagenet"; None takes "cifar" for
            images of at most 64 pixels.
        width: multiplies the channels of a ResNet.
        image_size: side of the views, in pixels.
        normalize: what is done last to every view: none, imagenet, cifar10, half, or a pair of means and standard
            deviations.
        center_crop: share of the image's side that a clean view keeps (0.875 is usual on ImageNet).
        augment: how training views are made: a policy (simclr, supervised, none), an operation (crop, flip, color,
            ...), either one with options ({simclr: {strength: 1.0}}), or a list of these.
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images; scaled linearly with the global batch.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.
        momentum: of lars and sgd.
        warmup_epochs: epochs in which the learning rate rises linearly, before the cosine to zero.
        channels_last: keep convolutions in the channels-last memory format.
        compile: compile the backbone with torch.compile while it trains, on CUDA the pixels of the training views as
            well; None does on CUDA, unless the trainer is deterministic. What is evaluated or measured runs eagerly.
        eval_precision: of the features of validation: float32; or training, which is faster, and where that precision
            is mixed stands in the name, such as ``val/knn_bf16-mixed``. Tests are in float32.
        seed: of the random views; fit sets it to ``--seed_everything``.

    """

    named_views: Mapping[str, Augment] = SINGLE
    """What measurements know by name, next to policies and operations (:meth:`ssl_geometry.measure.Subject.view`)."""
    learns_from_labels: bool | None = None
    """Whether training reads the labels; None is unknown, and takes part in no verdict of ``compare``."""
    num_views = 1
    """Views of each image that the loss compares."""
    backbone: nn.Module
    """Images to pooled features."""
    num_features: int
    """How many features those are."""
    head: nn.Module
    """What the loss reads; the identity until a subclass sets it."""
    view: View
    """How training views are made."""
    clean_view: View
    """How images are seen when they are measured."""
    shared_bank: SharedBank = NOT_SHARED
    """What the next evaluation takes over of its bank: float32 features, from a pass that serves others too."""

    def __init__(
        self,
        backbone: str = "resnet50",
        stem: Literal["cifar", "imagenet"] | None = None,
        width: Annotated[float, above(0)] = 1.0,
        image_size: Pixels = 32,
        normalize: str | tuple[list[float], list[float]] = "none",
        center_crop: Annotated[float, above(0, at_most=1)] = 1.0,
        augment: Augment = "none",
        optimizer: Optimizer = "sgd",
        lr: Rate = 0.1,
        weight_decay: Decay = 1e-4,
        momentum: Annotated[float, between(0, 1, below=True)] = 0.9,
        warmup_epochs: Annotated[int, at_least(0)] = 10,
        channels_last: bool = True,
        compile: bool | None = None,
        eval_precision: Precision = "float32",
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        check_arguments(Method, locals(), "--model.")
        self.save_hyperparameters()
        self.backbone = build_backbone(backbone, stem=stem, width=width, image_size=image_size)
        self.num_features = self.backbone.num_features  # type: ignore[assignment]
        self.head = nn.Identity()
        self.view = View(augment, size=image_size, normalize=normalize, center_crop=center_crop)
        self._compiled_view: View | None = None  # of training steps alone: its bits are not those of the view
        self.clean_view = View("none", size=image_size, normalize=normalize, center_crop=center_crop)
        self.knn = KNNAccuracy(NEIGHBORS)
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)

    # -- what a method gives -------------------------------------------------------------------------------------------

    def loss(self, outputs: tuple[Float[Tensor, "B D"], ...], batch: Batch) -> Float[Tensor, ""]:
        """The loss of one batch.

        Args:
            outputs: the head's outputs, one tensor for each of the ``num_views`` views.
            batch: images, labels and indices, as the datamodule gave them.

        Returns:
            A scalar, averaged over the images of this process.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(outputs, batch)")

    # -- what every method has -----------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Backbone and head on images that are views already."""
        return self.head(self.backbone(self._in_format(images)))

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
                    return self.backbone(views).float()
            with self.trainer.precision_plugin.forward_context():
                return self.backbone(views).float()

    def on_fit_start(self) -> None:
        """Compile what training steps run; the first of them does it, on the device and with the monitors' hooks."""
        if is_compiled(self.hparams["compile"], self.device):
            self.backbone.compile(dynamic=False)
            if self.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
                self._compiled_view = self.view.compiled()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """All views in one forward, then the method's loss."""
        with torch.autocast(self.device.type, enabled=False):
            view = self._compiled_view or self.view
            views = view(
                batch["image"],
                batch["index"],
                seed=self.hparams["seed"],
                epoch=self.current_epoch,
                view=range(self.num_views),
            )
        loss = self.loss(self(views).chunk(self.num_views), batch)
        self.log_mean("train/loss", loss)
        return loss

    def log_mean(self, name: str, value: Float[Tensor, ""]) -> None:
        """Log a figure of a training step, averaged over the processes, without waiting for the device.

        Args:
            name: such as ``train/loss``.
            value: of this process's images; each process has equally many.
        """
        value = value.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(value)  # Lightning's sync_dist puts a barrier before it in every step
            value /= dist.get_world_size()
        self.log(name, value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint, as plain data, which class with which arguments gives this network."""
        cls = type(self)
        checkpoint["method"] = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": self.init_args}

    @property
    def recipe(self) -> str:
        """What was trained, apart from the seed: the class and all options that change the network.

        Networks of one recipe are not independent evidence: statistics over networks take them as one unit.
        """
        options = {name: value for name, value in self.init_args.items() if name not in NOT_THE_RECIPE}
        return f"{type(self).__module__}.{type(self).__qualname__} {json.dumps(options, sort_keys=True, default=str)}"

    @property
    def init_args(self) -> dict[str, Any]:
        """The arguments that make this method again, as plain data."""
        return {
            name: value for name, value in self.hparams.items() if not name.startswith("_")
        }  # the rest is Lightning's

    def _in_format(self, images: Tensor) -> Tensor:
        images = images.to(self.dtype)
        return images.contiguous(memory_format=torch.channels_last) if self.hparams["channels_last"] else images

    # -- optimiser and schedule ----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The chosen optimiser, with linear warm-up and a cosine to zero over the steps of the whole run."""
        hparams, trainer = self.hparams, self.trainer
        images = getattr(getattr(trainer, "datamodule", None), "batch_size", 256) * trainer.accumulate_grad_batches
        lr = hparams["lr"] * images / 256
        logger.info(
            f"learning rate {lr:g} = {hparams['lr']:g} x {images}/256 "
            f"(global batch of {images} images over {trainer.world_size} process{'es' * (trainer.world_size > 1)})"
        )
        optimizer = self.build_optimizer(lr)
        trainer.fit_loop.setup_data()  # so that the number of batches is known
        if trainer.accumulate_grad_batches > trainer.num_training_batches:
            raise UserError(
                f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}: an epoch has only "
                f"{trainer.num_training_batches} batches; expected at most so many"
            )
        steps = int(trainer.estimated_stepping_batches)
        steps_an_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        warmup = min(steps, round(steps_an_epoch * hparams["warmup_epochs"]))

        # A function and not lightly's scheduler: that one's state would bring an old length of the run back on resume.
        def share(step: int) -> float:
            return cosine_warmup_schedule(min(step, steps), steps + 1, 1.0, 0.0, warmup, 0.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser trains, in groups with options of their own; a method may give others.

        Returns:
            Two groups: with the weight decay of the options, and without. Without are vectors and scalars (biases,
            normalisation), and what a module names itself by timm's convention, ``no_weight_decay()``: class tokens,
            position embeddings, tables of relative positions.
        """
        spared = {
            f"{path}.{name}".lstrip(".")
            for path, module in self.named_modules()
            if callable(names := getattr(module, "no_weight_decay", None))
            for name in names()
        }
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (others if parameter.ndim < 2 or name in spared else decayed).append(parameter)
        return [
            {"params": decayed, "weight_decay": self.hparams["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]

    def build_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """The chosen optimiser over :meth:`parameter_groups`.

        Args:
            lr: learning rate, as the optimiser takes it.
        """
        hparams, groups = self.hparams, self.parameter_groups()
        match hparams["optimizer"]:
            case "lars":
                return LARS(groups, lr=lr, momentum=hparams["momentum"])
            case "sgd":
                return torch.optim.SGD(groups, lr=lr, momentum=hparams["momentum"])
            case "adamw":
                return torch.optim.AdamW(groups, lr=lr)
            case unknown:
                raise UserError(f"--model.optimizer {unknown!r}: known: 'lars', 'sgd', 'adamw'")

    # -- evaluation: nearest neighbours for every method, the classifier where the head is one -------------------------

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
