"""The measuring engine: measurements that are due together share ONE pass over the images.

Each says what it needs (images, views, layers, reductions); the network runs once per batch and view, and every
measurement gets its part. Live and offline run this code.

The network is measured in evaluation mode (batch norm with its running statistics), in float32 whatever the precision
of training, on images in a fixed random order, split over processes by whole batches. Nothing of the network changes:
modes, weights and random number streams are left as they were found.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Annotated, Any, ClassVar, ParamSpec, TypeVar
from typing import Protocol as Interface

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ssl_geometry.errors import UserError
from ssl_geometry.geometry.precision import full_float32
from ssl_geometry.measure.processes import this_process, warned_once
from ssl_geometry.measure.requests import Reduced, Reduction, Request, Split, pooled
from ssl_geometry.measure.subject import Subject
from ssl_geometry.models.evaluating import evaluating
from ssl_geometry.models.taps import Taps
from ssl_geometry.ranges import at_least, check_arguments
from ssl_geometry.records import Protocol

Epochs = Annotated[int, at_least(0)]
P, R = ParamSpec("P"), TypeVar("R")
Layers = str | list[str]

AS_OPTIONS: ContextVar[bool] = ContextVar("AS_OPTIONS", default=False)
"""Whether messages speak of command-line options (``--cka.layers``) or of a script's arguments (``CKA.layers``)."""


def as_options(command: Callable[P, R]) -> Callable[P, R]:
    """A command, whose messages name its options."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        token = AS_OPTIONS.set(True)
        try:
            return command(*args, **kwargs)
        finally:
            AS_OPTIONS.reset(token)

    return run


class ImageSource(Interface):
    """Where measurements get their images: :class:`MeasurementImages`, or a data module of this package."""

    num_classes: int
    num_test: int
    multi_label: bool
    measure_size: int
    eval_batch_size: int
    image_shape: tuple[int, ...]

    def loader(self, split: Any, images: int | None = None) -> Any:
        """Batches of this process: ``image`` uint8 (B, 3, H, W), ``label`` (B,) or (B, C), ``index`` (B,)."""

    @property
    def size_option(self) -> str:
        """What says how many images are measured on, for messages."""

    @property
    def batch_option(self) -> str:
        """What says how many images are in a batch, for messages."""

    @property
    def origin(self) -> str:
        """Where the images come from, for messages."""

    @property
    def measure_ids(self) -> str:
        """Hash of the measurement images in their order."""

    @property
    def measure_sizes(self) -> Int64[Tensor, " C"] | None:
        """Measurement images of each class, drawn class by class; None where they were not."""

    @property
    def trained_on(self) -> dict[str, Any]:
        """Which labelled training images classifiers learn from, for protocols."""

    def tested(self, split: Any) -> dict[str, Any]:
        """Which images classifiers are tested on, for protocols."""


@dataclass(frozen=True)
class Occasion:
    """What is measured, on which images, and when.

    Args:
        subject: the network.
        images: that it sees.
        run: that the rows belong to.
        epoch: completed epochs.
        step: completed optimiser steps; None where the network is not in training.
    """

    subject: Subject
    images: ImageSource
    run: str
    epoch: int = 0
    step: int | None = None

    @property
    def is_initialisation(self) -> bool:
        """Whether training is about to begin."""
        return self.step == 0

    @property
    def columns(self) -> dict[str, Any]:
        """What all rows share."""
        name = self.subject.name
        return {"run": self.run, "model": name, "split": "measure", "epoch": self.epoch, "step": self.step}


@dataclass
class Measured:
    """Rows of one measurement, made by :func:`ssl_geometry.records.record`, and how the numbers came about."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    protocols: list[Protocol] = field(default_factory=list)


