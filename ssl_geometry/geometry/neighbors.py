"""The k nearest neighbours of every image, by FAISS: exact, or approximate with its measured recall.

Protocol: the image itself and exact duplicates of it are not neighbours; other duplicates count once.
Cosine similarity is searched, and given, as the distance of unit vectors, and all points are moved by the mean of the
queries: that tells directions apart where cosines all round to 1 (untrained and collapsed networks). Neighbours that
float32 products cannot rank (classes collapsed onto their means) are ranked by float64 differences of the features as
they are given; of points of one block that are equally near, up to float64's rounding, the smaller id is first. The
exact search runs where the features are; see :mod:`ssl_geometry.geometry.exact_search`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.geometry.duplicates import first_rows, row_blocks, row_keys
from ssl_geometry.geometry.exact_search import NEAR, exact_search, faiss, faiss_threads, gpu_resources, has_gpu
from ssl_geometry.geometry.vectors import Rows

Metric = Literal["cosine", "inner", "l2"]
Index = Literal["auto", "exact", "ivf", "hnsw", "cagra"]

RANKING = "float64 differences of the features where float32 cannot rank, ties by number"
"""How neighbours are ranked, for protocols."""
EXACT_ROWS = 200_000  # "auto" searches larger banks on a CPU approximately
SAMPLE = 256  # queries on which the recall of an approximate search is measured
LINKS = 32  # per point of an HNSW graph
PROBED = 8  # one in eight inverted lists is searched


class Neighbors(NamedTuple):
    """Nearest neighbours of N queries, best first."""

    ids: Int64[Tensor, "N k"]
    """Rows of the bank; -1 where there are fewer than k distinct points."""
    values: Float[Tensor, "N k"]
    """1 - cosine, squared distance (l2) or inner product; NaN without a neighbour."""
    recall: float = 1.0
    """Share of the true neighbours that were found: 1 for an exact search, otherwise measured on a sample."""


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
        bank: the points to search; an iterable of blocks, on any device, for a bank that is larger than memory; None
            searches among the queries, each without itself.
        k: number of neighbours.
        metric: "cosine", "inner" (product) or "l2" (squared distances).
        index: "exact", "ivf" (inverted lists) or "hnsw" (a graph), both on the CPU, "cagra" (a graph on a CUDA device;
            needs faiss-gpu-cuvs), or "auto": ivf for banks of more than 200,000 rows on a CPU, otherwise exact.
        duplicates: whether all duplicates of a point, those of the query included, are neighbours. By default they
            count once, and those of the query not at all.

    Returns:
        Ids (rows of the bank; blocks are numbered consecutively), distances or inner products in float32, and the
        recall. Cosines are returned as 1 - cosine, which keeps its digits where all cosines round to 1. If all points
        are equal there are no neighbours: ids are -1.

    Raises:
        ValueError: k that is not between 1 and the number of other points, features that are not finite, zero vectors
            under cosine, shapes that do not fit, an unknown metric or index, or cagra without a GPU or cuVS.

    References:
        Douze et al., *The Faiss library*, 2024.

    Example:
        >>> angle = torch.tensor([0.0, 0.1, 0.3, 1.0])
        >>> found = nearest(torch.stack([angle.cos(), angle.sin()], 1), k=2)
        >>> found.ids.tolist(), round(1 - float(found.values[0, 0]), 4)
        ([[1, 2], [0, 2], [1, 0], [2, 1]], 0.995)
    """
    if metric not in get_args(Metric) or index not in get_args(Index):
        raise ValueError(
            f"metric {metric!r}, index {index!r}: expected cosine, inner or l2; auto, exact, ivf, hnsw or cagra"
        )
    if index == "cagra" and not (features.is_cuda and has_gpu() and hasattr(faiss(), "GpuIndexCagra")):
        raise ValueError("index 'cagra' needs features on a CUDA device and faiss-gpu-cuvs: choose exact, ivf or hnsw")
    itself = bank is None
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    lengths = _lengths(features, metric, "queries", features.shape[-1])
    blocks = [features] if bank is None else [bank] if isinstance(bank, Tensor) else bank
    others = len(features) - 1 if bank is None else len(bank) if isinstance(bank, Tensor) else None
    if k < 1 or (others is not None and k > others):  # before a long search
        raise ValueError(_too_few(k, others))
    # Scaling by a power of two is exact, and keeps squares within the range of float32.
    scale = float(lengths.amax().log2().floor().exp2()) if metric == "l2" and bool(lengths.any()) else 1.0
    divisors = lengths if metric == "cosine" else torch.full_like(lengths, scale)
    center = None if metric == "inner" else _mean(features, divisors)
    divisor = None if metric == "cosine" else scale
    original = Rows(features, divisor, center)
    queries = original.centered(torch.float32)
    # Points of the same key are one point: equal rows, or, where duplicates are neighbours, equal indices.
    number = torch.arange(len(features), device=features.device)
    keys = (number if itself else -1 - number) if duplicates else row_keys(features)
    found, first, seen = None, 0, keys[:0]
    for block in blocks:
        points, raw, block_keys = queries, original, keys
        if not itself:
            block = block.to(features)
            _lengths(block, metric, "bank", features.shape[1])
            raw = Rows(block, divisor, center)
            points = raw.centered(torch.float32)
            block_keys = torch.arange(first, first + len(block), device=block.device) if duplicates else row_keys(block)
        rows = first_rows(block_keys, seen)
        if len(rows):
            some = _others((queries, points), (original, raw), keys, block_keys, rows, k, metric, index)
            some = some._replace(ids=torch.where(some.ids < 0, -1, some.ids + first))
            found = some if found is None else merge([found, some], k, metric == "inner")
        seen = torch.cat([seen, block_keys[rows]])
        first += len(block)
    if found is None or k > first - itself:
        raise ValueError(_too_few(k, first - itself))
    return found._replace(values=found.values * (0.5 if metric == "cosine" else scale**2))


