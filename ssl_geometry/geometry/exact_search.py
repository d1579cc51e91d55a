"""Exact search of the k nearest points, with the faster one of FAISS and torch.

Protocol: points and their products are float32, without TF32 or autocast. Neighbours that float32 products cannot order
are ordered by float64 differences of the rows that the points were rounded from, and ties within float64 rounding by
id. All backends therefore give the same neighbours, and protocols do not name the backend.

FAISS is imported only here, at the first search, with the BLAS kernels of this CPU.
"""

import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy  # noqa: F401 - its own OpenBLAS is loaded before the kernels of FAISS's are chosen
import torch
from jaxtyping import Float, Int64
from threadpoolctl import threadpool_info
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.geometry.precision import full_float32
from ssl_geometry.geometry.vectors import Rows

__all__ = [
    "backend",
    "exact_search",
    "faiss",
    "faiss_blas",
    "faiss_threads",
    "gpu_resources",
    "has_gpu",
    "kernels",
    "knows_cpu",
]

Backend = Literal["faiss", "faiss-gpu", "torch"]

NEAR = 1e-3  # squared distance, in squared lengths, below which float32 products can be off by more than 0.1 %
SPARE = 2  # additional neighbours: almost always one of them is farther away than float32 errors reach
ERROR = {"cpu": 8.0, "cuda": 32.0}
"""Largest error of a float32 distance |x|² + |y|² - 2xy, in units of eps (|x|² + |y|²).

On CPUs at most 5.4 was measured, for 2 to 8,192 features (benchmarks/results/neighbors.md). BLAS sums some hundreds of
products there before it rounds a block; kernels of a GPU may sum all in one row, and are allowed four times as much.
"""
ROUNDED = 2.0  # in the same units: the change of a distance when both points are rounded to float32
TIE = 8 * torch.finfo(torch.float64).eps  # relative difference of float64 distances that is rounding
TORCH_FROM_K = 50  # users measured torch's product and top-k to be faster than FAISS on CUDA from this k on
PRODUCTS = {"cpu": 2**24, "cuda": 2**27}  # float32 products of one block: 64 and 512 MiB
GPU_WORKSPACE = 2**28  # bytes that FAISS keeps on each GPU it searches on (its default is 1.5 GB)
GPU_ROOM = 2 * GPU_WORKSPACE  # free bytes needed before it starts: FAISS aborts if cuBLAS has no memory
MODERN = {"Haswell", "Zen", "SkylakeX", "Cooperlake", "SapphireRapids"}  # OpenBLAS's kernels for x86 with AVX2 or more


