"""A method at small size and its short trainings, which the checks share; each runs when a check first asks for it.

Images are the coloured digits, 16 pixels. The main training has 12 batches of 8 images in two epochs and takes a step
of the optimiser after every third batch. It runs under a real trainer, on one process of the CPU.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn
from typing_extensions import override

from ssl_geometry.callbacks import SeedSteps
from ssl_geometry.conformance.state import copied, optimizer_state, outside
from ssl_geometry.conformance.verdict import NotApplicable
from ssl_geometry.conformance.waits import Waits
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.measure import CKA, Occasion, Subject, measure_together
from ssl_geometry.methods import Method
from ssl_geometry.methods.base import Batch
from ssl_geometry.models import RESNETS
from ssl_geometry.models.evaluating import evaluating
from ssl_geometry.models.vit import vit_names
from ssl_geometry.ranges import parameters
from ssl_geometry.runs.checkpoints import WholeCheckpointIO

if TYPE_CHECKING:
    from ssl_geometry.conformance.processes import Pair

RESNET = {"backbone": "resnet10", "width": 1 / 16, "image_size": 16}
VIT = {"backbone": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4}
COMMON = {"warmup_epochs": 0, "compile": False}
BATCH, BATCHES, ACCUMULATED, EPOCHS = 8, 6, 3, 2
"""Images in a batch, batches in an epoch, batches in a step of the optimiser, epochs."""
SAVED_AFTER = ACCUMULATED
"""Batches until the checkpoint is saved that a second training continues."""
LONG = {"limit_train": 512, "batch_size": 64}
LONG_EPOCHS = 5
OTHER_SEED = 1
WATCHED = ("training_step", "backward", "on_after_backward", "after_step")
"""What a method does in a step; the optimiser may wait for its own numbers."""


def small_options(method: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that make a method small, as far as it takes them, under those that are given.

    Example:
        >>> small_options(Method, {"width": 0.25})
        {'warmup_epochs': 0, 'compile': False, 'backbone': 'resnet10', 'width': 0.25, 'image_size': 16}
    """
    known: Mapping[str, Any] = parameters(method)  # type: ignore[arg-type]
    chosen = options.get("backbone", known["backbone"].default if "backbone" in known else None)
    sizes: dict[str, Any] = {"image_size": 16}
    if chosen in RESNETS:
        sizes = RESNET
    elif chosen in vit_names():
        sizes = VIT
    return {name: value for name, value in {**COMMON, **sizes}.items() if name in known} | dict(options)