class Measurement:
    """Base of what is measured: says what it needs, gets it batch by batch, and returns rows.

    Args:
        every_n_epochs: while training, measure at the start, after every n-th epoch and after the last one; 0 is never,
            None leaves it to the monitor.
    """

    group: ClassVar[str] = ""
    """Name of its options (``cka`` for ``--cka.layers``) and of its part of the records; by default the class's."""
    default_layers: ClassVar[str | Sequence[str]] = "all"
    """Layers where none are chosen, as far as the network has them."""
    layers: Layers | None = None

    def __init__(self, every_n_epochs: Epochs | None = None) -> None:
        check_arguments(Measurement, {"every_n_epochs": every_n_epochs}, self.option(""))
        self.every_n_epochs = every_n_epochs

    @classmethod
    def option(cls, name: str) -> str:
        """An argument of it, as the user typed it: ``--cka.layers`` in a command, ``CKA.layers`` in a script."""
        return f"--{cls.group}.{name}" if AS_OPTIONS.get() and cls.group else f"{cls.__name__}.{name}"

    def chosen(self, subject: Subject) -> tuple[str, ...]:
        """Names of the layers that are measured of a network.

        Raises:
            UserError: layers that it does not have, with the option.
        """
        return subject.layers(self.layers, self.default_layers, self.option("layers"))

    def check(self, subject: Subject) -> None:
        """Refuse what means nothing for this network, before images are read.

        Raises:
            UserError: with the option, or a device without float64, in which numbers are summed.
        """
        if subject.device.type == "mps":
            fix = "--trainer.accelerator cpu" if AS_OPTIONS.get() else "network.cpu(), or Trainer(accelerator='cpu')"
            raise UserError(f"the network is on mps, which has no float64, in which numbers are summed; use {fix}")
        if self.layers is not None:
            self.chosen(subject)

    def prepare(self, subject: Subject, images: ImageSource) -> None:
        """Called once, before the first pass."""

    def requests(self, subject: Subject) -> Sequence[Request]:
        """What it needs of every batch; asked before each pass."""
        raise NotImplementedError

    def begin(self, occasion: Occasion) -> None:
        """A pass starts: forget the last one."""

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch of the pass.

        Args:
            batch_number: its place in its split, over all processes.
            reduced: for each of its requests of that split, layer to reduced output.
            batch: the images, labels and indices.
        """
        raise NotImplementedError

    def finish(self, occasion: Occasion) -> Measured:
        """The pass is over: the rows. Called on every process (metrics are reduced here)."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot measure again, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the checkpoint left."""


def given(measurements: Sequence[Measurement] | Measurement) -> list[Measurement]:
    """The measurements that a script asked for: one, or several.

    Args:
        measurements: as they were given.

    Raises:
        UserError: a class in place of a measurement, something else, or one twice.

    Example:
        >>> given(Measurement)
        Traceback (most recent call last):
        ssl_geometry.errors.UserError: measurements: Measurement is a class; write Measurement()
    """
    listed = list(measurements) if isinstance(measurements, Sequence) else [measurements]
    for item in listed:
        if isinstance(item, type):
            raise UserError(f"measurements: {item.__name__} is a class; write {item.__name__}()")
        if not isinstance(item, Measurement):
            raise UserError(f"measurements: {item!r} is no measurement, such as CKA()")
        if type(item).requests is Measurement.requests:
            raise UserError(f"measurements: {type(item).__name__} asks for nothing; it needs a method requests()")
    if twice := [item for number, item in enumerate(listed) if any(item is other for other in listed[:number])]:
        raise UserError(f"measurements: one {type(twice[0]).__name__} stands there twice; make another")
    return listed


def check_source(images: Any) -> None:
    """Refuse what measurements get no images from.

    Raises:
        UserError: with what to give.
    """
    if images is None:
        raise UserError("images: give images=MeasurementImages.from_dataset(…)")
    if not hasattr(images, "measure_ids"):
        raise UserError(
            f"images is {type(images).__name__}; give MeasurementImages(…) or MeasurementImages.from_dataset(…)"
        )


def measure_together(
    measurements: Sequence[Measurement],
    occasion: Occasion,
    advance: Callable[[], None] = lambda: None,
    together: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Measured]:
    """One pass over the images for several measurements.

    Args:
        measurements: prepared ones.
        occasion: what is measured, on which images, and when.
        advance: called after every batch of this process.
        together: what the pass runs in, such as :func:`ssl_geometry.measure.processes.agreeing`: a process that fails
            in it comes to nothing that the others wait for.

    Returns:
        What each of them found, the same on every process.
    """
    return Pass(measurements, occasion).finish(advance, together)


Part = tuple[Split, int | None]
"""A set of images: the first so many of a split, or all."""


