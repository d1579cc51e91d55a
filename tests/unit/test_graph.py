"""Graph statistics against NumPy and SciPy, and known graphs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geometry.geometry.graph import components, graph_statistics, hubness, in_degrees, label_purity, reciprocal
from ssl_geometry.geometry.neighbors import nearest


def graph(n: int, k: int, seed: int) -> torch.Tensor:
    """Random neighbours, some missing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(n - 1, generator=generator)[:k] for _ in range(n)])
    ids += ids >= torch.arange(n)[:, None]
    return ids.masked_fill(torch.rand(n, k, generator=generator) < 0.3, -1)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.data())
def test_statistics_are_those_of_the_adjacency_matrix(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n - 1))
    ids = graph(n, k, data.draw(st.integers(0, 1000)))
    labels = torch.randint(3, (n,), generator=torch.Generator().manual_seed(n))
    matrix = np.zeros((n, n))
    for i, row in enumerate(ids.tolist()):
        for j in row:
            if j >= 0:
                matrix[i, j] = 1
    np.testing.assert_array_equal(in_degrees(ids), matrix.sum(0))
    with np.errstate(invalid="ignore"):
        same = (matrix * (labels[:, None] == labels).numpy()).sum(1) / matrix.sum(1)
        np.testing.assert_allclose(reciprocal(ids), (matrix * matrix.T).sum() / matrix.sum())
    np.testing.assert_allclose(label_purity(ids, labels), same)
    reach = np.linalg.matrix_power(np.eye(n) + matrix + matrix.T, n) > 0
    parts = {tuple(row) for row in reach}
    assert components(ids) == (len(parts), max(map(sum, parts)) / n)


def test_hubness_of_a_star_and_of_a_ring() -> None:
    star = torch.zeros(10, 1, dtype=torch.long).index_fill(0, torch.tensor([0]), -1)
    np.testing.assert_allclose(hubness(star), 8 / 9**0.5)  # (n - 2) / sqrt(n - 1)
    assert hubness(torch.arange(10).roll(1)[:, None]).isnan(), "no hubs, and no spread to measure them in"


def test_two_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 3, generator=generator) + 50 * torch.eye(3)[torch.arange(60) % 2]
    found = graph_statistics(nearest(points, k=5, metric="l2").ids, torch.arange(60) % 2)
    assert found["components"] == 2
    assert found["largest_component"] == 0.5
    assert found["purity"] == 1
    assert found["degree"] == 5


def test_a_graph_without_edges_is_nan() -> None:
    found = graph_statistics(torch.full((4, 3), -1), torch.zeros(4, dtype=torch.long))
    assert found["components"] == 4
    assert np.isnan([found[name] for name in ("hubness", "reciprocal", "purity")]).all()
    assert found["degree"] == pytest.approx(0)
