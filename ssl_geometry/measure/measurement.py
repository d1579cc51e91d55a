"""What a measurement is: what it needs of every batch, what it is measured on, and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar
from typing import Protocol as Interface

from jaxtyping import Int64
from torch import Tensor

from ssl_geometry.errors import AS_OPTIONS, UserError, argument
from ssl_geometry.measure.requests import Reduced, Request
from ssl_geometry.measure.subject import Subject
from ssl_geometry.ranges import at_least, check_arguments
from ssl_geometry.records import Protocol

Epochs = Annotated[int, at_least(0)]
Layers = str | list[str]


class ImageSource(Interface):
    """Where measurements get their images: :class:`MeasurementImages`, or a data module of this package."""

    num_classes: int
    num_test: int
    multi_label: bool
    measure_size: int
    eval_batch_size: int
    image_shape: tuple[int, ...]
    size_option: str
    """What says how many images are measured on, for messages."""
    batch_option: str
    """What says how many images are in a batch, for messages."""

    def loader(self, split: Any, images: int | None = None) -> Any:
        """Batches of this process: ``image`` uint8 (B, 3, H, W), ``label`` (B,) or (B, C), ``index`` (B,)."""

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
        return argument(name, cls.group, cls.__name__)

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
