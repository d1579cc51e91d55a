"""Nearest neighbours against scikit-learn and float64, with copies, blocks, shards, and approximate searches."""

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from ssl_geometry.geometry.neighbors import merge, nearest

KINDS = {"cosine": "cosine", "l2": "sqeuclidean"}


def cloud(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 80), st.integers(2, 20), st.integers(0, 1000), st.sampled_from(["cosine", "l2"]), st.data())
def test_neighbours_are_scikit_learns(n: int, width: int, seed: int, metric: str, data: st.DataObject) -> None:
    points = cloud(n, width, seed)
    k = data.draw(st.integers(1, n - 1))
    found = nearest(points, k=k, metric=metric)  # type: ignore[arg-type]
    reference = NearestNeighbors(n_neighbors=k, metric=KINDS[metric], algorithm="brute").fit(points.double().numpy())
    distances, _ = reference.kneighbors()  # without the point itself
    values = 1 - found.values if metric == "cosine" else found.values
    np.testing.assert_allclose(values, distances, rtol=1e-4, atol=1e-5)
    pairs = torch.stack([points.double()[row] for row in found.ids])
    if metric == "cosine":
        again = F.cosine_similarity(pairs, points.double()[:, None], dim=2)
    else:
        again = (pairs - points.double()[:, None]).square().sum(2)
    np.testing.assert_allclose(found.values, again, rtol=1e-4, atol=1e-5)
    assert found.recall == 1.0


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 60), st.integers(2, 40), st.integers(1, 9), st.integers(0, 100))
def test_inner_products_with_a_bank(n: int, m: int, width: int, seed: int) -> None:
    queries, bank = cloud(n, width, seed), cloud(m, width, seed + 1)
    k = min(5, m)
    found = nearest(queries, bank, k, metric="inner")
    expected = (queries @ bank.T).topk(k)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-5)


def test_neighbours_of_a_collapsed_network_are_told_apart() -> None:
    """Directions that differ by 1e-4: in float32 every cosine is 1."""
    points = 1 + 1e-4 * cloud(200, 32, 0)
    exact = F.normalize(points.double(), dim=1)
    similarity = (exact - exact.mean(0)) @ (exact - exact.mean(0)).T
    half = (exact - exact.mean(0)).square().sum(1) / 2
    expected = (similarity - half).fill_diagonal_(-torch.inf).topk(10).indices
    found = nearest(points, k=10)
    assert (found.ids == expected).double().mean() > 0.99


def test_copies_are_no_neighbours_and_stand_once() -> None:
    points = cloud(30, 4, 1)
    doubled = torch.cat([points, points, points[:5]])
    found, single = nearest(doubled, k=6), nearest(points, k=6)
    assert torch.equal(found.ids[:30], single.ids), "the first of equal points stands for all"
    assert torch.equal(found.ids[30:60], single.ids)
    copies = nearest(doubled, k=2, duplicates=True)
    own = torch.arange(65)
    assert (copies.ids != own[:, None]).all()
    torch.testing.assert_close(copies.values[:, 0], torch.ones(65), rtol=0, atol=1e-5)
    assert (copies.ids[:, 0] % 30 == own % 30).all()


def test_what_is_missing_is_minus_one() -> None:
    collapsed = nearest(torch.ones(5, 3), k=2)
    assert (collapsed.ids == -1).all()
    assert collapsed.values.isnan().all()
    two = torch.cat([torch.zeros(4, 2), torch.ones(4, 2)])
    assert nearest(two, k=3, metric="l2").ids.tolist() == [[4, -1, -1]] * 4 + [[0, -1, -1]] * 4


@pytest.mark.parametrize("metric", ["cosine", "l2", "inner"])
def test_a_bank_in_blocks_and_shards_is_the_whole_bank(metric: str) -> None:
    queries, bank = cloud(50, 6, 2), cloud(120, 6, 3)
    bank[70:90] = bank[:20]
    bank[110] = queries[4]
    whole = nearest(queries, bank, k=7, metric=metric)  # type: ignore[arg-type]
    blocks = nearest(queries, iter(bank.split(37)), k=7, metric=metric)  # type: ignore[arg-type]
    torch.testing.assert_close(blocks.values, whole.values, rtol=1e-4, atol=1e-6)
    assert torch.equal(blocks.ids, whole.ids)
    distinct = torch.cat([bank[:70], bank[90:]])
    whole = nearest(queries, distinct, k=7, metric=metric)  # type: ignore[arg-type]
    shards = [nearest(queries, part, k=7, metric=metric) for part in distinct.split(40)]  # type: ignore[arg-type]
    shards = [part._replace(ids=part.ids + 40 * number) for number, part in enumerate(shards)]
    merged = merge(shards, k=7, largest=metric != "l2")
    assert torch.equal(merged.ids, whole.ids)
    torch.testing.assert_close(merged.values, whole.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_approximate_search_says_how_good_it_is(index: str) -> None:
    centers = cloud(50, 16, 4)
    points = centers.repeat_interleave(60, 0) + 0.3 * cloud(3000, 16, 5)
    found, exact = nearest(points, k=10, index=index), nearest(points, k=10, index="exact")  # type: ignore[arg-type]
    recall = (found.ids[:, :, None] == exact.ids[:, None]).any(1).double().mean()
    assert 0.8 < found.recall <= 1
    assert abs(found.recall - recall) < 0.05
    assert exact.recall == 1


def test_threads_are_torchs_and_put_back() -> None:
    faiss.omp_set_num_threads(2)
    nearest(cloud(20, 3, 6), k=2)
    assert faiss.omp_get_max_threads() == 2


@pytest.mark.parametrize(
    ("points", "options", "words"),
    [
        (torch.ones(4, 2).cumsum(0), {"k": 4}, "k=4 neighbours need 1 <= k <= 3"),
        (torch.ones(4, 2).cumsum(0), {"k": 0}, "k=0"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), {"k": 1}, "1 of 3 vectors are zero"),
        (torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [torch.inf, 1.0]]), {"k": 1}, "2 of 3 vectors are not finite"),
        (torch.ones(4, 2), {"k": 1, "metric": "cos"}, "cosine, inner or l2"),
        (torch.ones(0, 2), {"k": 1}, "0 of 0"),
    ],
)
def test_bad_input_is_told(points: torch.Tensor, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nearest(points, **options)
