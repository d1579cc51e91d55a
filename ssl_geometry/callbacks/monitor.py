"""Measuring while any Lightning module trains.

Measurements are made before the first step (the initialisation) and at the end of epochs. Those that are due in the
same epoch share one pass over the measurement images. Nothing of the training changes: modes, weights, optimiser and
random number streams are left as they were found.
"""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ssl_geometry.callbacks.measured_network import submodule, usual_path
from ssl_geometry.callbacks.publishing import is_last, log, new_folder, run_name
from ssl_geometry.callbacks.records import RecordsLogger
from ssl_geometry.errors import UserError, first_line
from ssl_geometry.measure.cka import CKA, INITIAL
from ssl_geometry.measure.engine import Part, Pass
from ssl_geometry.measure.images import MeasurementImages
from ssl_geometry.measure.invariance import Invariance
from ssl_geometry.measure.measurement import (
    Epochs,
    ImageSource,
    Measured,
    Measurement,
    Occasion,
    check_measurements,
    check_source,
)
from ssl_geometry.measure.neighbors import Neighborhoods
from ssl_geometry.measure.probes import Probes
from ssl_geometry.measure.processes import agreeing, is_of_the_first
from ssl_geometry.measure.subject import HOW_IT_SEES, Subject
from ssl_geometry.methods import Method
from ssl_geometry.ranges import check_arguments, check_name
from ssl_geometry.report.live import Row, curve_rows
from ssl_geometry.runs.networks import load_method

logger = logging.getLogger(__name__)
logger.addFilter(is_of_the_first)

Network = str | Callable[[L.LightningModule], nn.Module]


