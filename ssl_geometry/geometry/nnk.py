"""Non-negative kernel regression (NNK): the neighbours that explain an image together, each adding what others lack.

For a query i and its K candidates S, under a kernel k with k(i, i) = 1, the weights are

    theta = argmin over theta >= 0 of theta' K_SS theta / 2 - theta' K_Si,
    error = 1 - 2 theta' K_Si + theta' K_SS theta,

and the candidates with theta_j > 0 are its NNK neighbours (Shekkizhar & Ortega 2020), found exactly
(``nnk_solver.py``).

Where all vectors are close together, kernel values agree in all digits but the last, and the problem lies in what they
differ by. Under the cosine kernel it is therefore posed in the differences between a query and its candidates, and
limits are relative to their size: features that vary by a millionth are solved as exactly as others.

Candidates are rows of the features, padded with -1; usually the nearest images, but any others are allowed. Memory next
to a centred copy of the features does not grow with their number.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_geometry.geometry.chunks import over_chunks, queries_at_once, scratch
from ssl_geometry.geometry.nnk_solver import NNK, CosineProblem, KernelProblem, joined, solve_problem, symmetric
from ssl_geometry.geometry.vectors import centered, products, products_of_directions, vector_lengths

Kernel = Literal["cosine", "gaussian"] | Callable[[Tensor, Tensor], Tensor]
RESOLUTION = 8
"""A neighbourhood whose radius is fewer than this many roundings of the features' dtype is not solved."""
COARSE = 1e-3
"""Distance to the nearest candidate, relative to the query's distance from the features' mean, below which differences
are formed in float64: float32 would lose the near candidates next to far ones."""
CLOSE = 1e-2
"""Squared distance of unit vectors to their nearest candidate below which float32 cosines are too coarse."""


def nnk(
    features: Float[Tensor, "N D"],
    ids: Int64[Tensor, "Q K"],
    queries: Float[Tensor, "Q D"] | None = None,
    *,
    kernel: Kernel = "cosine",
    similarity: Float[Tensor, "N N"] | None = None,
    chunk: int | None = None,
    tolerance: float = 1e-6,
) -> NNK:
    """The NNK neighbours of each query among its candidates.

    Args:
        features: a vector for each image.
        ids: the candidates of each query as rows of ``features``, -1 for none.
        queries: what is to be explained; None for the features themselves, each without itself.
        kernel: "cosine", (1 + cos)/2; "gaussian", exp(-d²/2s²) with s a third of the distance to the query's farthest
            candidate; or a function of (..., P, D) and (..., R, D) features that returns (..., P, R).
        similarity: the cosines of all features, where a search has kept them. K_SS is then gathered from them, but
            for queries whose candidates are too close for float32 cosines.
        chunk: queries at once in each thread; None for 256 on a CPU and 8,192 elsewhere, fewer for more than 64
            candidates.
        tolerance: as in :func:`solve`.

    Returns:
        Weights, neighbours, error and residual of each query. A query without candidates has no neighbours. Under the
        cosine kernel, a query whose candidates differ from it by no more than the rounding of their dtype (unit vectors
        less than 8 eps away, 9.5e-7 in float32, but not all equal to it) has NaN and no neighbours.

    Raises:
        ValueError: ids that fit neither the queries nor the features, features that are not finite, zero vectors
            under the cosine kernel, an unknown kernel, or kept cosines that cannot serve.

    Warns:
        UserWarning: queries that miss the tolerance, or that differ from their candidates by rounding alone.

    References:
        Shekkizhar & Ortega, *Graph construction from data by non-negative kernel regression*, 2020.

    Example:
        >>> angle = torch.tensor([0.0, 0.1, 0.2, -0.1, -0.2])  # on a circle, the nearest on each side are enough
        >>> points = torch.stack([angle.cos(), angle.sin()], 1)
        >>> nnk(points, torch.tensor([[1, 2, 3, 4]]), points[:1]).active
        tensor([[ True, False,  True, False]])
    """
    n, k, device = len(features), ids.shape[1], features.device
    targets = features if queries is None else queries
    if ids.numel() == 0 or len(ids) != len(targets):
        raise ValueError(f"ids must hold candidates of {len(targets)} queries, got shape {tuple(ids.shape)}")
    if bool((ids < -1).any()) or bool((ids >= n).any()):
        raise ValueError(f"ids must lie between -1 (none) and {n - 1}, got {int(ids.min())} to {int(ids.max())}")
    if not callable(kernel) and kernel not in ("cosine", "gaussian"):
        raise ValueError(f"kernel must be 'cosine', 'gaussian' or a function, got {kernel!r}")
    valid = ids >= 0
    if queries is None:
        valid = valid & (ids != torch.arange(n, device=device).unsqueeze(1))
    rows = ids.clamp_min(0)

    problem: Callable[[slice], KernelProblem | CosineProblem]
    if similarity is not None:
        if kernel != "cosine" or queries is not None or similarity.shape != (n, n):
            raise ValueError(
                f"similarity must hold cosines of all {n} features, with kernel='cosine' and queries=None; got shape "
                f"{tuple(similarity.shape)}, kernel={kernel!r} and queries={'None' if queries is None else 'given'}"
            )

        # Where float32 cosines hardly differ, the features themselves are asked, further down.
        cosines = similarity.gather(1, rows).double()
        close = cosines.where(valid, -1).amax(1) > 1 - CLOSE / 2
        kept = valid
        valid = valid & ~close.unsqueeze(1)

        def problem(r: slice) -> KernelProblem | CosineProblem:
            index = scratch("index", (*rows[r].shape, k), torch.int64, device)
            torch.add((rows[r] * n).unsqueeze(2), rows[r].unsqueeze(1), out=index)
            between = scratch("between", index.shape, similarity.dtype, device)
            gram = symmetric(torch.take(similarity, index, out=between)).mul_(0.5).add_(0.5)
            return KernelProblem.of(gram, cosines[r] / 2 + 0.5, gram.new_ones(1), valid[r])

    elif callable(kernel):
        vector_lengths(features)
        vector_lengths(targets)

        def problem(r: slice) -> KernelProblem | CosineProblem:
            candidates, query = features[rows[r]], targets[r].unsqueeze(1)
            own = kernel(query, query)[:, 0, 0].double()
            target = kernel(candidates, query)[..., 0].double()
            return KernelProblem.of(symmetric(kernel(candidates, candidates)), target, own, valid[r])

    else:
        points, centers = centered(features, queries, unit=kernel == "cosine")

        def problem(r: slice) -> KernelProblem | CosineProblem:
            between = scratch("between", (*rows[r].shape, k), points.dtype, device)
            gram = symmetric(products(points, rows[r], centers[r], out=between))
            near = gram.diagonal(dim1=1, dim2=2)  # squared distance to the query
            if kernel == "cosine":
                nearest = near.where(valid[r], torch.inf).amin(1)
                coarse = nearest < COARSE**2 * centers[r].square().sum(1)
                if points.dtype == torch.float32 and bool(coarse.any()):
                    gram[coarse] = products_of_directions(features, rows[r][coarse], targets[r][coarse])
                return CosineProblem.of(gram, valid[r])
            near = near.clone()
            width = near.where(valid[r], 0).amax(1, keepdim=True) * (2 / 9)  # 2s², s = d/3
            width = width.where(width > 0, 1)
            gram.mul_(2).sub_(near.unsqueeze(2)).sub_(near.unsqueeze(1)).div_(width.unsqueeze(2))
            return KernelProblem.of(gram.exp_(), (-near / width).exp(), gram.new_ones(1), valid[r])

    def work(r: slice) -> NNK:
        posed = problem(r)
        result = solve_problem(posed, tolerance)
        if isinstance(posed, KernelProblem):
            return result
        radius = posed.near.amax(1)
        rounded = (radius > 0) & (radius < (RESOLUTION * torch.finfo(points.dtype).eps) ** 2)
        known = ~rounded.unsqueeze(1)
        values = (value.masked_fill(rounded, torch.nan) for value in (result.error, result.residual))
        return NNK(result.weights.where(known, torch.nan), result.active & known, *values)

    result = joined(over_chunks(work, len(ids), device, chunk or queries_at_once(ids)), tolerance)
    if similarity is not None and bool(close.any()):
        again = torch.nonzero(close).flatten()
        redone = nnk(
            features,
            ids.where(kept, -1)[again],
            features[again],
            chunk=chunk,
            tolerance=tolerance,
        )
        result = NNK(*(a.index_copy(0, again, b) for a, b in zip(result, redone, strict=True)))
    return result


