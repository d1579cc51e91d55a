"""DINO: a student finds, in any crop of an image, what its teacher sees in another large crop."""

from typing import Annotated, Any

import torch
from torch import Tensor

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.methods.base import Batch, Decay, Measured, Method, Optimizer, Rate, Share
from ssl_geometry.methods.parts.prototypes import prototype_head, swapped_cross_entropy
from ssl_geometry.methods.parts.teacher import Teacher, rising_momentum
from ssl_geometry.ranges import above, at_least, check_arguments

VIEWS = [ViewSpec(augment={"byol": {"blur": 0.0, "solarize": p, "scale": [0.4, 1.0]}}) for p in (0.0, 0.2)]
Temperature = Annotated[float, above(0)]


class DINO(Method):
    """Self-distillation with no labels. The optimiser is that of lightly's CIFAR-10 benchmark, for ResNet-18.

    Args:
        temperature: of the student.
        teacher_temperature: of the first epoch, and from ``warmup_teacher_epochs`` on; in between it changes linearly.
        warmup_teacher_epochs: epochs until the teacher's temperature is the second one.
        hidden_dim: width of the head's two hidden layers.
        output_dim: number of prototypes.
        batch_norm: whether the head has batch norm; not for vision transformers.
        freeze_prototypes_epochs: first epochs in which the prototypes do not learn.
        teacher_momentum: of the teacher at the first step; it rises to 1 at the last, along a cosine.
        weight_decay_end: weight decay of the last step, reached along a cosine; None is that of the first.
        views: two global crops, which the teacher sees too, then local ones: {augment: crop, size: 16, count: 4}.
        measured: which network is evaluated and measured: teacher, student, or both.
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.

    References:
        Caron et al., *Emerging properties in self-supervised vision transformers*, 2021, algorithm 1.
    """

    learns_from_labels = False
    num_views = None
    fewest_views = global_views = 2
    teacher: Teacher

    def __init__(
        self,
        temperature: Temperature = 0.1,
        teacher_temperature: tuple[Temperature, Temperature] = (0.04, 0.04),
        warmup_teacher_epochs: Annotated[int, at_least(0)] = 0,
        hidden_dim: Annotated[int, at_least(1)] = 2048,
        output_dim: Annotated[int, at_least(2)] = 2048,
        batch_norm: bool = True,
        freeze_prototypes_epochs: Annotated[int, at_least(0)] = 1,
        teacher_momentum: Share = 0.996,
        weight_decay_end: Decay | None = None,
        views: list[ViewSpec] = VIEWS,
        measured: Measured = "teacher",
        optimizer: Optimizer = "sgd",
        lr: Rate = 0.12,
        weight_decay: Decay = 5e-4,
        **kwargs: Any,
    ) -> None:
        from lightly.models.modules.center import Center

        check_arguments(DINO, locals(), "--model.")
        recipe: Any = {"optimizer": optimizer, "lr": lr, "weight_decay": weight_decay}
        super().__init__(views=views, measured=measured, **recipe, **kwargs)
        self.head = prototype_head(self.num_features, hidden_dim, output_dim, batch_norm)
        self.teacher = Teacher(self)
        self.center = Center((1, output_dim), momentum=0.9)
        self.seen: list[Tensor] = []  # means of the teacher's outputs since the last step of the optimiser

    def outputs(self, views: Any, batch: Batch) -> tuple[Tensor, ...]:
        """The teacher's for the global views, then the student's for all."""
        return (*self.encode(views[:2], self.teacher), *self.encode(views))

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """The centre keeps the teacher from one prototype for all, its temperature from all prototypes alike."""
        teacher, student = outputs[:2], outputs[2:]
        self.seen.append(torch.cat(teacher).mean(0, keepdim=True))
        (start, end), epochs = self.hparams["teacher_temperature"], self.hparams["warmup_teacher_epochs"]
        temperature = start + (end - start) * min(1, self.current_epoch / epochs) if epochs else end
        targets = [((output - self.center.value) / temperature).softmax(1) for output in teacher]
        return swapped_cross_entropy(targets, (output / self.hparams["temperature"] for output in student))

    def on_after_backward(self) -> None:
        """The prototypes wait until the teacher has something to say."""
        if self.current_epoch < self.hparams["freeze_prototypes_epochs"]:
            self.head.get_parameter("last_layer.weight").grad = None

    def after_step(self, progress: float) -> None:
        """The teacher follows, ever more slowly; the centre follows the teacher's outputs; the weight decay changes."""
        self.teacher.follow(self, rising_momentum(self.hparams["teacher_momentum"], progress))
        self.center.update(torch.cat(self.seen))
        self.seen.clear()
        if (end := self.hparams["weight_decay_end"]) is not None:
            decayed, start = self.trainer.optimizers[0].param_groups[0], self.hparams["weight_decay"]
            decayed["weight_decay"] = start + (end - start) * rising_momentum(0, progress)