class Trial:
    """One method that is tried out.

    Args:
        method: its class.
        options: of its constructor; what is not given is small.
        folder: for checkpoints and records.
    """

    def __init__(self, method: type[Method], options: Mapping[str, Any], folder: Path) -> None:
        self.cls, self.folder = method, folder
        self.options = small_options(method, options)

    def build(self, seed: int = 0) -> Method:
        """A new instance.

        Args:
            seed: of its weights, and of all else that its constructor draws.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.cls(**self.options)

    @cached_property
    def main(self) -> "Witness":
        """The main training, watched."""
        witness = Witness(self.folder / "saved.ckpt")
        self.train(self.build(), [witness])
        witness.end()
        return witness

    @cached_property
    def resumed(self) -> "Witness":
        """A new instance, of other random weights, continues from the checkpoint of the main training."""
        saved = self.main.save_to
        witness = Witness(None)
        self.train(self.build(OTHER_SEED), [witness], ckpt_path=saved)
        witness.end()
        return witness

    @cached_property
    def measured(self) -> "Witness":
        """The main training once more, with measurements between steps and validation after each epoch."""
        witness = Witness(None)
        self.train(self.build(), [Measures(), witness], limit_val_batches=1.0, check_val_every_n_epoch=1)
        witness.end()
        return witness

    @cached_property
    def features(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Features of clean images and what the head makes of them, before and after a training of some seconds."""
        looks = Looks()
        self.train(self.build(), [looks], {**LONG}, max_epochs=LONG_EPOCHS, accumulate_grad_batches=1)
        return {name: (looks.start[name], looks.end[name]) for name in looks.start}

    @cached_property
    def pair(self) -> "Pair":
        """Two processes that train it."""
        from ssl_geometry.conformance.processes import Pair  # which tries methods, too

        return Pair(self)

    def train(
        self, method: Method, callbacks: Sequence[L.Callback], data: Mapping[str, Any] | None = None, **options: Any
    ) -> L.Trainer:
        """Train an instance, as ``fit`` does.

        Args:
            method: the instance.
            callbacks: that watch.
            data: options of the data module in place of the main training's.
            options: of the trainer in place of the main training's, and ``ckpt_path``.
        """
        images = {"limit_train": BATCH * BATCHES, "batch_size": BATCH, **(data or {})}
        common: dict[str, Any] = {"limit_test": 32, "measure_size": 32, "eval_batch_size": 64, "val_fraction": 0.03}
        path = options.pop("ckpt_path", None)
        trainer = L.Trainer(
            **{
                "max_epochs": EPOCHS,
                "accumulate_grad_batches": ACCUMULATED if method.automatic_optimization else 1,
                "limit_val_batches": 0,
                "devices": 1,
                "plugins": [LightningEnvironment(), WholeCheckpointIO()],
                **options,
            },
            accelerator="cpu",
            callbacks=[SeedSteps(0), *callbacks],
            default_root_dir=self.folder,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(method, datamodule=DataModule("colored_digits", **images, **common), ckpt_path=path)
        return trainer

    def copy(self) -> Method:
        """The method as the main training left it, to take single steps with."""
        method = self.main.method
        memo: dict[int, Any] = {}  # tensors with a history cannot be copied
        for module in method.modules():
            memo |= {id(x): x.detach() for x in vars(module).values() if isinstance(x, Tensor) and not x.is_leaf}
        twin = copy.deepcopy(method, memo)
        twin.trainer = method.trainer
        twin.log = twin.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
        return twin.train()


def step(
    method: Method,
    batch: Batch,
    precision: AbstractContextManager[Any] | None = None,
    seed: int = 0,
    backward: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step without the optimiser's part.

    Args:
        method: a copy; it changes.
        batch: images, labels, indices.
        precision: such as autocast, for the forward pass.
        seed: of the global random streams.
        backward: compute gradients.

    Returns:
        The loss, and name to gradient.

    Raises:
        NotApplicable: a method that calls its optimiser itself.
    """
    if not method.automatic_optimization:
        raise NotApplicable("it calls its optimiser itself (manual optimisation)")
    torch.manual_seed(seed)
    method.zero_grad()
    with precision or nullcontext():
        found: Any = method.training_step(batch, 0)
    loss: Tensor = found["loss"] if isinstance(found, Mapping) else found
    if backward:
        loss.backward()
        method.on_after_backward()
    gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    return loss.detach().clone(), gradients


class Witness(L.Callback):
    """Sees all that the checks of a short training ask for.

    Args:
        save_to: where a checkpoint is saved in the middle of the first epoch; None saves none.
    """

    def __init__(self, save_to: Path | None) -> None:
        self.save_to = save_to
        self.waits = Waits()
        self.batches: list[Batch] = []
        self.losses: list[Tensor] = []
        self.progresses: list[float] = []
        """What ``after_step`` was called with."""
        self.steps: list[int] = []
        """Steps of the optimiser after each batch."""
        self.without_gradient: dict[str, None] = {}
        """Trainable parameters that a step has left out."""
        self.with_gradient: dict[str, None] = {}
        """Parameters that a step gave a gradient other than zero."""
        self.decayed: list[str] = []
        """Parameters with weight decay."""
        self.moved_between: list[str] = []
        """Parameters that changed between two batches of one step of the optimiser."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        self.method, self.trainer = pl_module, trainer
        self.start = copied(pl_module.named_parameters())
        self.outside_at_start = outside(pl_module)
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.decayed = [names[id(p)] for group in groups if group.get("weight_decay") for p in group["params"]]
        for name in WATCHED if self.save_to else ():  # once is enough
            setattr(pl_module, name, self._watched(getattr(pl_module, name)))
        pl_module.after_step = self._counted(pl_module.after_step)  # type: ignore[method-assign]

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            batch = [x for arg in args if isinstance(arg, dict) for x in arg.values() if isinstance(x, Tensor)]
            with self.waits.noted([*batch, *self.method.parameters(), *self.method.buffers()]):
                return call(*args, **kwargs)

        return watched

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def counted(progress: float, *args: Any, **kwargs: Any) -> Any:
            self.progresses.append(progress)
            return call(progress, *args, **kwargs)

        return counted

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if len(self.batches) < 2:
            self.batches.append({key: value.clone() for key, value in batch.items()})  # type: ignore[arg-type]
        # The second step of the optimiser: a moving average has somewhere to go. Its first batch is left out, since
        # what a forward normalises once per step, as prototypes, changes in that one.
        if len(self.losses) == ACCUMULATED + 1:
            self._before = copied(pl_module.named_parameters())
        elif len(self.losses) == ACCUMULATED + 2 and trainer.accumulate_grad_batches == ACCUMULATED:
            after = dict(pl_module.named_parameters())
            self.moved_between = [n for n, before in self._before.items() if _moved(before, after[n].detach())]

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with self.waits.paused():
            self._look_at_gradients(trainer, pl_module)

    def _look_at_gradients(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(self.losses) % trainer.accumulate_grad_batches:
            return  # gradients of the batch before are there as well
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None and parameter.grad.any():
                self.with_gradient[name] = None
            if parameter.requires_grad and parameter.grad is None:
                self.without_gradient[name] = None

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it
            self.losses.append(loss.detach().clone() * trainer.accumulate_grad_batches)
        else:
            self.losses.append(torch.zeros(()))
        self.steps.append(trainer.global_step)
        if self.save_to is not None and len(self.losses) == SAVED_AFTER:
            trainer.save_checkpoint(self.save_to)
            self.outside_when_saved = outside(pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.optimizer_state = optimizer_state(trainer)

    def end(self) -> None:
        """The method is itself again, and its state is kept."""
        for name in WATCHED:
            vars(self.method).pop(name, None)
        self.state = copied(self.method.state_dict().items())
        self.parameters = copied(self.method.named_parameters())


class Measures(L.Callback):
    """Measures at the start and twice in each epoch, between two steps, as a monitor does."""

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % ACCUMULATED == 0:
            subject, images = Subject.of(pl_module), trainer.datamodule  # type: ignore[attr-defined]
            cka = CKA()
            cka.prepare(subject, images)
            measure_together([cka], Occasion(subject, images, "method"))


class Looks(L.Callback):
    """Features of the measurement images at the start and at the end of training."""

    start: dict[str, Tensor]
    end: dict[str, Tensor]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = _features(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end = _features(trainer, pl_module)


def _features(trainer: L.Trainer, method: Any) -> dict[str, Tensor]:
    batches = trainer.datamodule.loader("val")  # type: ignore[attr-defined]
    with evaluating(method), torch.no_grad():
        found = {"features": torch.cat([method.features(batch["image"]) for batch in batches])}
        with suppress(Exception):  # a head that does not read features, such as a decoder
            outputs = method.network.head(found["features"])
            found |= {"outputs": outputs} if isinstance(outputs, Tensor) and outputs.ndim == 2 else {}
    return found


def _moved(before: Tensor, after: Tensor) -> bool:
    """More than by rounding."""
    return bool((after - before).abs().max() > 1e-6 * before.abs().max()) if before.numel() else False


@contextmanager
def alone() -> Iterator[None]:
    """Random streams are left as they were, and nothing is printed of what trainers report."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "ssl_geometry")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), evaluating(nn.Identity()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
