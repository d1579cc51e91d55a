"""Layerwise CKA while a network trains: with itself, with its own initialisation, and with a reference.

Protocol: unbiased minibatch CKA with a linear kernel on flattened activations, Gram matrices of ``gram_size``
measurement images in one fixed random order, network in evaluation mode, float32 with products summed in float64.
Initialisation and reference do not move, so their Gram vectors are taken once and kept (a quarter of a MB a layer for
2,048 images): every later moment costs one pass of one network, and all pairs of layers are one matrix product a
batch.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import lightning as L
import torch
from torch import Tensor

from ssl_geometry import __version__
from ssl_geometry.callbacks.measure import Epochs, Findings, Moment, Monitor, Reduced, Request, forward_pass, measuring
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.geometry.cka import DUST, LEAST_BLOCK, MIN_GRAM_SIZE, gram_vector, standing
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.metrics.cka import BLOCKS
from ssl_geometry.models.taps import layer_depths
from ssl_geometry.ranges import at_least, check_arguments
from ssl_geometry.records import Protocol, record
from ssl_geometry.report.moments import Row, curve_rows, pictures, scalars
from ssl_geometry.runs import load_method

logger = logging.getLogger(__name__)

FEW_GRAMS, SMALLER = 3, 16
"""So many Gram matrices give intervals that say little; the size that is proposed instead."""
GramSize = Annotated[int, at_least(MIN_GRAM_SIZE)]


@dataclass(frozen=True)
class GramVector:
    """The reduction that CKA asks of every layer."""

    size: int

    def __call__(self, activations: Tensor) -> Tensor:
        """See :func:`ssl_geometry.geometry.cka.gram_vector`."""
        return gram_vector(activations, self.size)


@dataclass
class FixedNetwork:
    """A network that does not move: its layers, and the Gram vectors of each batch on the host, a row per layer."""

    name: str
    depths: dict[str, float]
    vectors: dict[int, Tensor]
    images: str = ""
    """Which images in which batches: a resumed run may look at others."""

    def batch(self, number: int, device: torch.device) -> dict[str, Tensor]:
        """Layer to Gram vector, as columns of the metric are named, on a device by one copy."""
        rows = self.vectors[number].to(device)
        return {f"{self.name}/{layer}": row for layer, row in zip(self.depths, rows, strict=True)}


class CKAMonitor(Monitor):
    """Layer by layer CKA of the network with itself, with its initialisation, and with a reference network.

    Args:
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches it off.
        layers: which layers: all, blocks, post_residual, residual, stages, head, names, globs, or a list of these.
        gram_size: images in a Gram matrix, at least 4; the cost grows with it.
        reference: a run directory or a checkpoint to compare with as well, such as the supervised twin.
    """

    options = "cka"

    def __init__(
        self,
        every_n_epochs: Epochs = 1,
        layers: str | list[str] = "all",
        gram_size: GramSize = 64,
        reference: str | None = None,
    ) -> None:
        check_arguments(CKAMonitor, locals(), "--cka.")
        super().__init__(every_n_epochs)
        self.layers, self.gram_size, self.reference = layers, gram_size, reference
        self.fixed: dict[str, FixedNetwork] = {}
        self.curves: list[Row] = []  # one row a layer and moment: what the curves over epochs show

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the reference once."""
        if self.every_n_epochs > 0 and self.reference is not None:
            self._measure_reference(trainer, pl_module, self.reference)

    def _measure_reference(self, trainer: L.Trainer, method: L.LightningModule, path: str) -> None:
        name, reference, _ = load_method(path, option="--cka.reference")
        if name in ("init", run_name(trainer)):  # the names tell the networks of the records apart
            name += "-reference"
        reference.to(method.device)
        request = Request(self.layer_names(reference), GramVector(self.gram_size))
        fixed = FixedNetwork(name, layer_depths(reference, request.layers), {})
        with measuring(reference):
            batches = trainer.datamodule.loader("measure")  # type: ignore[attr-defined]
            for count, (_, reduced) in enumerate(forward_pass(reference, batches, [request])):
                number = count * trainer.world_size + trainer.global_rank
                fixed.vectors[number] = torch.stack(list(reduced[request].values())).cpu()
        self.fixed[name] = fixed
        strangers = set(self.layer_names(method)) - set(fixed.depths)
        if any(not layer.startswith("head") for layer in strangers):
            logger.info(f"--cka.reference {name} is of another architecture: curves compare layers of nearest depth")

    def requests(self, method: L.LightningModule) -> Sequence[Request]:
        """The Gram vector of every layer, clean images."""
        self._request = Request(self.layer_names(method), GramVector(self.gram_size))
        self._depths = layer_depths(method, self._request.layers)
        return [self._request]

    def begin(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        """A fresh sum; at the very first moment, the initialisation begins to be kept."""
        self._keep_initial = trainer.global_step == 0
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self._keep_initial:
            warn_of_few(data, self.gram_size, "--cka.gram_size")
        self._grams_in_batch = len(gram_sizes(data.eval_batch_size, data.eval_batch_size, self.gram_size))
        images = f"{data.measure_ids}, batches of {data.eval_batch_size}, Gram matrices of {self.gram_size}"
        if self._keep_initial:
            self.fixed["init"] = FixedNetwork("init", self._depths, {}, images)
        elif "init" in self.fixed and self.fixed["init"].images != images:
            logger.info("the measurement images are others than at the start: CKA with the initialisation ends here")
            del self.fixed["init"]
        columns = [layer for name, fixed in self.fixed.items() for layer in (f"{name}/{key}" for key in fixed.depths)]
        self._metric = LayerwiseCKA(self._request.layers, [*self._request.layers, *columns], self.gram_size).to(
            method.device
        )
        self._images = torch.zeros((), dtype=torch.long, device=method.device)

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """All pairs of layers by one matrix product."""
        rows = reduced[self._request]
        if self._keep_initial:
            self.fixed["init"].vectors[batch_number] = torch.stack(list(rows.values())).cpu()
        cols = dict(rows)
        for fixed in self.fixed.values():
            cols |= fixed.batch(batch_number, batch["index"].device)
        self._metric.update(rows, cols, batch_number * self._grams_in_batch)
        self._images += len(batch["index"])

    def finish(self, trainer: L.Trainer, method: L.LightningModule, moment: Moment) -> Findings:
        """Rows for every pair of layers; curves against initialisation and reference."""
        if self._keep_initial:
            self.fixed["init"].vectors = _over_all_ranks(self.fixed["init"].vectors)
        shape = self._metric.cross.shape[1:]
        matrix = torch.stack([m.reshape(shape) for m in (self._metric.compute(), *self._metric.interval())], 2).cpu()
        images = int(trainer.strategy.reduce(self._images, reduce_op="sum"))
        views = {"clean": method.clean_view.spec}  # type: ignore[union-attr]
        protocol = cka_protocol(trainer.datamodule, self.gram_size, method, views)  # type: ignore[attr-defined]
        run = run_name(trainer)
        common = {
            "run": run,
            "model": run,
            "metric": "cka",
            "view": "clean",
            "split": "measure",
            "epoch": moment.epoch,
            "step": moment.step,
            "n": images,
            "protocol": protocol.hash,
        }
        others = {run: self._depths, **{name: fixed.depths for name, fixed in self.fixed.items()}}
        rows: list[dict[str, Any]] = []
        column = 0
        for other, depths in others.items():
            block = matrix[:, column : column + len(depths)].tolist()
            column += len(depths)
            for layer, line in zip(self._depths, block, strict=True):
                rows += [
                    record(
                        **common,
                        model_other=other,
                        layer=layer,
                        layer_other=layer_other,
                        depth=self._depths[layer],
                        depth_other=depths[layer_other],
                        value=value,
                        low=low,
                        high=high,
                    )
                    for layer_other, (value, low, high) in zip(depths, line, strict=True)
                ]
        self.curves += curve_rows(rows)
        return Findings(rows, scalars(rows), pictures(rows, self.curves), [protocol])

    def state_dict(self) -> dict[str, Any]:
        """The initialisation's Gram vectors and the curves so far: what a resumed run cannot measure again."""
        initial = self.fixed.get("init")
        return {
            "curves": self.curves,
            "initial": None if initial is None else vars(initial),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint left."""
        self.curves = state_dict["curves"]
        if state_dict["initial"] is not None:
            self.fixed["init"] = FixedNetwork(**state_dict["initial"])


def warn_of_few(data: DataModule, gram_size: int, option: str) -> None:
    """Warn where intervals rest on so few Gram matrices that they are wider than all that CKA can be.

    Args:
        data: whose measurement images are seen.
        gram_size: images in a Gram matrix.
        option: that gave it.
    """
    sizes = gram_sizes(data.measure_size, data.eval_batch_size, gram_size)
    count, blocks = len(sizes), _blocks(sizes)
    if blocks > FEW_GRAMS:
        return
    degrees = "no degree" if blocks < 2 else f"{blocks - 1} degree{'s' if blocks > 2 else ''}"
    smaller = _blocks(gram_sizes(data.measure_size, data.eval_batch_size, SMALLER))
    ways = [f"{option} {SMALLER} gives {smaller - 1}"] if smaller > blocks else []
    ways += ["measure more images (--data.measure_size)"] if data.measure_size < data.num_test else []
    logger.warning(
        f"{option} {gram_size}: {count} Gram matri{'x' if count == 1 else 'ces'} of {data.measure_size} images: "
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


def _over_all_ranks(vectors: dict[int, Tensor]) -> dict[int, Tensor]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return vectors
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, vectors)
    return {number: part[number] for part in parts for number in sorted(part)}


def cka_protocol(data: DataModule, gram_size: int, network: L.LightningModule, views: Mapping[str, Any]) -> Protocol:
    """All that changes a CKA, the same live and afterwards.

    Args:
        data: whose measurement images were seen.
        gram_size: images in a Gram matrix.
        network: what was measured; its precision counts.
        views: how the images were seen, by the names that stand in the rows.
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
            "batch": data.eval_batch_size if data.eval_batch_size % gram_size else "of whole Gram matrices",
            "network": f"evaluation mode, {network.dtype}",
            "views": dict(views),
            "images": data.measure_ids,
            "n": data.measure_size,
            "versions": {"ssl_geometry": __version__, "torch": torch.__version__},
        }
    )


def run_name(trainer: L.Trainer) -> str:
    """The run that a trainer belongs to."""
    return str(next((logger.version for logger in trainer.loggers if logger.version is not None), "run"))
