"""The k nearest neighbours of every image, by FAISS: exact, or approximate with its measured recall.

Protocol: the image itself and exact copies of it are no neighbours, and of equal points one stands for all. Cosine
similarity is searched as the distance of unit vectors about their mean, which tells directions apart where cosines all
round to 1 (untrained and collapsed networks). On a CUDA device the exact search runs there, tensors in and out.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import faiss
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

Metric = Literal["cosine", "inner", "l2"]
Index = Literal["auto", "exact", "ivf", "hnsw"]

EXACT_ROWS = 200_000  # "auto" searches larger banks on a CPU approximately
SAMPLE = 256  # queries whose exact neighbours tell the recall of an approximate search
CLOSE = 1e-3  # unit vectors whose mean is this near to length 1 are told apart in float64
LINKS = 32  # of a point in an HNSW graph


class Neighbors(NamedTuple):
    """Nearest neighbours of N queries, best first."""

    ids: Int64[Tensor, "N k"]
    """Rows of the bank; -1 where there are fewer than k distinct points."""
    values: Float[Tensor, "N k"]
    """Similarity (cosine, inner product), or squared distance (l2); NaN where there is no neighbour."""
    recall: float = 1.0
    """Share of the true neighbours that were found: 1 for an exact search, measured on a sample otherwise."""


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
        bank: where to search, float32; several blocks of a bank that is larger than memory, one after another; None
            searches among the queries, each without itself.
        k: neighbours.
        metric: "cosine", "inner" (product) or "l2".
        index: "exact", "ivf" (inverted lists), "hnsw" (a graph), or "auto": exact but for banks of more than 200,000
            rows on a CPU, which take ivf. Approximate searches run on the CPU.
        duplicates: whether points that are equal are all neighbours, copies of the query among them. By default one
            stands for all, and a copy of the query is none.

    Returns:
        Ids (rows of the bank, of all blocks in a row), similarities or squared distances, and the recall.

    Raises:
        ValueError: k that is not between 1 and the number of other points, features that are not finite, zero vectors
            under cosine, or an unknown metric or index.

    References:
        Douze et al., *The Faiss library*, 2024.

    Example:
        >>> angle = torch.tensor([0.0, 0.1, 0.3, 1.0])
        >>> found = nearest(torch.stack([angle.cos(), angle.sin()], 1), k=2)
        >>> found.ids.tolist(), round(float(found.values[0, 0]), 4)
        ([[1, 2], [0, 2], [1, 0], [2, 1]], 0.995)
    """
    if metric not in ("cosine", "inner", "l2") or index not in ("auto", "exact", "ivf", "hnsw"):
        raise ValueError(f"metric {metric!r}, index {index!r}: expected cosine, inner or l2; auto, exact, ivf or hnsw")
    itself = bank is None
    blocks = [features] if bank is None else [bank] if isinstance(bank, Tensor) else bank
    queries, center = _centered(features, metric)
    keys = None  # a hash of each row, once equal rows are seen
    found, found_keys, first = None, torch.empty(0), 0
    for block in blocks:
        points = queries if itself else _points(block, metric, center, "bank")
        own = torch.arange(len(features), device=features.device) if itself else None
        some = _search(queries, points, k + itself, metric, index)
        several = bank is not None and not isinstance(bank, Tensor)  # copies may be in different blocks
        if not duplicates and (several or _copies_in(some, queries, metric, features, block, own)):
            keys = _keys(features) if keys is None else keys
            block_keys = _keys(block)
            rows = _distinct(block_keys)
            some = _search(queries, points[rows], k + 1, metric, index)
            some = some._replace(ids=rows[some.ids].where(some.ids >= 0, -1))
            some_keys = block_keys[some.ids.clamp_min(0)].where(some.ids >= 0, 0)
            some = some._replace(ids=some.ids.masked_fill(some_keys == keys[:, None], -1))
        else:
            some_keys = torch.zeros_like(some.ids)
            if own is not None:
                some = some._replace(ids=some.ids.masked_fill(some.ids == own[:, None], -1))
        some = some._replace(ids=(some.ids + first).where(some.ids >= 0, -1))
        lists = [(some, some_keys)] if found is None else [(found, found_keys), (some, some_keys)]
        found, found_keys = _best(lists, k, metric == "inner", distinct=not duplicates)  # of equal points the first
        first += len(block)
    others = first - itself
    if found is None or not 1 <= k <= others:
        raise ValueError(f"k={k} neighbours need 1 <= k <= {others}, the number of other points")
    values = 1 - found.values / 2 if metric == "cosine" else found.values
    return found._replace(values=values)


