"""Exact non-negative kernel regression of many queries at once, from kernel values or differences of unit vectors.

Solved in float64 for a whole chunk of queries, by the active-set method of Lawson & Hanson on swept tableaux, where a
candidate enters or leaves by one rank-one update. Singular K_SS (more candidates than dimensions, duplicates) are
allowed. Every solution comes with its KKT residual, computed independently; solutions with a residual above 1e-10 are
computed again with SciPy, and a warning reports those that still miss the tolerance.
"""

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from scipy.optimize import nnls
from torch import Tensor

from ssl_geometry.geometry.chunks import over_chunks, queries_at_once, scratch

ACTIVE = 1e-6
"""A candidate is a neighbour if its weight exceeds this share of the query's largest."""
OPTIMAL = 1e-13
"""A candidate enters if it lowers the objective at more than this rate, of a tableau scaled to a largest value of 1."""
INDEPENDENT = 1e-12
"""... and if more than this share of it (squared, in kernel space) lies outside the span of the active candidates."""
SMALLEST = 3e-3
"""Candidates are scaled to 1, except those closer than this to the nearest one, relative to the farthest."""
SURE = 1e-10
"""KKT residual beyond which rounding has corrupted the tableau, and a query is solved again by the slower path."""


class NNK(NamedTuple):
    """Solutions for Q queries with K candidates each, in float64.

    Attributes:
        weights: theta; 0 for candidates that are inactive or padding.
        active: the NNK neighbours: theta_j > 1e-6 max theta.
        error: 1 - 2 theta' K_Si + theta' K_SS theta, the remaining squared distance in kernel space.
        residual: largest violation of the KKT conditions (K_SS theta - K_Si is 0 where theta > 0, >= 0 elsewhere) for
            the kernel as computed; rounding of a kernel of float32 features, about 1e-7, is not included. Relative to
            the largest entry of K_Si; for the cosine kernel, to the largest of 1 - K_Si, the variation of the kernel.
    """

    weights: Float[Tensor, "Q K"]
    active: Bool[Tensor, "Q K"]
    error: Float[Tensor, " Q"]
    residual: Float[Tensor, " Q"]


def solve(
    gram: Float[Tensor, "Q K K"],
    target: Float[Tensor, "Q K"],
    self_similarity: float | Float[Tensor, " Q"] = 1.0,
    *,
    valid: Bool[Tensor, "Q K"] | None = None,
    tolerance: float = 1e-6,
) -> NNK:
    """Solve NNK problems that are given by their kernel matrices.

    Args:
        gram: K_SS, the kernel between the candidates of each query; symmetric, positive semi-definite, of any scale.
        target: K_Si, the kernel between each query and its candidates.
        self_similarity: the kernel of each query with itself; only the error depends on it.
        valid: which candidates exist; None for all.
        tolerance: largest KKT residual of a solution that counts as exact.

    Returns:
        Weights, neighbours, error and residual of each query.

    Raises:
        ValueError: no query or no candidate, or values that are not finite.

    Warns:
        UserWarning: queries that miss the tolerance, as under a kernel that is not positive semi-definite.

    References:
        Shekkizhar & Ortega, *Graph construction from data by non-negative kernel regression*, 2020; Lawson & Hanson,
        *Solving least squares problems*, 1974, chapter 23; Goodnight, *A tutorial on the SWEEP operator*, 1979.

    Example:
        >>> gram = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])  # the second candidate lies behind the first
        >>> solve(gram, torch.tensor([[0.95, 0.80]])).active
        tensor([[ True, False]])
    """
    if target.numel() == 0:
        raise ValueError(f"NNK needs at least one query and one candidate, got target of shape {tuple(target.shape)}")
    own = torch.as_tensor(self_similarity, dtype=torch.float64, device=target.device).expand(len(target))
    exists = torch.ones_like(target, dtype=torch.bool) if valid is None else valid

    def work(r: slice) -> NNK:
        return solve_problem(KernelProblem.of(symmetric(gram[r]), target[r].double(), own[r], exists[r]), tolerance)

    parts = over_chunks(work, len(target), target.device, queries_at_once(target))
    return joined(parts, tolerance)