def kernels(machine: str, cpuinfo: str) -> str | None:
    r"""The fastest OpenBLAS kernels for a CPU, by its flags.

    OpenBLAS chooses by family and model, and takes kernels of 2004 (Prescott) or 2007 (Barcelona) for newer CPUs
    than itself: with the OpenBLAS of FAISS's wheels (0.3.15) exact search on a Zen 5 takes 4.4 times as long.

    Args:
        machine: architecture, from :func:`platform.machine`.
        cpuinfo: text of /proc/cpuinfo.

    Returns:
        A value of OPENBLAS_CORETYPE; None to leave the choice to OpenBLAS.

    Example:
        >>> kernels("x86_64", "vendor_id : AuthenticAMD\nflags : sse4_2 fma avx2")
        'Zen'
    """
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if machine.lower() not in ("x86_64", "amd64") or flags is None:
        return None
    known = set(flags[1].split())
    if known >= {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"}:
        return "SkylakeX"  # also on AMD: 1.9 s on a Zen 5, instead of 3.6 with Zen's kernels
    if known >= {"avx2", "fma"}:
        return "Zen" if re.search(r"^vendor_id\s*:\s*AuthenticAMD", cpuinfo, re.MULTILINE) else "Haswell"
    return None


@contextmanager
def _kernels_of_this_cpu() -> Iterator[None]:
    """Choose the kernels of the OpenBLAS that is loaded inside: FAISS's, as NumPy's is loaded already."""
    name = "OPENBLAS_CORETYPE"
    info = Path("/proc/cpuinfo")
    chosen = kernels(platform.machine(), info.read_text(errors="replace", encoding="utf-8")) if info.is_file() else None
    if chosen is None or name in os.environ:
        yield
        return
    os.environ[name] = chosen
    try:
        yield
    finally:
        del os.environ[name]


@cache
def faiss() -> Any:
    """The FAISS module, imported on first use, as the import takes a third of a second."""
    with _kernels_of_this_cpu():
        import faiss
        import faiss.contrib.torch_utils  # FAISS takes and gives tensors
    return faiss


@cache
def faiss_blas() -> tuple[str, str] | None:
    """Version and kernels of FAISS's own OpenBLAS; None where it uses another library."""
    faiss()
    for library in threadpool_info():
        if library["internal_api"] == "openblas" and "faiss" in library["filepath"]:
            return library["version"], library["architecture"]
    return None


def knows_cpu() -> bool:
    """Whether FAISS's BLAS has kernels for this generation of CPUs."""
    blas = faiss_blas()
    if blas is None:
        return True
    return blas[1] in MODERN if platform.machine().lower() in ("x86_64", "amd64") else blas[1] != "armv8"


def has_gpu() -> bool:
    """Whether this FAISS was built for GPUs (faiss-cpu was not)."""
    return hasattr(faiss(), "StandardGpuResources")


def backend(device: torch.device, k: int) -> Backend:
    """Where exact searches run.

    Args:
        device: of the points.
        k: neighbours.

    Returns:
        On a CPU FAISS, or torch if FAISS's OpenBLAS has no kernels for it. On CUDA FAISS for k below 50; torch for
        larger k, and where FAISS has no GPU support.
    """
    if device.type == "cuda":
        return "faiss-gpu" if has_gpu() and k < TORCH_FROM_K else "torch"
    return "faiss" if knows_cpu() else "torch"


@cache
def gpu_resources(device: int) -> Any:
    """FAISS's resources on one GPU, created once (0.1 to 0.2 s): 256 MiB there, no pinned memory on the host.

    Raises:
        torch.OutOfMemoryError: no memory for them, even after torch's cache is emptied.
    """
    if torch.cuda.mem_get_info(device)[0] < GPU_ROOM:  # FAISS does not allocate from torch's cache
        torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < GPU_ROOM:
        raise torch.OutOfMemoryError(
            f"GPU {device} has {free / 2**20:.0f} MiB free, FAISS needs {GPU_ROOM / 2**20:.0f}"
        )
    resources = faiss().StandardGpuResources()
    resources.setTempMemory(GPU_WORKSPACE)
    resources.setPinnedMemory(0)  # only needed for copies from the host
    return resources


def exact_search(
    queries: Float[Tensor, "N D"],
    points: Float[Tensor, "M D"],
    k: int,
    *,
    inner: bool = False,
    rows: tuple[Rows, Rows] | None = None,
) -> tuple[Float[Tensor, "N k"], Int64[Tensor, "N k"]]:
    """The k nearest points of every query, ties ordered by id.

    Args:
        queries: float32, on the device of the points.
        points: float32, of lengths similar to those of the queries.
        k: number of neighbours, at most M.
        inner: search by largest inner product instead of smallest squared distance.
        rows: the vectors that queries and points were rounded from, to decide where float32 cannot.

    Returns:
        Squared distances or inner products, float32, and ids.

    Example:
        >>> exact_search(torch.tensor([[0.0]]), torch.tensor([[2.0], [1.0], [-1.0]]), k=2)
        (tensor([[1., 1.]]), tensor([[1, 2]]))
    """
    n = min(k + SPARE, len(points))
    search = {"faiss": _by_faiss, "faiss-gpu": _by_faiss_gpu, "torch": _by_torch}[backend(points.device, k)]
    values, ids = search(queries, points, n, inner)
    rows = rows or (Rows(queries), Rows(points))
    values, ids = _settle(queries, points, rows, -values if inner else values, ids, k, inner)
    return (-values if inner else values)[:, :k], ids[:, :k]


def _by_faiss(queries: Tensor, points: Tensor, k: int, inner: bool) -> tuple[Tensor, Tensor]:
    with faiss_threads():
        values, ids = faiss().knn(queries.cpu(), points.cpu(), k, metric=_metric(inner))
    return values.to(points.device), ids.to(points.device)


def _by_faiss_gpu(queries: Tensor, points: Tensor, k: int, inner: bool) -> tuple[Tensor, Tensor]:
    """Search on the GPU; if its memory is full, once more after emptying torch's cache, then on the CPU.

    Not run on a GPU whose memory is full; a test simulates failing allocations.
    """
    device, options = points.device.index, {"metric": _metric(inner), "device": points.device.index}
    reason = ""  # the error itself would keep FAISS's resources alive by its traceback
    for _ in range(2):
        try:
            with torch.cuda.device(device):  # FAISS uses its stream
                return faiss().knn_gpu(gpu_resources(device), queries, points, k, **options)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "alloc fail" in str(error)):
                raise
            reason = str(error).strip().splitlines()[-1]
        gpu_resources.cache_clear()  # a failed allocation may leave them incomplete
        torch.cuda.empty_cache()
    warnings.warn(f"neighbours are searched on the CPU, as FAISS has no memory on GPU {device}: {reason}", stacklevel=2)
    search = _by_faiss if backend(torch.device("cpu"), k) == "faiss" else _by_torch
    values, ids = search(queries.cpu(), points.cpu(), k, inner)
    return values.to(points.device), ids.to(points.device)


