"""L-BFGS for many logistic regressions on the same features at once, with line searches on logits alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

MEMORY = 12  # length of the L-BFGS history
TRIALS = 12  # most trials of a line search


def minimise(
    x: Float[Tensor, "G N E"],
    y: Float[Tensor, "P C N"],
    weight: Float[Tensor, "G P C E"],
    squares: Float[Tensor, "G E"],
    l2: Float[Tensor, " P"],
    tolerance: float,
    max_iterations: int,
) -> Float[Tensor, "G P C E"]:
    """Weights of P problems per layer, started from ``weight``; targets of one problem are shared by all."""
    n = x.shape[1]
    done = weight.clone()
    columns = torch.arange(len(l2), device=x.device)  # problems that are not solved in all layers
    steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def penalties() -> Float[Tensor, "1 P 1 E"]:
        penalty = l2[columns].float().view(1, -1, 1, 1).repeat(1, 1, 1, x.shape[2])
        penalty[..., -1] = 0
        return penalty

    def inverse_hessian(logits: Tensor) -> Float[Tensor, "G P C E"]:
        return 1 / (variances(logits).mean(3).clamp_min(1e-8)[..., None] * squares[:, None, None] + penalty)

    def times(direction: Tensor) -> Float[Tensor, "G P C N"]:
        return (direction.flatten(1, 2) @ x.mT).unflatten(1, direction.shape[1:3])

    def gradient_at(logits: Tensor) -> Float[Tensor, "G P C E"]:
        errors = residuals(logits, y)
        return (errors.flatten(1, 2) @ x).unflatten(1, errors.shape[1:3]) / n + penalty * weight

    penalty = penalties()
    logits = times(weight)
    gradient = gradient_at(logits)
    for iteration in range(max_iterations):
        if iteration % 5 == 0:
            objective = total_loss(logits, y) / n + (penalty * weight.square()).sum((2, 3)) / 2
            initial_inverse = inverse_hessian(logits)
            suboptimality = (gradient.square() * initial_inverse).sum((2, 3)) / 2
            flat = gradient.abs().amax((2, 3)) <= tolerance * objective
            unsolved = ~(flat & (suboptimality <= tolerance / 30 * objective))
            keep = unsolved.any(0)
            if not bool(keep.all()):
                done[:, columns] = weight
                columns, unsolved, y = columns[keep], unsolved[:, keep], y if len(y) == 1 else y[keep]
                weight, gradient, logits, initial_inverse = (
                    part[:, keep] for part in (weight, gradient, logits, initial_inverse)
                )
                steps = [(step[:, keep], change[:, keep], inverse[:, keep]) for step, change, inverse in steps]
                penalty = penalties()
            if not len(columns):
                return done
        direction = _two_loops(gradient, initial_inverse, steps)
        direction_logits = times(direction)
        slope = (gradient * direction).sum((2, 3))
        length = _length(logits, direction_logits, weight, direction, penalty, y, slope)
        step = (length * unsolved)[..., None, None] * direction
        weight = weight + step
        logits = torch.addcmul(logits, (length * unsolved)[..., None, None], direction_logits)
        change, gradient = -gradient, gradient_at(logits)
        change += gradient
        curvature = (step * change).sum((2, 3))
        # Below, 1 / curvature overflows: the layer has converged up to rounding while others still iterate.
        steps.append((step, change, torch.where(curvature > 1e-30, 1 / curvature, 0)))
        del steps[:-MEMORY]
    done[:, columns] = weight
    return done


def residuals(logits: Float[Tensor, "G P C N"], y: Float[Tensor, "P C N"]) -> Float[Tensor, "G P C N"]:
    """Probabilities minus targets, without cancellation where a probability is close to 1."""
    if logits.shape[2] == 1:
        sign = (2 * y).sub_(1).neg_()
        return (sign * logits).sigmoid_().mul_(sign)
    others = logits.softmax(2).mul_(1 - y)
    return others.sub_(y * others.sum(2, keepdim=True))


def total_loss(logits: Float[Tensor, "G P C N"], y: Float[Tensor, "P C N"]) -> Float[Tensor, "G P"]:
    """The cross-entropy, summed over images; with one column, that of a binary regression."""
    if logits.shape[2] == 1:
        return F.softplus((2 * y).sub_(1).neg_().mul(logits)).sum((2, 3))
    return (logits.logsumexp(2) - (logits * y).sum(2)).sum(2)


def variances(logits: Float[Tensor, "G P C N"]) -> Float[Tensor, "G P C N"]:
    """Variance of each class, p (1 - p)."""
    p = logits.sigmoid() if logits.shape[2] == 1 else logits.softmax(2)
    return p.sub_(p.square())


def _two_loops(gradient: Tensor, initial_inverse: Tensor, steps: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The L-BFGS direction, by the two-loop recursion."""
    direction = -gradient
    shares = []
    for step, change, inverse in reversed(steps):
        share = (inverse * (step * direction).sum((2, 3)))[..., None, None]
        direction = torch.addcmul(direction, share, change, value=-1)
        shares.append(share)
    if steps:
        _, change, inverse = steps[-1]
        scale = inverse * (change * initial_inverse * change).sum((2, 3))
        direction = direction * torch.where(scale > 0, 1 / scale, 1)[..., None, None]
    direction = direction * initial_inverse
    for (step, change, inverse), share in zip(steps, reversed(shares), strict=True):
        back = (inverse * (change * direction).sum((2, 3)))[..., None, None]
        direction = torch.addcmul(direction, share - back, step)
    return direction


def _length(
    logits: Tensor,
    direction_logits: Tensor,
    weight: Tensor,
    direction: Tensor,
    penalty: Tensor,
    y: Tensor,
    slope: Tensor,
) -> Float[Tensor, "G S"]:
    """Line search along each direction, to where the slope is at most half as steep (the loss is convex)."""
    along, curvature = (penalty * weight * direction).sum((2, 3)), (penalty * direction.square()).sum((2, 3))
    length, low, high = torch.ones_like(slope), torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    for _ in range(TRIALS):
        errors = residuals(torch.addcmul(logits, length[..., None, None], direction_logits), y)
        here = (errors * direction_logits).sum((2, 3)) / logits.shape[3] + along + length * curvature
        too_long, too_short = here > 0.5 * slope.abs(), here < 0.9 * slope
        if not bool((too_long | too_short).any()):
            break
        high, low = torch.where(too_long, length, high), torch.where(too_short, length, low)
        secant = length * slope / (slope - here)
        middle = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        inside = (secant > low) & (secant < high) & too_long
        length = torch.where(too_long | too_short, torch.where(inside, secant, middle), length)
    return length
