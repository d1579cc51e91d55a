"""Measuring while training: monitors due at the same moment share ONE pass over the images.

A moment is the start of training (the initialisation) or the end of an epoch. The first monitor that is due runs the
pass for all: it collects what each asks for (images, views, layers, reductions), runs the network once a batch and
view, and hands every monitor its part.

The network is measured in evaluation mode (batch norm with its running statistics), in float32 whatever the precision
of training, on images in a fixed random order, split over processes by whole batches. Nothing of the training changes:
modes, weights, optimiser and random number streams are left as they were found.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from torch import Tensor, nn

from ssl_geometry.callbacks.loggers import ResumableWandbLogger
from ssl_geometry.callbacks.records import RecordsLogger
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.cka import pool
from ssl_geometry.geometry.precision import full_float32
from ssl_geometry.models.taps import Taps, layer_names, present
from ssl_geometry.ranges import at_least
from ssl_geometry.records import Protocol

Reduction = Callable[[Tensor], Tensor]
Epochs = Annotated[int, at_least(0)]


@dataclass(frozen=True)
class Request:
    """What a monitor wants of every batch: the layers of one view, reduced inside the hook.

    Args:
        layers: names of layers, in forward order.
        reduce: hashable function of a layer's output (B, ...); equal reductions of several monitors are computed
            once.
        view: how the images are seen: "clean", "own", or a policy or operation; see ``Method.measuring_view``.
        draw: number of the draw of a random view: two draws are two augmented copies.
        split: which images: "measure" (the measurement images) or "bank" (labelled training images).
        images: the first so many of them; None takes all.
    """

    layers: tuple[str, ...]
    reduce: Reduction
    view: str = "clean"
    draw: int = 0
    split: Literal["measure", "bank"] = "measure"
    images: int | None = None


def pooled(activations: Tensor) -> Tensor:
    """The reduction of probes and neighbourhoods: averaged over space, float32."""
    return pool(activations).float()


@dataclass(frozen=True)
class Moment:
    """When a measurement happens: after ``epoch`` completed epochs and ``step`` optimiser steps."""

    epoch: int
    step: int


Reduced = Mapping[Request, Mapping[str, Tensor]]


class Monitor(L.Callback):
    """Base of the callbacks that measure: says what it needs, gets it batch by batch, and returns records.

    Args:
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches the monitor
            off.
    """

    options = ""
    """Under what name its options stand: ``cka`` for ``--cka.layers``."""
    layers: str | list[str] | None = None

    def __init__(self, every_n_epochs: Epochs = 1) -> None:
        self.every_n_epochs = every_n_epochs
        self.seconds = 0.0

    def layer_names(self, network: nn.Module, default: Sequence[str] = ("all",)) -> tuple[str, ...]:
        """The layers of a network that the options choose, or of a default those that it has."""
        option = f"--{self.options}.layers" if self.options else "layers"
        return tuple(layer_names(network, present(network, self.layers, default), option))

    def check(self, method: Any) -> None:
        """Refuse options that mean nothing for this method, before images are read.

        Args:
            method: that is to be measured.

        Raises:
            UserError: with the option.
        """
        if self.every_n_epochs and self.layers is not None:
            self.layer_names(method)

    # -- what a monitor gives ------------------------------------------------------------------------------------------

    def requests(self, method: L.LightningModule) -> Sequence[Request]:
        """What it needs of every batch; asked at every moment, before the pass."""
        raise NotImplementedError

    def begin(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        """A pass starts: forget the last one."""

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch of the pass.

        Args:
            batch_number: its place in its split, over all processes.
            reduced: for each of this monitor's requests of that split, layer to reduced output.
            batch: the images, labels and indices.
        """
        raise NotImplementedError

    def finish(self, trainer: L.Trainer, method: L.LightningModule, moment: Moment) -> "Findings":
        """The pass is over: the numbers. Called on every process (metrics are reduced here)."""
        raise NotImplementedError

    # -- when it measures ----------------------------------------------------------------------------------------------

    def due(self, trainer: L.Trainer, epoch: int) -> bool:
        """Whether this monitor measures after ``epoch`` completed epochs."""
        if not self.every_n_epochs:
            return False
        return epoch % self.every_n_epochs == 0 or is_last(trainer, epoch)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The initialisation is the first moment; a resumed run has it already."""
        if trainer.global_step == 0:
            self._measure(trainer, pl_module, Moment(0, 0))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure where due; checkpoints are written after this, so they know of it."""
        self._measure(trainer, pl_module, Moment(trainer.current_epoch + 1, trainer.global_step))

    def _measure(self, trainer: L.Trainer, method: L.LightningModule, moment: Moment) -> None:
        due = [monitor for monitor in monitors(trainer) if monitor.due(trainer, moment.epoch)]
        if due and due[0] is self:
            started = time.perf_counter()
            measure(trainer, method, due, moment)
            self.seconds += time.perf_counter() - started


@dataclass
class Findings:
    """What a monitor found at one moment.

    Args:
        records: rows for Parquet.
        scalars: the few of them that are watched live as curves, by logged name.
        figures: how to draw pictures, by logged name; drawn only for loggers that show pictures.
        protocols: how the numbers came about.
    """

    records: list[dict[str, Any]]
    scalars: dict[str, float]
    figures: dict[str, Callable[[], Figure]]
    protocols: list[Protocol]


