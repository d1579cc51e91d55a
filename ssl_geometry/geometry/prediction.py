"""Statistics over a few models: clusters of similar ones, and prediction of their transfer.

Rows are models, columns are their metrics (manifold graph metrics). As there are few models, tests are permutation
tests, corrected for the number of columns, and predictions are of models that the fit has not seen.

**Rows of a test or a prediction must be independent.** Seeds of one recipe are not: a fit that has seen one seed has
practically seen the other, and permutations must not separate them (seven recipes of two seeds each give a median Q² of
0.97 without any true relation). Average them first: :func:`unit_means`.
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
"""Regularisation strengths of ridge regression on standardised columns, selected without the predicted model."""
ALL_PERMUTATIONS = 8
"""Up to this number of models, all permutations (at most 40,320) are used instead of random ones."""


class Groups(NamedTuple):
    """Clusters of similar models."""

    merges: Float[Array, "n-1 4"]
    """SciPy's linkage matrix."""
    labels: Array
    """Cluster of each model, numbered from 1 in the order of the models."""
    place: Float[Array, "n 2"]
    """Coordinates on the first two principal components."""
    explained: Float[Array, " 2"]
    """Share of the variance along each."""


def group(x: Float[Array, "n p"], groups: int = 3) -> Groups:
    """Cluster models by Ward's method on standardised columns, and project them on principal components.

    Args:
        x: models x metrics, float64; constant columns and those with missing values are left out.
        groups: number of clusters, at most.

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
    labels, _ = pd.factorize(fcluster(merges, groups, "maxclust"))  # in the order of the models
    return Groups(merges, labels + 1, place, explained)


def unit_means(x: Float[Array, "n p"], units: Sequence[str]) -> Float[Array, "u p"]:
    """Average the rows of each unit, so that rows are independent.

    Args:
        x: models x metrics; a missing value is filled if another model of the unit has it.
        units: unit of each model, such as its recipe.

    Returns:
        Units x metrics, in the order in which units first occur.

    Example:
        >>> unit_means(np.array([[1.0], [5.0], [3.0]]), ["a", "b", "a"])
        array([[2.],
               [5.]])
    """
    return pd.DataFrame(x).groupby(np.asarray(units), sort=False).mean().to_numpy()


class Correlation(NamedTuple):
    """Rank correlation of each column with the target."""

    rho: Float[Array, " p"]
    """Spearman's; NaN for a constant column or one with missing values."""
    p: Float[Array, " p"]
    """Two-sided, by permutation."""
    adjusted: Float[Array, " p"]
    """The same, corrected for the number of columns (Holm)."""


def rank_correlation(x: Float[Array, "n p"], y: Float[Array, " n"], draws: int = 10_000, seed: int = 0) -> Correlation:
    """Spearman's correlation of every column with a target, tested by permuting the target.

    Args:
        x: models x metrics, float64, of independent models (:func:`unit_means`).
        y: target of each model.
        draws: number of random permutations; up to 8 models all permutations are used instead.
        seed: of the random permutations.

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
        lambda order, axis: np.abs(order @ ranks),  # exact, since ranks are integers
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
    """Twice the centred ranks, which are integers even with ties."""
    return 2 * rankdata(x, axis=0, nan_policy="propagate") - (len(x) + 1)


def holm(p: Float[Array, " m"]) -> Float[Array, " m"]:
    """p-values with Holm's correction; NaN does not count as a test.

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
    """Leave-one-out predictions of ridge regression.

    Standardisation and the choice of the regularisation strength (by another leave-one-out) do not see the predicted
    model.

    Args:
        x: models x metrics, float64, of independent models (:func:`unit_means`); columns with missing values are left
            out.
        y: target of each model.
        strengths: regularisation strengths to select from.

    Raises:
        ValueError: fewer than four models, or no complete column.

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
    """Q²: the share of the variance that leave-one-out predictions explain; 1 is perfect.

    The baseline, with a Q² of 0, predicts each model by the mean of the others.

    Example:
        >>> predictive_r2(np.array([1.5, 1.0, 0.5]), np.array([0.0, 1.0, 2.0]))  # the means of the others
        0.0
    """
    others = (y.sum() - y) / (len(y) - 1)
    return float(1 - np.square(y - predicted).sum() / np.square(y - others).sum())
