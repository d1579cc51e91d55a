"""The interface of measurements: what they request of every batch, the images they see, and the rows they return."""

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
    """The source of images of measurements: :class:`MeasurementImages`, or a data module of this package."""

    num_classes: int
    num_test: int
    multi_label: bool
    measure_size: int
    eval_batch_size: int
    image_shape: tuple[int, ...]
    size_option: str
    """The option for the number of measurement images, for messages."""
    batch_option: str
    """The option for the batch size, for messages."""

    def loader(self, split: Any, images: int | None = None) -> Any:
        """Batches of this process: ``image`` uint8 (B, 3, H, W), ``label`` (B,) or (B, C), ``index`` (B,)."""

    @property
    def origin(self) -> str:
        """The origin of the images, for messages."""

    @property
    def measure_ids(self) -> str:
        """Hash of the measurement images in their order."""

    @property
    def measure_sizes(self) -> Int64[Tensor, " C"] | None:
        """Number of measurement images of each class, if they were drawn class by class; otherwise None."""

    @property
    def trained_on(self) -> dict[str, Any]:
        """The training images of classifiers, for protocols."""

    def tested(self, split: Any) -> dict[str, Any]:
        """The test images of classifiers, for protocols."""


@dataclass(frozen=True)
class Occasion:
    """The network, the images and the time of a measurement.

    Args:
        subject: the network.
        images: the images.
        run: id of the run that the rows belong to.
        epoch: completed epochs.
        step: completed optimiser steps; None if the network is not in training.
    """

    subject: Subject
    images: ImageSource
    run: str
    epoch: int = 0
    step: int | None = None

    @property
    def is_initialisation(self) -> bool:
        """Whether this is the measurement before training."""
        return self.step == 0

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that all rows share."""
        name = self.subject.name
        return {"run": self.run, "model": name, "split": "measure", "epoch": self.epoch, "step": self.step}


@dataclass
class Measured:
    """Rows of one measurement, made by :func:`ssl_geometry.records.record`, and their protocols."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    protocols: list[Protocol] = field(default_factory=list)


class Measurement:
    """Base class of measurements: requests what it needs, receives it batch by batch, and returns rows.

    Args:
        every_n_epochs: during training, measure at the start, after every n-th epoch and after the last one; 0 is
            never, None takes the monitor's.
    """

    group: ClassVar[str] = ""
    """Name of its options (``cka`` for ``--cka.layers``) and of its part of the records; by default the class's."""
    default_layers: ClassVar[str | Sequence[str]] = "all"
    """Layers by default, where the network has them."""
    layers: Layers | None = None

    def __init__(self, every_n_epochs: Epochs | None = None) -> None:
        check_arguments(Measurement, {"every_n_epochs": every_n_epochs}, self.option(""))
        self.every_n_epochs = every_n_epochs

    @classmethod
    def option(cls, name: str) -> str:
        """An argument as the user typed it: ``--cka.layers`` in a command, ``CKA.layers`` in a script."""
        return argument(name, cls.group, cls.__name__)

    def chosen(self, subject: Subject) -> tuple[str, ...]:
        """Names of the measured layers of a network.

        Raises:
            UserError: unknown layers, with the option.
        """
        return subject.layers(self.layers, self.default_layers, self.option("layers"))

    def check(self, subject: Subject) -> None:
        """Refuse options that do not fit this network, before images are read.

        Raises:
            UserError: with the option; also for a device without float64, which sums need.
        """
        if subject.device.type == "mps":
            fix = "--trainer.accelerator cpu" if AS_OPTIONS.get() else "network.cpu(), or Trainer(accelerator='cpu')"
            raise UserError(f"the network is on mps, which has no float64; measurements need it, so use {fix}")
        if self.layers is not None:
            self.chosen(subject)

    def prepare(self, subject: Subject, images: ImageSource) -> None:
        """Called once, before the first pass."""

    def requests(self, subject: Subject) -> Sequence[Request]:
        """What it needs of every batch; called before each pass."""
        raise NotImplementedError

    def begin(self, occasion: Occasion) -> None:
        """Reset the state at the start of a pass."""

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """Process one batch.

        Args:
            batch_number: index of the batch in its split, over all processes.
            reduced: for each of its requests of that split, layer to reduced output.
            batch: the images, labels and indices.
        """
        raise NotImplementedError

    def finish(self, occasion: Occasion) -> Measured:
        """Return the rows at the end of a pass; called on every process, as metrics are reduced here."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run cannot measure again, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""


def check_measurements(measurements: Sequence[Measurement] | Measurement) -> list[Measurement]:
    """Check the measurements of a script, and return them as a list.

    Args:
        measurements: one or several.

    Raises:
        UserError: a class in place of a measurement, something else, or one twice.

    Example:
        >>> check_measurements(Measurement)
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
            raise UserError(f"measurements: {type(item).__name__} requests nothing; implement its method requests()")
    if twice := [item for number, item in enumerate(listed) if any(item is other for other in listed[:number])]:
        raise UserError(f"measurements: the same {type(twice[0]).__name__} is listed twice; create a second one")
    return listed


def check_source(images: Any) -> None:
    """Refuse objects that are not a source of images.

    Raises:
        UserError: with the fix.
    """
    if images is None:
        raise UserError("images: give images=MeasurementImages.from_dataset(…)")
    if not hasattr(images, "measure_ids"):
        raise UserError(
            f"images is {type(images).__name__}; give MeasurementImages(…) or MeasurementImages.from_dataset(…)"
        )
