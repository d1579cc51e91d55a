"""Logistic regression of many layers and regularisation strengths at once, by L-BFGS in principal axes."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.geometry.classification import (
    BLOCK,
    L2,
    LinearProbe,
    check_bank,
    check_features,
    check_l2,
    choose_l2,
    is_varying,
    one_hot,
    rows_at_once,
    validation_folds,
)
from ssl_geometry.geometry.lbfgs import MEMORY, minimise, residuals, total_loss, variances

TOLERANCE, ITERATIONS = 3e-6, 2000
"""Stopping criterion: largest gradient entry as a share of the objective, and the maximum number of iterations."""
GROUP_BYTES = {"cpu": 0, "cuda": 3 * 2**30}
"""Working memory up to which layers of one width are solved together, by device.

On a CPU each layer is solved alone: its regularisation strengths keep the cores busy, and three layers of 10,000 x 512
features together take twice as long as one after the other, as they leave the caches and wait for the slowest.
"""
SOLVER_BYTES = 2**30
"""Working memory up to which the strengths of one layer are solved together."""


def cross_entropy(
    logits: Float[Tensor, "N C"], labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"]
) -> Float[Tensor, ""]:
    """The loss of logistic regression: mean over images; for multi-label images, of the sum over classes.

    Example:
        >>> round(float(cross_entropy(torch.zeros(1, 2), torch.tensor([1]))), 4)
        0.6931
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / len(labels)


def converged_probes(
    features: Mapping[str, Float[Tensor, "N D"]],
    labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"],
    validation: Bool[Tensor, " N"],
    num_classes: int,
    l2: Sequence[float] = L2,
) -> dict[str, LinearProbe]:
    """Logistic regression on every layer, its strength selected on the validation split, refitted on all images.

    Next to the features it needs at most :func:`converged_probes_bytes` of the widest layer.

    Args:
        features: layer to features.
        labels: class of each image, or a multi-hot row per image (multi-label).
        validation: the validation split, used for 100 images or more; see :func:`validation_folds`.
        num_classes: number of classes.
        l2: regularisation strengths to select from by validation accuracy; ties are broken by the smallest
            cross-entropy, then by the largest strength.

    Returns:
        Layer to one classifier (S = 1).

    Raises:
        ValueError: an empty validation split, or as in :func:`logistic_regression`.
    """
    _check_problem(features, labels, num_classes)
    folds = validation_folds(labels, validation, num_classes)
    best: dict[str, int] = {}
    for group in _groups(features, len(l2) * num_classes):
        tried = [
            logistic_regression({name: features[name][~fold] for name in group}, labels[~fold], num_classes, l2)
            for fold in folds
        ]
        for name in group:
            parts = [
                (probes[name], features[name][fold], labels[fold]) for probes, fold in zip(tried, folds, strict=True)
            ]
            best[name] = choose_l2(parts, cross_entropy)
    found: dict[str, LinearProbe] = {}
    for number in sorted(set(best.values())):  # layers with the same strength are solved together
        some = {name: x for name, x in features.items() if best[name] == number}
        found |= logistic_regression(some, labels, num_classes, [l2[number]])
    return {name: found[name] for name in features}


def converged_probes_bytes(
    images: int,
    width: int,
    num_classes: int,
    strengths: int = len(L2),
    multi_label: bool = False,
    device: str = "cpu",
) -> int:
    """Upper bound of the memory that :func:`converged_probes` needs next to the features, in bytes.

    On a CPU layers are solved one after the other, on a GPU together up to :data:`GROUP_BYTES`; regularisation
    strengths are solved together up to :data:`SOLVER_BYTES`, at least one at a time. The bound counts tensors; freed
    memory that the C library keeps, some hundred MB, comes on top.

    Args:
        images: number of training images.
        width: number of features of the widest layer.
        num_classes: number of classes.
        strengths: number of regularisation strengths.
        multi_label: whether an image can have several classes.
        device: type of the device.

    Example:
        >>> [round(converged_probes_bytes(n, width=512, num_classes=10) / 2**20) for n in (10_000, 100_000)]
        [124, 679]
    """
    rank, columns = min(images, width), strengths * num_classes
    targets = (24 if multi_label else 8) * images * num_classes
    inputs = 4 * images * (width + rank + 1)  # of those that are not validation out, raw and in their principal axes
    block = 8 * 3 * max(BLOCK, width + columns)
    axes = block + 8 * (4 * width**2 if images > width else 4 * width * images + 4 * images**2)
    problem = _problem_bytes(images, rank + 1, 1 if multi_label else num_classes)
    problems = columns if multi_label else strengths
    solver = 8 * width * rank + max(problem, min(problems * problem, SOLVER_BYTES))
    evaluation = 2 * block + 8 * width * (rank + 5 * columns)
    return 2**25 + targets + inputs + max(axes, solver, evaluation) + GROUP_BYTES.get(device, GROUP_BYTES["cuda"])