class Pass:
    """The pass of :func:`measure_together`, whose parts may be run one by one while the network stays as it is.

    A measurement begins with the first part that it asks for: of a pass that is given up, the others know nothing.

    Args:
        measurements: prepared ones.
        occasion: what is measured, on which images, and when.
    """

    def __init__(self, measurements: Sequence[Measurement], occasion: Occasion) -> None:
        self.occasion = occasion
        self.asked = {item: tuple(item.requests(occasion.subject)) for item in measurements}
        self.left = splits(request for asked in self.asked.values() for request in asked)
        self._begun: set[Measurement] = set()

    def run(self, part: Part) -> Iterator[Mapping[str, Tensor]]:
        """Run the network over the images of one part, for all that ask for them.

        Args:
            part: one of those that are left.

        Yields:
            Each batch of this process, once it was measured.
        """
        self.left.remove(part)
        subject = self.occasion.subject
        here = {item: [r for r in asked if (r.split, r.images) == part] for item, asked in self.asked.items()}
        here = {item: asked for item, asked in here.items() if asked}
        self._begin(here)
        rank, world_size = this_process()
        with measuring(subject.network):
            batches = self.occasion.images.loader(*part)
            wanted = [request for asked in here.values() for request in asked]
            for count, (batch, reduced) in enumerate(forward_pass(subject, batches, wanted)):
                for measurement, asked in here.items():
                    mine = {request: reduced[request] for request in asked}
                    measurement.update(count * world_size + rank, mine, batch)
                yield batch

    def finish(
        self,
        advance: Callable[[], None] = lambda: None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> list[Measured]:
        """Run what is left; see :func:`measure_together`."""
        self._begin(self.asked)
        with together():
            for part in list(self.left):
                for _ in self.run(part):
                    advance()
        with measuring(self.occasion.subject.network), warned_once():
            return [measurement.finish(self.occasion) for measurement in self.asked]

    def _begin(self, measurements: Iterable[Measurement]) -> None:
        for measurement in measurements:
            if measurement not in self._begun:
                measurement.begin(self.occasion)
                self._begun.add(measurement)


def splits(requests: Iterable[Request]) -> list[Part]:
    """The sets of images that requests ask for, each once."""
    return list(dict.fromkeys((request.split, request.images) for request in requests))


def forward_pass(
    subject: Subject, batches: Iterable[Mapping[str, Tensor]], requests: Sequence[Request]
) -> Iterator[tuple[Mapping[str, Tensor], dict[Request, dict[str, Tensor]]]]:
    """Run the network over images, once per batch and view, and take what was asked for.

    Args:
        subject: the network, already in the state to be measured (see :func:`measuring`).
        batches: images, labels and indices.
        requests: the union of what is to be taken.

    Yields:
        The batch, and for each request layer to reduced output.
    """
    wanted: dict[tuple[str, int], dict[str, set[Reduction]]] = defaultdict(lambda: defaultdict(set))
    for request in requests:
        for layer in request.layers:
            wanted[request.view, request.draw][layer].add(request.reduce)
    views, device, dtype = {name: subject.view(name) for name, _ in wanted}, subject.device, subject.dtype
    look = ("", 0)

    def reduce(layer: str, output: Tensor) -> dict[Reduction, Tensor]:
        return {reduction: reduction(output) for reduction in wanted[look].get(layer, ())}

    with Taps(subject.network, sorted({layer for layers in wanted.values() for layer in layers}), reduce) as taps:
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            taken = {}
            for look in wanted:
                name, draw = look
                seen = views[name](batch["image"], batch["index"], seed=0, epoch=0, view=draw)
                taken[look] = taps(seen.to(dtype))
            yield batch, {r: {layer: taken[r.view, r.draw][layer][r.reduce] for layer in r.layers} for r in requests}


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """:func:`~ssl_geometry.models.evaluating.evaluating`, no gradients, full float32, kernels that no timing chooses.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2))  # the first is frozen
        >>> with measuring(net):
        ...     assert not net.training
        >>> [part.training for part in net]
        [False, True]
    """
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # the last batch is shorter, and would be timed for one use
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    try:
        with evaluating(module), torch.no_grad(), torch.autocast(device, enabled=False), full_float32():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


def layer_widths(subject: Subject, layers: Sequence[str], image_shape: Sequence[int]) -> dict[str, int]:
    """How many features each layer has once pooled, from one forward of a dummy image.

    Args:
        subject: the network.
        layers: names of layers.
        image_shape: (3, H, W) of the images.
    """
    with (
        measuring(subject.network),
        Taps(subject.network, list(layers), lambda _, output: pooled(output).shape[1]) as taps,
    ):
        blank = torch.zeros(1, *image_shape, dtype=torch.uint8, device=subject.device)
        found = taps(subject.seen("clean", blank, torch.zeros(1, dtype=torch.long, device=subject.device)))
    return {layer: found[layer] for layer in layers}  # of a module that runs several times, the first counts