def solve_cosine(
    local: Float[Tensor, "Q K K"],
    *,
    valid: Bool[Tensor, "Q K"] | None = None,
    tolerance: float = 1e-6,
) -> NNK:
    """Solve NNK problems for the kernel (1 + cos)/2, given differences of unit vectors, however small.

    Args:
        local: (x_a - x_i) · (x_b - x_i) of all pairs of candidates of each query, of unit vectors.
        valid: as in :func:`solve`.
        tolerance: as in :func:`solve`.

    Returns:
        Weights, neighbours, error and residual of each query.

    Raises:
        ValueError: no query or no candidate, or values that are not finite.

    Warns:
        UserWarning: queries that miss the tolerance.

    References:
        As for :func:`solve`.

    Example:
        >>> differences = 1e-7 * torch.tensor([[[1.0, 0.5], [-1.0, 0.5], [2.0, 1.5]]])  # the third is behind the first
        >>> solve_cosine(differences @ differences.mT).active
        tensor([[ True,  True, False]])
    """
    queries, k = local.shape[:2]
    if local.numel() == 0:
        raise ValueError(f"NNK needs at least one query and one candidate, got local of shape {tuple(local.shape)}")
    exists = torch.ones(queries, k, dtype=torch.bool, device=local.device) if valid is None else valid

    def work(r: slice) -> NNK:
        return solve_problem(CosineProblem.of(symmetric(local[r]), exists[r]), tolerance)

    parts = over_chunks(work, queries, local.device, queries_at_once(exists))
    return joined(parts, tolerance)


def symmetric(gram: Float[Tensor, "Q K K"]) -> Float[Tensor, "Q K K"]:
    """Symmetrise in float64: a float32 product is symmetric up to its rounding only, which is too coarse for 1e-10."""
    both = torch.add(gram, gram.mT, out=scratch("both", gram.shape, gram.dtype, gram.device))
    return scratch("gram", gram.shape, torch.float64, gram.device).copy_(both).mul_(0.5)


class KernelProblem(NamedTuple):
    """Problems given by kernel values."""

    gram: Float[Tensor, "Q K K"]
    target: Float[Tensor, "Q K"]
    own: Float[Tensor, " Q"]
    valid: Bool[Tensor, "Q K"]

    @classmethod
    def of(cls, gram: Tensor, target: Tensor, own: Tensor, valid: Tensor) -> "KernelProblem":
        """Takes over ``gram``, and changes it."""
        if not bool(valid.all()):  # padding gets kernel values of zero, and never enters
            gram.masked_fill_(~(valid.unsqueeze(2) & valid.unsqueeze(1)), 0)
            target = target.where(valid, 0)
        return cls(gram, target, own, valid)

    def tableau(self) -> tuple[Tensor, Bool[Tensor, "Q K"], Float[Tensor, "Q K"]]:
        """The initial tableau, the active candidates (none), and the scale of the solution."""
        k = self.target.shape[1]
        # Kernels of any scale are brought to a largest value of 1, so that the limits above are relative ones.
        size, aim = self.gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True), self.target.abs().amax(1, keepdim=True)
        size, aim = size.where(size > 0, 1), aim.where(aim > 0, 1)
        table = scratch("table", (len(self.gram), k + 1, k + 1), self.gram.dtype, self.gram.device)
        torch.div(self.gram, size.unsqueeze(2), out=table[:, :k, :k])
        table[:, k, :k] = table[:, :k, k] = self.target / aim
        table[:, k, k] = 0
        return table, torch.zeros_like(self.valid), aim / size

    def certified(self, weights: Float[Tensor, "Q K"]) -> NNK:
        """The weights with their error and KKT residual."""
        slope = (self.gram @ weights.unsqueeze(2)).squeeze(2) - self.target
        scale = self.target.abs().amax(1)
        error = self.own + (weights * (slope - self.target)).sum(1)
        return _answer(weights, error, _violation(weights, slope) / scale.where(scale > 0, 1))

    def equations(self, query: int) -> tuple[Float[Tensor, "M K"], Float[Tensor, " M"]]:
        """Matrix and right-hand side of the equivalent non-negative least squares problem."""
        values, vectors = _spectrum(self.gram[query])
        return values.sqrt().unsqueeze(1) * vectors.T, (vectors.T @ self.target[query]) / values.sqrt()


