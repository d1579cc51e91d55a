"""Contrasts of measured numbers: confidence intervals over images and over runs, and a verdict.

There are two sources of variation, each estimated by the jackknife. **Images**: one block of images is left out at a
time. Networks see the same images, so the deviations of a difference are the differences of the deviations, and errors
in common cancel. **Runs** (seeds of a method): one run is left out at a time; the variances of several methods add up,
with Welch's degrees of freedom. The squared half-widths of both add up, each with its own Student's t, so that few runs
of large variance do not borrow the degrees of freedom of the images.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array
from scipy.special import stdtrit

Verdict = Literal["supports", "contradicts", "undecided"]

LEVEL = 0.95
SMALLEST = 0.01
"""Smaller differences neither support nor contradict a claim, whatever their standard error."""


class Contrast(NamedTuple):
    """A difference that a claim states to be positive, and its deviations, whose squares sum to its squared errors."""

    value: float
    """With all images and runs."""
    images: Float[Array, " J"]
    """Deviations over blocks of images."""
    runs: Sequence[Float[Array, " R"]] = ()
    """Deviations over the runs of each group; a group with a single run (length 1) has no interval."""


def deviations(left_out: Float[Array, " n"]) -> Float[Array, " n"]:
    """Jackknife deviations from the values without each of n equal parts.

    Example:
        >>> x = np.array([1.0, 2.0, 6.0])
        >>> found = deviations((x.sum() - x) / 2)  # of a mean: its standard error is s / sqrt(n)
        >>> bool(np.isclose(np.linalg.norm(found), x.std(ddof=1) / 3**0.5))
        True
    """
    n = len(left_out)
    return ((n - 1) / n) ** 0.5 * (left_out - left_out.mean())


def interval(contrast: Contrast, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a contrast over the choice of images and runs.

    Args:
        contrast: the value, and its deviations.
        level: confidence level.

    Returns:
        Both ends; NaN with fewer than two blocks of images or runs of a group, or where a number is missing. Without
        groups of runs it is an interval over images alone: it holds for these networks, not for others trained in the
        same way.

    References:
        Efron & Stein, *The jackknife estimate of variance*, 1981; Welch, *The generalization of "Student's" problem
        when several different population variances are involved*, 1947; levels each with their own t: Cochran,
        *Approximate significance levels of the Behrens-Fisher test*, 1964.

    Example:
        >>> interval(Contrast(0.5, deviations(np.array([0.4, 0.5, 0.6]))))  # t(2) = 4.30, standard error 0.115
        (0.0031..., 0.9968...)
        >>> interval(Contrast(0.5, np.array([0.0])))
        (nan, nan)
        >>> interval(Contrast(0.5, np.array([-0.1, 0.1]), [np.array([0.0])]))  # a single run of a method
        (nan, nan)
    """
    width = np.hypot(_half_width([contrast.images], level), _half_width(contrast.runs, level))
    return float(contrast.value - width), float(contrast.value + width)


def _half_width(parts: Sequence[Float[Array, " n"]], level: float) -> float:
    """Half-width of an interval of a sum of independent parts with different variances."""
    free = np.array([len(part) - 1 for part in parts])
    variances = np.array([np.square(part).sum() for part in parts])
    if not len(parts) or not free.all():
        return float("nan") if len(parts) else 0.0
    if not variances.any():
        return 0.0
    welch = variances.sum() ** 2 / (variances**2 / free).sum()
    # At most the degrees of freedom of equal variances, as a variance that is small by chance would inflate them.
    return float(stdtrit(min(welch, len(parts) * free.min()), (1 + level) / 2) * variances.sum() ** 0.5)


def verdict(contrasts: Sequence[Contrast]) -> Verdict:
    """The verdict on a claim that all contrasts are positive.

    A claim is supported if all of them are, and contradicted if any is negative, so a further baseline can only make it
    harder to support. If a contrast is exactly 0, the probability of a verdict is meant to be at most 5 %: 2.5 % for
    support, which needs all 95 % intervals to be above; 2.5 % for contradiction, with joint intervals (Bonferroni). For
    normal errors this holds with Student's t, and approximately with Welch's (benchmarks/results/verdicts.md).

    Args:
        contrasts: of the claim.

    Returns:
        "supports" if all 95 % intervals lie above :data:`SMALLEST`; "contradicts" if one of k intervals of level
        1 - 0.05 / k lies below its negative; otherwise, and without intervals, "undecided".

    Example:
        >>> steady = np.array([-0.001, 0, 0.001])
        >>> [verdict([Contrast(value, steady)]) for value in (0.3, -0.3, 0.005)]
        ['supports', 'contradicts', 'undecided']
        >>> verdict([Contrast(0.3, steady), Contrast(-0.3, steady)])
        'contradicts'
    """
    jointly = 1 - (1 - LEVEL) / max(1, len(contrasts))
    if any(interval(contrast, jointly)[1] < -SMALLEST for contrast in contrasts):
        return "contradicts"
    if contrasts and all(interval(contrast)[0] > SMALLEST for contrast in contrasts):
        return "supports"
    return "undecided"
