"""Intrinsic dimension of sets of known dimension, and against independent implementations in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geometry.geometry.dimension import levina_bickel, two_nn
from ssl_geometry.geometry.neighbors import nearest


def cube(n: int, dimension: int, width: int, seed: int = 0) -> torch.Tensor:
    """A cube of that dimension, turned into a space of more."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:dimension]
    return torch.rand(n, dimension, generator=generator) @ turn


@pytest.mark.parametrize("dimension", [1, 2, 5])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_cube_has_its_dimension(dimension: int, scale: float) -> None:
    distances = nearest(scale * cube(3000, dimension, 20), k=20, metric="l2").values
    assert float(two_nn(distances)) == pytest.approx(dimension, rel=0.08)
    assert float(levina_bickel(distances)) == pytest.approx(dimension, rel=0.12)  # the edges of a cube bend it down


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 200), st.integers(1, 6), st.integers(3, 10), st.integers(0, 100))
def test_estimates_are_those_of_their_definitions(n: int, dimension: int, k: int, seed: int) -> None:
    points = cube(n, dimension, dimension + 2, seed)
    distances = torch.cdist(points.double(), points.double()).fill_diagonal_(torch.inf).sort(1).values[:, :k]
    mu = np.sort(np.asarray(distances[:, 1] / distances[:, 0]))
    kept = round(0.9 * n)
    x, y = np.log(mu[:kept]), -np.log(1 - np.arange(1, kept + 1) / n)
    expected = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
    assert float(two_nn(distances.square())) == pytest.approx(expected, rel=1e-6)
    inverses = [np.mean(np.log(row[-1] / row[:-1])) for row in distances.numpy()]
    assert float(levina_bickel(distances.square())) == pytest.approx(1 / np.mean(inverses), rel=1e-6)


def test_a_space_of_more_dimensions_changes_nothing() -> None:
    flat, deep = cube(500, 3, 3), cube(500, 3, 3)
    deep = torch.cat([deep, torch.zeros(500, 40)], 1)
    values = [two_nn(nearest(points, k=5, metric="l2").values) for points in (flat, deep)]
    torch.testing.assert_close(*values, rtol=1e-3, atol=0)


def test_copies_do_no_harm_and_a_point_has_no_dimension() -> None:
    points = cube(500, 2, 5)
    doubled = nearest(torch.cat([points, points]), k=10, metric="l2").values
    single = nearest(points, k=10, metric="l2").values
    torch.testing.assert_close(levina_bickel(doubled), levina_bickel(single))
    collapsed = nearest(torch.ones(50, 4), k=5, metric="l2").values
    assert two_nn(collapsed).isnan()
    assert levina_bickel(collapsed).isnan()


def test_too_few_neighbours_are_reported() -> None:
    with pytest.raises(ValueError, match="two neighbours"):
        two_nn(torch.ones(5, 1))
    with pytest.raises(ValueError, match="three neighbours"):
        levina_bickel(torch.ones(5, 2))
