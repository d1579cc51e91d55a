"""Statistics over a handful of models: groups of similar ones, and what predicts how well they transfer.

Rows are models, columns are numbers measured of each (manifold graph metrics). There are few models, so every figure
is made to be honest about that: tests are permutation tests, corrected for the number of columns that were tried, and
predictions are of models that the fit has not seen.

**Rows of a test or a prediction must be independent.** Seeds of one recipe are not: a fit that has seen one seed has
seen the other, and an order that keeps them together is no random one (seven recipes of two seeds each give a median
Q² of 0.97 where nothing predicts anything). Average them first: :func:`unit_means`.
"""

from collections.abc import Sequence
from math import factorial, inf
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray as Array
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.stats import permutation_test, rankdata

STRENGTHS = tuple(np.logspace(-2, 5, 29).tolist())
"""Penalties of ridge regression, on standardised columns; each is chosen without the model that is predicted."""
ALL_PERMUTATIONS = 8
"""Up to so many models, all orders are tried (40,320 at most) instead of random ones."""


class Groups(NamedTuple):
    """Models by similarity."""

    merges: Float[Array, "n-1 4"]
    """What is merged with what, at which distance, into how many: SciPy's linkage matrix."""
    labels: Array
    """Group of each model, numbered from 1 as they come."""
    place: Float[Array, "n 2"]
    """On the first two principal components."""
    explained: Float[Array, " 2"]
    """Share of the variance along each."""


def group(x: Float[Array, "n p"], groups: int = 3) -> Groups:
    """Cluster models by Ward's method on standardised columns, and lay them out by principal components.

    Args:
        x: models x numbers, float64; columns that do not vary, or have a gap, are left out.
        groups: how many groups the tree is cut into, at most.

    Raises:
        ValueError: fewer than three models, or no column that varies.

    References:
        Ward, *Hierarchical grouping to optimize an objective function*, 1963.

    Example:
        >>> found = group(np.array([[0.0, 0.1], [0.1, 0.0], [5.0, 4.9], [5.1, 5.0]]), groups=2)
        >>> found.labels
        array([1, 1, 2, 2])
    """
    x = x[:, np.isfinite(x).all(0)]
    x = x[:, np.ptp(x, axis=0) > 1e-12 * np.abs(x).max(0)]  # more than rounding
    if len(x) < 3 or not x.shape[1]:
        raise ValueError(f"at least 3 models and a number that varies are needed, got {len(x)} and {x.shape[1]}")
    from sklearn.decomposition import PCA  # half a second to import
    from sklearn.preprocessing import StandardScaler

    z = StandardScaler().fit_transform(x)
    merges = linkage(z, "ward")
    components = PCA(min(2, z.shape[1]), svd_solver="full")
    missing = 2 - components.n_components
    place = np.pad(components.fit_transform(z), ((0, 0), (0, missing)))
    explained = np.pad(components.explained_variance_ratio_, (0, missing))
    labels, _ = pd.factorize(fcluster(merges, groups, "maxclust"))  # numbered as they come
    return Groups(merges, labels + 1, place, explained)


def unit_means(x: Float[Array, "n p"], units: Sequence[str]) -> Float[Array, "u p"]:
    """Rows of one unit averaged: what is left is independent.

    Args:
        x: models x numbers; a gap stays one unless another model of the unit has the number.
        units: of each model, such as its recipe.

    Returns:
        Units x numbers, in the order in which units first come.

    Example:
        >>> unit_means(np.array([[1.0], [5.0], [3.0]]), ["a", "b", "a"])
        array([[2.],
               [5.]])
    """
    return pd.DataFrame(x).groupby(np.asarray(units), sort=False).mean().to_numpy()


class Correlation(NamedTuple):
    """Rank correlation of each column with the target."""

    rho: Float[Array, " p"]
    """Spearman's; NaN for a column that does not vary or has a gap."""
    p: Float[Array, " p"]
    """Two-sided, by permutation."""
    adjusted: Float[Array, " p"]
    """The same, corrected for the number of columns (Holm)."""


