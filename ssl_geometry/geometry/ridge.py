"""Ridge regression on one-hot classes, from sufficient statistics."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_geometry.geometry.classification import (
    L2,
    LinearProbe,
    check_l2,
    choose_l2,
    is_varying,
    one_hot,
    rows_at_once,
    unchecked_one_hot,
    validation_folds,
)


def sufficient_statistics(features: Float[Tensor, "N D"], targets: Float[Tensor, "N C"]) -> Float[Tensor, "D+1 D+1+C"]:
    """Sufficient statistics of ridge regression, float64; :func:`merge_statistics` merges those of batches and ranks.

    The first D rows hold the centred products of features with features and targets, so nothing cancels where features
    vary little around a large mean. The last row holds the means of the features, the number of images, and the means
    of the targets.

    Args:
        features: of each image.
        targets: of each image; see :func:`one_hot`.

    Example:
        >>> sufficient_statistics(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])).tolist()
        [[2.0, 2.0, 1.0], [2.0, 2.0, 0.5]]
    """
    width = features.shape[1]
    found = []
    for x, y in zip(features.split(rows_at_once(width)), targets.split(rows_at_once(width)), strict=True):
        both = torch.cat([x.double(), y.double()], 1)
        mean = both.sum(0) / max(1, len(x))
        both -= mean
        products = both[:, :width].T @ both
        last = torch.cat([mean[:width], mean.new_full((1,), len(x)), mean[width:]])
        rows = torch.cat([products[:, :width], mean[:width, None], products[:, width:]], 1)
        found.append(torch.cat([rows, last[None]]))
    return found[0] if len(found) == 1 else merge_statistics(torch.stack(found))


def merge_statistics(parts: Float[Tensor, "P D+1 D+1+C"]) -> Float[Tensor, "D+1 D+1+C"]:
    """The statistics of all images from those of disjoint parts of them, which may be empty.

    References:
        Chan, Golub & LeVeque, *Updating formulae and a pairwise algorithm for computing sample variances*, 1982.

    Example:
        >>> x, y = torch.arange(8.0).view(4, 2), torch.eye(4)
        >>> parts = [sufficient_statistics(x[:1], y[:1]), sufficient_statistics(x[1:], y[1:])]
        >>> merged = merge_statistics(torch.stack(parts))
        >>> bool((merged - sufficient_statistics(x, y)).abs().max() < 1e-12)
        True
    """
    width = parts.shape[1] - 1
    counts, means = parts[:, -1, width], parts[:, -1]
    total = counts.sum()
    mean = (counts / total.clamp_min(1)) @ means
    apart = (means - mean) * counts.sqrt()[:, None]
    apart[:, width] = 0
    merged = parts.sum(0)
    merged[:-1] += apart[:, :width].T @ apart
    mean[width] = total
    merged[:-1, width] = mean[:width]
    merged[-1] = mean
    return merged


def ridge(sums: Float[Tensor, "D+1 D+1+C"], l2: Sequence[float] = L2) -> LinearProbe:
    """Minimise (1/N) |y - x W - b|^2 + l2 |W|^2 on standardised features, in closed form.

    Args:
        sums: of the images, from :func:`sufficient_statistics`.
        l2: regularisation strengths, 0 or above.

    Returns:
        Regressions in float64. A constant feature has weight 0; collinear ones share theirs.

    Raises:
        ValueError: no image, sums that are not finite, a negative strength, or l2 = 0 where features are collinear.

    References:
        Hoerl & Kennard, *Ridge regression*, 1970.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> probe = ridge(sufficient_statistics(x, x[:, :1] * 2 + 1), l2=[1e-9])
        >>> [round(value, 3) for value in probe.weight.flatten().tolist()], round(float(probe.bias), 3)
        ([2.0, 0.0, 0.0], 1.0)
    """
    check_l2(l2, zero=True)
    width = len(sums) - 1
    n = sums[-1, width]
    finite, some = torch.stack([sums.isfinite().all(), n > 0]).tolist()
    if not finite:
        raise ValueError("ridge regression: features or targets are not finite")
    if not some:
        raise ValueError("ridge regression needs at least one image")
    mean, target_mean = sums[-1, :width], sums[-1, width + 1 :]
    covariance, cross = sums[:-1, :width] / n, sums[:-1, width + 1 :] / n
    variance = covariance.diagonal()
    varies = is_varying(variance, mean)
    scale = torch.where(varies, variance.rsqrt(), 0)
    correlation, aim = scale[:, None] * covariance * scale, scale[:, None] * cross
    strengths = torch.tensor(l2, dtype=torch.float64, device=sums.device)
    solved, dependent = _penalised(correlation, aim, l2)
    if 0 in l2 and dependent > int((~varies).sum()):
        raise ValueError(f"l2 0: {int(varies.sum())} features of {int(n)} images are collinear; set it above 0")
    standard = torch.stack([solved[strength] for strength in l2])  # (S, D, C), of standardised features
    weight = scale[:, None] * standard
    bias = target_mean - mean @ weight
    columns = standard.permute(1, 0, 2)  # one product for all strengths
    product = (correlation @ columns.flatten(1)).view_as(columns).permute(1, 0, 2)
    gradient = 2 * (product + strengths[:, None, None] * standard - aim)
    # |y|^2 is not among the statistics: the objective is reported up to that constant.
    fit = (standard * (product - 2 * aim)).sum((1, 2))
    objective = fit + strengths * standard.square().sum((1, 2))
    return LinearProbe(weight, bias, strengths, objective, gradient.abs().amax((1, 2)))


def _penalised(
    correlation: Float[Tensor, "D D"], aim: Float[Tensor, "D C"], l2: Sequence[float]
) -> tuple[dict[float, Float[Tensor, "D C"]], int]:
    """(correlation + l2)^-1 aim for each strength; and, where eigenvalues were computed, how many of them are zero.

    A matrix of unit diagonal whose smallest eigenvalue is above D (D + 1) eps has a Cholesky factor despite rounding
    (Demmel 1989). Larger strengths are therefore solved by Cholesky, in the memory of one matrix and without host
    synchronisation; smaller ones, 0 included, by an eigendecomposition of the correlation.
    """
    width, eps = len(correlation), torch.finfo(torch.float64).eps
    solved, failed = {}, []
    for strength in l2:
        if strength > width * (width + 1) * eps:
            matrix = correlation.clone()
            matrix.diagonal().add_(strength)
            root, failure = torch.linalg.cholesky_ex(matrix)
            solved[strength] = torch.cholesky_solve(aim, root)
            failed.append(failure)
    if failed and bool(torch.stack(failed).any()):  # no valid statistics of features
        solved.clear()
    if len(solved) == len(set(l2)):
        return solved, 0
    values, vectors = torch.linalg.eigh(correlation)
    lost = values <= width * eps * values[-1:]
    projected = vectors.T @ aim
    for strength in l2:
        if strength not in solved:
            shrinkage = torch.where(lost, torch.inf, values) if strength == 0 else values.clamp_min(0) + strength
            solved[strength] = vectors @ (projected / shrinkage[:, None])
    return solved, int(lost.sum())


def ridge_probe(
    fit: Float[Tensor, "D+1 D+1+C"],
    validation: Float[Tensor, "D+1 D+1+C"],
    validation_features: Float[Tensor, "M D"],
    validation_labels: Int64[Tensor, " M"] | Int64[Tensor, "M C"],
    l2: Sequence[float] = L2,
) -> LinearProbe:
    """Ridge regression whose regularisation strength is selected on the validation split, refitted on all images.

    Args:
        fit: statistics of the images to learn from.
        validation: statistics of the validation split.
        validation_features: of the validation split.
        validation_labels: of the validation split.
        l2: regularisation strengths to select from by validation accuracy; ties are broken by the smallest squared
            error, then by the largest strength.

    Returns:
        One regression (S = 1).

    Raises:
        ValueError: features that are not finite, or an empty validation split.
    """
    best = choose_l2([(ridge(fit, l2), validation_features, validation_labels)], squared_error)
    return ridge(merge_statistics(torch.stack([fit, validation])), [l2[best]])


def ridge_probe_of_few(
    features: Float[Tensor, "N D"],
    labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"],
    num_classes: int,
    l2: Sequence[float] = L2,
) -> LinearProbe:
    """:func:`ridge_probe` for fewer than 100 images: five-fold cross-validation selects the regularisation strength.

    Args:
        features: of each image.
        labels: of each image.
        num_classes: number of classes.
        l2: as in :func:`ridge_probe`; each image is predicted by the classifier that did not see its fold.

    Returns:
        One regression (S = 1), fitted to all images.

    Raises:
        ValueError: features that are not finite, or images that no classifier can be fitted to.

    Example:
        >>> labels = torch.arange(20) % 2
        >>> probe = ridge_probe_of_few(torch.eye(2)[labels], labels, num_classes=2)
        >>> bool((probe.logits(torch.eye(2))[0].argmax(1) == torch.arange(2)).all())
        True
    """
    targets = one_hot(labels, num_classes)
    parts = []
    for fold in validation_folds(labels, torch.zeros_like(targets[:, 0], dtype=torch.bool), num_classes):
        parts.append((ridge(sufficient_statistics(features[~fold], targets[~fold]), l2), features[fold], labels[fold]))
    return ridge(sufficient_statistics(features, targets), [l2[choose_l2(parts, squared_error)]])


def squared_error(
    predictions: Float[Tensor, "N C"], labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"]
) -> Float[Tensor, ""]:
    """The loss of ridge regression: mean over images of the squared distance to the one-hot targets.

    Example:
        >>> float(squared_error(torch.zeros(1, 2), torch.tensor([1])))
        1.0
    """
    return (predictions - unchecked_one_hot(labels, predictions.shape[1])).square().sum(1).mean()
