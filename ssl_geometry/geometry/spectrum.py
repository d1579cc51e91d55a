"""How many directions features use, and how evenly: numbers read off singular values, eigenvalues and distances.

All in float64. What cannot be computed, because features are all zero, do not vary or are not finite, is NaN.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.geometry.vectors import unit_vectors

RANKME_EPS = 1e-7
"""Added to each share of the singular values, as in RankMe's paper."""
FIRST, LAST, RANK_SHARE = 11, 100, 0.9
"""Eigenvalues between which alpha-ReQ fits its law, and the share of the rank at which it ends before that."""
LIDAR_DELTA, LIDAR_EPS = 1e-4, 1e-8
"""Added to the covariance within images, and to each share of the eigenvalues."""
CONSTANT = 8
"""Features vary where they lie further than this many roundings from their mean (root mean square)."""
POTENTIAL = 2.0
"""The t of the Gaussian potential of uniformity."""


def singular_values(features: Float[Tensor, "N D"]) -> Float[Tensor, " M"]:
    """Singular values in descending order, min(N, D) of them; NaN for features that are not finite.

    They are roots of the eigenvalues of the smaller product, in float64: those of a float32 matrix are lost below 1e-7
    of the largest either way.

    Example:
        >>> singular_values(torch.diag(torch.tensor([3.0, 4.0])))
        tensor([4., 3.], dtype=torch.float64)
    """
    x = features.double()
    product = x @ x.T if len(x) < x.shape[1] else x.T @ x
    finite = product.isfinite().all()
    values = torch.linalg.eigvalsh(product.where(finite, 0)).flip(0)  # which would raise
    resolution = len(values) * torch.finfo(torch.float64).eps * values[:1]
    return torch.where(values > resolution, values, 0).sqrt().where(finite, torch.nan)


def entropy_rank(values: Float[Tensor, " M"], eps: float = 0.0) -> Float[Tensor, ""]:
    """The exponential of the entropy of the shares of a spectrum: :func:`rankme` of its singular values.

    Args:
        values: singular values, or other numbers of at least 0.
        eps: added to each share.

    Example:
        >>> round(float(entropy_rank(torch.tensor([2.0, 2.0, 0.0]))), 3)
        2.0
    """
    p = values / values.sum() + eps
    return torch.special.entr(p).sum().exp()


def rankme(features: Float[Tensor, "N D"], eps: float = RANKME_EPS) -> Float[Tensor, ""]:
    """RankMe: the exponential of the entropy of the singular values, features not centred.

    Args:
        features: embeddings.
        eps: added to each share of the singular values; 0 gives the effective rank.

    Returns:
        From 1 to about min(N, D); NaN where all features are zero.

    References:
        Garrido et al., *RankMe: assessing the downstream performance of pretrained self-supervised representations by
        their rank*, 2023, eq. 1-2; Roy & Vetterli, *The effective rank*, 2007 (eps = 0).

    Example:
        >>> round(float(rankme(torch.eye(8))), 3)
        8.0
    """
    return entropy_rank(singular_values(features), eps)


def covariance_eigenvalues(features: Float[Tensor, "N D"]) -> Float[Tensor, " M"]:
    """Eigenvalues of the covariance (centred, divided by N) in descending order, min(N, D) of them.

    All are 0 where rounding is all that features vary by: noise without structure would read as many directions.
    """
    centered = _centered(features.double(), torch.promote_types(features.dtype, torch.float32))
    return singular_values(centered).square() / len(features)


def _centered(x: Float[Tensor, "N D"], dtype: torch.dtype) -> Float[Tensor, "N D"]:
    """Less the mean; 0 where rounding in ``dtype`` is all that rows vary by."""
    mean = x.mean(0)
    rest = x - mean
    rounding = CONSTANT * torch.finfo(dtype).eps * mean.norm()
    return rest.masked_fill(rest.square().sum(1).mean().sqrt() <= rounding, 0)