def _problem_bytes(images: int, columns: int, classes: int) -> int:
    """Working memory of the solver for one regularisation strength of one layer; one class: binary regression."""
    return 4 * classes * ((8 if classes == 1 else 7) * images + (2 * MEMORY + 8) * columns)


def logistic_regression(
    features: Mapping[str, Float[Tensor, "N D"]],
    labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"],
    num_classes: int,
    l2: Sequence[float] = L2,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = ITERATIONS,
) -> dict[str, LinearProbe]:
    """Minimise mean cross-entropy + l2/2 |W|^2 on standardised features, for all layers and strengths.

    L-BFGS runs in the principal axes of each layer. There the Hessian is nearly diagonal: the mean of p (1 - p) of a
    class times the eigenvalue of the axis. Its inverse is the initial inverse Hessian. The line search needs the logits
    alone, which are linear in the step length, so an iteration costs one product with the features and one with their
    transpose, for all strengths and all layers of one width together. Iterations run in float32; the principal axes,
    the rotation back and the final objective and gradient are computed in float64.

    Args:
        features: layer to features; layers may differ in width.
        labels: class of each image, in [0, num_classes); or a multi-hot row per image (multi-label), which gives one
            binary regression per class. A class that no image or every image has no optimum: its weights are 0.
        num_classes: number of classes.
        l2: regularisation strengths, above 0; biases are not regularised. scikit-learn's C is 1 / (N l2), and for two
            classes 2 / (N l2): both classes have weights here, which halves the penalty on their difference.
        tolerance: a problem has converged where the largest entry of its gradient is at most this share of the
            objective, and the suboptimality that the initial inverse Hessian predicts is at most a thirtieth of that.
            The default is close to the resolution of float32 and leaves the objective within 1e-6 of the optimum,
            relative (the largest seen was 5e-7 at l2 = 1e-5, and 1e-9 at 1e-2).
        max_iterations: most iterations; a warning names the problems that have not converged by then.

    Returns:
        Layer to classifiers, float64, with their objective and its gradient.

    Raises:
        ValueError: a single class, labels out of range, fewer images than classes, features that are not finite, or a
            regularisation strength that is not above 0.

    References:
        Liu & Nocedal, *On the limited memory BFGS method for large scale optimization*, 1989.

    Example:
        >>> x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        >>> probe = logistic_regression({"layer": x}, (x[:, 0] > 0).long(), num_classes=2, l2=[1e-3, 1e-1])["layer"]
        >>> probe.weight.shape, bool((probe.gradient_norm < 1e-5).all())
        (torch.Size([2, 4, 2]), True)
    """
    check_l2(l2, zero=False)
    _check_problem(features, labels, num_classes)
    # Images come last in targets and logits: a softmax over classes then runs along the images, 14 times faster on a
    # CPU than over ten classes that are adjacent in memory.
    targets = one_hot(labels, num_classes).T.contiguous()
    strengths = torch.tensor(l2, dtype=torch.float64, device=labels.device)
    found: dict[str, LinearProbe] = {}
    for group in _groups(features, len(l2) * num_classes):
        n, width = features[group[0]].shape
        x = torch.empty(len(group), n, min(n, width) + 1, device=labels.device)
        axes = [_principal_axes(features[name], inputs) for name, inputs in zip(group, x, strict=True)]
        weights = _solve(x, targets, axes, strengths, labels.ndim == 1, tolerance, max_iterations)
        del x
        for name, axis, weight in zip(group, axes, weights, strict=True):
            probe, suboptimality = _evaluate(
                features[name], targets, axis, weight.double(), strengths, labels.ndim == 1
            )
            unsolved = ~(suboptimality <= tolerance / 3)  # float32 rounding stays below this
            if bool(unsolved.any()):
                which = ", ".join(f"{value:g}" for value in strengths[unsolved].tolist())
                warnings.warn(
                    f"logistic regression of {name} stopped before the optimum for l2 {which}: the objective is "
                    f"{float(suboptimality.max()):.0e} above it, relative, and the largest entry of the gradient is "
                    f"{float(probe.gradient_norm.max()):.1e}",
                    stacklevel=2,
                )
            found[name] = probe
    return {name: found[name] for name in features}