class CosineProblem(NamedTuple):
    """Problems under the cosine kernel, given by the differences d_j = x_j - x_i of unit vectors to the query.

    With near_j = |d_j|² and lack = 1 - sum theta, the objective is

        lack² + lack near' theta / 2 + theta' (d_a · d_b) theta / 2,

    in which only lack is a difference of numbers close to 1.
    """

    local: Float[Tensor, "Q K K"]
    near: Float[Tensor, "Q K"]
    valid: Bool[Tensor, "Q K"]

    @classmethod
    def of(cls, local: Tensor, valid: Tensor) -> "CosineProblem":
        """Takes over ``local``, and changes it."""
        if not bool(valid.all()):
            local.masked_fill_(~(valid.unsqueeze(2) & valid.unsqueeze(1)), 0)
        return cls(local, local.diagonal(dim1=1, dim2=2).clone(), valid)

    def tableau(self) -> tuple[Tensor, Bool[Tensor, "Q K"], Float[Tensor, "Q K"]]:
        """The initial tableau: the nearest candidate x_0 is active, as it would be after the first sweep.

        That sweep gives K_ab - K_a0 K_0b = (x_a - x_0) · (x_b - x_0) / 2 - |x_a - x_0|² |x_b - x_0|² / 16, which is
        computed without cancellation. Each candidate is then scaled to 1 on the diagonal (to less, if it is too close
        to the nearest one for float32 to resolve its size), and so is the query.
        """
        (queries, k), device = self.near.shape, self.near.device
        closest, first = self.near.where(self.valid, torch.inf).min(1, keepdim=True)
        usable = closest < 4  # the kernel with it is above 0
        closest = closest.where(usable, 0)
        to_first = self.local.gather(1, first.unsqueeze(2).expand(-1, 1, k)).squeeze(1)
        apart = (self.near + closest - 2 * to_first).clamp_min(0).where(self.valid, 0)  # squared, from the nearest
        size, aim = ((d / 2 - d.square() / 16).sqrt() for d in (apart, closest))
        largest = size.amax(1, keepdim=True)
        size = torch.maximum(size, SMALLEST * largest.where(largest > 0, 1 / SMALLEST))
        least = size.amin(1, keepdim=True)  # the nearest is scaled by it
        unit, aim = (usable & self.valid) / size, aim.where(aim > 0, 1)

        table = scratch("table", (queries, k + 1, k + 1), self.local.dtype, device)
        lift = (closest / 4 - to_first / 2) * unit
        left = torch.stack([lift, unit, apart * unit / -16], 2)
        right = torch.stack([unit, lift, apart * unit], 1)
        block = table[:, :k, :k]
        torch.mul(self.local, unit.unsqueeze(2) / 2, out=block)
        block.mul_(unit.unsqueeze(1)).baddbmm_(left, right)
        table[:, k, :k] = table[:, :k, k] = ((closest - to_first) / 2 - apart * closest / 16) * unit / aim
        table[:, k, k] = 0
        row = torch.cat([(1 - apart / 4) * unit * least, (1 - closest / 4) * usable * least / aim], 1)
        row.scatter_(1, first, -least.square() * usable)
        at = torch.arange(queries, device=device)
        table[at, first[:, 0]] = row
        table[at, :, first[:, 0]] = row
        inside = torch.zeros_like(self.valid).scatter_(1, first, usable)
        unit.scatter_(1, first, usable / least)
        return table, inside, unit * aim

    def certified(self, weights: Float[Tensor, "Q K"]) -> NNK:
        """The weights with their error and KKT residual."""
        product = (self.local @ weights.unsqueeze(2)).squeeze(2)
        pulled = product / 2 - (weights * self.near).sum(1, keepdim=True) / 4
        target = (1 - self.near / 4).where(self.valid, 0)
        # The slope is pulled - lack target. For weights close to 1, a small lack is only known up to their rounding:
        # slopes use the lack that fits the weights best, and its difference from the sum counts as a violation too.
        sums, aimed = weights.sum(1, keepdim=True), (weights * target).sum(1, keepdim=True)
        lack = torch.where(aimed > 0, (weights * pulled).sum(1, keepdim=True) / aimed, 1 - sums)
        scale = (self.near / 4).amax(1)
        violation = _violation(weights, (pulled - lack * target).where(self.valid, 0)) / scale.where(scale > 0, 1)
        error = (1 - sums).square() + (weights * ((1 - sums) * self.near + product)).sum(1, keepdim=True) / 2
        return _answer(weights, error.squeeze(1), torch.maximum(violation, (1 - sums - lack).squeeze(1).abs()))

    def equations(self, query: int) -> tuple[Float[Tensor, "M K"], Float[Tensor, " M"]]:
        """Matrix and right-hand side of the equivalent non-negative least squares problem."""
        near = self.near[query]
        size = near.amax().clamp_min(torch.finfo(near.dtype).tiny).sqrt()
        # Orthogonal to the query, along it, and the constant feature of the 1 in (1 + cos)/2.
        values, vectors = _spectrum((self.local[query] - near.unsqueeze(1) * near / 4) / size.square())
        exists = self.valid[query].double()
        rows = [values.sqrt().unsqueeze(1) * vectors.T, ((exists - near / 2) / size)[None], (exists / size)[None]]
        return torch.cat(rows), torch.cat([torch.zeros_like(values), (1 / size).expand(2)])


