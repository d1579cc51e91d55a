"""Every pair of layers of two networks: CKA with error bars, overlap of nearest neighbours, and the permutation null.

Each network is measured on its own: Gram vectors and neighbours of each layer. Pairs are compared from these, so that
only one network at a time is on the device.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ssl_geometry.geometry.cka import permutation_p, permuted_cka
from ssl_geometry.geometry.overlap import DEGENERATE, NEAREST, mutual_knn, neighbor_ids
from ssl_geometry.measure.cka import cka_rows, gram_sizes
from ssl_geometry.measure.measurement import Measured, Measurement, Occasion
from ssl_geometry.measure.processes import agreeing
from ssl_geometry.measure.requests import GramVector, Reduced, Request, pooled
from ssl_geometry.measure.storage import BatchStorage
from ssl_geometry.measure.subject import Subject
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.records import Protocol, record
from ssl_geometry.report.style import BLOCK

SEED, CHANCE = 0, 0.95
"""Seed of the permutations, and the quantile of the null that a search over layers is compared with."""


@dataclass
class Network:
    """One network of the comparison: its Gram vectors, neighbours and records, but no activations or weights."""

    name: str
    learns_from_labels: bool | None
    """None if unknown or untrained."""
    epoch: int | None
    """Completed epochs; None if untrained."""
    architecture: str
    depths: dict[str, float]
    vectors: list[Tensor]
    """For each batch, the Gram vectors of the layers, (L, P)."""
    neighbors: Tensor
    """Of each layer and image, the k nearest images, (L, N, k)."""
    degenerate: Tensor
    """Which layers are degenerate, (L,): their directions do not vary, so they have no neighbours."""
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The records of its invariance and class CKA, and their jackknife deviations over blocks of images."""
    features: Tensor | None = None
    """Features of the last layer of the backbone, (N, D), if neighbours are to be shown."""