class GeometryMonitor(L.Callback):
    """Measures the geometry of a network's layers while it trains, in any Lightning project.

    Numbers go to the trainer's loggers, rows to Parquet: with ``fit`` into the run's directory, else into
    ``<default_root_dir>/geometry/<version of the logger>/records``.

    Args:
        measurements: such as ``[CKA(layers="blocks"), Spectrum(every_n_epochs=10)]``.
        images: to measure on; None takes the trainer's data module, where it is this package's.
        network: attribute path in the module, or function from the module to the network; None takes the module where
            it is a method of this package, else its ``backbone``, else its only submodule with parameters, else the
            module, with a line that names its parts; ``""`` is the module itself.
        heads: attribute paths of modules that read the network's features, measured under these names.
        clean: how the network sees an image: a :class:`View`, or a transform from a PIL image to a tensor (random views
            then cannot be measured). Methods of this package know it.
        every_n_epochs: default of the measurements: at the start, after every n-th epoch and after the last one.
        name: of the network where several are monitored, such as ``"teacher"``: in the rows, in the names of curves
            (``cka/teacher/to_init/…``) and of figures. None takes the run's.

    Once training has begun, it goes on where only measuring failed, with a warning; a run of ``fit`` ends with one
    line and is resumed, as do several processes.

    Raises:
        UserError: when training starts at the latest, in one line that names the argument.
    """

    def __init__(
        self,
        measurements: Sequence[Measurement],
        images: ImageSource | None = None,
        network: Network | None = None,
        heads: Sequence[str] = (),
        clean: Any = None,
        every_n_epochs: Epochs = 1,
        name: str | None = None,
    ) -> None:
        arguments = {"heads": heads, "every_n_epochs": every_n_epochs, "name": name}
        check_arguments(GeometryMonitor, arguments, "")
        if name is not None:
            check_name(name, "name")
        if isinstance(network, nn.Module) or not (network is None or isinstance(network, str) or callable(network)):
            raise UserError(
                f"network is {type(network).__name__}, expected an attribute path, such as 'student.backbone', or a "
                "function from the module to the network"
            )
        self.measurements = check_measurements(measurements)
        self.images, self.network, self.heads, self.clean = images, network, heads, clean
        self.every_n_epochs, self.name = every_n_epochs, name
        self.seconds = 0.0
        self.curves: list[Row] = []  # rows of all measured epochs that curves over epochs show
        self._active: list[Measurement] = []  # measured in this training, due in this epoch or not
        self._shared: tuple[Pass, list[Tensor]] | None = None  # that validation has begun, and the weights then
        self._records: RecordsLogger | None = None
        self._folder: str | None = None  # of records in the trainer's root directory

    @property
    def state_key(self) -> str:
        """Several monitors of one trainer have states of their own."""
        return "GeometryMonitor" + (f" {self.name}" if self.name else "")

    # -- when it measures ------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find network and images, and check the measurements against them before hours of training."""
        if trainer.global_step == 0:
            self._active, self._shared, self._records = [], None, None  # forget an earlier training of this monitor
        switched_on = [measurement for measurement in self.measurements if self._every(measurement)]
        if not switched_on:
            return
        shared = {id(item) for monitor in monitors(trainer) if monitor is not self for item in monitor.measurements}
        if twice := [type(measurement).__name__ for measurement in switched_on if id(measurement) in shared]:
            raise UserError(f"measurements: one {twice[0]} is given to two monitors; give each its own")
        self._images = self._find_images(trainer)
        self._active = self._possible(switched_on)
        self._prepare(self.subject(pl_module, self.name or run_name(trainer)), trainer, pl_module)

    def _prepare(self, subject: Subject, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check and prepare the measurements for a network, at the start and when the module has got another one."""
        self._subject, self._parameters = subject, list(subject.network.parameters())
        for measurement in self._active:
            measurement.check(self._subject)
            measurement.prepare(self._subject, self._images)
            if isinstance(measurement, CKA) and measurement.reference is not None:
                measurement.add_reference(self._reference(measurement, pl_module), self._images, self._subject)
            if isinstance(measurement, Probes) and isinstance(pl_module, Method) and self.images is None:
                if not pl_module.steps_show_images:
                    logger.info("online probes are left out: a training step shows the backbone no whole views")
                    continue
                whole_views = [part for part in pl_module.training_views if part[0].size == pl_module.view.size]
                learns_from = {  # of batches that have labels and indices, as those of the data module have
                    "precision": trainer.precision,
                    "training views": [view.spec | {"count": len(numbers)} for view, numbers in whole_views],
                    "batch": trainer.datamodule.batch_size,  # type: ignore[attr-defined]
                }
                measurement.create_online(self._subject, self._images, learns_from)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the initialisation, unless the run is resumed; then attach online probes to the training steps."""
        if trainer.global_step == 0:
            self.curves = []  # forget an earlier training of this monitor
            self._measure(trainer, pl_module, 0)
        for probes in self._probes:
            probes.attach(self._subject)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what is due. Checkpoints are written after this, so their state includes it."""
        self._measure(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Capture the activations of this step for online probes."""
        for probes in self._probes:
            probes.step_starts()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Train online probes on this step; where the module has got another network, from the next step on."""
        if any(probes.layers_not_run for probes in self._probes):
            self._follow_network(trainer, pl_module)
        for probes in self._probes:
            probes.step_ends(batch)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Training failed or was stopped."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the network as it was, however training ended."""
        for probes in self._probes:
            probes.detach()

    def _every(self, measurement: Measurement) -> int:
        every = measurement.every_n_epochs
        return self.every_n_epochs if every is None else every

    @property
    def _probes(self) -> list[Probes]:
        return [measurement for measurement in self._active if isinstance(measurement, Probes)]

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        if not (due := self._due_at(trainer, epoch)):
            return
        started = time.perf_counter()
        found: list[Measured] = []
        with _training_continues(trainer, epoch, "nothing is measured", trainer.world_size == 1):
            self._follow_network(trainer, pl_module)
            occasion = self._occasion(trainer, epoch)
            with _naming_epoch(epoch):
                found = self._pass(due, occasion).finish(together=agreeing)
        if found and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            names = part_names(trainer)
            for measurement, measured in zip(due, found, strict=True):
                with _training_continues(trainer, epoch, f"{names[measurement]} is not kept whole", True):
                    self.curves += curve_rows(measured.rows)
                    log(trainer, self._store(trainer), measured, self.curves, occasion, names[measurement])
        self.seconds += time.perf_counter() - started

    def _follow_network(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the network that the module has now, which may have been replaced since the last measurement."""
        subject = self.subject(pl_module, self._subject.name)
        if list(map(id, subject.network.parameters())) != list(map(id, self._parameters)):
            logger.info(f"{subject.name}: the module has another network than before, which is measured from now on")
            self._prepare(subject, trainer, pl_module)
            for probes in self._probes:
                probes.attach(subject)

    def _due_at(self, trainer: L.Trainer, epoch: int) -> list[Measurement]:
        last = is_last(trainer, epoch)
        return [measurement for measurement in self._active if epoch % self._every(measurement) == 0 or last]

    def _occasion(self, trainer: L.Trainer, epoch: int) -> Occasion:
        return Occasion(self._subject, self._images, run_name(trainer), epoch, trainer.global_step)

    # -- one pass over the labelled training images for probes and for the validation by nearest neighbours --------

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """If measurements of this epoch need training images, let validation run that part of their pass."""
        self._shared = None
        if trainer.state.fn != "fit" or not self._active or not isinstance(pl_module, Method):
            return
        if not self._can_share(pl_module):
            return
        epoch = trainer.current_epoch + 1 if trainer.global_step else 0
        begun = Pass(self._due_at(trainer, epoch), self._occasion(trainer, epoch))
        bank = [request for requests in begun.requests.values() for request in requests if request.split == "bank"]
        if bank and all((request.view, request.draw) == ("clean", 0) for request in bank):
            part = bank[0].split, bank[0].images
            images = len(self._images.loader(*part).sampler.rows)
            pl_module.shared_bank = images, self._bank_features(pl_module, begun, part)

    def _can_share(self, method: Method) -> bool:
        """Whether validation computes the features that are measured."""
        same = self._subject.network is method.network and self._images is method.trainer.datamodule  # type: ignore[attr-defined]
        return same and method.hparams["eval_precision"] == "float32" and type(method).features is Method.features

    def _bank_features(self, method: Method, begun: Pass, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Run a part of the pass, and give validation the backbone's features and the labels of each batch."""
        started = time.perf_counter()
        outputs: list[Tensor] = []
        hook = method.network.backbone.register_forward_hook(
            lambda *call: outputs.append(call[-1].to(torch.float32, copy=True))
        )
        try:
            with _naming_epoch(begun.occasion.epoch):
                for batch in begun.run(part):
                    yield outputs.pop(), batch["label"]
        finally:
            hook.remove()
        self._shared = begun, [tensor.clone() for tensor in _weights(begun.occasion.subject.network)]
        self.seconds += time.perf_counter() - started

    def _pass(self, due: list[Measurement], occasion: Occasion) -> Pass:
        """The pass that validation has begun, if measurements, step and weights are still the same; else a new one."""
        shared, self._shared = self._shared, None
        if shared is not None:
            begun, weights = shared
            same = list(begun.requests) == due and begun.occasion == occasion
            # weights differ where validation runs on averaged ones, as of a callback
            if same and all(map(torch.equal, weights, _weights(occasion.subject.network))):
                return begun
        return Pass(due, occasion)

    # -- what it measures ------------------------------------------------------------------------------------------

    def subject(self, module: L.LightningModule, name: str) -> Subject:
        """The network that is measured.

        Raises:
            UserError: no such attribute, or a network whose view of an image is not known.
        """
        if isinstance(module, Method) and not self.heads and self.clean is None and not callable(self.network):
            network = None if self.network is None else submodule(module, self.network, "network")
            return Subject.of(module, name, network)
        if callable(self.network):
            network = self.network(module)
        else:
            network = submodule(module, usual_path(module) if self.network is None else self.network, "network")
        if self.clean is None:
            raise UserError(HOW_IT_SEES.format(type(network).__name__))
        heads = {path: submodule(module, path, "heads") for path in self.heads}
        return Subject(network, self.clean, name=name, heads=heads, image_shape=self._images.image_shape)

    def _find_images(self, trainer: L.Trainer) -> ImageSource:
        images: Any = getattr(trainer, "datamodule", None) if self.images is None else self.images
        check_source(images)
        return images

    def _possible(self, measurements: Sequence[Measurement]) -> list[Measurement]:
        """The measurements that the images allow; those that need labels are left out with a warning."""
        images = self._images
        can_probe = not isinstance(images, MeasurementImages) or images.has_training_images
        if not can_probe and any(isinstance(measurement, Probes) for measurement in measurements):
            logger.warning("probes are left out: they need labelled training images (images: train=…)")
        without = {Invariance: "class CKA", Neighborhoods: "semantic manifolds and purity"}
        kinds = [what for kind, what in without.items() if any(isinstance(item, kind) for item in measurements)]
        if kinds and not images.num_classes:
            verb = "is" if kinds == ["class CKA"] else "are"
            logger.warning(f"{', '.join(kinds)} {verb} left out: the measurement images have no labels")
        return [measurement for measurement in measurements if can_probe or not isinstance(measurement, Probes)]

    def _reference(self, cka: CKA, module: Any) -> Subject:
        loaded = load_method(str(cka.reference), option=cka.option("reference"))
        name = loaded.name
        if name in (INITIAL, self._subject.name):  # names distinguish networks in the records
            name += "-reference"
        return Subject.of(loaded.method.to(self._subject.device), name)

    # -- where the numbers go --------------------------------------------------------------------------------------

    def _store(self, trainer: L.Trainer) -> RecordsLogger:
        """The records: those of the run, or a folder in the trainer's root directory."""
        if self._records is None:
            shared = [*trainer.loggers, *(monitor._records for monitor in monitors(trainer))]
            known = [records for records in shared if isinstance(records, RecordsLogger)]
            self._records = known[0] if known else RecordsLogger(new_folder(trainer, self._folder))
            self._folder = None if known else self._records.run_dir.name
        return self._records

    # -- a resumed run ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, and the state that measurements cannot measure again."""
        states = {name: measurement.state_dict() for name, measurement in self._by_name().items()}
        return {"curves": self.curves, "measurements": states, "folder": self._folder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves and the state of the measurements."""
        self.curves, self._folder = state_dict["curves"], state_dict.get("folder")
        for name, measurement in self._by_name().items():
            if state := state_dict["measurements"].get(name):
                measurement.load_state_dict(state)

    def _by_name(self) -> dict[str, Measurement]:
        counts: Counter[str] = Counter()
        names: dict[str, Measurement] = {}
        for item in self.measurements:  # numbered within its class, so that other classes may be added or removed
            kind = type(item).__name__
            names[f"{kind} {counts[kind]}"] = item
            counts[kind] += 1
        return names


@contextmanager
def _naming_epoch(epoch: int) -> Iterator[None]:
    """Report a metric's ``ValueError``, such as of features that are not finite, in one line with the epoch."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"measured after {epoch} epochs: {error}") from error


@contextmanager
def _training_continues(trainer: L.Trainer, epoch: int, lost: str, alone: bool) -> Iterator[None]:
    """Turn an error while measuring into a warning, so that training continues.

    The error is raised at the start, where no training is lost yet; in a run of ``fit``, which is resumed and measures
    again; and where other processes would wait.

    Args:
        trainer: that trains.
        epoch: completed epochs.
        lost: what the error loses, for the warning.
        alone: no other process would wait for this one.
    """
    try:
        yield
    except Exception as error:
        is_resumed = any(isinstance(other, RecordsLogger) for other in trainer.loggers)
        if not (epoch and alone) or is_resumed:
            raise
        logger.warning(
            f"after epoch {epoch} {lost}, training goes on: {type(error).__name__}: {first_line(error)}",
            exc_info=logger.isEnabledFor(logging.DEBUG),
        )


def _weights(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def monitors(trainer: L.Trainer) -> list[GeometryMonitor]:
    """The trainer's monitors, in the order of its callbacks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, GeometryMonitor)]  # type: ignore[attr-defined]


def part_names(trainer: L.Trainer) -> dict[Measurement, str]:
    """The folder of each measurement's records: the name of its options (``cka``), else of its class; each name once.

    Measurements are named whether due or not, so that a name is the same in every epoch and after a resume.
    """
    names: dict[Measurement, str] = {}
    for monitor in monitors(trainer):
        for measurement in monitor.measurements:
            name = "-".join(filter(None, (monitor.name, measurement.group or type(measurement).__name__)))
            taken = {RecordsLogger.SCALARS, *names.values()}
            numbered = (f"{name}-{number}" for number in itertools.count(2))
            names[measurement] = name if name not in taken else next(other for other in numbered if other not in taken)
    return names
