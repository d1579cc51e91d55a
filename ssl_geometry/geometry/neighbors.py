"""The k nearest neighbours of every image, by FAISS: exact, or approximate with its measured recall.

Protocol: the image itself and exact copies of it are no neighbours, and of equal points the first stands for all.
Cosine similarity is searched, and told, as the distance of unit vectors, and all points are moved by the mean of the
queries: that tells directions apart where cosines all round to 1 (untrained and collapsed networks). Neighbours nearer
than float32 products can rank (classes collapsed onto their means) are searched again in float64. Of points at
distances that come out equal the smaller id is first (cosine and l2, on a CPU). On a CUDA device the exact search runs
there, tensors in and out.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import faiss
import faiss.contrib.torch_utils  # FAISS takes and gives tensors
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

Metric = Literal["cosine", "inner", "l2"]
Index = Literal["auto", "exact", "ivf", "hnsw"]

EXACT_ROWS = 200_000  # "auto" searches larger banks on a CPU approximately
SAMPLE = 256  # queries whose exact neighbours tell the recall of an approximate search
LINKS = 32  # of a point in an HNSW graph
NEAR = 1e-3  # squared distance, in squared lengths, that float32 products get wrong by up to 0.1 %
GPU_MAX_K = 2048  # FAISS keeps no longer lists on a GPU
GPU_WORKSPACE = 2**28  # bytes; FAISS would take 1.5 GB, which training may not have left


class Neighbors(NamedTuple):
    """Nearest neighbours of N queries, best first."""

    ids: Int64[Tensor, "N k"]
    """Rows of the bank; -1 where there are fewer than k distinct points."""
    values: Float[Tensor, "N k"]
    """1 - cosine, squared distance (l2) or inner product; NaN where there is no neighbour."""
    recall: float = 1.0
    """Share of the true neighbours that were found: 1 for an exact search, measured on a sample otherwise."""


@torch.no_grad()
def nearest(
    features: Float[Tensor, "N D"],
    bank: Float[Tensor, "M D"] | Iterable[Float[Tensor, "m D"]] | None = None,
    k: int = 50,
    *,
    metric: Metric = "cosine",
    index: Index = "auto",
    duplicates: bool = False,
) -> Neighbors:
    """The k nearest points of a bank for every query.

    Args:
        features: the queries.
        bank: where to search; several blocks of a bank that is larger than memory, one after another, from any device;
            None searches among the queries, each without itself.
        k: neighbours.
        metric: "cosine", "inner" (product) or "l2".
        index: "exact", "ivf" (inverted lists), "hnsw" (a graph), or "auto": exact but for banks of more than 200,000
            rows on a CPU, which take ivf. Approximate searches run on the CPU.
        duplicates: whether points that are equal are all neighbours, copies of the query among them. By default one
            stands for all, and a copy of the query is none.

    Returns:
        Ids (rows of the bank, of all blocks in a row), distances or inner products in float32, and the recall. Cosines
        are told as 1 - cosine, which keeps its digits where all cosines round to 1. Where all points are equal nothing
        has a neighbour: ids are -1.

    Raises:
        ValueError: k that is not between 1 and the number of other points, features that are not finite, zero vectors
            under cosine, shapes that do not fit, or an unknown metric or index.

    References:
        Douze et al., *The Faiss library*, 2024.

    Example:
        >>> angle = torch.tensor([0.0, 0.1, 0.3, 1.0])
        >>> found = nearest(torch.stack([angle.cos(), angle.sin()], 1), k=2)
        >>> found.ids.tolist(), round(1 - float(found.values[0, 0]), 4)
        ([[1, 2], [0, 2], [1, 0], [2, 1]], 0.995)
    """
    if metric not in get_args(Metric) or index not in get_args(Index):
        raise ValueError(f"metric {metric!r}, index {index!r}: expected cosine, inner or l2; auto, exact, ivf or hnsw")
    itself = bank is None
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    lengths = _lengths(features, metric, "queries", features.shape[-1])
    blocks = [features] if bank is None else [bank] if isinstance(bank, Tensor) else bank
    others = len(features) - 1 if bank is None else len(bank) if isinstance(bank, Tensor) else None
    if k < 1 or (others is not None and k > others):  # before a long search
        raise ValueError(_too_few(k, others))
    # A power of two changes no digit, and keeps squares within float32.
    scale = float(lengths.amax().log2().floor().exp2()) if metric == "l2" and bool(lengths.any()) else 1.0

    def divisors(lengths: Tensor) -> Tensor:
        return lengths if metric == "cosine" else torch.full_like(lengths, scale)

    center = None if metric == "inner" else _mean(features, divisors(lengths))
    queries = _points(features, divisors(lengths), center)
    # Points of the same key are the same point: of equal bits, or of the same number where copies count.
    number = torch.arange(len(features), device=features.device)
    keys = (number if itself else -1 - number) if duplicates else _keys(features)
    found, first, seen = None, 0, keys[:0]
    for block in blocks:
        points, block_keys = queries, keys
        if not itself:
            block = block.to(features)
            points = _points(block, divisors(_lengths(block, metric, "bank", features.shape[1])), center)
            block_keys = torch.arange(first, first + len(block), device=block.device) if duplicates else _keys(block)
        rows = _new(block_keys, seen)
        if len(rows):
            some = _others(queries, keys, points, block_keys, rows, k, metric, index)
            some = some._replace(ids=torch.where(some.ids < 0, -1, some.ids + first))
            found = some if found is None else merge([found, some], k, metric == "inner")
        seen = torch.cat([seen, block_keys[rows]])
        first += len(block)
    if found is None or k > first - itself:
        raise ValueError(_too_few(k, first - itself))
    return found._replace(values=found.values * (0.5 if metric == "cosine" else scale**2))


def merge(parts: Sequence[Neighbors], k: int, largest: bool = False) -> Neighbors:
    """The best k of several lists for the same queries, such as those of ranks that each hold a part of the bank.

    Args:
        parts: lists whose ids number the whole bank. Copies in different parts stay.
        k: neighbours to keep.
        largest: whether large values are near (inner product) or small ones (cosine, l2).

    Returns:
        The merged lists, of equally near points the smaller id first; the recall is the lowest of the parts'.

    Example:
        >>> a = Neighbors(torch.tensor([[0, 1]]), torch.tensor([[0.1, 0.9]]))
        >>> b = Neighbors(torch.tensor([[7, 8]]), torch.tensor([[0.5, 0.6]]))
        >>> merge([a, b], k=2).ids
        tensor([[0, 7]])
    """
    ids, values = torch.cat([part.ids for part in parts], 1), torch.cat([part.values for part in parts], 1)
    rank = values.masked_fill(ids < 0, -torch.inf if largest else torch.inf)
    order = ids.argsort(dim=1)  # the smaller id first, where the stable sort that follows finds them equal
    order = order.gather(1, rank.gather(1, order).argsort(dim=1, descending=largest, stable=True))[:, :k]
    short = (0, k - order.shape[1])
    ids = F.pad(ids.gather(1, order), short, value=-1)
    values = F.pad(values.gather(1, order), short).masked_fill(ids < 0, torch.nan)
    return Neighbors(ids, values, min(part.recall for part in parts))


def _too_few(k: int, others: int | None) -> str:
    return f"k={k} neighbours need 1 <= k <= {'' if others is None else f'{others}, '}the number of other points"


def _lengths(features: Tensor, metric: Metric, what: str, width: int) -> Float[Tensor, "N 1"]:
    """Refuses what cannot be searched."""
    if features.ndim != 2 or features.shape[1] != width or not features.numel():
        raise ValueError(f"{what}: expected (N, {width}) numbers, N at least 1, got shape {tuple(features.shape)}")
    # Float32 will do: the error of a length moves a unit vector across all differences of near ones.
    lengths = features.norm(dim=1, keepdim=True)
    if not bool(((lengths > 1e-15) & (lengths < 1e15)).all()):  # but squares must not leave its range
        lengths = features.double().norm(dim=1, keepdim=True)
    if broken := int((~lengths.isfinite()).sum()):
        raise ValueError(f"{what}: {broken} of {len(features)} vectors are not finite")
    if metric == "cosine" and (zero := int((lengths == 0).sum())):
        raise ValueError(f"{what}: {zero} of {len(features)} vectors are zero and have no cosine")
    return lengths


def _mean(features: Tensor, divisors: Tensor) -> Float[Tensor, " D"]:
    """About the mean. Any shift leaves distances as they are; this one leaves most digits to the differences."""
    return (features.T @ (1 / divisors[:, 0]).to(features.dtype)).double() / len(features)


def _points(features: Tensor, divisors: Tensor, center: Tensor | None) -> Float[Tensor, "N D"]:
    """The points as FAISS is to see them: float32, differences taken in float64."""
    if center is None:
        return features.float().contiguous()
    points = torch.empty(features.shape, dtype=torch.float32, device=features.device)
    for part in _parts(features):
        points[part] = features[part].double() / divisors[part] - center
    return points


def _keys(features: Tensor) -> Int64[Tensor, " N"]:
    """Equal for equal rows; for others almost never (a 64-bit hash)."""
    size = 8 // features.itemsize  # numbers in 64 bits
    words = -(-features.shape[1] // size)
    odd = torch.randint(2**62, (words,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    odd = odd.to(features.device)
    keys = []
    for part in _parts(features):
        rows = F.pad(features[part] + 0.0, (0, size * words - features.shape[1]))  # -0 becomes 0
        bits = rows.contiguous().view(torch.int64)
        keys.append(((bits ^ (bits >> 32) ^ (bits >> 16)) * odd).sum(1))  # the lower bits of small integers are 0
    return torch.cat(keys)


def _parts(features: Tensor) -> Iterator[slice]:
    """Few rows at once: on a CPU they stay in the cache, and below what torch spreads over threads."""
    step = max(1, (2**24 if features.is_cuda else 2**14) // features.shape[1])
    return (slice(start, start + step) for start in range(0, len(features), step))


def _new(keys: Int64[Tensor, " M"], seen: Int64[Tensor, " S"]) -> Int64[Tensor, " m"]:
    """The first row of each key that was not seen before."""
    values, inverse = keys.unique(return_inverse=True)
    firsts = torch.full((len(values),), len(keys), device=keys.device)
    firsts.scatter_reduce_(0, inverse, torch.arange(len(keys), device=keys.device), "amin")
    return firsts[~torch.isin(values, seen)].sort().values


def _others(
    queries: Tensor, keys: Tensor, bank: Tensor, bank_keys: Tensor, rows: Tensor, k: int, metric: Metric, index: Index
) -> Neighbors:
    """The k nearest of some rows of a bank, not the query itself; -1 and NaN where they run out."""
    points = bank[rows] if len(rows) < len(bank) else bank
    if index == "auto":
        index = "exact" if points.is_cuda or len(points) <= EXACT_ROWS else "ivf"
    n = min(k + 1, len(points))
    values, ids = (_exact if index == "exact" else _approximate)(queries, points, n, metric, index)
    if n <= k:
        values, ids = F.pad(values, (0, k + 1 - n)), F.pad(ids, (0, k + 1 - n), value=-1)
    known, order = bank_keys[rows].sort()
    place = torch.searchsorted(known, keys).clamp_max(len(known) - 1)
    itself = torch.where(known[place] == keys, order[place], len(points))
    # A list holds its query once at most: from there on, columns move up.
    column = torch.arange(k, device=ids.device) + (ids[:, :k] == itself[:, None]).cumsum(1)
    values, ids = values.gather(1, column), ids.gather(1, column)
    missing = ids < 0
    if metric != "inner":  # the nearest may be too near for float32 products where no other is
        near = (values[:, 0] < NEAR * _squares(queries)).nonzero()[:, 0]
        values[near, 0] = (queries[near].double() - points[ids[near, 0]]).square().sum(1).to(values.dtype)
    found = Neighbors(rows[ids].masked_fill_(missing, -1), values.masked_fill_(missing, torch.nan))
    if index == "exact":
        return found
    sample = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:SAMPLE].to(ids.device)
    true = _others(queries[sample], keys[sample], bank, bank_keys, rows, k, metric, "exact").ids
    hits = (true[:, :, None] == found.ids[sample, None]).any(2)
    return found._replace(recall=float(hits[true >= 0].double().mean()))  # NaN where nobody has a neighbour


def _exact(queries: Tensor, points: Tensor, k: int, metric: Metric, _: Index) -> tuple[Tensor, Tensor]:
    kind = faiss.METRIC_INNER_PRODUCT if metric == "inner" else faiss.METRIC_L2
    if points.is_cuda and k <= GPU_MAX_K:
        with torch.cuda.device(points.device):  # whose stream FAISS joins
            resources = faiss.StandardGpuResources()  # not kept: training wants its memory back
            resources.setTempMemory(GPU_WORKSPACE)
            values, ids = faiss.knn_gpu(resources, queries, points, k, metric=kind, device=points.device.index)
    else:
        with _threads():
            values, ids = faiss.knn(queries.cpu(), points.cpu(), k, metric=kind)
        values, ids = values.to(points.device), ids.to(points.device)
    if metric != "inner":
        _rank_in_float64(queries, points, values, ids)
    return values, ids


def _rank_in_float64(queries: Tensor, points: Tensor, values: Tensor, ids: Tensor) -> None:
    """Search again, in place, for queries whose neighbours are too near for |x|² + |y|² - 2xy in float32."""
    second = values[:, min(1, values.shape[1] - 1)]  # the first may be the query itself
    rows = (second < NEAR * _squares(queries)).nonzero()[:, 0]
    if not len(rows):
        return
    wide = points.double()
    half = wide.square().sum(1) / 2
    for part in rows.split(max(1, 2**24 // len(points))):
        query = queries[part].double()
        near, ids[part] = (query @ wide.T).sub_(half).topk(values.shape[1], dim=1)
        values[part] = (query.square().sum(1, keepdim=True) - 2 * near).clamp_min(0).to(values.dtype)


def _squares(points: Tensor) -> Float[Tensor, " N"]:
    return torch.linalg.vector_norm(points, dim=1).square()


def _approximate(queries: Tensor, points: Tensor, k: int, metric: Metric, index: Index) -> tuple[Tensor, Tensor]:
    kind = faiss.METRIC_INNER_PRODUCT if metric == "inner" else faiss.METRIC_L2
    n, width = points.shape
    device, points = points.device, points.cpu()
    searcher: Any
    if index == "hnsw":
        searcher = faiss.IndexHNSWFlat(width, LINKS, kind)
        searcher.hnsw.efSearch = max(64, 2 * k)
    else:
        lists = max(1, min(n // 39, round(4 * n**0.5)))  # FAISS wants 39 training points a list
        searcher = faiss.index_factory(width, f"IVF{lists},Flat", kind)
        searcher.nprobe = max(1, lists // 8)
    with _threads():
        searcher.train(points)
        searcher.add(points)
        values, ids = searcher.search(queries.cpu(), k)
    return values.to(device), ids.to(device)


@contextmanager
def _threads() -> Iterator[None]:
    """FAISS uses as many threads as torch does, and is left as it was."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
