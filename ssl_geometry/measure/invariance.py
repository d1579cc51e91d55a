"""Invariance of each layer to augmentations, and its similarity to the classes.

Protocol: the CKA of a layer with itself under two augmented views of the same measurement images (Grigg et al. 2021,
figures 3 and 5), for the method's own policy, the standard policies, and each augmentation alone (that split is
ours); and the CKA of a layer on clean images with the one-hot labels. Every network sees the same augmented views, at
every epoch.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ssl_geometry.errors import UserError
from ssl_geometry.measure.cka import GramSize, cka_protocol, first_gram, warn_of_few
from ssl_geometry.measure.measurement import Epochs, ImageSource, Measured, Measurement, Occasion
from ssl_geometry.measure.requests import GramVector, Reduced, Request
from ssl_geometry.measure.subject import Subject
from ssl_geometry.metrics import ClassCKA, InvarianceCKA
from ssl_geometry.metrics.cka import LONELY
from ssl_geometry.ranges import check_arguments
from ssl_geometry.records import Protocol, record

VIEWS = ("own", "simclr", "supervised", "crop", "flip", "color", "gray", "blur", "rotate", "translate")


class Invariance(Measurement):
    """CKA between two augmented views of the images, per layer and augmentation; class CKA where there are labels.

    Args:
        layers: which layers, as for CKA.
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches it off.
        gram_size: images per Gram matrix; the cost grows with it.
        views: augmentations: own (the method's training views), policies (simclr, supervised) and single operations.
            By default all of them; own is left out where the training views are not known, as of any other module.
    """

    group = "invariance"

    def __init__(
        self,
        layers: str | list[str] = "all",
        every_n_epochs: Epochs | None = None,
        gram_size: GramSize = 64,
        views: Sequence[str] = VIEWS,
    ) -> None:
        check_arguments(Invariance, locals(), self.option(""))
        super().__init__(every_n_epochs)
        self.layers, self.gram_size, self.views = layers, gram_size, tuple(dict.fromkeys(views))

    def check(self, subject: Subject) -> None:
        """The views too.

        Raises:
            UserError: with the option as it was typed.
        """
        super().check(subject)
        for name in self._views_of(subject):
            try:
                subject.view(name)
            except UserError as error:
                reason = str(error).removeprefix("augment: ")
                raise UserError(f"{self.option('views')} [{name}]: {reason}") from error

    def _views_of(self, subject: Subject) -> list[str]:
        """The views that were asked for, or those of the default that are known."""
        return [name for name in self.views if name != "own" or subject.own is not None or self.views != VIEWS]

    def prepare(self, subject: Subject, images: ImageSource) -> None:
        """Intervals of few Gram matrices are warned of."""
        warn_of_few(images, self.gram_size, self.option("gram_size"))

    def requests(self, subject: Subject) -> Sequence[Request]:
        """Clean images for class CKA, which other measurements ask for too, and two augmented views of each policy."""
        names = self.chosen(subject)
        self._depths = subject.depths(names)
        specs = {name: subject.view(name).spec for name in self._views_of(subject)}
        # of views that give the same images, the first one is measured for all
        self._distinct = {name: next(other for other in specs if specs[other] == spec) for name, spec in specs.items()}
        vector = GramVector(self.gram_size)
        self._clean = Request(names, vector)
        distinct = dict.fromkeys(self._distinct.values())
        return [self._clean, *(Request(names, vector, view, draw) for view in distinct for draw in (0, 1))]

    def begin(self, occasion: Occasion) -> None:
        """Fresh sums."""
        layers, device, images = list(self._depths), occasion.subject.device, occasion.images
        self._images = images
        self._invariance = {
            view: InvarianceCKA(layers, self.gram_size).to(device) for view in set(self._distinct.values())
        }
        self._classes = None
        if images.num_classes:
            classes = ClassCKA(layers, images.num_classes, self.gram_size, sizes=images.measure_sizes)
            self._classes = classes.to(device)

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch: all views of it."""
        looks = {(request.view, request.draw): layers for request, layers in reduced.items()}
        gram = first_gram(batch_number, self._images, self.gram_size)
        for view, metric in self._invariance.items():
            metric.update(looks[view, 0], looks[view, 1], gram)
        if self._classes is not None:
            self._classes.update(looks["clean", 0], batch["label"], gram)

    @property
    def metrics(self) -> list[tuple[str, str, InvarianceCKA | ClassCKA]]:
        """Name in the rows, view and sums of all that is measured, in the order of the rows."""
        found: list[tuple[str, str, InvarianceCKA | ClassCKA]]
        found = [("invariance", view, self._invariance[measured]) for view, measured in self._distinct.items()]
        return found if self._classes is None else [*found, ("class_cka", "clean", self._classes)]

    def finish(self, occasion: Occasion) -> Measured:
        """A row for each layer and view, with an error bar from the jackknife over Gram matrices."""
        rows, protocols = [], []
        common = {**occasion.columns, "n": occasion.images.measure_size}
        for name, view, metric in self.metrics:
            protocol = self.protocol(occasion.subject, occasion.images, name, view)
            protocols.append(protocol)
            found = (tensor.reshape(-1).tolist() for tensor in (metric.compute(), *metric.interval()))
            for (layer, depth), value, low, high in zip(self._depths.items(), *found, strict=True):
                bar = {"value": value, "low": low, "high": high}
                place = {"layer": layer, "depth": depth, "view": view}
                rows.append(record(**common, **place, **bar, metric=name, protocol=protocol.hash))
        return Measured(rows, protocols)

    def protocol(self, subject: Subject, images: ImageSource, name: str, view: str) -> Protocol:
        """All that changes the CKA of augmented views, or with the classes."""
        protocol = cka_protocol(images, self.gram_size, subject, {name: view})
        if name == "class_cka" and images.measure_sizes is not None:
            weighed = "one-hot; pairs of images of a class of n_c images count n_c/(n_c - 1) times; no more than "
            weighed += f"{LONELY:.0%} of them may be those of classes of a single image"
            protocol = Protocol({**protocol.what, "classes": weighed})
        return protocol
