"""Nearest neighbours against scikit-learn and float64, with copies, blocks, shards, and approximate searches."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from ssl_geometry.geometry.exact_search import faiss
from ssl_geometry.geometry.neighbors import Neighbors, merge, nearest

KINDS = {"cosine": "cosine", "l2": "sqeuclidean"}


@pytest.fixture(scope="module", autouse=True, params=["differences", "products"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """FAISS takes differences of few points, and products |x|² + |y|² - 2xy of many: test both on few."""
    before = faiss().cvar.distance_compute_blas_threshold
    if request.param == "products":
        faiss().cvar.distance_compute_blas_threshold = 1
    yield
    faiss().cvar.distance_compute_blas_threshold = before


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
    np.testing.assert_allclose(found.values, distances, rtol=1e-4, atol=1e-5)
    pairs = torch.stack([points.double()[row] for row in found.ids])
    if metric == "cosine":
        again = 1 - F.cosine_similarity(pairs, points.double()[:, None], dim=2)
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


@pytest.mark.parametrize("spread", [1e-3, 1e-4, 1e-5])
def test_neighbours_of_a_collapsed_network_are_distinguished(spread: float) -> None:
    """Directions that hardly differ: in float32 every cosine is 1."""
    points = 1 + spread * cloud(200, 32, 0)
    exact = F.normalize(points.double(), dim=1)
    similarity = (exact - exact.mean(0)) @ (exact - exact.mean(0)).T
    half = (exact - exact.mean(0)).square().sum(1) / 2
    expected = (similarity - half).fill_diagonal_(-torch.inf).topk(10).indices
    found = nearest(points, k=10)
    assert (found.ids == expected).double().mean() > 0.99


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_neighbours_in_classes_that_collapsed_are_distinguished(spread: float, metric: str) -> None:
    """Ten tight classes far from each other: their mean is near to none of them."""
    points = cloud(10, 32, 0)[torch.arange(600) % 10] + spread * cloud(600, 32, 1)
    exact = F.normalize(points.double(), dim=1) if metric == "cosine" else points.double()
    distances = (exact[:, None] - exact).square().sum(2).fill_diagonal_(torch.inf)
    expected = distances.topk(10, largest=False)
    found = nearest(points, k=10, metric=metric)  # type: ignore[arg-type]
    assert (found.ids[:, :, None] == expected.indices[:, None]).any(2).double().mean() > 0.999
    if metric == "l2":
        np.testing.assert_allclose(found.values, expected.values, rtol=0.02)


@pytest.mark.parametrize(("width", "k"), [(1, 3), (2, 5), (3, 20), (4, 130)])
def test_of_equally_near_points_the_smaller_id_comes_first(width: int, k: int) -> None:
    corners = torch.cartesian_prod(*[torch.arange(4.0)] * width).reshape(-1, width)  # distances are exact in float32
    points = corners[torch.randperm(len(corners), generator=torch.Generator().manual_seed(0))]
    distances = (points[:, None] - points).square().sum(2).fill_diagonal_(torch.inf)
    assert torch.equal(nearest(points, k=k, metric="l2").ids, distances.sort(stable=True).indices[:, :k])


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_the_corners_of_a_simplex_are_equally_near(metric: str) -> None:
    found = nearest(torch.eye(100), k=10, metric=metric).ids  # type: ignore[arg-type]
    expected = [[other for other in range(11) if other != row][:10] for row in range(100)]
    assert found.tolist() == expected


@pytest.mark.parametrize("metric", ["cosine", "l2", "inner"])
@pytest.mark.parametrize("width", [12, 64])
def test_ties_do_not_depend_on_the_other_queries(width: int, metric: str) -> None:
    """Bits: most distances are equal, though unit vectors of bits are rounded in float64 too."""
    queries, bank = ((cloud(n, width, n) > 0).double() for n in (40, 500))
    queries[:, 0] = bank[:, 0] = 1
    together = nearest(queries, bank, k=20, metric=metric, duplicates=True).ids  # type: ignore[arg-type]
    alone = [nearest(row[None], bank, k=20, metric=metric, duplicates=True).ids for row in queries]  # type: ignore[arg-type]
    assert torch.equal(together, torch.cat(alone))
    far = {
        "cosine": -(F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).mul(1e12).round(),
        "l2": (queries[:, None] - bank).square().sum(2),
        "inner": -(queries @ bank.T),
    }[metric]
    assert torch.equal(together, far.sort(dim=1, stable=True).indices[:, :20])


def test_equal_distances_of_a_grid_that_no_centre_fits() -> None:
    points = (3 * cloud(400, 4, 3)).round().unique(dim=0)  # whose mean is no number of float32
    points = 1000 + points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))]
    distances = (points[:, None] - points).square().sum(2).fill_diagonal_(torch.inf)
    found = nearest(points, k=20, metric="l2")
    assert torch.equal(found.ids, distances.sort(stable=True).indices[:, :20])
    torch.testing.assert_close(found.values, distances.gather(1, found.ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spread", [1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_collapsed_classes_have_the_neighbours_of_float64(spread: float, metric: str) -> None:
    """What points lose where they are rounded to float32 must not decide."""
    points = cloud(10, 64, 0)[torch.arange(500) % 10] + spread * cloud(500, 64, 1)
    exact = F.normalize(points.double(), dim=1) if metric == "cosine" else points.double()
    distances = torch.stack([(row - exact).square().sum(1) for row in exact]).fill_diagonal_(torch.inf)
    found = nearest(points, k=10, metric=metric)  # type: ignore[arg-type]
    assert torch.equal(found.ids, distances.sort(stable=True).indices[:, :10])


@pytest.mark.parametrize("tiny", [1e-37, 1e-39, 1e-42])
def test_a_query_of_subnormal_length_takes_no_neighbours_from_others(tiny: float) -> None:
    bank, queries = cloud(60, 8, 16), cloud(20, 8, 17)
    expected = nearest(queries, bank, k=5).ids
    direction = torch.zeros(8, dtype=torch.float64)
    direction[3] = 1
    queries[7] = tiny * direction
    found = nearest(queries, bank, k=5)
    others = torch.arange(20) != 7
    assert torch.equal(found.ids[others], expected[others])
    along = F.normalize(bank.double(), dim=1)[:, 3].topk(5).indices
    assert torch.equal(found.ids[7], along)
    assert bool(found.values.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["cosine", "l2", "inner"])
def test_the_layout_of_features_does_not_matter_and_they_stay_as_they_are(dtype: torch.dtype, metric: str) -> None:
    points = cloud(40, 6, 7).to(dtype)
    before = points.clone()
    expected = nearest(points.float(), k=4, metric=metric)  # type: ignore[arg-type]
    for layout in (points, points.T.contiguous().T, points.clone().requires_grad_()):
        found = nearest(layout, k=4, metric=metric)  # type: ignore[arg-type]
        assert torch.equal(found.ids, expected.ids)
        assert found.values.dtype == torch.float32
    assert torch.equal(points, before)


def test_copies_are_no_neighbours_and_stand_once() -> None:
    points = cloud(30, 4, 1)
    doubled = torch.cat([points, points, points[:5]])
    found, single = nearest(doubled, k=6), nearest(points, k=6)
    assert torch.equal(found.ids[:30], single.ids), "the first of equal points stands for all"
    assert torch.equal(found.ids[30:60], single.ids)
    copies = nearest(doubled, k=2, duplicates=True)
    own = torch.arange(65)
    assert (copies.ids != own[:, None]).all()
    torch.testing.assert_close(copies.values[:, 0], torch.zeros(65), rtol=0, atol=1e-5)
    assert (copies.ids[:, 0] % 30 == own % 30).all()


def test_a_zero_has_no_sign() -> None:
    points = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert nearest(points, k=2, metric="l2").ids.tolist() == [[3, 2], [3, 2], [3, 0], [0, 2]]


def test_points_of_zeros_and_ones_are_not_taken_for_copies() -> None:
    points = (torch.arange(2**12)[:, None] >> torch.arange(12) & 1).float()  # their bits differ in few places
    found = nearest(points, k=12, metric="l2")
    assert (found.values == 1).all(), "each corner of the cube has the twelve next to it"


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
    merged = merge(shards[::-1], k=7, largest=metric == "inner")
    assert torch.equal(merged.ids, whole.ids)
    torch.testing.assert_close(merged.values, whole.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", [1, 10])
@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_shards_of_a_collapsed_network_are_merged(spread: float, classes: int) -> None:
    """All cosines within a class round to 1: the lists must tell more than that."""
    points = 1 + cloud(classes, 32, 4)[torch.arange(400) % classes] + spread * cloud(400, 32, 5)
    whole = nearest(points, k=10)
    shards = [nearest(points, part, k=11) for part in points.split(100)]
    shards = [part._replace(ids=part.ids + 100 * number) for number, part in enumerate(shards)]
    merged = merge(shards, k=10)
    assert (merged.ids == whole.ids).double().mean() > 0.99
    blocks = nearest(points, iter(points.split(150)), k=10)
    assert (blocks.ids == whole.ids).double().mean() > 0.99


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e17])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_the_scale_of_features_does_not_matter(scale: float, metric: str) -> None:
    points = cloud(60, 8, 11)
    expected = nearest(points, k=5, metric=metric)  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.float64):
        found = nearest(points.to(dtype) * scale, k=5, metric=metric)  # type: ignore[arg-type]
        assert torch.equal(found.ids, expected.ids)


def test_float64_far_from_the_origin() -> None:
    points = cloud(60, 8, 12).double()
    found, expected = nearest(1e9 + points, k=5, metric="l2"), nearest(points, k=5, metric="l2")
    assert torch.equal(found.ids, expected.ids), "points that differ in float64 are no copies"
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-4)


def test_one_near_neighbour_in_a_bank_has_its_distance() -> None:
    queries, bank = 5 + cloud(40, 16, 13), 5 + cloud(80, 16, 14)
    bank[::2] = queries + 1e-4 * cloud(40, 16, 15)
    found = nearest(queries, bank, k=3, metric="l2")
    exact = (queries.double() - bank[::2].double()).square().sum(1)
    assert torch.equal(found.ids[:, 0], torch.arange(0, 80, 2))
    np.testing.assert_allclose(found.values[:, 0], exact, rtol=1e-2)


def test_lists_shorter_than_k_are_filled_up() -> None:
    parts = [Neighbors(torch.tensor([[5, -1]]), torch.tensor([[0.3, torch.nan]])) for _ in range(2)]
    merged = merge([parts[0], parts[1]._replace(ids=torch.tensor([[4, -1]]), recall=0.9)], k=6)
    assert merged.ids.tolist() == [[4, 5, -1, -1, -1, -1]], "of equal ones the smaller id"
    assert merged.values.isnan().tolist() == [[False, False, True, True, True, True]]
    assert merged.recall == 0.9
    few = nearest(torch.zeros(1, 2), iter([torch.ones(2, 2), torch.ones(2, 2)]), k=3, metric="l2")
    assert few.ids.tolist() == [[0, -1, -1]]
    assert few.values.isnan().tolist() == [[False, True, True]]


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_approximate_search_reports_its_recall(index: str, duplicates: bool) -> None:
    points = cloud(3000, 24, 5)  # without structure: hard for either
    found, exact = (nearest(points, k=2, index=kind, duplicates=duplicates) for kind in (index, "exact"))  # type: ignore[arg-type]
    recall = (found.ids[:, :, None] == exact.ids[:, None]).any(1).double().mean()
    assert 0.4 < found.recall < (1 if index == "ivf" else 1.001)
    assert abs(found.recall - recall) < 0.08, "of the others: a query that finds itself is no success"
    assert exact.recall == 1


def test_threads_are_torchs_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    library = faiss()
    search, seen = library.knn, []

    def knn(*args: object, **kwargs: object) -> object:
        seen.append(library.omp_get_max_threads())
        return search(*args, **kwargs)

    monkeypatch.setattr(library, "knn", knn)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)  # of FAISS too, where both have loaded one OpenMP
            own = library.omp_get_max_threads()
            nearest(cloud(20, 3, 6), k=2)
            assert seen.pop() == threads
            assert library.omp_get_max_threads() == own
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["cosine", "l2", "inner"])
def test_a_cuda_device_finds_the_same(metric: str) -> None:
    points = torch.cat([cloud(500, 16, 8), cloud(5, 16, 8), cloud(5, 16, 9).repeat_interleave(40, 0) + 1e-4])
    points[505:] += 1e-3 * cloud(200, 16, 10)
    there, here = nearest(points.cuda(), k=10, metric=metric), nearest(points, k=10, metric=metric)  # type: ignore[arg-type]
    assert there.ids.is_cuda
    assert (there.ids.cpu() == here.ids).double().mean() > 0.99
    torch.testing.assert_close(there.values.cpu(), here.values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("points", "options", "words"),
    [
        (torch.ones(4, 2).cumsum(0), {"k": 4}, "k=4 neighbours need 1 <= k <= 3"),
        (torch.ones(4, 2).cumsum(0), {"k": 0}, "k=0"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), {"k": 1}, "1 of 3 vectors are zero"),
        (torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [torch.inf, 1.0]]), {"k": 1}, "2 of 3 vectors are not finite"),
        (torch.ones(4, 2), {"k": 1, "metric": "cos"}, "cosine, inner or l2; auto, exact, ivf, hnsw or cagra"),
        (
            torch.ones(4, 2),
            {"k": 1, "index": "cagra"},
            "'cagra' needs features on a CUDA device and faiss-gpu-cuvs: choose",
        ),
        (torch.ones(0, 2), {"k": 1}, r"queries: expected .* got shape \(0, 2\)"),
        (torch.ones(4, 2), {"k": 1, "bank": torch.ones(4, 3)}, r"bank: expected \(N, 2\) .* got shape \(4, 3\)"),
        (torch.ones(4, 2), {"k": 5, "bank": torch.ones(4, 2)}, "1 <= k <= 4"),
        (torch.ones(4, 2), {"k": 5, "bank": [torch.ones(2, 2)] * 2}, "1 <= k <= 4"),
        (torch.ones(4, 2), {"k": 5, "bank": []}, "1 <= k <= 0"),
        (torch.ones(4, 2), {"k": -3, "bank": [torch.ones(2, 2)] * 2}, "k=-3"),
        (torch.ones(4, 2), {"k": 1, "bank": torch.tensor([[1.0, torch.inf]])}, "bank: 1 of 1 vectors are not finite"),
    ],
)
def test_bad_input_is_reported(points: torch.Tensor, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nearest(points, **options)