def merge(parts: Sequence[Neighbors], k: int, largest: bool = True) -> Neighbors:
    """The best k of several lists for the same queries, such as those of ranks that each hold a part of the bank.

    Args:
        parts: lists whose ids number the whole bank.
        k: neighbours to keep.
        largest: whether large values are near (cosine, inner product) or small ones (l2).

    Returns:
        The merged lists; the recall is the lowest of the parts'.

    Example:
        >>> a = Neighbors(torch.tensor([[0, 1]]), torch.tensor([[0.9, 0.1]]))
        >>> b = Neighbors(torch.tensor([[7, 8]]), torch.tensor([[0.5, 0.4]]))
        >>> merge([a, b], k=2).ids
        tensor([[0, 7]])
    """
    sign = -1 if largest else 1
    pairs = [(part._replace(values=sign * part.values), part.ids) for part in parts]
    merged, _ = _best(pairs, k, False, distinct=False)
    return merged._replace(values=sign * merged.values)


def _centered(features: Tensor, metric: Metric) -> tuple[Tensor, Tensor | None]:
    """The queries as FAISS is to see them, and the shift by which all points are moved.

    Any shift leaves distances as they are; this one leaves most digits to the differences.
    """
    points = _points(features, metric, None, "queries")
    if metric == "inner":
        return points, None
    center = points.mean(0)
    if metric == "l2":
        return points - center, center
    if float(1 - center.square().sum()) > CLOSE:
        return points.sub_(center), center  # unit vectors are a copy already
    center = F.normalize(features.double(), dim=1).mean(0)
    return _points(features, metric, center, "queries"), center


def _points(features: Tensor, metric: Metric, center: Tensor | None, what: str) -> Tensor:
    """Float32 points, unit vectors for cosine, less the center; in float64 on the way where the center is."""
    points = features.to(torch.float32 if center is None else center.dtype)
    lengths = points.norm(dim=1)
    broken, zero = int((~lengths.isfinite()).sum()), int((lengths == 0).sum())
    if broken or not len(features):
        raise ValueError(f"{what}: {broken} of {len(features)} vectors are not finite")
    if metric == "cosine":
        if zero:
            raise ValueError(f"{what}: {zero} of {len(features)} vectors are zero and have no cosine")
        points = points / lengths[:, None]
    return points.contiguous() if center is None else (points - center).float().contiguous()


def _copies_in(
    found: Neighbors, queries: Tensor, metric: Metric, features: Tensor, bank: Tensor, own: Tensor | None
) -> bool:
    """Whether a list holds a copy of its query, or two equal points: these have equal values but for rounding."""
    ids, values = found.ids, found.values
    there = ids >= 0 if own is None else (ids >= 0) & (ids != own[:, None])
    squares = queries.square().sum(1, keepdim=True)
    rounding = 64 * torch.finfo(values.dtype).eps * (squares + values.abs())
    of_a_copy = squares if metric == "inner" else 0
    row, place = (there & ((values - of_a_copy).abs() <= rounding)).nonzero(as_tuple=True)
    if _any_equal(features, row, bank, ids[row, place]):
        return True
    for step in (1, 2):
        gap = (values[:, step:] - values[:, :-step]).abs()
        row, place = (there[:, step:] & there[:, :-step] & (gap <= rounding[:, step:])).nonzero(as_tuple=True)
        if _any_equal(bank, ids[row, place], bank, ids[row, place + step]):
            return True
    return False


def _any_equal(x: Tensor, rows: Tensor, y: Tensor, columns: Tensor) -> bool:
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        if bool((x[rows[part]] == y[columns[part]]).all(1).any()):
            return True
    return False