class Kept(Measurement):
    """Gram vectors and neighbours of each layer on clean images, from which pairs of networks are compared.

    Each process stores those of its images. At the end the first one gathers the Gram vectors of all, and the features
    layer by layer.

    Args:
        widths: layer to its pooled features.
        gram_size: images in a Gram matrix.
        k: neighbours.
        shown: layer whose features stay, if any does.
        folder: for files of what does not fit into memory; None keeps all in memory.
    """

    def __init__(
        self, widths: Mapping[str, int], gram_size: int, k: int, shown: str | None = None, folder: Path | None = None
    ) -> None:
        super().__init__()
        self._widths, self._gram_size, self._k, self._shown, self._folder = widths, gram_size, k, shown, folder
        self._clean, self._pooled = (Request(tuple(widths), reduce) for reduce in (GramVector(gram_size), pooled))
        self.vectors: list[Tensor] = []
        self.neighbors = torch.empty(0, 0, 0, dtype=torch.long)
        self.features: Tensor | None = None

    def requests(self, subject: Subject) -> Sequence[Request]:
        """Of clean images."""
        return [self._clean, self._pooled]

    def begin(self, occasion: Occasion) -> None:
        """Allocate storage for this process's images."""
        images = occasion.images
        whole, rest = divmod(images.measure_size, images.eval_batch_size)
        batches = [images.eval_batch_size] * whole + [rest] * bool(rest)
        dtype = torch.promote_types(occasion.subject.dtype, torch.float32)
        self._lengths = [len(self._widths) * gram_pairs(n, n, self._gram_size) for n in batches]
        self._vectors = BatchStorage(self._lengths, dtype, self._folder)
        self._features = {
            layer: BatchStorage([n * width for n in batches], folder=self._folder)
            for layer, width in self._widths.items()
        }

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch, to the host."""
        self._vectors.put(batch_number, torch.stack(list(reduced[self._clean].values())))
        for layer, value in reduced[self._pooled].items():
            self._features[layer].put(batch_number, value)

    def finish(self, occasion: Occasion) -> Measured:
        """Gather on the first process; rows come from pairs of networks."""
        vectors = self._vectors.on_first()
        del self._vectors
        if vectors is not None:
            self.vectors = [part.view(len(self._widths), -1) for part in vectors.split(self._lengths)]
        neighbors = []
        for layer, width in self._widths.items():
            features = self._features.pop(layer).on_first()
            with agreeing():  # the others wait with their next layer
                if features is not None:
                    neighbors.append(neighbor_ids(features.view(-1, width), self._k))
                    if layer == self._shown:
                        self.features = features.view(-1, width)
        if neighbors:
            self.neighbors = torch.stack(neighbors)
        return Measured()


def gram_pairs(images: int, batch: int, gram_size: int) -> int:
    """Pairs of images in all Gram matrices: how many numbers are stored per layer.

    Example:
        >>> gram_pairs(130, 128, 64), gram_pairs(140, 128, 64)
        (4032, 4098)
    """
    return sum(n * (n - 1) // 2 for n in gram_sizes(images, batch, gram_size))


def compare_pair(
    a: Network, b: Network, protocol: Protocol, run: str, gram_size: int, k: int, permutations: int = 0
) -> tuple[Measured, pd.DataFrame]:
    """All pairs of layers of two networks: CKA with error bars, and overlap of neighbours.

    Args:
        a: whose layers are the rows.
        b: whose layers are the columns; may be ``a`` itself.
        protocol: of CKA.
        run: that the rows belong to.
        gram_size: images in a Gram matrix.
        k: neighbours that were kept.
        permutations: of the images, for the null of the most similar layer; 0, or a network compared with itself,
            leaves it out.

    Returns:
        Rows and protocols; and the rows of CKA with their jackknife deviations over blocks of images.
    """
    cka = LayerwiseCKA([f"a/{layer}" for layer in a.depths], [f"b/{layer}" for layer in b.depths], gram_size)
    cka.distributed_available_fn = lambda: False  # the first process has the images of all
    for x, y in zip(a.vectors, b.vectors, strict=True):
        cka.update(
            {f"a/{layer}": row for layer, row in zip(a.depths, x, strict=True)},
            {f"b/{layer}": row for layer, row in zip(b.depths, y, strict=True)},
        )
    undefined = a.degenerate[:, None] | b.degenerate
    overlap = mutual_knn(a.neighbors, b.neighbors).masked_fill(undefined, torch.nan)
    alike = f"no neighbours where directions are within {DEGENERATE} roundings"
    metric = f"mutual kNN, k={k}, {NEAREST}, pooled features; {alike}"
    knn_protocol = Protocol({**protocol.what, "metric": metric})
    common = {
        "run": run,
        "model": a.name,
        "split": "measure",
        "view": "clean",
        "epoch": a.epoch or 0,
        "n": a.neighbors.shape[1],
    }
    rows = cka_rows(cka, a.depths, b.depths, **common, model_other=b.name, protocol=protocol.hash)
    same_pair = ("model_other", "layer", "layer_other", "depth", "depth_other")
    overlaps = [
        record(
            **common,
            **{column: row[column] for column in same_pair},
            metric="mutual_knn",
            value=shared,
            protocol=knn_protocol.hash,
        )
        for row, shared in zip(rows, overlap.flatten().tolist(), strict=True)
    ]
    searched, protocols = [], [protocol, knn_protocol]
    if a is not b and permutations:
        permuted = f"images within Gram matrices, alike in all layers, seed {SEED}; null: quantile {CHANCE:g}"
        what = {"permutations": permutations, "permuted": permuted}
        protocols.append(Protocol({**protocol.what, **what}))
        values = torch.tensor([row["value"] for row in rows], dtype=torch.float64).view(len(a.depths), -1)
        null = permuted_cka(a.vectors, b.vectors, gram_size, permutations, SEED)
        searched = against_chance(a, b, values, null, **common, protocol=protocols[-1].hash)
    deviations = list(cka.deviations().flatten(1).T.numpy())
    return Measured(rows + overlaps + searched, protocols), pd.DataFrame(rows).assign(deviations=deviations)


def against_chance(
    a: Network, b: Network, values: Float[Tensor, "L M"], null: Float[Tensor, "R L M"], **common: Any
) -> list[dict[str, Any]]:
    """The most similar layer of the other network for each layer, and the same search on permuted images.

    Args:
        a: whose layers are the rows.
        b: whose layers are searched: its post-residual ones for a post-residual layer, else all.
        values: their CKA.
        null: CKA of permuted images.
        common: what all records share.

    Returns:
        For each layer of ``a`` three records: ``max_cka``, with the most similar layer; ``max_cka_null``, the 95 %
        quantile of the search on permuted images; ``max_cka_p``, its permutation p-value.
    """
    blocks = torch.tensor([bool(re.fullmatch(BLOCK, layer)) for layer in b.depths])
    rows: list[dict[str, Any]] = []
    for layer, row, draws in zip(a.depths, values, null.unbind(1), strict=True):
        among = row.isfinite() & (blocks if re.fullmatch(BLOCK, layer) and blocks.any() else True)
        if not among.any():
            continue
        best = row.masked_fill(~among, -torch.inf).argmax()
        by_chance = draws[:, among].amax(1)
        other = list(b.depths)[best]
        place = {"model_other": b.name, "layer": layer, "layer_other": other}
        place |= {"depth": a.depths[layer], "depth_other": b.depths[other]}
        found = {
            "max_cka": row[best],
            "max_cka_null": by_chance.quantile(CHANCE),
            "max_cka_p": permutation_p(row[best], by_chance),
        }
        rows += [record(**common, **place, metric=name, value=float(value)) for name, value in found.items()]
    return rows