def rank_correlation(x: Float[Array, "n p"], y: Float[Array, " n"], draws: int = 10_000, seed: int = 0) -> Correlation:
    """Spearman's correlation of every column with a target, tested by permuting the target.

    Args:
        x: models x numbers, float64; models that are independent (:func:`unit_means`).
        y: what is to be predicted of each model.
        draws: random orders; up to 8 models all orders are taken instead.
        seed: of the random orders.

    References:
        Holm, *A simple sequentially rejective multiple test procedure*, 1979; the p-value of drawn permutations counts
        the observed one: Phipson & Smyth, *Permutation p-values should never be zero*, 2010.

    Example:
        >>> found = rank_correlation(np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([2.0, 3.0, 5.0, 9.0]))
        >>> float(found.rho[0].round(12)), float(found.p[0])  # 2 of 24 orders are as extreme
        (1.0, 0.0833...)
    """
    ranks, target = _centered_ranks(x), _centered_ranks(y)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = target @ ranks / (np.linalg.norm(target) * np.linalg.norm(ranks, axis=0))
    tested = permutation_test(
        (target,),
        lambda order, axis: np.abs(order @ ranks),  # of whole numbers: what is equal is found to be
        permutation_type="pairings",
        alternative="greater",
        n_resamples=inf if len(y) <= ALL_PERMUTATIONS else draws,
        vectorized=True,
        rng=seed,
    )
    p = np.where(np.isnan(rho), np.nan, tested.pvalue)
    return Correlation(rho, p, holm(p))


def least_p(n: int, draws: int = 10_000) -> float:
    """The smallest p that :func:`rank_correlation` can give: of n! orders, two are as extreme as a perfect one.

    Example:
        >>> [round(least_p(n), 4) for n in (4, 5, 7, 14)]
        [0.0833, 0.0167, 0.0004, 0.0001]
    """
    return 2 / factorial(n) if n <= ALL_PERMUTATIONS else 1 / (draws + 1)


def _centered_ranks(x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    """Twice the ranks about their mean, which are whole numbers, ties as well."""
    return 2 * rankdata(x, axis=0, nan_policy="propagate") - (len(x) + 1)


def holm(p: Float[Array, " m"]) -> Float[Array, " m"]:
    """p-values corrected for how many there are; NaN are not tests and stay.

    Example:
        >>> holm(np.array([0.01, 0.04, np.nan, 0.03]))
        array([0.03, 0.06,  nan, 0.06])
    """
    adjusted = np.full_like(p, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known])]
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted


def leave_one_out(
    x: Float[Array, "n p"], y: Float[Array, " n"], strengths: tuple[float, ...] = STRENGTHS
) -> Float[Array, " n"]:
    """Ridge regression's prediction of each model from all others.

    Columns are standardised, and the penalty is chosen (by leaving out one more), without the predicted model.

    Args:
        x: models x numbers, float64, of models that are independent (:func:`unit_means`); columns with a gap are left
            out.
        y: what is to be predicted of each model.
        strengths: penalties to choose from.

    Raises:
        ValueError: fewer than four models, or no column without a gap.

    Example:
        >>> x = np.arange(8.0)[:, None]
        >>> bool(np.allclose(leave_one_out(x, 3 * x[:, 0] + 1, strengths=(1e-9,)), 3 * x[:, 0] + 1))
        True
    """
    from sklearn.linear_model import RidgeCV  # half a second to import
    from sklearn.model_selection import LeaveOneOut, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = x[:, np.isfinite(x).all(0)]
    if len(x) < 4 or not x.shape[1]:
        raise ValueError(f"at least 4 models and a number that all have are needed, got {len(x)} and {x.shape[1]}")
    return cross_val_predict(make_pipeline(StandardScaler(), RidgeCV(list(strengths))), x, y, cv=LeaveOneOut())


def predictive_r2(predicted: Float[Array, " n"], y: Float[Array, " n"]) -> float:
    """Share of the variance that leave-one-out predictions explain: 1 is perfect, 0 no better than the others' mean.

    The yardstick is the mean of the other models, which is what a prediction without any column is: Q², not R².

    Example:
        >>> predictive_r2(np.array([1.5, 1.0, 0.5]), np.array([0.0, 1.0, 2.0]))  # the means of the others
        0.0
    """
    others = (y.sum() - y) / (len(y) - 1)
    return float(1 - np.square(y - predicted).sum() / np.square(y - others).sum())
