"""What every method shares: backbone, views, optimiser, schedule, evaluation. A method adds a loss.

One training step: the batch's images become views on the device; all views of one size go through backbone and head in
ONE forward (so batch norm sees them together); ``loss`` gets the head's outputs, one tensor per view, in float32. After
the optimiser's step comes ``after_step``. Nothing in the step waits for the device: metrics stay tensors until a logger
reads them, once in ``log_every_n_steps``. On CUDA it is compiled.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_geometry.data.views import Augment, View, ViewSpec
from ssl_geometry.errors import UserError
from ssl_geometry.methods.parts.compilation import is_compiled
from ssl_geometry.methods.parts.evaluation import NEIGHBORS, Batch, KNNEvaluation, Precision
from ssl_geometry.methods.parts.optimizers import Optimizer, build_optimizer, cosine_schedule, decay_groups
from ssl_geometry.methods.parts.queue import Queue
from ssl_geometry.methods.parts.teacher import Teacher
from ssl_geometry.metrics import KNNAccuracy
from ssl_geometry.models import build_backbone, import_path
from ssl_geometry.ranges import Pixels, Seed, above, at_least, between, check_arguments, parameters

__all__ = ["Backbone", "Batch", "Decay", "Measured", "Method", "Optimizer", "Precision", "Rate", "Share"]

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

NOT_THE_RECIPE = {"seed", "channels_last", "compile"}
"""Options of a method that seeds of one recipe may differ in."""

Rate = Annotated[float, at_least(0)]
Decay = Annotated[float, at_least(0)]
Share = Annotated[float, between(0, 1)]
Measured = Literal["student", "teacher", "both"]
Backbone = str | nn.Module if TYPE_CHECKING else str  # an option is text: a parser would list all of torch's modules


UNCHANGED = [ViewSpec(augment="none")]


class Method(KNNEvaluation):
    """Base of all methods: subclass it in one file, build ``self.head``, and give ``loss``.

    Args:
        backbone: resnet10, resnet18, resnet34, resnet50, resnet101, a vision transformer of timm such as
            vit_small_patch16_224, or the import path of a class or function that makes a network from images to
            features, such as my_package.convnext; in a script, a network itself as well.
        stem: first layers of a ResNet: "cifar" (3x3 convolution, no pooling) or "imagenet"; None takes "cifar" for
            images of at most 64 pixels.
        width: multiplies the channels of a ResNet.
        patch_size: side of a vision transformer's patches in pixels, such as 4 for images of 32; None is the size in
            the name.
        image_size: side of the views, in pixels.
        normalize: what is done last to every view: none, imagenet, cifar10, half, or a pair of means and standard
            deviations.
        center_crop: share of the image's side that a clean view keeps (0.875 is usual on ImageNet).
        views: how training views are made: a list of {augment: ..., size: pixels, count: number}; size where it is not
            image_size, count where there are several ways and one of them makes more than one view. augment is a
            policy (simclr, byol, supervised, none), an operation (crop, flip, color, ...), either one with options
            ({simclr: {strength: 1.0}}), or a list of these.
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images; scaled linearly with the global batch.
        min_lr: learning rate at the end of the cosine, scaled likewise.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.
        momentum: of lars and sgd.
        betas: of adamw.
        warmup_epochs: epochs in which the learning rate rises linearly, before the cosine.
        measured: of methods with a teacher, which network is evaluated and measured: student, teacher, or both (then
            the student's is the accuracy in ``val/knn``).
        channels_last: keep convolutions in the channels-last memory format.
        compile: compile the backbone (of MAE, the blocks of encoder and decoder) with torch.compile while it trains,
            on CUDA the pixels of the training views as well; None does on CUDA, unless the trainer is deterministic.
            What is evaluated or measured runs eagerly.
        eval_precision: of the features of validation: float32; or training, which is faster, and where that precision
            is mixed stands in the name, such as ``val/knn_bf16-mixed``. Tests are in float32.
        seed: of the random views; fit sets it to ``--seed_everything``.

    """

    named_views: Mapping[str, Augment] = SINGLE
    """What measurements know by name, next to policies and operations (:meth:`ssl_geometry.measure.Subject.view`)."""
    learns_from_labels: bool | None = None
    """Whether training reads the labels; None is unknown, and takes part in no verdict of ``compare``."""
    num_views: int | None = 1
    """Views of each image that the loss takes; None for any number."""
    fewest_views = 1
    """How many the loss takes at least, where it takes any number."""
    global_views = 0
    """How many of the first views are global: none is larger."""
    steps_show_images = True
    """Whether the backbone's forwards of training steps see whole views; online probes learn from them."""
    compiled_parts: tuple[str, ...] = ("backbone", "teacher.backbone")
    """Paths of the modules that are compiled while it trains: those that training steps call as a whole."""
    backbone: nn.Module
    """Images to pooled features."""
    num_features: int
    """How many features those are."""
    head: nn.Module
    """What the loss reads; the identity until a subclass sets it."""
    teacher: Teacher | None
    """A moving average of backbone and head, where a subclass sets it; ``after_step`` must have it follow."""
    set_by_class: set[str]
    """Options of this class that a subclass sets itself, and does not take."""
    training_views: list[tuple[View, range]]
    """How training views are made, and the numbers of those that are made so."""
    clean_view: View
    """How images are seen when they are measured."""

    def __init__(
        self,
        backbone: Backbone = "resnet50",
        stem: Literal["cifar", "imagenet"] | None = None,
        width: Annotated[float, above(0)] = 1.0,
        patch_size: Annotated[int, at_least(1)] | None = None,
        image_size: Pixels = 32,
        normalize: str | tuple[list[float], list[float]] = "none",
        center_crop: Annotated[float, above(0, at_most=1)] = 1.0,
        views: list[ViewSpec] = UNCHANGED,
        optimizer: Optimizer = "sgd",
        lr: Rate = 0.1,
        min_lr: Rate = 0.0,
        weight_decay: Decay = 1e-4,
        momentum: Annotated[float, between(0, 1, below=True)] = 0.9,
        betas: tuple[Share, Share] = (0.9, 0.999),
        warmup_epochs: Annotated[int, at_least(0)] = 10,
        measured: Measured = "student",
        channels_last: bool = True,
        compile: bool | None = None,
        eval_precision: Precision = "float32",
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        check_arguments(Method, {k: v for k, v in locals().items() if not isinstance(v, nn.Module)}, "--model.")
        if min_lr > lr:
            raise UserError(f"--model.min_lr {min_lr:g}: above the learning rate, --model.lr {lr:g}")
        options = {name: value for name, value in locals().items() if name in parameters(Method)}
        # in a command: what the class has as options, without those that it sets itself
        self.save_hyperparameters(ignore=None if isinstance(backbone, str) else "backbone")
        if not isinstance(backbone, str):
            options["backbone"] = self.hparams["backbone"] = import_path(backbone)
        self.set_by_class = options.keys() - self.hparams.keys()
        self.hparams.update({name: options[name] for name in self.set_by_class})
        self.training_views = self._numbered(views, size=image_size, normalize=normalize, center_crop=center_crop)
        sizes = {view.size for view, _ in self.training_views}
        self.backbone = build_backbone(
            backbone,
            stem=stem,
            width=width,
            image_size=image_size,
            other_sizes=sizes - {image_size},
            patch_size=patch_size,
        )
        self.num_features = self.backbone.num_features  # type: ignore[assignment]
        self.head = nn.Identity()
        self.teacher = None
        self._compiled: list[View] = []  # of training steps alone: their bits are not those of the views
        self.clean_view = View("none", size=image_size, normalize=normalize, center_crop=center_crop)
        self.knn = KNNAccuracy(NEIGHBORS)
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)

    def _numbered(self, specs: Sequence[ViewSpec], **common: Any) -> list[tuple[View, range]]:
        """Views by what ``--model.views`` says, each with the numbers that its random parameters come from."""
        views: list[tuple[View, range]] = []
        first = 0
        for spec in specs:
            if not isinstance(spec, dict) or "augment" not in spec or spec.keys() - ViewSpec.__annotations__:
                raise UserError(f"--model.views {spec}: expected {{augment: ..., size: pixels, count: number}}")
            count = spec.get("count", (self.num_views if len(specs) == 1 else None) or 1)
            if not isinstance(count, int) or count < 1:
                raise UserError(f"--model.views: count {count}, expected a number of views, at least 1")
            view = View(spec["augment"], **{**common, "size": spec.get("size", common["size"])})
            views.append((view, range(first, first + count)))
            first += count
        if first < self.fewest_views or self.num_views not in (None, first):
            wanted = self.num_views or f"at least {self.fewest_views}"
            raise UserError(f"--model.views: {first} of each image; {type(self).__name__} takes {wanted}")
        largest = max(view.size for view, _ in views)
        for view, numbers in views:
            if numbers.start < self.global_views and view.size < largest:
                raise UserError(
                    f"--model.views: view {numbers.start + 1} has {view.size} pixels, a later one {largest}; "
                    f"{type(self).__name__} takes the global views first"
                )
        return views

    # -- what a method gives -------------------------------------------------------------------------------------------

    def loss(self, outputs: tuple[Float[Tensor, "B D"], ...], batch: Batch) -> Float[Tensor, ""]:
        """The loss of one batch; autocast is off.

        Args:
            outputs: what :meth:`outputs` gave, in float32 at least: unless it is overridden, the head's output for each
                view.
            batch: images, labels and indices, as the datamodule gave them.

        Returns:
            A scalar, averaged over the images of this process.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(outputs, batch)")

    def outputs(self, views: Sequence[Float[Tensor, "B 3 S S"]], batch: Batch) -> tuple[Tensor, ...]:
        """What the loss reads, in the trainer's precision; a method with a teacher or a predictor adds to it.

        Args:
            views: of the batch's images, in the order of ``--model.views``.
            batch: images, labels and indices.

        Returns:
            The head's output for each view.
        """
        return self.encode(views)

    def after_step(self, progress: float) -> None:
        """Called after each step of the optimiser: a teacher follows, schedules move on. Nothing, unless overridden.

        A method that calls its optimisers itself (``automatic_optimization = False``) calls this itself as well.

        Args:
            progress: share of the run's optimiser steps that are done, in (0, 1].
        """

    # -- what every method has -----------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Backbone and head on images that are views already."""
        return self.head(self.backbone(self._in_format(images)))

    def encode(
        self, views: Sequence[Float[Tensor, "B 3 S S"]], network: nn.Module | None = None
    ) -> tuple[Float[Tensor, "B D"], ...]:
        """Outputs for views, in one forward for all views of one size, so that batch norm sees them together.

        Args:
            views: of the batch's images.
            network: such as the teacher; None is the method itself.

        Returns:
            One tensor for each view.
        """
        sizes: dict[int, list[int]] = {}
        for number, view in enumerate(views):
            sizes.setdefault(view.shape[-1], []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in sizes.values():
            outputs = (network or self)(self._in_format(torch.cat([views[number] for number in numbers])))
            found.update(zip(numbers, outputs.chunk(len(numbers)), strict=True))
        return tuple(found[number] for number in range(len(views)))

    @property
    def view(self) -> View:
        """How training views are made; where they are not made alike, the first of them."""
        return self.training_views[0][0]

    @property
    def network(self) -> "Method | Teacher":
        """What is evaluated and measured, with a backbone and a head: the method itself, or its teacher.

        Raises:
            UserError: the teacher is to be measured, and there is none.
        """
        measured = self.hparams["measured"]
        if measured != "student" and self.teacher is None:
            raise UserError(f"--model.measured {measured}: {type(self).__name__} has no teacher; leave it out")
        return self.teacher if measured == "teacher" and self.teacher is not None else self

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    @property
    def progress(self) -> float:
        """Share of the run's optimiser steps that are done, in [0, 1], for schedules of a loss."""
        return min(1.0, self.trainer.global_step / self.total_steps)

    def configure_model(self) -> None:
        """Have DDP leave out queues, which it would send before each forward: all processes push the same."""
        queues = [(path, part) for path, part in self.named_modules() if isinstance(part, Queue)]
        equal = [f"{path}.{name}" for path, queue in queues for name, _ in queue.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, equal)

    def on_fit_start(self) -> None:
        """Queues begin alike; and what training steps run is compiled.

        The first step compiles, on the device and with the monitors' hooks.
        """
        if dist.is_initialized():
            for part in self.modules():
                if isinstance(part, Queue):  # a script may not have seeded its processes
                    dist.broadcast(part.rows, src=0)
        if is_compiled(self.hparams["compile"], self.device):
            self.compile_parts()
            if self.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
                self._compiled = [view.compiled() for view, _ in self.training_views]

    def compile_parts(self, **options: Any) -> None:
        """Compile the modules of ``compiled_parts`` in place, when a step first calls them.

        Args:
            options: of torch.compile.
        """
        for name, part in self.named_modules():
            if name in self.compiled_parts:
                part.compile(dynamic=False, **options)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Views, the networks' outputs for them, then the method's loss."""
        autocast_off = torch.autocast(self.device.type, enabled=False)
        views: list[Tensor] = []
        with autocast_off:
            for which, (view, numbers) in enumerate(self.training_views):
                make = self._compiled[which] if self._compiled else view
                seed, epoch = self.hparams["seed"], self.current_epoch
                made = make(batch["image"], batch["index"], seed=seed, epoch=epoch, view=numbers)
                views += made.chunk(len(numbers))
        full = [out.to(torch.promote_types(out.dtype, torch.float32)) for out in self.outputs(views, batch)]
        with autocast_off:
            loss: Any = self.loss(tuple(full), batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            returned = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"{type(self).__name__}.loss returns {returned}; expected a scalar, the mean over images")
        self.log_mean("train/loss", loss)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, once for all batches whose gradients are accumulated; then :meth:`after_step`."""
        super().optimizer_step(*args, **kwargs)
        self.after_step(min(1.0, (self.trainer.global_step + 1) / self.total_steps))

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
        taken = parameters(type(self)).keys() - self.set_by_class  # type: ignore[arg-type]
        return {name: value for name, value in self.hparams.items() if name in taken}

    # -- optimiser and schedule ----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The chosen optimiser, with linear warm-up and a cosine to ``min_lr`` over the steps of the whole run."""
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
        steps = self.total_steps
        steps_an_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        warmup = min(steps, round(steps_an_epoch * hparams["warmup_epochs"]))
        end = hparams["min_lr"] / hparams["lr"] if hparams["lr"] else 0.0
        schedule = cosine_schedule(optimizer, steps, warmup, end)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser trains, in groups with options of their own; a method may give others.

        Returns:
            Two groups: with the weight decay of the options, and without. Without are vectors and scalars (biases,
            normalisation), and what a module names itself by timm's convention, ``no_weight_decay()``: class tokens,
            position embeddings, tables of relative positions. A group may have options of the optimiser, and
            ``lr_factor``, which multiplies its learning rate, or ``constant_lr``, which spares it the schedule.
        """
        return decay_groups(self, self.hparams["weight_decay"])

    def build_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """The chosen optimiser over :meth:`parameter_groups`.

        Args:
            lr: learning rate, as the optimiser takes it.
        """
        hparams, groups = self.hparams, self.parameter_groups()
        return build_optimizer(hparams["optimizer"], groups, lr, hparams["momentum"], hparams["betas"])