def _keys(features: Tensor) -> Int64[Tensor, " N"]:
    """Equal for equal rows; for others almost never (a 64-bit hash)."""
    bits = (features.float() + 0.0).contiguous().view(torch.int32).long()  # -0 becomes 0
    odd = torch.randint(2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    total = torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
    for part, factor in zip(bits.split(4096, dim=1), odd.to(bits.device).split(4096), strict=True):
        total += (part * factor).sum(1)
    return total


def _distinct(keys: Int64[Tensor, " N"]) -> Int64[Tensor, " n"]:
    """The first row of each set of equal ones."""
    values, inverse = keys.unique(return_inverse=True)
    firsts = torch.full((len(values),), len(keys), device=keys.device)
    firsts.scatter_reduce_(0, inverse, torch.arange(len(keys), device=keys.device), "amin")
    return firsts.sort().values


def _search(queries: Tensor, points: Tensor, k: int, metric: Metric, index: Index) -> Neighbors:
    """Ids, and inner products or squared distances; -1 and NaN where the points run out."""
    wanted, k = k, min(k, len(points))
    kind = faiss.METRIC_INNER_PRODUCT if metric == "inner" else faiss.METRIC_L2
    if index == "auto":
        index = "exact" if points.is_cuda or len(points) <= EXACT_ROWS else "ivf"
    if index == "exact" and points.is_cuda:
        values, ids = faiss.knn_gpu(_resources(), queries, points, k, metric=kind, device=points.device.index)
        found = Neighbors(ids, values)
    else:
        with _threads():
            search = _exact if index == "exact" else partial(_approximate, index=index)
            found = search(queries.cpu(), points.cpu(), k, kind)
    missing = (0, wanted - k)
    ids = F.pad(found.ids.to(points.device), missing, value=-1)
    values = F.pad(found.values.to(points.device), missing, value=torch.nan)
    return found._replace(ids=ids, values=values)


def _exact(queries: Tensor, points: Tensor, k: int, kind: Any) -> Neighbors:
    values, ids = faiss.knn(queries.numpy(), points.numpy(), k, metric=kind)
    return Neighbors(torch.from_numpy(ids), torch.from_numpy(values))


def _approximate(queries: Tensor, points: Tensor, k: int, kind: Any, index: str) -> Neighbors:
    n, width = points.shape
    searcher: Any
    if index == "hnsw":
        searcher = faiss.IndexHNSWFlat(width, LINKS, kind)
        searcher.hnsw.efSearch = max(64, 2 * k)
    else:
        lists = max(1, min(n // 39, round(4 * n**0.5)))  # FAISS wants 39 training points a list
        searcher = faiss.index_factory(width, f"IVF{lists},Flat", kind)
        searcher.nprobe = max(1, lists // 8)
        searcher.train(points.numpy())
    searcher.add(points.numpy())
    values, ids = searcher.search(queries.numpy(), k)
    sample = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    true = _exact(queries[sample], points, k, kind).ids
    found = torch.from_numpy(ids)
    recall = float((found[sample, :, None] == true[:, None]).any(1).double().mean())
    return Neighbors(found, torch.from_numpy(values), recall)


def _best(
    parts: Sequence[tuple[Neighbors, Tensor]], k: int, largest: bool, distinct: bool
) -> tuple[Neighbors, Int64[Tensor, "N k"]]:
    """The best k of the lists laid side by side; of equal keys only the first where ``distinct``."""
    ids, keys = (torch.cat(columns, 1) for columns in zip(*((part.ids, key) for part, key in parts), strict=True))
    values = torch.cat([part.values for part, _ in parts], 1)
    if len(parts) > 1:
        rank = values.masked_fill(ids < 0, -torch.inf if largest else torch.inf)
        order = rank.argsort(dim=1, descending=largest, stable=True)
        ids, keys, values = (column.gather(1, order) for column in (ids, keys, values))
    gone = ids < 0
    if distinct and len(parts) > 1:
        for start in range(0, len(ids), 1024):
            rows = slice(start, start + 1024)
            same = (keys[rows, :, None] == keys[rows, None]) & ~gone[rows, None]
            gone[rows] |= same.tril(-1).any(2)
    order = gone.int().argsort(dim=1, stable=True)[:, :k]
    ids, keys, values, gone = (column.gather(1, order) for column in (ids, keys, values, gone))
    if ids.shape[1] < k:
        pad = (0, k - ids.shape[1])
        ids, keys, values, gone = (F.pad(ids, pad), F.pad(keys, pad), F.pad(values, pad), F.pad(gone, pad, value=True))
    recall = min(part.recall for part, _ in parts)
    return Neighbors(ids.masked_fill(gone, -1), values.masked_fill(gone, torch.nan), recall), keys


@contextmanager
def _threads() -> Iterator[None]:
    """FAISS uses as many threads as torch does, from the same OpenMP pool, and is left as it was."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@cache
def _resources() -> Any:
    import faiss.contrib.torch_utils  # lets FAISS take and give CUDA tensors

    return faiss.StandardGpuResources()
