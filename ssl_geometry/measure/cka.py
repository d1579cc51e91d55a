"""Layerwise CKA: of a network with itself, with its own initialisation, and with references.

Protocol: unbiased minibatch CKA with a linear kernel on flattened activations, Gram matrices of ``gram_size``
measurement images in one fixed random order, network in evaluation mode, float32 with products summed in float64.
Initialisation and references are frozen, so their Gram vectors are taken once and kept (a quarter of a MB per layer for
2,048 images): every later measurement costs one pass of one network, and all pairs of layers are one matrix product per
batch.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from ssl_geometry import __version__
from ssl_geometry.geometry.gram import DUST, MIN_GRAM_SIZE
from ssl_geometry.geometry.jackknife import LEAST_BLOCK, standing
from ssl_geometry.measure.engine import forward_pass, measuring
from ssl_geometry.measure.measurement import Epochs, ImageSource, Measured, Measurement, Occasion
from ssl_geometry.measure.processes import gathered, is_of_the_first, this_process
from ssl_geometry.measure.requests import GramVector, Reduced, Request
from ssl_geometry.measure.subject import Subject
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.metrics.cka import BLOCKS
from ssl_geometry.ranges import at_least, check_arguments
from ssl_geometry.records import Protocol, record

logger = logging.getLogger(__name__)
logger.addFilter(is_of_the_first)

FEW_GRAMS, SMALLER = 3, 16
"""Up to this number of Gram matrices, intervals are too wide to be useful; the size that the warning proposes."""
INITIAL = "init"
"""Name of the initialisation in the records."""
GramSize = Annotated[int, at_least(MIN_GRAM_SIZE)]


@dataclass
class FrozenReference:
    """A frozen reference: its layers, and the Gram vectors of each batch on the host, one row per layer."""

    name: str
    depths: dict[str, float]
    vectors: dict[int, Tensor]
    images: str = ""
    """The images and batches, which may differ in a resumed run."""

    @property
    def columns(self) -> list[str]:
        """Its layers, with names distinct from those of the compared network."""
        return [f"{self.name}/{layer}" for layer in self.depths]

    def batch(self, number: int, device: torch.device) -> dict[str, Tensor]:
        """Column to Gram vector, moved to the device in one copy."""
        return dict(zip(self.columns, self.vectors[number].to(device), strict=True))


class CKA(Measurement):
    """Layerwise CKA of the network with itself, with its initialisation, and with a reference network.

    Args:
        layers: which layers: all, blocks, post_residual, residual, stages, head, names, globs, or a list of these.
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches it off.
        gram_size: images per Gram matrix; the cost grows with it.
        reference: a run directory or a checkpoint to compare with, such as the supervised counterpart.
    """

    group = "cka"

    def __init__(
        self,
        layers: str | list[str] = "all",
        every_n_epochs: Epochs | None = None,
        gram_size: GramSize = 64,
        reference: str | None = None,
    ) -> None:
        check_arguments(CKA, locals(), self.option(""))
        super().__init__(every_n_epochs)
        self.layers, self.gram_size, self.reference = layers, gram_size, reference
        self.frozen: dict[str, FrozenReference] = {}
        self._may_lack_initial = False  # without another line

    def prepare(self, subject: Subject, images: ImageSource) -> None:
        """Warn if there are few Gram matrices."""
        warn_of_few(images, self.gram_size, self.option("gram_size"))

    def add_reference(self, reference: Subject, images: ImageSource, like: Subject) -> None:
        """Measure a frozen reference once, and compare with it from now on.

        Args:
            reference: the network, on its device, under its name in the records.
            images: the measurement images.
            like: the network that is compared with it.
        """
        request = Request(self.chosen(reference), GramVector(self.gram_size))
        frozen = FrozenReference(reference.name, reference.depths(request.layers), {})
        rank, world_size = this_process()
        with measuring(reference.network):
            for count, (_, reduced) in enumerate(forward_pass(reference, images.loader("measure"), [request])):
                frozen.vectors[count * world_size + rank] = torch.stack(list(reduced[request].values())).cpu()
        self.frozen[frozen.name] = frozen  # each process keeps the batches that it will see again
        unmatched = set(self.chosen(like)) - set(frozen.depths)
        if any(not layer.startswith("head") for layer in unmatched):
            logger.info(f"{reference.name} has another architecture: curves compare layers of the nearest depth")

    def requests(self, subject: Subject) -> Sequence[Request]:
        """The Gram vector of every layer, clean images."""
        self._request = Request(self.chosen(subject), GramVector(self.gram_size))
        self._depths = subject.depths(self._request.layers)
        return [self._request]

    def begin(self, occasion: Occasion) -> None:
        """Reset the metrics; before the first step, start storing the initialisation."""
        self._keep_initial = occasion.is_initialisation
        self._images = data = occasion.images
        images = f"{data.measure_ids}, batches of {data.eval_batch_size}, Gram matrices of {self.gram_size}"
        if self._keep_initial:
            self.frozen[INITIAL] = FrozenReference(INITIAL, self._depths, {}, images)
        elif INITIAL in self.frozen and self.frozen[INITIAL].images != images:
            logger.info(
                "the measurement images, their batches or gram_size have changed since the start: CKA with the "
                "initialisation ends here"
            )
            del self.frozen[INITIAL]
            self._may_lack_initial = True
        elif INITIAL not in self.frozen and occasion.step and not self._may_lack_initial:
            logger.info("CKA with the initialisation is left out: training went on from a checkpoint without it")
            self._may_lack_initial = True
        layers, device = self._request.layers, occasion.subject.device
        self._itself = LayerwiseCKA(layers, gram_size=self.gram_size).to(device)
        self._others = {
            name: LayerwiseCKA(layers, frozen.columns, self.gram_size).to(device)
            for name, frozen in self.frozen.items()
        }

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """Add one batch: all pairs of layers of two networks by one matrix product."""
        rows = reduced[self._request]
        if self._keep_initial:
            self.frozen[INITIAL].vectors[batch_number] = torch.stack(list(rows.values())).cpu()
        gram = first_gram(batch_number, self._images, self.gram_size)
        self._itself.update(rows, first_gram=gram)
        for name, metric in self._others.items():  # one product per network, so that bits do not depend on the others
            metric.update(rows, self.frozen[name].batch(batch_number, batch["index"].device), gram)

    def finish(self, occasion: Occasion) -> Measured:
        """Rows for every pair of layers."""
        if self._keep_initial:
            self.frozen[INITIAL].vectors = gathered(self.frozen[INITIAL].vectors)
        protocol = cka_protocol(occasion.images, self.gram_size, occasion.subject, {"clean": "clean"})
        common = {**occasion.columns, "view": "clean", "n": occasion.images.measure_size, "protocol": protocol.hash}
        rows = cka_rows(self._itself, self._depths, self._depths, model_other=common["model"], **common)
        for name, metric in self._others.items():
            rows += cka_rows(metric, self._depths, self.frozen[name].depths, model_other=name, **common)
        return Measured(rows, [protocol])

    def state_dict(self) -> dict[str, Any]:
        """The initialisation's Gram vectors."""
        initial = self.frozen.get(INITIAL)
        return {} if initial is None else {INITIAL: vars(initial)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the initialisation."""
        if INITIAL in state:
            self.frozen[INITIAL] = FrozenReference(**state[INITIAL])


def cka_rows(
    metric: LayerwiseCKA, depths: Mapping[str, float], depths_other: Mapping[str, float], **common: Any
) -> list[dict[str, Any]]:
    """Rows for every pair of layers of two networks, with their intervals."""
    shape = len(depths), len(depths_other)
    block = torch.stack([found.reshape(shape) for found in (metric.compute(), *metric.interval())], 2)
    return [
        record(
            **common,
            metric="cka",
            layer=layer,
            layer_other=layer_other,
            depth=depths[layer],
            depth_other=depths_other[layer_other],
            value=value,
            low=low,
            high=high,
        )
        for layer, line in zip(depths, block.tolist(), strict=True)
        for layer_other, (value, low, high) in zip(depths_other, line, strict=True)
    ]


def first_gram(batch_number: int, images: ImageSource, gram_size: int) -> int:
    """How many Gram matrices the batches before hold, over all processes."""
    return batch_number * len(gram_sizes(images.eval_batch_size, images.eval_batch_size, gram_size))


def warn_of_few(images: ImageSource, gram_size: int, option: str) -> None:
    """Warn where batches cut Gram matrices, or where intervals of few of them are wider than all that CKA can be."""
    sizes = gram_sizes(images.measure_size, images.eval_batch_size, gram_size)
    if not sizes:
        logger.warning(
            f"{option} {gram_size}: {images.measure_size} images in batches of {images.eval_batch_size} hold no "
            f"Gram matrix, which needs {MIN_GRAM_SIZE} at least, and every CKA is NaN; measure more of them, in larger "
            "batches"
        )
        return
    if images.eval_batch_size < images.measure_size and images.eval_batch_size % gram_size:
        held = dict.fromkeys(gram_sizes(images.eval_batch_size, images.eval_batch_size, gram_size))
        logger.warning(
            f"{option} {gram_size}: a batch of {images.eval_batch_size} images holds Gram matrices of "
            f"{', '.join(map(str, held))} images; set {images.batch_option} to a multiple of {gram_size}"
        )
    count, blocks = len(sizes), _blocks(sizes)
    if blocks > FEW_GRAMS:
        return
    degrees = "no degree" if blocks < 2 else f"{blocks - 1} degree{'s' if blocks > 2 else ''}"
    smaller = _blocks(gram_sizes(images.measure_size, images.eval_batch_size, SMALLER))
    ways = [f"{option} {SMALLER} gives {smaller - 1}"] if smaller > blocks else []
    ways += [f"measure more images ({images.size_option})"] if images.measure_size < images.num_test else []
    logger.warning(
        f"{option} {gram_size}: {count} Gram matri{'x' if count == 1 else 'ces'} of {images.measure_size} images: "
        f"intervals rest on {degrees} of freedom{'; ' * bool(ways)}{', or '.join(ways)}"
    )


def gram_sizes(images: int, batch: int, gram_size: int) -> list[int]:
    """Images in each Gram matrix of images in batches.

    Example:
        >>> gram_sizes(100, 256, 64), gram_sizes(130, 128, 64), gram_sizes(140, 128, 64)
        ([64, 36], [64, 64], [64, 64, 12])
    """
    whole, rest = divmod(images, batch)
    cut = [n for size in (*[batch] * whole, rest) for n in (*[gram_size] * (size // gram_size), size % gram_size)]
    return [n for n in cut if n >= MIN_GRAM_SIZE]


def _blocks(sizes: Sequence[int]) -> int:
    """Blocks that an interval rests on, where there are fewer Gram matrices than blocks."""
    return int(standing(torch.tensor([n * (n - 3) for n in sizes] or [0])).sum())


def cka_protocol(images: ImageSource, gram_size: int, subject: Subject, views: Mapping[str, str]) -> Protocol:
    """All that changes a CKA, the same live and afterwards.

    Args:
        images: whose measurement images were seen.
        gram_size: images in a Gram matrix.
        subject: what was measured; its precision and its views count.
        views: name in the rows to view.
    """
    return Protocol(
        {
            "metric": "CKA, unbiased (HSIC_1), minibatch, linear kernel, flattened activations",
            "gram_size": gram_size,
            "constant": f"Gram matrices within {DUST} roundings",
            "error bars": f"95 %, Student's t on a jackknife over {BLOCKS} blocks of Gram matrices, dealt in turn; "
            f"those of less than {LEAST_BLOCK:g} of the largest join the one before",
            "order": "Gram matrices of consecutive images, which are in one fixed random order",
            # how batches fall into Gram matrices: no matter while they hold whole ones
            "batch": images.eval_batch_size if images.eval_batch_size % gram_size else "of whole Gram matrices",
            "network": f"evaluation mode, {subject.dtype}",
            "views": {name: subject.view(view).spec for name, view in views.items()},
            "images": images.measure_ids,
            "n": images.measure_size,
            "versions": {"ssl_geometry": __version__, "torch": torch.__version__},
        }
    )