def _violation(weights: Float[Tensor, "Q K"], slope: Float[Tensor, "Q K"]) -> Float[Tensor, " Q"]:
    return torch.where(weights > 0, slope.abs(), -slope).amax(1).clamp_min(0)


def _answer(weights: Float[Tensor, "Q K"], error: Float[Tensor, " Q"], residual: Float[Tensor, " Q"]) -> NNK:
    return NNK(weights, weights > ACTIVE * weights.amax(1, keepdim=True), error, residual)


def solve_problem(problem: KernelProblem | CosineProblem, tolerance: float) -> NNK:
    """Solve all queries by sweeps, and those that rounding has corrupted by SciPy.

    Raises:
        ValueError: kernel values that are not finite.
    """
    table, inside, unit = problem.tableau()
    result = problem.certified(_lawson_hanson(table, inside) * unit)
    if missed := torch.nonzero(~(result.residual <= min(SURE, tolerance))).flatten().tolist():
        if not bool(problem[0].isfinite().all() & problem[1].isfinite().all()):
            raise ValueError("kernel values must be finite, some are NaN or infinite")
        weights = result.weights.clone()
        for query in missed:
            weights[query] = _scipy(*problem.equations(query))
        again = problem.certified(weights)
        worse = again.residual >= result.residual
        result = problem.certified(result.weights.where(worse.unsqueeze(1), weights))
    return result