def nearest_directions(
    features: Float[Tensor, "N D"], bank: Float[Tensor, "M D"] | None = None, k: int = 10
) -> Neighbors:
    """Exact search of the k most similar images by cosine; duplicates are neighbours, and zero vectors are allowed.

    The first columns are the result for a smaller k, so one search serves several k.

    Args:
        features: the queries.
        bank: the images to search; None searches among the queries, each without itself.
        k: number of neighbours.

    Returns:
        As in :func:`nearest`; ties are ordered by index. Zero vectors have no direction: they have no neighbours
        (-1, NaN) and are none.

    Raises:
        ValueError: k that is not between 1 and the number of other images, or features that are not finite.

    Example:
        >>> nearest_directions(torch.tensor([[1.0, 0.1], [0.0, 0.0]]), torch.eye(2), k=2).ids
        tensor([[ 0,  1],
                [-1, -1]])
    """
    others = len(features) - 1 if bank is None else len(bank)
    if not 1 <= k <= others:
        raise ValueError(_too_few(k, others))
    asked = (features != 0).any(1).nonzero()[:, 0]
    known = asked if bank is None else (bank != 0).any(1).nonzero()[:, 0]
    ids = torch.full((len(features), k), -1, device=features.device)
    values = torch.full((len(features), k), torch.nan, device=features.device)
    columns = min(k, len(known) - (bank is None))
    if len(asked) and columns > 0:
        points = None if bank is None else bank[known]
        found = nearest(features[asked], points, columns, index="exact", duplicates=True)
        ids[asked, :columns], values[asked, :columns] = known[found.ids], found.values
    return Neighbors(ids, values)


def merge(parts: Sequence[Neighbors], k: int, largest: bool = False) -> Neighbors:
    """Merge neighbour lists of the same queries, such as those of ranks that each hold a part of the bank.

    Args:
        parts: lists whose ids refer to the whole bank. Duplicates in different parts are kept.
        k: number of neighbours to keep.
        largest: whether neighbours have large values (inner product) or small ones (cosine, l2).

    Returns:
        The best k, by their float32 values, ties by id; the recall is the lowest of the parts.

    Example:
        >>> a = Neighbors(torch.tensor([[0, 1]]), torch.tensor([[0.1, 0.9]]))
        >>> b = Neighbors(torch.tensor([[7, 8]]), torch.tensor([[0.5, 0.6]]))
        >>> merge([a, b], k=2).ids
        tensor([[0, 7]])
    """
    ids, values = torch.cat([part.ids for part in parts], 1), torch.cat([part.values for part in parts], 1)
    rank = values.masked_fill(ids < 0, -torch.inf if largest else torch.inf)
    order = ids.argsort(dim=1)  # ties by id, thanks to the stable sort that follows
    order = order.gather(1, rank.gather(1, order).argsort(dim=1, descending=largest, stable=True))[:, :k]
    short = (0, k - order.shape[1])
    ids = F.pad(ids.gather(1, order), short, value=-1)
    values = F.pad(values.gather(1, order), short).masked_fill(ids < 0, torch.nan)
    return Neighbors(ids, values, min(part.recall for part in parts))


def _too_few(k: int, others: int | None) -> str:
    return f"k={k} neighbours need 1 <= k <= {'' if others is None else f'{others}, '}the number of other points"


def _lengths(features: Tensor, metric: Metric, what: str, width: int) -> Float[Tensor, "N 1"]:
    """Lengths to float32 precision; refuses features that cannot be searched."""
    if features.ndim != 2 or features.shape[1] != width or not features.numel():
        raise ValueError(f"{what}: expected (N, {width}) numbers, N at least 1, got shape {tuple(features.shape)}")
    lengths = features.norm(dim=1, keepdim=True)
    if not bool(((lengths > 1e-15) & (lengths < 1e15)).all()):  # squares would leave float32's range
        lengths = features.double().norm(dim=1, keepdim=True)
    if broken := int((~lengths.isfinite()).sum()):
        raise ValueError(f"{what}: {broken} of {len(features)} vectors are not finite")
    if metric == "cosine" and (zero := int((lengths == 0).sum())):
        raise ValueError(f"{what}: {zero} of {len(features)} vectors are zero and have no cosine")
    return lengths


