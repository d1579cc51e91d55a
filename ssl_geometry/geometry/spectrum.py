"""How many directions features use, and how evenly: metrics of singular values, eigenvalues and distances.

All are computed in float64. A metric is NaN where features are all zero, constant or not finite.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.geometry.vectors import unit_vectors

RANKME_EPS = 1e-7
"""Added to each share of the singular values, as in RankMe's paper."""
FIRST, LAST, RANK_SHARE = 11, 100, 0.9
"""Range of eigenvalues of the power-law fit of alpha-ReQ; it ends earlier, at this share of the rank, for low ranks."""
LIDAR_DELTA, LIDAR_EPS = 1e-4, 1e-8
"""Added to the covariance within images, and to each share of the eigenvalues."""
CONSTANT = 8
"""Features are constant if their root mean square deviation from the mean is at most this many roundings."""
POTENTIAL = 2.0
"""The t of the Gaussian potential of uniformity."""


def singular_values(features: Float[Tensor, "N D"]) -> Float[Tensor, " M"]:
    """Singular values in descending order, min(N, D) of them; NaN for features that are not finite.

    They are square roots of the eigenvalues of the smaller Gram matrix, in float64, which is accurate enough: singular
    values of a float32 matrix below 1e-7 of the largest are rounding noise.

    Example:
        >>> singular_values(torch.diag(torch.tensor([3.0, 4.0])))
        tensor([4., 3.], dtype=torch.float64)
    """
    x = features.double()
    product = x @ x.T if len(x) < x.shape[1] else x.T @ x
    finite = product.isfinite().all()
    values = torch.linalg.eigvalsh(product.where(finite, 0)).flip(0)  # eigvalsh raises on NaN
    resolution = len(values) * torch.finfo(torch.float64).eps * values[:1]
    return torch.where(values > resolution, values, 0).sqrt().where(finite, torch.nan)


def entropy_rank(values: Float[Tensor, " M"], eps: float = 0.0) -> Float[Tensor, ""]:
    """The exponential of the entropy of a normalised spectrum; of singular values, :func:`rankme`.

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

    All are 0 where features vary by rounding alone, since such noise would look like many directions.
    """
    centered = _centered(features.double(), torch.promote_types(features.dtype, torch.float32))
    return singular_values(centered).square() / len(features)


def _centered(x: Float[Tensor, "N D"], dtype: torch.dtype) -> Float[Tensor, "N D"]:
    """Rows minus their mean; 0 where they vary by the rounding of ``dtype`` alone."""
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
    """Square of the sum over sum of squares; of the covariance's eigenvalues, :func:`participation_ratio`.

    Example:
        >>> float(evenness(torch.tensor([2.0, 2.0, 0.0])))
        2.0
    """
    return values.sum().square() / values.square().sum()


def alpha_req(
    features: Float[Tensor, "N D"], first: int = FIRST, last: int = LAST
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Decay exponent alpha of the covariance's eigenvalues, lambda_i ~ i^-alpha, and the quality of the fit.

    Args:
        features: embeddings.
        first: first index of the fit, counted from 1; the largest eigenvalues do not follow the power law.
        last: last index of the fit, at most. The fit ends at 0.9 of the rank, because the smallest eigenvalues of few
            images or features are dominated by finite-sample effects.

    Returns:
        alpha and R^2 of the fit of log lambda against log i, both weighted by 1/i; NaN where the range ends before
        twice its first index (``first`` = 11: a rank below 25), which is too short for a power law.

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
    weight = torch.where(used & (end >= 2 * first), 1 / index, 0)  # without any index, 0 / 0 gives NaN
    x, y = index.log(), values.where(used, 1).log()
    x, y = (part - (weight * part).sum() / weight.sum() for part in (x, y))
    slope = (weight * x * y).sum() / (weight * x * x).sum()
    return -slope, 1 - (weight * (y - slope * x).square()).sum() / (weight * y * y).sum()


def view_statistics(views: Float[Tensor, "n q D"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, "D D"]]:
    """Mean of the q views of each of n images, and the scatter matrix of the views around these means.

    Scatter matrices of batches and ranks add up to the input of :func:`lidar`.
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
    """LiDAR: the effective rank of linear discriminant analysis in which each image is a class, made of its views.

    Args:
        means: mean embedding of each image over its views, from :func:`view_statistics`.
        scatter: scatter matrix within images, summed over images.
        views: number of views of each image.
        delta: added to the diagonal of the covariance within images.
        eps: added to the share of each of the D eigenvalues, zero ones included.

    Returns:
        From 1 to about min(n - 1, D); NaN where all means are equal within float32 rounding.

    References:
        Thilak et al., *LiDAR: sensing linear probing performance in joint embedding SSL architectures*, 2024, eq. 1-4.

    Example:
        >>> images = torch.eye(6)[:, None] + 1e-3 * torch.randn(6, 10, 6, generator=torch.Generator().manual_seed(0))
        >>> round(float(lidar(*view_statistics(images), views=10)), 1)
        5.0
    """
    n, width = means.shape
    centered = _centered(means.double(), torch.float32)  # the dtype of the features
    within = scatter.double() / (n * views) + delta * torch.eye(width, dtype=torch.float64, device=scatter.device)
    # S_w^-1/2 S_b S_w^-1/2 has the squared singular values of L^-1 (centered / sqrt(n)), where S_w = L L'.
    root, failed = torch.linalg.cholesky_ex(within)  # delta is lost in rounding for features of very large scale
    root = root.masked_fill((failed > 0) | ~within.isfinite().all(), torch.nan)
    whitened = torch.linalg.solve_triangular(root, centered.T / n**0.5, upper=False)
    values = singular_values(whitened).square()
    return entropy_rank(F.pad(values, (0, width - len(values))), eps)  # zero eigenvalues have share eps


def alignment(x: Float[Tensor, "N D"], y: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Squared distance between the unit vectors of two views of each image; 0 where they agree.

    Returns:
        One value per image in [0, 4], float64, whose mean is the alignment loss. NaN for a zero vector.

    References:
        Wang & Isola, *Understanding contrastive representation learning through alignment and uniformity on the
        hypersphere*, 2020, eq. 8 (alpha = 2).

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([0., 2.], dtype=torch.float64)
    """
    return (unit_vectors(x) - unit_vectors(y)).square().sum(1)


def uniformity(x: Float[Tensor, "N D"], t: float = POTENTIAL, chunk: int = 1024) -> Float[Tensor, ""]:
    """Logarithm of the mean Gaussian potential of all pairs of unit vectors: lower is more uniform.

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
    """Mean cosine of all pairs of different images, features not centred; close to 1 for collapsed features.

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