def monitors(trainer: L.Trainer) -> list[Monitor]:
    """The trainer's monitors, in the order of its callbacks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]  # type: ignore[attr-defined]


def part_names(trainer: L.Trainer) -> dict[Monitor, str]:
    """Under what name the records of each monitor lie: its options' (``cka``), else its class's; each name once.

    All monitors of the trainer count, due or not, so that a name is the same at every measurement and after a resume.
    """
    names: dict[Monitor, str] = {}
    for monitor in monitors(trainer):
        name = monitor.options or type(monitor).__name__
        taken = {RecordsLogger.SCALARS, *names.values()}
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names[monitor] = name if name not in taken else next(other for other in numbered if other not in taken)
    return names


def is_last(trainer: L.Trainer, epoch: int) -> bool:
    """Whether training ends with this epoch: by its epochs, its steps, its time, or a callback."""
    return epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop


def measure(trainer: L.Trainer, method: L.LightningModule, due: Sequence[Monitor], moment: Moment) -> None:
    """One pass over the images for all monitors that are due; then log what they found."""
    if not hasattr(method, "measuring_view"):
        raise UserError(
            f"--model {type(method).__name__}: monitors need a subclass of ssl_geometry.methods.Method; "
            "make it one, or switch them off (--cka.every_n_epochs 0 --probes.every_n_epochs 0)"
        )
    requests = {monitor: tuple(monitor.requests(method)) for monitor in due}
    for monitor in due:
        monitor.begin(trainer, method)
    wanted = [request for asked in requests.values() for request in asked]
    with measuring(method):
        for split, images in dict.fromkeys((request.split, request.images) for request in wanted):
            batches = trainer.datamodule.loader(split, images)  # type: ignore[attr-defined]
            here = [request for request in wanted if (request.split, request.images) == (split, images)]
            for count, (batch, reduced) in enumerate(forward_pass(method, batches, here)):
                number = count * trainer.world_size + trainer.global_rank
                for monitor in due:
                    if mine := {request: reduced[request] for request in requests[monitor] if request in reduced}:
                        monitor.update(number, mine, batch)
        findings = [monitor.finish(trainer, method, moment) for monitor in due]
    if trainer.is_global_zero:
        names = part_names(trainer)
        for monitor, found in zip(due, findings, strict=True):
            log(trainer, found, moment, names[monitor])


def forward_pass(
    method: Any, batches: Iterable[Mapping[str, Tensor]], requests: Sequence[Request]
) -> Iterator[tuple[Mapping[str, Tensor], dict[Request, dict[str, Tensor]]]]:
    """Run the network over images, once a batch and view, and take what was asked for.

    Args:
        method: the network, already in the state to be measured (see :func:`measuring`).
        batches: images, labels and indices.
        requests: the union of what is to be taken.

    Yields:
        The batch, and for each request layer to reduced output.
    """
    wanted: dict[tuple[str, int], dict[str, set[Reduction]]] = defaultdict(lambda: defaultdict(set))
    for request in requests:
        for layer in request.layers:
            wanted[request.view, request.draw][layer].add(request.reduce)
    views = {name: method.measuring_view(name) for name, _ in wanted}
    look = ("", 0)

    def reduce(layer: str, output: Tensor) -> dict[Reduction, Tensor]:
        return {reduction: reduction(output) for reduction in wanted[look].get(layer, ())}

    with Taps(method, sorted({layer for layers in wanted.values() for layer in layers}), reduce) as taps:
        for batch in batches:
            batch = {key: value.to(method.device) for key, value in batch.items()}
            taken = {}
            for look in wanted:
                name, draw = look
                taken[look] = taps(views[name](batch["image"], batch["index"], seed=0, epoch=0, view=draw))
            yield batch, {r: {layer: taken[r.view, r.draw][layer][r.reduce] for layer in r.layers} for r in requests}


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, full float32, kernels that no timing chooses; all is put back, module by module.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2))  # the first is frozen
        >>> with measuring(net):
        ...     assert not net.training
        >>> [part.training for part in net]
        [False, True]
    """
    modes = {part: part.training for part in module.modules()}
    benchmark = torch.backends.cudnn.benchmark
    module.eval()
    torch.backends.cudnn.benchmark = False  # the last batch is shorter, and would be timed for one use
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False), full_float32():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        for part, training in modes.items():
            part.training = training


def log(trainer: L.Trainer, found: Findings, moment: Moment, part: str) -> None:
    """Hand findings to every logger in the form that it understands (on the first process).

    Args:
        trainer: whose loggers.
        found: by one monitor.
        moment: when.
        part: the name of that monitor's records; see :func:`part_names`.
    """
    figures = cache(lambda: {name: draw() for name, draw in found.figures.items()})
    for logger in trainer.loggers:
        if isinstance(logger, RecordsLogger):
            logger.log_findings(part, found.records, found.protocols, moment.epoch)
            if is_last(trainer, moment.epoch):
                logger.save_figures(figures())
        else:
            shown: Mapping[str, Any] = {}
            if isinstance(logger, ResumableWandbLogger):  # W&B's failures are its own matter
                shown = figures() if logger.alive else {}
            elif isinstance(logger, WandbLogger) and found.figures:
                shown = _for_wandb(figures())
            row = {**found.scalars, **shown, "epoch": float(moment.epoch)}  # pictures in one row with their epoch
            logger.log_metrics(row, moment.step)
        if isinstance(logger, TensorBoardLogger):
            for name, figure in figures().items():
                logger.experiment.add_figure(name, figure, global_step=moment.step)


def _for_wandb(figures: Mapping[str, Figure]) -> dict[str, Any]:
    import wandb  # a third of a second

    return {name: wandb.Image(figure) for name, figure in figures.items()}