def _mean(features: Tensor, divisors: Tensor) -> Float[Tensor, " D"]:
    """The mean, in float64. No shift changes distances; this one leaves the most digits to differences."""
    weights = 1 / divisors[:, 0].double()
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in row_blocks(features):
        total += weights[part] @ features[part].double()
    return total / len(features)


def _others(
    both: tuple[Tensor, Tensor],
    originals: tuple[Rows, Rows],
    keys: Tensor,
    bank_keys: Tensor,
    rows: Tensor,
    k: int,
    metric: Metric,
    index: Index,
) -> Neighbors:
    """The k nearest among some rows of a bank, without the query itself; -1 and NaN where there are fewer."""
    (queries, bank), (asked, known_rows) = both, originals
    points, raw = (bank[rows], known_rows[rows]) if len(rows) < len(bank) else (bank, known_rows)
    if index == "auto":
        index = "exact" if points.is_cuda or len(points) <= EXACT_ROWS else "ivf"
    n = min(k + 1, len(points))
    if index == "exact":
        values, ids = exact_search(queries, points, n, inner=metric == "inner", rows=(asked, raw))
    else:
        values, ids = _approximate(queries, points, n, metric, index)
    if n <= k:
        values, ids = F.pad(values, (0, k + 1 - n)), F.pad(ids, (0, k + 1 - n), value=-1)
    known, order = bank_keys[rows].sort()
    place = torch.searchsorted(known, keys).clamp_max(len(known) - 1)
    itself = torch.where(known[place] == keys, order[place], len(points))
    # A list contains its query at most once; the columns after it move up.
    column = torch.arange(k, device=ids.device) + (ids[:, :k] == itself[:, None]).cumsum(1)
    values, ids = values.gather(1, column), ids.gather(1, column)
    missing = ids < 0
    if metric != "inner":  # the nearest may be too close for float32 products
        near = (values[:, 0] < NEAR * torch.linalg.vector_norm(queries, dim=1).square()).nonzero()[:, 0]
        apart = asked.divided(near) - raw.divided(ids[near, 0])
        values[near, 0] = apart.square_().sum(1).to(values.dtype)
    found = Neighbors(rows[ids].masked_fill_(missing, -1), values.masked_fill_(missing, torch.nan))
    if index == "exact":
        return found
    sample = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:SAMPLE].to(ids.device)
    some = (queries[sample], bank), (asked[sample], known_rows)
    true = _others(*some, keys[sample], bank_keys, rows, k, metric, "exact").ids
    hits = (true[:, :, None] == found.ids[sample, None]).any(2)
    return found._replace(recall=float(hits[true >= 0].double().mean()))  # NaN if no query has a neighbour


def _approximate(queries: Tensor, points: Tensor, k: int, metric: Metric, index: Index) -> tuple[Tensor, Tensor]:
    library = faiss()
    kind = library.METRIC_INNER_PRODUCT if metric == "inner" else library.METRIC_L2
    if index == "cagra":
        return _by_cagra(queries, points, k, kind)
    n, width = points.shape
    device, points = points.device, points.cpu()
    searcher: Any
    if index == "hnsw":
        searcher = library.IndexHNSWFlat(width, LINKS, kind)
        searcher.hnsw.efSearch = max(64, 2 * k)
    else:
        lists = max(1, min(n // 39, round(4 * n**0.5)))  # FAISS wants 39 training points per list
        searcher = library.index_factory(width, f"IVF{lists},Flat", kind)
        searcher.nprobe = max(1, lists // PROBED)
    with faiss_threads():
        searcher.train(points)
        searcher.add(points)
        values, ids = searcher.search(queries.cpu(), k)
    return values.to(device), ids.to(device)


def _by_cagra(queries: Tensor, points: Tensor, k: int, kind: int) -> tuple[Tensor, Tensor]:
    """A graph that is built and searched on the device (not run on a GPU yet)."""
    device = points.device.index
    library = faiss()
    config, options = library.GpuIndexCagraConfig(), library.SearchParametersCagra()
    config.device = device
    options.itopk_size = max(64, -(-2 * k // 32) * 32)  # size of the candidate list, a multiple of 32
    with torch.cuda.device(device):
        searcher = library.GpuIndexCagra(gpu_resources(device), points.shape[1], kind, config)
        searcher.train(points)
        # FAISS's wrapper for tensors does not accept options.
        values = queries.new_empty(len(queries), k)
        ids = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        tensors = library.contrib.torch_utils
        pointers = [tensors.swig_ptr_from_FloatTensor(x) for x in (queries, values)]
        pointers.append(tensors.swig_ptr_from_IndicesTensor(ids))
        with tensors.using_stream(searcher.getResources()):
            searcher.search_ex(len(queries), pointers[0], library.Float32, k, *pointers[1:], options)
    return values, ids
