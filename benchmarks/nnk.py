"""What exact NNK costs, beside forming the kernels, the public algorithm and SciPy; prints Markdown tables.

    OMP_NUM_THREADS=2 python benchmarks/nnk.py

N points on a curved manifold are queries, their k nearest others are candidates, the kernel is (1 + cos)/2. All rows
start from the same unit vectors and candidates and end with weights. "floor" gathers the candidates and forms their
Gram matrices, nothing else, at the best of several chunk sizes. "public" is what the public solver does, written out
with LAPACK one query at a time (drop all weights that are not positive, solve again); "projected gradient" is its
variant for GPUs (100 steps of 0.05, batched). Rounds are interleaved, and ratios are those of a round. Quality is
measured in float64 on the features: KKT residuals, and neighbours against SciPy's.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import spotrf, spotrs
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.geometry.nnk import nnk


def manifold(n: int, d: int) -> Tensor:
    """Unit vectors: 20 clusters on a curved manifold of 10 dimensions, with noise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    latent = 2 * normal(20, 10)[torch.arange(n) % 20] + normal(n, 10)
    x = ((latent @ normal(10, 256) / 10**0.5 + normal(256)).relu() @ normal(256, d) / 16).relu()
    return F.normalize(x + 0.05 * x.std() * normal(n, d), dim=1)


def floor(x: Tensor, ids: Tensor, chunk: int) -> None:
    for part in ids.split(chunk):
        candidates = x[part]
        candidates @ candidates.mT


def gathered(similarity: Tensor, ids: Tensor, chunk: int) -> None:
    for part in ids.split(chunk):
        similarity[part.unsqueeze(2), part.unsqueeze(1)]


def public(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    weights = np.zeros(ids.shape, np.float32)
    for i, row in enumerate(ids):
        gram, target = 0.5 + 0.5 * x[row] @ x[row].T, 0.5 + 0.5 * x[row] @ x[i]
        kept = np.flatnonzero(target > 1e-10)
        while True:
            solution, _ = spotrs(spotrf(gram[np.ix_(kept, kept)])[0], target[kept])
            if (solution > 1e-10).all():
                break
            kept = kept[solution > 1e-10]
        weights[i, kept] = solution
    return weights


def projected_gradient(x: Tensor, ids: Tensor, chunk: int = 512) -> Tensor:
    weights = []
    for part, query in zip(ids.split(chunk), x.split(chunk), strict=True):
        candidates = x[part]
        gram = 0.5 + 0.5 * candidates @ candidates.mT
        target = 0.5 + 0.5 * candidates @ query.unsqueeze(2)
        theta = target
        for _ in range(100):
            theta = (theta + 0.05 * (target - gram @ theta)).clamp(0, 1)
        weights.append(theta.squeeze(2))
    return torch.cat(weights)


def scipy_loop(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    weights = np.zeros(ids.shape)
    for i, row in enumerate(ids):
        gram, target = 0.5 + 0.5 * x[row] @ x[row].T, 0.5 + 0.5 * x[row] @ x[i]
        root = np.linalg.cholesky(gram.astype(np.float64))
        weights[i] = nnls(root.T, solve_triangular(root, target, lower=True))[0]
    return weights


def quality(x: Tensor, ids: Tensor, weights: Tensor, optimum: Tensor) -> str:
    """KKT residual, neighbours, and how often they are those of the optimum, in float64."""
    unit = F.normalize(x.double(), dim=1)
    residuals = []
    for part, query, theta in zip(ids.split(128), unit.split(128), weights.double().split(128), strict=True):
        candidates = unit[part]
        target = 0.5 + 0.5 * candidates @ query.unsqueeze(2)
        slope = ((0.5 + 0.5 * candidates @ candidates.mT) @ theta.unsqueeze(2) - target).squeeze(2)
        violation = torch.where(theta > 0, slope.abs(), -slope).amax(1)
        residuals.append(violation.clamp_min(0) / target.squeeze(2).amax(1))
    residual = torch.cat(residuals)
    active, best = (w > 1e-6 * w.amax(1, keepdim=True) for w in (weights, optimum))
    return (
        f"{residual.max():.0e} | {residual.median():.0e} | {active.sum(1).double().mean():.2f} | "
        f"{(active == best).all(1).double().mean():.1%}"
    )


def exact(x: Tensor, ids: Tensor) -> Tensor:
    """SciPy's answer in feature space, float64."""
    unit = F.normalize(x.double(), dim=1)
    rows = []
    for row, query in zip(ids, unit, strict=True):
        matrix = np.vstack([unit[row].numpy().T, np.ones(len(row))])
        # An orthogonal transformation shrinks D + 1 equations to k + 1.
        triangle = np.linalg.qr(np.c_[matrix, np.append(query.numpy(), 1)], mode="r")
        rows.append(nnls(triangle[:, :-1], triangle[:, -1])[0])
    return torch.from_numpy(np.array(rows))


def search(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    similarity = x @ x.T
    own = similarity.diagonal().clone()
    similarity.fill_diagonal_(-2)
    ids = similarity.topk(k, dim=1).indices
    similarity.diagonal().copy_(own)
    return similarity, ids


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(n: int, d: int, k: int, rounds: int) -> None:
    """One table: times of all contenders, interleaved, and the quality of those that have weights to show."""
    x = manifold(n, d)
    similarity, ids = search(x, k)
    points, rows = x.numpy(), ids.numpy()
    tried = {chunk: min(seconds(partial(floor, x, ids, chunk)) for _ in range(2)) for chunk in (8, 16, 64, 256)}
    chunk = min(tried, key=tried.__getitem__)
    floors: dict[str, Callable[[], object]] = {
        "search: cosines, k largest": partial(search, x, k),
        f"floor: Gram matrices (chunks of {chunk})": partial(floor, x, ids, chunk),
        "floor: gathered from kept cosines": partial(gathered, similarity, ids, 64),
    }
    contenders: dict[str, Callable[[], Tensor | np.ndarray]] = {
        "ours": lambda: nnk(x, ids).weights,
        "ours, cosines kept by the search": lambda: nnk(x, ids, similarity=similarity).weights,
        "public": partial(public, points, rows),
        "public, projected gradient": partial(projected_gradient, x, ids),
        "SciPy NNLS": partial(scipy_loop, points, rows),
    }
    times: dict[str, list[float]] = {name: [] for name in floors | contenders}
    for _ in range(rounds):
        for name, call in (floors | contenders).items():
            times[name].append(seconds(call))
    base = list(times.values())[1]
    optimum = exact(x, ids)
    print(f"\nN = {n:,}, d = {d}, k = {k}, medians of {rounds} rounds\n")
    print("| | s | over floor (range) | largest KKT residual | median | neighbours | those of the optimum |")
    print("|---" * 7 + "|")
    for name, took in times.items():
        over = [one / of for one, of in zip(took, base, strict=True)]  # of the same round
        found = quality(x, ids, torch.as_tensor(contenders[name]()), optimum) if name in contenders else "| | |"
        share = f"{statistics.median(over):.2f} ({min(over):.2f}-{max(over):.2f})"
        print(f"| {name} | {statistics.median(took):.3f} | {share} | {found} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="points, all of them queries")
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 2048], help="widths of the features")
    parser.add_argument("--k", type=int, default=50, help="candidates of a query")
    parser.add_argument("--rounds", type=int, default=5, help="times that each contender is run")
    args = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}; "
        f"load {os.getloadavg()[0]:.1f} at the start; {date.today()}"
    )
    for d in args.dims:
        measure(args.images, d, args.k, args.rounds)


if __name__ == "__main__":
    main()
