"""Intrinsic dimension of a set of points, from the distances to its nearest neighbours.

Distances are those of one search among N points, the point itself and duplicates excluded (see
:func:`ssl_geometry.geometry.neighbors.nearest` with metric "l2"): squared, in ascending order, NaN where there is none.
"""

import torch
from jaxtyping import Float
from torch import Tensor

DISCARD = 0.1
"""Share of the largest ratios that TwoNN leaves out."""


def two_nn(squared_distances: Float[Tensor, "N k"], discard: float = DISCARD) -> Float[Tensor, ""]:
    """Dimension from the ratio of the distances to the second and the first neighbour.

    The ratios mu of points of a d-dimensional manifold follow the Pareto law P(mu > m) = m^-d; d is the slope of
    -log(1 - F) against log mu, through the origin.

    Args:
        squared_distances: to the neighbours of each point, ascending, k >= 2.
        discard: share of the largest ratios that is left out, because the law fails there first.

    Returns:
        The dimension, float64; NaN where no point has two neighbours at different distances.

    Raises:
        ValueError: k < 2.

    References:
        Facco et al., *Estimating the intrinsic dimension of datasets by a minimal neighborhood information*, 2017.

    Example:
        >>> from ssl_geometry.geometry.neighbors import nearest
        >>> plane = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) @ torch.rand(2, 10)
        >>> 1.8 < float(two_nn(nearest(plane, k=2, metric="l2").values)) < 2.2
        True
    """
    if squared_distances.shape[1] < 2:
        raise ValueError(f"TwoNN needs two neighbours of each point, got {squared_distances.shape[1]}")
    first, second = squared_distances[:, :2].double().unbind(1)
    logs = ((second / first).log() / 2).masked_fill(~(first > 0), torch.nan)
    logs = logs[logs.isfinite()].sort().values
    n = len(logs)
    kept = logs[: round(n * (1 - discard))]
    heights = -torch.log1p(-torch.arange(1, n + 1, dtype=torch.float64, device=logs.device) / n)[: len(kept)]
    kept, heights = kept[heights.isfinite()], heights[heights.isfinite()]
    squares = kept.square().sum()
    return torch.where(squares > 0, (kept * heights).sum() / squares, torch.nan)


def levina_bickel(squared_distances: Float[Tensor, "N k"]) -> Float[Tensor, ""]:
    """Maximum-likelihood estimate from the distances to k neighbours; inverse estimates are averaged over points.

    Args:
        squared_distances: to the neighbours of each point, ascending, k >= 3; points with fewer are left out.

    Returns:
        The dimension, float64; NaN where no point has k neighbours at different distances.

    Raises:
        ValueError: k < 3.

    References:
        Levina & Bickel, *Maximum likelihood estimation of intrinsic dimension*, 2004, eq. 8-9; MacKay & Ghahramani,
        *Comments on "Maximum likelihood estimation of intrinsic dimension"*, 2005 (averaging the inverses).

    Example:
        >>> from ssl_geometry.geometry.neighbors import nearest
        >>> plane = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) @ torch.rand(2, 10)
        >>> 1.8 < float(levina_bickel(nearest(plane, k=20, metric="l2").values)) < 2.2
        True
    """
    k = squared_distances.shape[1]
    if k < 3:
        raise ValueError(f"the maximum-likelihood dimension needs three neighbours of each point, got {k}")
    logs = squared_distances.double().log() / 2
    ratios = (logs[:, -1:] - logs[:, :-1]).sum(1)  # of each point, the sum of log(T_k / T_j)
    ratios = ratios[ratios.isfinite()]
    return torch.where(ratios.sum() > 0, (k - 1) * len(ratios) / ratios.sum(), torch.nan)