def _check_problem(features: Mapping[str, Tensor], labels: Tensor, num_classes: int) -> None:
    check_bank(labels, num_classes)
    for name, x in features.items():
        check_features(f"layer {name}", x)
        if len(x) != len(labels):
            raise ValueError(f"layer {name}: features of {len(x)} images, labels of {len(labels)}")


class _Axes(NamedTuple):
    """Principal axes of the standardised features, float64."""

    mean: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]
    """Inverse standard deviation; 0 for a constant feature."""
    rotation: Float[Tensor, "D M"]
    """Maps standardised features to the inputs of the solver; its columns are orthonormal."""
    squares: Float[Tensor, " M+1"]
    """Mean squares of the inputs."""


def _principal_axes(features: Float[Tensor, "N D"], inputs: Float[Tensor, "N M+1"]) -> _Axes:
    """The M = min(N, D) axes; writes the standardised features along them, and a column of ones, into ``inputs``.

    Axes of small variance matter, as weakly regularised classifiers use them. Hence float64, and no truncation.
    """
    n, width = features.shape
    parts = features.split(rows_at_once(width))
    mean = sum((part.double().sum(0) for part in parts), torch.zeros(())) / n
    variance = sum(((part.double() - mean).square().sum(0) for part in parts), torch.zeros(())) / n
    scale = torch.where(is_varying(variance, mean), variance.rsqrt(), 0)
    if n < width:  # all images lie in a space of n dimensions
        basis, coordinates = torch.linalg.qr(((features.double() - mean) * scale).T)
        _, vectors = torch.linalg.eigh(coordinates @ coordinates.T)
        rotation, rotated = basis @ vectors, coordinates.T @ vectors
        inputs[:, :-1] = rotated
        squares = rotated.square().mean(0)
    else:
        standard = ((part.double() - mean) * scale for part in parts)
        _, rotation = torch.linalg.eigh(sum((part.T @ part for part in standard), torch.zeros(())))
        squares = torch.zeros_like(mean)
        for part, into in zip(parts, inputs.split(rows_at_once(width)), strict=True):
            rotated = ((part.double() - mean) * scale) @ rotation
            into[:, :-1] = rotated
            squares += rotated.square().sum(0) / n
    inputs[:, -1] = 1
    return _Axes(mean, scale, rotation, torch.cat([squares, squares.new_ones(1)]))


