"""Ridge regression on the classes, from sums over images."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_geometry.geometry.classification import (
    L2,
    LinearProbe,
    check_strengths,
    choose_strength,
    choosing_folds,
    is_varying,
    one_hot,
    rows_at_once,
    unchecked_one_hot,
)


def ridge_sums(features: Float[Tensor, "N D"], targets: Float[Tensor, "N C"]) -> Float[Tensor, "D+1 D+1+C"]:
    """All that ridge regression needs of some images, float64; :func:`merge_sums` joins those of batches and ranks.

    The rows of the features hold the products with features and targets, summed about the means: nothing cancels where
    features vary little around a large mean. The last row holds the means, and the number of images in between.

    Args:
        features: of each image.
        targets: of each image; see :func:`one_hot`.

    Example:
        >>> ridge_sums(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])).tolist()
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
    return found[0] if len(found) == 1 else merge_sums(torch.stack(found))


def merge_sums(parts: Float[Tensor, "P D+1 D+1+C"]) -> Float[Tensor, "D+1 D+1+C"]:
    """The sums of all images from those of parts of them, which may be empty.

    References:
        Chan, Golub & LeVeque, *Updating formulae and a pairwise algorithm for computing sample variances*, 1982.

    Example:
        >>> x, y = torch.arange(8.0).view(4, 2), torch.eye(4)
        >>> merged = merge_sums(torch.stack([ridge_sums(x[:1], y[:1]), ridge_sums(x[1:], y[1:])]))
        >>> bool((merged - ridge_sums(x, y)).abs().max() < 1e-12)
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
        sums: of the images, as of :func:`ridge_sums`.
        l2: strengths of the penalty, 0 or above.

    Returns:
        Regressions in float64. A feature that does not vary has the weight 0; collinear ones share theirs.

    Raises:
        ValueError: no image, sums that are not finite, a negative strength, or no penalty where features are collinear.

    References:
        Hoerl & Kennard, *Ridge regression*, 1970.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> probe = ridge(ridge_sums(x, x[:, :1] * 2 + 1), l2=[1e-9])
        >>> [round(value, 3) for value in probe.weight.flatten().tolist()], round(float(probe.bias), 3)
        ([2.0, 0.0, 0.0], 1.0)
    """
    check_strengths(l2, zero=True)
    width = len(sums) - 1
    n = sums[-1, width]
    finite, some = torch.stack([sums.isfinite().all(), n > 0]).tolist()
    if not finite:
        raise ValueError("ridge regression: features or targets are not finite")
    if not some:
        raise ValueError("ridge regression of no image: give some")
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
    # |y|^2 is not among the sums: of one-hot targets it is their sum. The objective is reported up to that constant.
    fit = (standard * (product - 2 * aim)).sum((1, 2))
    objective = fit + strengths * standard.square().sum((1, 2))
    return LinearProbe(weight, bias, strengths, objective, gradient.abs().amax((1, 2)))


def _penalised(
    correlation: Float[Tensor, "D D"], aim: Float[Tensor, "D C"], l2: Sequence[float]
) -> tuple[dict[float, Float[Tensor, "D C"]], int]:
    """(correlation + l2)^-1 aim for each strength; and, where eigenvalues were computed, how many of them are zero.

    A matrix of unit diagonal whose smallest eigenvalue is above D (D + 1) eps has a Cholesky factor in spite of
    rounding (Demmel 1989): strengths above that are solved by one, each in the memory of one matrix and without a wait
    of the host. Weaker ones, 0 among them, are solved by the eigenvalues of the correlation.
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
    if failed and bool(torch.stack(failed).any()):  # not the sums of any features
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
    held: Float[Tensor, "D+1 D+1+C"],
    held_features: Float[Tensor, "M D"],
    held_labels: Int64[Tensor, " M"] | Int64[Tensor, "M C"],
    l2: Sequence[float] = L2,
) -> LinearProbe:
    """Ridge regression whose strength is chosen on held-out images, fitted again on all.

    Args:
        fit: sums of the images to learn from.
        held: sums of the held-out images.
        held_features: of the held-out images.
        held_labels: of the held-out images.
        l2: strengths to choose from; of equally right ones that of the smallest squared error, then the strongest.

    Returns:
        One regression (S = 1).

    Raises:
        ValueError: features that are not finite, or no held-out images.
    """
    best = choose_strength([(ridge(fit, l2), held_features, held_labels)], squared_error)
    return ridge(merge_sums(torch.stack([fit, held])), [l2[best]])


def ridge_probe_of_few(
    features: Float[Tensor, "N D"],
    labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"],
    num_classes: int,
    l2: Sequence[float] = L2,
) -> LinearProbe:
    """:func:`ridge_probe` of fewer than 100 images, its strength chosen by five-fold cross-validation.

    Args:
        features: of each image.
        labels: of each image.
        num_classes: number of classes.
        l2: as of :func:`ridge_probe`, by the numbers of all images, each scored by the classifier without its fold.

    Returns:
        One regression (S = 1), of all images.

    Raises:
        ValueError: features that are not finite, or images that teach nothing.

    Example:
        >>> labels = torch.arange(20) % 2
        >>> probe = ridge_probe_of_few(torch.eye(2)[labels], labels, num_classes=2)
        >>> bool((probe.scores(torch.eye(2))[0].argmax(1) == torch.arange(2)).all())
        True
    """
    targets = one_hot(labels, num_classes)
    parts = []
    for fold in choosing_folds(labels, torch.zeros_like(targets[:, 0], dtype=torch.bool), num_classes):
        parts.append((ridge(ridge_sums(features[~fold], targets[~fold]), l2), features[fold], labels[fold]))
    return ridge(ridge_sums(features, targets), [l2[choose_strength(parts, squared_error)]])


def squared_error(
    scores: Float[Tensor, "N C"], labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"]
) -> Float[Tensor, ""]:
    """What ridge regression minimises: the mean over images of the squared distance to the targets.

    Example:
        >>> float(squared_error(torch.zeros(1, 2), torch.tensor([1])))
        1.0
    """
    return (scores - unchecked_one_hot(labels, scores.shape[1])).square().sum(1).mean()