def nnk_graph(ids: Int64[Tensor, "N K"], result: NNK) -> Float[Tensor, "N N"]:
    """The undirected NNK graph, as a sparse matrix.

    Where i and j are candidates of each other, the edge has the weight that the one with the smaller error gives to
    the other (the smaller index where errors are equal), and there is no edge if that weight is inactive. Where only
    one is a candidate of the other, its weight counts.

    Args:
        ids: the candidates of each image, -1 for none.
        result: :func:`nnk` of the same images and candidates.

    Returns:
        A symmetric sparse COO matrix, float64, coalesced.

    References:
        Shekkizhar & Ortega, *Graph construction from data by non-negative kernel regression*, 2020.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> ids = torch.tensor([[1, 2], [0, 2], [0, 1]])
        >>> nnk_graph(ids, nnk(points, ids)).to_dense() > 0
        tensor([[False,  True, False],
                [ True, False,  True],
                [False,  True, False]])
    """
    n = len(ids)
    rows = torch.arange(n, device=ids.device).unsqueeze(1).expand_as(ids)
    candidates = (ids >= 0) & (ids != rows)
    i, j, weight = rows[candidates], ids[candidates], result.weights.where(result.active, 0)[candidates]
    order = torch.argsort(result.error[i], stable=True)
    pair = (torch.minimum(i, j) * n + torch.maximum(i, j))[order]
    pair, by_pair = torch.sort(pair, stable=True)
    kept = torch.ones_like(pair, dtype=torch.bool)
    kept[1:] = pair[1:] != pair[:-1]
    weight = weight[order][by_pair]
    kept &= weight > 0
    a, b, weight = pair[kept] // n, pair[kept] % n, weight[kept]
    both = torch.stack([torch.cat([a, b]), torch.cat([b, a])])
    return torch.sparse_coo_tensor(both, weight.repeat(2), (n, n), check_invariants=False).coalesce()