def _by_torch(queries: Tensor, points: Tensor, k: int, inner: bool) -> tuple[Tensor, Tensor]:
    """Search by products and top-k, in blocks of at most 64 MiB of products on a CPU and 512 MiB on a GPU."""
    half = points.new_zeros(()) if inner else _squares(points) / 2
    rows = max(1, PRODUCTS.get(points.device.type, PRODUCTS["cpu"]) // len(points))
    with torch.autocast(points.device.type, enabled=False), full_float32():
        found = [torch.addmm(half, part, points.T, beta=-1).topk(k, dim=1) for part in queries.split(rows)]
    values, ids = torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])
    return values if inner else (_squares(queries)[:, None] - 2 * values).clamp_min_(0), ids


def _metric(inner: bool) -> int:
    return faiss().METRIC_INNER_PRODUCT if inner else faiss().METRIC_L2


@contextmanager
def faiss_threads() -> Iterator[None]:
    """Let FAISS use as many threads as torch."""
    library = faiss()
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        library.omp_set_num_threads(before)


# -- what float32 cannot order -----------------------------------------------------------------------------------------


def _settle(
    queries: Tensor, points: Tensor, rows: tuple[Rows, Rows], values: Tensor, ids: Tensor, k: int, inner: bool
) -> tuple[Tensor, Tensor]:
    """Lists (ascending values, and ids) in the order of float64.

    An entry is computed again if it is within rounding errors of the next one, or too close to the query for float32.
    If points beyond the list might belong to the k nearest, the query is searched again in float64.
    """
    others = _squares(points)
    squares = (others if queries is points else _squares(queries))[:, None]
    eps = (ERROR.get(points.device.type, ERROR["cpu"]) + ROUNDED) * torch.finfo(torch.float32).eps
    if inner:
        error = eps * (squares * others.max()).sqrt()
        beyond = error[:, 0]
    else:
        error = eps * (squares + others[ids])
        beyond = eps * (3 * squares[:, 0] + 2 * values[:, -1])  # |y|² <= 2 |x|² + 2 |x - y|²
    error = error.expand_as(values)
    close = values.diff(dim=1) <= error[:, 1:] + error[:, :-1]
    unsure = F.pad(close, (0, 1)) | F.pad(close, (1, 0))
    if not inner:  # the first may be the query itself, whose distance is not used
        unsure[:, 1:] |= values[:, 1:] < NEAR * squares
    if len(others) > values.shape[1]:
        searched = (values[:, -1] - values[:, k - 1] <= error[:, k - 1] + beyond).nonzero()[:, 0]
        if len(searched):
            ids[searched] = _ids_in_float64(rows[0][searched], rows[1], ids.shape[1], inner)
            unsure[searched] = True
    lists = unsure.any(1).nonzero()[:, 0]
    if not len(lists):
        return values, ids
    near, wide = ids[lists], values[lists].double()
    row, column = unsure[lists].nonzero(as_tuple=True)
    wide[row, column] = _distances_in_float64(rows, lists[row], near[row, column], inner)
    wide, order = wide.sort(dim=1)
    near = near.gather(1, order)
    scale = (squares[lists].double() * others.max()).sqrt() if inner else None
    apart = wide.diff(dim=1) > _tie(wide[:, 1:], rows[0].divisor is None, scale)
    group = F.pad(apart.cumsum(1), (1, 0))
    order = near.argsort(dim=1)  # the smaller id first, where the stable sort that follows finds equal distances
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    values[lists], ids[lists] = wide.gather(1, order).to(values.dtype), near.gather(1, order)
    return values, ids