def _groups(features: Mapping[str, Tensor], columns: int) -> list[list[str]]:
    """Groups of layers of one width, as many in each as fit into the working memory."""
    by_width: dict[int, list[str]] = {}
    for name, x in features.items():
        by_width.setdefault(x.shape[1], []).append(name)
    groups = []
    for width, names in by_width.items():
        n = len(features[names[0]])
        each = 8 * n * width + _problem_bytes(n, width, columns)
        budget = GROUP_BYTES.get(features[names[0]].device.type, GROUP_BYTES["cuda"])
        some = max(1, budget // each)
        groups += [names[start : start + some] for start in range(0, len(names), some)]
    return groups


def _solve(
    x: Float[Tensor, "G N E"],
    targets: Float[Tensor, "C N"],
    axes: Sequence[_Axes],
    l2: Float[Tensor, " S"],
    multinomial: bool,
    tolerance: float,
    max_iterations: int,
) -> Float[Tensor, "G S C E"]:
    """Weights of all layers and strengths, as many at once as memory allows; the last of the E columns is the bias."""
    classes, n = targets.shape
    squares = torch.stack([axis.squares for axis in axes]).float()
    share = targets.mean(1, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    weights = x.new_zeros(len(x), len(l2), classes, x.shape[2])
    weights[..., -1] = share.log() if multinomial else share.logit()
    budget = max(SOLVER_BYTES, GROUP_BYTES.get(x.device.type, GROUP_BYTES["cuda"]))
    together = budget // (len(x) * _problem_bytes(n, x.shape[2], classes if multinomial else 1))
    if multinomial:
        for some in torch.arange(len(l2), device=x.device).split(max(1, together)):
            weights[:, some] = minimise(
                x, targets[None], weights[:, some], squares, l2[some], tolerance, max_iterations
            )
        return weights
    several = (targets != targets[:, :1]).any(1).nonzero()[:, 0]
    for pairs in torch.cartesian_prod(torch.arange(len(l2), device=x.device), several).split(max(1, together)):
        strength, one = pairs.unbind(1)  # each class is a separate problem with one column
        start = weights[:, strength, one, None]
        solved = minimise(x, targets[one, None], start, squares, l2[strength], tolerance, max_iterations)
        weights[:, strength, one] = solved[:, :, 0]
    return weights


def _evaluate(
    features: Float[Tensor, "N D"],
    targets: Float[Tensor, "C N"],
    axes: _Axes,
    weight: Float[Tensor, "S C E"],
    l2: Float[Tensor, " S"],
    multinomial: bool,
) -> tuple[LinearProbe, Float[Tensor, " S"]]:
    """The classifier for raw features, and its relative suboptimality, estimated from gradient and Hessian."""
    standard = weight[..., :-1] @ axes.rotation.T  # (S, C, D)
    raw = standard * axes.scale
    bias = weight[..., -1] - raw @ axes.mean
    gradient, slope, variance = torch.zeros_like(raw), torch.zeros_like(bias), torch.zeros_like(bias)
    loss = l2.new_zeros(len(l2), 1 if multinomial else bias.shape[1])
    rows = rows_at_once(raw.shape[2] + bias.numel())
    for part, y in zip(features.split(rows), targets.split(rows, 1), strict=True):
        part, y = part.double(), y.double()
        logits = (raw.flatten(0, 1) @ part.T).unflatten(0, bias.shape) + bias[..., None]
        # a binary regression for each class, or one problem of all
        logits, y = (logits[None], y[None]) if multinomial else (logits[:, :, None], y[:, None])
        loss += total_loss(logits, y).view_as(loss)
        variance += variances(logits).sum(3).view_as(bias)
        errors = residuals(logits, y).view(*bias.shape, -1)
        slope += errors.sum(2)
        gradient += (errors.flatten(0, 1) @ ((part - axes.mean) * axes.scale)).view_as(raw)
    n, penalty = len(features), l2[:, None]
    gradient, slope, variance = gradient / n + penalty[..., None] * standard, slope / n, variance / n
    curvature = (variance[..., None] * axes.squares[:-1] + penalty[..., None]).clamp_min(
        torch.finfo(torch.float64).tiny
    )
    suboptimality = ((gradient @ axes.rotation).square() / curvature).sum(2) + slope.square() / variance.clamp_min(
        1e-30
    )
    size = standard.square().sum(2)
    if multinomial:
        suboptimality, size = suboptimality.sum(1, keepdim=True), size.sum(1, keepdim=True)
    else:
        suboptimality = torch.where((targets == targets[:, :1]).all(1), 0, suboptimality)  # those without an optimum
    objective = loss / n + penalty / 2 * size
    steepest = torch.maximum(gradient.abs().amax((1, 2)), slope.abs().amax(1))
    probe = LinearProbe(raw.mT.contiguous(), bias, l2, objective.sum(1), steepest)
    return probe, (suboptimality / 2 / objective).amax(1)
