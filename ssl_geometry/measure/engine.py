"""The measuring engine: measurements that are due together share ONE pass over the images.

Each requests what it needs (images, views, layers, reductions); the network runs once per batch and view, and every
measurement receives its part. Live and offline measurements run this code.

The network is measured in evaluation mode (batch norm with its running statistics), in float32 whatever the precision
of training, on images in a fixed random order, distributed over processes by whole batches. A measurement does not
change the network: modes, weights and random number streams are restored.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ssl_geometry.geometry.precision import full_float32
from ssl_geometry.measure.measurement import Measured, Measurement, Occasion
from ssl_geometry.measure.processes import this_process, warned_once
from ssl_geometry.measure.requests import Reduction, Request, Split, pooled
from ssl_geometry.measure.subject import Subject
from ssl_geometry.models.evaluating import evaluating
from ssl_geometry.models.taps import Taps


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
        together: context of the pass, such as :func:`ssl_geometry.measure.processes.agreeing`, in which an error of one
            process becomes an error of all.

    Returns:
        The rows of each measurement, the same on every process.
    """
    return Pass(measurements, occasion).finish(advance, together)


Part = tuple[Split, int | None]
"""A set of images: the first n of a split, or all."""


class Pass:
    """The pass of :func:`measure_together` in parts, which may run at different times if the network does not change.

    A measurement begins with the first part that it requests, so that an abandoned pass leaves those that have not
    begun as they were.

    Args:
        measurements: prepared ones.
        occasion: what is measured, on which images, and when.
    """

    def __init__(self, measurements: Sequence[Measurement], occasion: Occasion) -> None:
        self.occasion = occasion
        self.requests = {item: tuple(item.requests(occasion.subject)) for item in measurements}
        self.remaining = parts_of(request for requests in self.requests.values() for request in requests)
        self._begun: set[Measurement] = set()

    def run(self, part: Part) -> Iterator[Mapping[str, Tensor]]:
        """Run the network over the images of one part, for all that ask for them.

        Yields:
            Each batch of this process, once it was measured.
        """
        self.remaining.remove(part)
        subject = self.occasion.subject
        of_part = {item: [r for r in requests if _part(r) == part] for item, requests in self.requests.items()}
        of_part = {item: requests for item, requests in of_part.items() if requests}
        self._begin(of_part)
        rank, world_size = this_process()
        with measuring(subject.network):
            batches = self.occasion.images.loader(*part)
            union = [request for requests in of_part.values() for request in requests]
            for number, (batch, reduced) in enumerate(forward_pass(subject, batches, union)):
                for measurement, requests in of_part.items():
                    own = {request: reduced[request] for request in requests}
                    measurement.update(number * world_size + rank, own, batch)
                yield batch

    def finish(
        self,
        advance: Callable[[], None] = lambda: None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> list[Measured]:
        """Run the remaining parts; see :func:`measure_together`."""
        self._begin(self.requests)
        with together():
            for part in list(self.remaining):
                for _ in self.run(part):
                    advance()
        with measuring(self.occasion.subject.network), warned_once():
            return [measurement.finish(self.occasion) for measurement in self.requests]

    def _begin(self, measurements: Iterable[Measurement]) -> None:
        for measurement in measurements:
            if measurement not in self._begun:
                measurement.begin(self.occasion)
                self._begun.add(measurement)


def _part(request: Request) -> Part:
    return request.split, request.images


def parts_of(requests: Iterable[Request]) -> list[Part]:
    """The sets of images that requests ask for, each once."""
    return list(dict.fromkeys(map(_part, requests)))


def forward_pass(
    subject: Subject, batches: Iterable[Mapping[str, Tensor]], requests: Sequence[Request]
) -> Iterator[tuple[Mapping[str, Tensor], dict[Request, dict[str, Tensor]]]]:
    """Run the network over images, once per batch and view, and reduce the requested layers.

    Args:
        subject: the network, already in the state to be measured (see :func:`measuring`).
        batches: images, labels and indices.
        requests: of all measurements.

    Yields:
        The batch, and for each request layer to reduced output.
    """
    # (view, draw) -> layer -> reductions, each once for all requests
    wanted: dict[tuple[str, int], dict[str, set[Reduction]]] = defaultdict(lambda: defaultdict(set))
    for request in requests:
        for layer in request.layers:
            wanted[request.view, request.draw][layer].add(request.reduce)
    views, device, dtype = {name: subject.view(name) for name, _ in wanted}, subject.device, subject.dtype
    current = ("", 0)  # view and draw of the forward that is running, for the hooks

    def reduce(layer: str, output: Tensor) -> dict[Reduction, Tensor]:
        return {reduction: reduction(output) for reduction in wanted[current].get(layer, ())}

    with Taps(subject.network, sorted({layer for layers in wanted.values() for layer in layers}), reduce) as taps:
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            taken = {}
            for current in wanted:
                name, draw = current
                seen = views[name](batch["image"], batch["index"], seed=0, epoch=0, view=draw)
                taken[current] = taps(seen.to(dtype))
            yield batch, {r: {layer: taken[r.view, r.draw][layer][r.reduce] for layer in r.layers} for r in requests}


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """The state of a network that is measured; the state before is restored.

    Evaluation mode (:func:`~ssl_geometry.models.evaluating.evaluating`), no gradients, no autocast, no TF32, and cuDNN
    kernels that do not depend on timings.

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
    return {layer: found[layer] for layer in layers}  # a module that runs twice has another entry, name:1