def _tie(values: Tensor, unit: bool, products: Tensor | None = None) -> Tensor:
    """Bound of the float64 rounding of differences: that of the squares and, for unit vectors, of their division."""
    if products is not None:
        return TIE * products
    return TIE * (values + values.clamp_min(0).sqrt() if unit else values)


def _ids_in_float64(queries: Rows, points: Rows, n: int, inner: bool) -> Int64[Tensor, "N n"]:
    """The n nearest, ordered by id; ties go to the smaller ids.

    The search uses float64 products. Where these are not exact enough (the n-th point is close), points that they
    cannot distinguish from the n-th are compared by differences.
    """
    wide = points.centered(torch.float64)
    others = wide.square().sum(1)
    eps = ERROR.get(wide.device.type, ERROR["cpu"]) * torch.finfo(torch.float64).eps
    found = []
    step = max(1, PRODUCTS["cpu"] // 2 // len(wide))
    for start in range(0, len(queries.features), step):
        part = queries[slice(start, start + step)].centered(torch.float64)
        square = part.square().sum(1, keepdim=True)
        distance = -(part @ wide.T) if inner else torch.addmm(others, part, wide.T, alpha=-2).add_(square)
        last = distance.topk(n, dim=1, largest=False).values[:, -1:]
        tie = 2 * eps * ((square * others.max()).sqrt() if inner else 3 * square + 2 * last.clamp_min(0))
        if not inner:
            near = last < NEAR * square
            row, other = (near & ((distance - last).abs() <= tie)).nonzero(as_tuple=True)
            if len(row):
                distance[row, other] = _distances_in_float64((queries, points), row + start, other, inner)
                last = distance.topk(n, dim=1, largest=False).values[:, -1:]
                tie = torch.where(near, _tie(last, points.divisor is None), tie)
        nearer, equal = distance < last - tie, (distance - last).abs() <= tie
        chosen = nearer | (equal & (equal.cumsum(1) <= n - nearer.sum(1, keepdim=True)))
        found.append(chosen.nonzero()[:, 1].view(-1, n))
    return torch.cat(found)


def _distances_in_float64(
    points: tuple[Rows, Rows], rows: Int64[Tensor, " P"], ids: Int64[Tensor, " P"], inner: bool
) -> Float[Tensor, " P"]:
    """Squared distances, or the negated inner products, of pairs."""
    queries, others = points
    found = []
    step = max(1, (2**24 if rows.is_cuda else 2**15) // queries.features.shape[1])
    for row, other in zip(rows.split(step), ids.split(step), strict=True):
        x, y = queries.divided(row), others.divided(other)
        found.append(-(x * y).sum(1) if inner else (x - y).square_().sum(1))
    return torch.cat(found)


def _squares(points: Tensor) -> Float[Tensor, " N"]:
    return torch.linalg.vector_norm(points, dim=1).square()