def participation_ratio(features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Square of the sum of the covariance's eigenvalues over the sum of their squares.

    Returns:
        From 1 to min(N - 1, D); NaN where the features do not vary.

    References:
        Gao et al., *A theory of multineuronal dimensionality, dynamics and measurement*, 2017.

    Example:
        >>> round(float(participation_ratio(torch.eye(5))), 3)  # a simplex: four equal directions
        4.0
    """
    return evenness(covariance_eigenvalues(features))


def evenness(values: Float[Tensor, " M"]) -> Float[Tensor, ""]:
    """The square of the sum over the sum of squares: :func:`participation_ratio` of the covariance's eigenvalues.

    Example:
        >>> float(evenness(torch.tensor([2.0, 2.0, 0.0])))
        2.0
    """
    return values.sum().square() / values.square().sum()


def alpha_req(
    features: Float[Tensor, "N D"], first: int = FIRST, last: int = LAST
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Decay alpha of the covariance's eigenvalues, lambda_i ~ i^-alpha, and how well that law holds.

    Args:
        features: embeddings.
        first: first index of the fit, counted from 1: the largest eigenvalues follow no law.
        last: last index of the fit, at most; it ends at 0.9 of the rank, for the smallest eigenvalues of few images or
            features follow the edge of the matrix and no law.

    Returns:
        alpha and R^2 of the fit of log lambda against log i, both weighted by 1/i; NaN where the range ends before
        twice its first index (``first`` = 11: a rank below 25), for a law is not seen in less.

    References:
        Agrawal et al., *alpha-ReQ: assessing representation quality in self-supervised learning by measuring
        eigenspectrum decay*, 2022; Stringer et al., *High-dimensional geometry of population responses in visual
        cortex*, 2019 (the weights).

    Example:
        >>> axes = torch.linalg.qr(torch.randn(300, 120, generator=torch.Generator().manual_seed(0)).double())[0]
        >>> axes -= axes.mean(0)
        >>> axes = torch.linalg.qr(axes)[0]
        >>> alpha, fit = alpha_req(axes * torch.arange(1, 121) ** -0.75)  # eigenvalues i^-1.5
        >>> round(float(alpha), 3), round(float(fit), 3)
        (1.5, 1.0)
    """
    return decay(covariance_eigenvalues(features), first, last)


def decay(
    values: Float[Tensor, " M"], first: int = FIRST, last: int = LAST
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """:func:`alpha_req` of the covariance's eigenvalues, in descending order.

    Example:
        >>> alpha, fit = decay(torch.arange(1, 121).double() ** -1.5)
        >>> round(float(alpha), 3), round(float(fit), 3)
        (1.5, 1.0)
    """
    end = (RANK_SHARE * (values > 0).sum()).floor().clamp_max(last)
    index = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
    used = (index >= first) & (index <= end)
    weight = torch.where(used & (end >= 2 * first), 1 / index, 0)  # no index: 0 / 0 is not a number
    x, y = index.log(), values.where(used, 1).log()
    x, y = (part - (weight * part).sum() / weight.sum() for part in (x, y))
    slope = (weight * x * y).sum() / (weight * x * x).sum()
    return -slope, 1 - (weight * (y - slope * x).square()).sum() / (weight * y * y).sum()


def view_statistics(views: Float[Tensor, "n q D"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, "D D"]]:
    """Of q views of each of n images: the mean of each image, and the sum of products of what is left.

    The sums of batches and ranks add up; :func:`lidar` takes them.
    """
    means = views.double().mean(1)
    rest = (views.double() - means[:, None]).flatten(0, 1)
    return means, rest.T @ rest


def lidar(
    means: Float[Tensor, "n D"],
    scatter: Float[Tensor, "D D"],
    views: int,
    delta: float = LIDAR_DELTA,
    eps: float = LIDAR_EPS,
) -> Float[Tensor, ""]:
    """LiDAR: the effective rank of what linear discriminant analysis sees when every image is a class of its views.

    Args:
        means: mean embedding of each image over its views, as of :func:`view_statistics`.
        scatter: the sum over images of the products of what is left.
        views: how many views each image has.
        delta: added to the diagonal of the covariance within images.
        eps: added to the share of each of the D eigenvalues, also of those that are 0.

    Returns:
        From 1 to about min(n - 1, D); NaN where all means are equal but for float32's rounding.

    References:
        Thilak et al., *LiDAR: sensing linear probing performance in joint embedding SSL architectures*, 2024, eq. 1-4.

    Example:
        >>> images = torch.eye(6)[:, None] + 1e-3 * torch.randn(6, 10, 6, generator=torch.Generator().manual_seed(0))
        >>> round(float(lidar(*view_statistics(images), views=10)), 1)
        5.0
    """
    n, width = means.shape
    centered = _centered(means.double(), torch.float32)  # of which features are
    within = scatter.double() / (n * views) + delta * torch.eye(width, dtype=torch.float64, device=scatter.device)
    # S_w^-1/2 S_b S_w^-1/2 has the squared singular values of L^-1 (centered / sqrt(n)), where S_w = L L'.
    root, failed = torch.linalg.cholesky_ex(within)  # delta is lost next to features of very large scale
    root = root.masked_fill((failed > 0) | ~within.isfinite().all(), torch.nan)
    whitened = torch.linalg.solve_triangular(root, centered.T / n**0.5, upper=False)
    values = singular_values(whitened).square()
    return entropy_rank(F.pad(values, (0, width - len(values))), eps)  # of all D: those that are 0 have a share of eps


def alignment(x: Float[Tensor, "N D"], y: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Squared distance of the unit vectors of two views of each image; 0 where they agree.

    Returns:
        One number an image in [0, 4], float64: the loss is their mean. NaN for a zero vector.

    References:
        Wang & Isola, *Understanding contrastive representation learning through alignment and uniformity on the
        hypersphere*, 2020, eq. 8 (alpha = 2).

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([0., 2.], dtype=torch.float64)
    """
    return (unit_vectors(x) - unit_vectors(y)).square().sum(1)


def uniformity(x: Float[Tensor, "N D"], t: float = POTENTIAL, chunk: int = 1024) -> Float[Tensor, ""]:
    """Logarithm of the mean Gaussian potential of all pairs of unit vectors: the lower, the more evenly spread.

    Args:
        x: embeddings.
        t: the potential is exp(-t |x - y|^2).
        chunk: images compared at once.

    Returns:
        At most 0 (all equal), float64; NaN for fewer than two images or a zero vector.

    References:
        Wang & Isola, as for :func:`alignment`, eq. 9.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # one pair, at distance 2
        tensor(-8., dtype=torch.float64)
    """
    n, unit = len(x), unit_vectors(x)
    total = unit.new_zeros(())
    for start in range(0, n, chunk):
        squares = 2 - 2 * (unit[start : start + chunk] @ unit.T)
        squares.diagonal(start).fill_(torch.inf)  # an image with itself
        total += (-t * squares).exp().sum()
    return (total / (n * (n - 1))).log() if n > 1 else total.new_tensor(torch.nan)


def mean_cosine(x: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Mean cosine of all pairs of different images, features not centred: near 1 where features are collapsed.

    The sum over pairs is the squared length of the sum of unit vectors without its diagonal, so no pair is formed.

    Args:
        x: embeddings.

    Returns:
        From -1 / (N - 1) to 1, float64; NaN for fewer than two images or a zero vector.

    Example:
        >>> mean_cosine(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor(-1., dtype=torch.float64)
    """
    n, unit = len(x), unit_vectors(x)
    if n < 2:
        return unit.new_tensor(torch.nan)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))
