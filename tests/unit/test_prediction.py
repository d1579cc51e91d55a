"""Statistics over models against SciPy, scikit-learn and definitions written out."""

from itertools import permutations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geometry.geometry.prediction import (
    STRENGTHS,
    group,
    holm,
    least_p,
    leave_one_out,
    predictive_r2,
    rank_correlation,
    unit_means,
)

SHAPES = {"n": st.integers(4, 20), "p": st.integers(1, 30), "seed": st.integers(0, 1000)}


def numbers(n: int, p: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, p)) * 10.0 ** generator.integers(-3, 4, p)
    x[:, 0] = np.round(x[:, 0])  # ties
    return x, generator.normal(size=n) + x[:, -1]


@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_rank_correlation_is_scipys(n: int, p: int, seed: int) -> None:
    x, y = numbers(n, p, seed)
    found = rank_correlation(x, y, draws=100)
    for column in range(p):
        with np.errstate(all="ignore"):
            expected = scipy.stats.spearmanr(x[:, column], y).statistic if np.ptp(x[:, column]) else np.nan
        np.testing.assert_allclose(found.rho[column], expected, atol=1e-12)


def test_all_orders_are_tried_of_few_models() -> None:
    x, y = numbers(6, 3, seed=4)
    found = rank_correlation(x, y)
    for column in range(3):
        every = [scipy.stats.spearmanr(x[:, column], y[list(order)]).statistic for order in permutations(range(6))]
        expected = np.mean(np.abs(every) >= abs(found.rho[column]) - 1e-12)
        assert found.p[column] == pytest.approx(expected, abs=1e-12)


def test_noise_is_found_no_more_often_than_the_level_says() -> None:
    generator = np.random.default_rng(0)
    found = [
        np.nanmin(rank_correlation(generator.normal(size=(7, 10)), generator.normal(size=7)).adjusted) <= 0.1
        for _ in range(100)
    ]
    assert np.mean(found) < 0.2


@pytest.mark.slow
def test_seeds_of_recipes_predict_nothing_under_the_null() -> None:
    """Metrics and results that have nothing to do with each other, of seven recipes of two seeds each."""
    q2, single, best, apart = [], [], [], []
    for number in range(150):
        generator = np.random.default_rng(number)
        x = np.repeat(generator.normal(size=(7, 54)), 2, 0) + 0.1 * generator.normal(size=(14, 54))
        y = np.repeat(generator.normal(size=7), 2) + 0.1 * generator.normal(size=14)
        units = [str(model // 2) for model in range(14)]
        means, results = unit_means(x, units), unit_means(y[:, None], units)[:, 0]
        tested = rank_correlation(means, results)
        single.append(tested.p[0] < 0.05)
        best.append(tested.adjusted.min() < 0.05)
        if number < 40:
            q2.append(predictive_r2(leave_one_out(means, results), results))
        if number < 10:
            apart.append(predictive_r2(leave_one_out(x, y), y))
    assert np.median(q2) <= 0
    assert np.mean(single) < 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 150)
    assert np.mean(best) < 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 150)
    assert np.median(apart) > 0.9, "so it is the averaging that does it"


def test_units_are_averaged_in_the_order_in_which_they_come() -> None:
    x = np.array([[1.0, np.nan], [4.0, 1.0], [3.0, 2.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(unit_means(x, ["b", "a", "b", "c"]), [[2, 2], [4, 1], [np.nan, np.nan]])


@pytest.mark.parametrize("n", [4, 5, 6, 12])
def test_no_p_is_below_the_least(n: int) -> None:
    column = np.arange(float(n))
    assert rank_correlation(column[:, None], column, draws=500).p[0] == pytest.approx(least_p(n, 500))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_its_procedure_rejects(p: list[float]) -> None:
    adjusted = holm(np.array(p))
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected = set()
        for rank, place in enumerate(np.argsort(p, kind="stable")):  # the procedure, step by step
            if p[place] > level / (len(p) - rank):
                break
            rejected.add(int(place))
        near = {i for i, value in enumerate(adjusted) if abs(value - level) < 1e-9}
        assert set(np.flatnonzero(adjusted <= level)) - near == rejected - near


def test_gaps_are_no_tests() -> None:
    x, y = numbers(9, 3, seed=0)
    x[2, 1] = np.nan
    x[:, 2] = 5.0
    found = rank_correlation(x, y)
    assert np.isnan(found.rho[1:]).all()
    assert np.isnan(found.adjusted[1:]).all()
    assert found.adjusted[0] == found.p[0], "one test needs no correction"
    np.testing.assert_array_equal(holm(np.array([np.nan, 0.02])), [np.nan, 0.02])


@settings(max_examples=10, deadline=None)
@given(n=st.integers(5, 14), p=st.integers(1, 20), seed=st.integers(0, 100))
def test_ridge_predicts_each_model_from_the_others(n: int, p: int, seed: int) -> None:
    x, y = numbers(n, p, seed)
    predicted = leave_one_out(x, y)
    for out in range(n):
        rest = np.arange(n) != out
        mean, spread = x[rest].mean(0), x[rest].std(0)
        spread = np.where(spread == 0, 1, spread)
        z, target = (x[rest] - mean) / spread, y[rest]
        errors = []
        for strength in STRENGTHS:  # leaving out one more, written out
            error = 0.0
            for inner in range(n - 1):
                keep = np.arange(n - 1) != inner
                error += (ridge(z[keep], target[keep], strength, z[inner]) - target[inner]) ** 2
            errors.append(error)
        best = np.argmin(errors)
        if np.sort(errors)[1] - errors[best] < 1e-6 * errors[best]:
            continue  # a tie
        expected = ridge(z, target, STRENGTHS[best], (x[out] - mean) / spread)
        assert predicted[out] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def ridge(z: np.ndarray, y: np.ndarray, strength: float, query: np.ndarray) -> float:
    center = z.mean(0)
    gram = (z - center).T @ (z - center) + strength * np.eye(z.shape[1])
    return float(y.mean() + (query - center) @ np.linalg.solve(gram, (z - center).T @ (y - y.mean())))


def test_predictive_r2_is_zero_for_the_mean_of_the_others_and_one_for_the_truth() -> None:
    y = np.random.default_rng(0).normal(size=9)
    others = np.array([np.delete(y, i).mean() for i in range(9)])
    assert predictive_r2(others, y) == pytest.approx(0)
    assert predictive_r2(y, y) == 1
    assert predictive_r2(others - (y - others), y) < 0


def test_models_are_grouped_and_placed_by_all_standardised_columns() -> None:
    ends = np.array([0.0, 0.0, 6.0, 6.0, 1e-9])
    x = np.stack([ends, 1e3 * ends + 5, np.full(5, 0.1), [0, np.nan, 0, 0, 0]], 1)
    found = group(x, groups=2)
    assert found.labels.tolist() == [1, 1, 2, 2, 1], "numbered as they come"
    np.testing.assert_allclose(found.explained, [1, 0], atol=1e-12)
    z = (ends - ends.mean()) / ends.std()
    np.testing.assert_allclose(np.abs(found.place[:, 0]), np.abs(2**0.5 * z))  # one axis holds two equal columns


def test_models_that_do_not_differ_are_not_grouped() -> None:
    with pytest.raises(ValueError, match="a number that varies"):
        group(np.ones((5, 4)))
    with pytest.raises(ValueError, match="at least 3 models"):
        group(np.random.default_rng(0).normal(size=(2, 4)))
    one = group(np.array([[0.0], [1.0], [5.0]]))
    np.testing.assert_allclose(one.explained, [1, 0])
    assert one.place.shape == (3, 2)