def _lawson_hanson(table: Float[Tensor, "Q K+1 K+1"], inside: Bool[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
    """Active-set non-negative least squares of all queries; per iteration one candidate enters or leaves each query.

    The tableau is [K_SS K_Si; K_Si' 0] when no candidate is active. Sweeping candidate j, once to enter and once more
    to leave, maintains in the last row the unconstrained solution of the active candidates and the negative slope of
    the objective for the others, and on the diagonal -(K_FF^-1)_jj for the active ones and the squared distance to
    their span for the others. Initially active candidates have been swept already. The tableau is overwritten.
    """
    queries, k = inside.shape
    spare = scratch("spare", table.shape, table.dtype, table.device)

    weights = torch.zeros(queries, k, dtype=table.dtype, device=table.device)
    live = at = torch.arange(queries, device=table.device)
    x = weights
    for left in reversed(range(3 * k)):
        best, free = table[:, k, :k], table.diagonal(dim1=1, dim2=2)[:, :k].contiguous()
        # Move towards the solution of the active candidates until one of them reaches zero and leaves.
        share, leaving = torch.where(inside & (best < 0), x / (x - best), torch.inf).min(1)
        blocked = share <= 1
        x = torch.lerp(x, best, share.clamp_max(1).unsqueeze(1)).where(inside, 0)
        # If none does, the candidate that lowers the objective most enters.
        gain, entering = torch.where((free > INDEPENDENT) & (best > OPTIMAL), best.square() / free, 0).max(1)
        done = ~blocked & (gain == 0)
        finished = int(done.sum())
        if 2 * finished >= len(live) or not left:  # at half, since copying the others costs as much as a sweep of all
            indefinite = ((free < -0.5) & ~inside).any(1, keepdim=True)  # no kernel has these
            weights[live] = x.masked_fill(indefinite, torch.nan)
            if finished == len(live):
                break
            rest = torch.nonzero(~done).flatten()
            table, spare = torch.index_select(table, 0, rest, out=spare[: len(rest)]), table
            x, live, at = x[rest], live[rest], at[: len(rest)]
            done, blocked, leaving, entering = done[rest], blocked[rest], leaving[rest], entering[rest]
            inside = inside[rest]
        j = torch.where(blocked, leaving, entering)
        inside = inside.scatter(1, j.unsqueeze(1), inside.gather(1, j.unsqueeze(1)) ^ ~done.unsqueeze(1))
        row, idle = table[at, j], done.unsqueeze(1)
        pivot = row.gather(1, j.unsqueeze(1))
        table.addcmul_((row / pivot.masked_fill(idle, torch.inf)).unsqueeze(2), row.unsqueeze(1), value=-1)
        row = row / pivot.abs().masked_fill(idle, 1)
        row.scatter_(1, j.unsqueeze(1), pivot.where(idle, -1 / pivot))
        table[at, j] = row
        table[at, :, j] = row
    return weights


def _spectrum(gram: Float[Tensor, "K K"]) -> tuple[Float[Tensor, " M"], Float[Tensor, "K M"]]:
    """Eigenvalues that are not zero, and their vectors."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-14 * values[-1]
    return values[kept], vectors[:, kept]


def _scipy(matrix: Float[Tensor, "M K"], side: Float[Tensor, " M"]) -> Float[Tensor, " K"]:
    """The slower, certain path: least squares |matrix theta - side|²."""
    try:
        weights, _ = nnls(matrix.cpu().numpy(), side.cpu().numpy(), maxiter=30 * matrix.shape[1])
    except RuntimeError:  # too many iterations: the first answer stands, and its residual shows it
        return matrix.new_zeros(matrix.shape[1])
    return torch.from_numpy(weights).to(matrix.device)


def joined(parts: list[NNK], tolerance: float) -> NNK:
    """The answers of all chunks; warns of those that are NaN or miss the tolerance."""
    result = NNK(*(torch.cat(part) for part in zip(*parts, strict=True)))
    lost = int(result.residual.isnan().sum())
    if lost:
        warnings.warn(
            f"{lost} of {len(result.residual)} NNK problems are NaN: candidates differ from queries by rounding alone",
            stacklevel=3,
        )
    missed = int((result.residual > tolerance).sum())
    if missed:
        warnings.warn(
            f"{missed} of {len(result.residual)} NNK problems miss the tolerance of {tolerance:g} (worst residual "
            f"{float(result.residual.nan_to_num().max()):.1e}): is the kernel positive semi-definite?",
            stacklevel=3,
        )
    return result
