"""Nearest neighbours against scikit-learn, their overlap against sets, and what must not change it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from ssl_geometry.geometry.overlap import is_degenerate, jaccard, mutual_knn, neighbor_ids
from ssl_geometry.metrics import InvarianceKNN, MutualKNN


def sklearn_ids(features: np.ndarray, k: int) -> np.ndarray:
    """Neighbours in float64; asked without queries, scikit-learn leaves each image itself out."""
    return NearestNeighbors(n_neighbors=k, metric="cosine").fit(features.astype(np.float64)).kneighbors()[1]


def random_ids(layers: int, n: int, k: int, generator: torch.Generator) -> Tensor:
    """k different images for each image."""
    return torch.rand(layers, n, n, generator=generator).topk(k, dim=2).indices


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 150),
    d=st.integers(2, 40),
    k=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_neighbours_are_those_of_scikit_learn(n: int, d: int, k: int, seed: int) -> None:
    k = min(k, n - 1)
    features = np.random.default_rng(seed).standard_normal((n, d))
    got = neighbor_ids(torch.from_numpy(features), k)
    np.testing.assert_array_equal(got.numpy(), sklearn_ids(features, k))


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_nearly_equal_directions_are_ranked_exactly(spread: float) -> None:
    """All cosines lie within 1e-6 or 1e-10 of 1, as in an untrained or collapsed network; classes lie closer still."""
    generator = np.random.default_rng(0)
    classes = spread * generator.standard_normal((5, 64))[np.arange(300) % 5]
    features = (1 + classes + 0.1 * spread * generator.standard_normal((300, 64))).astype(np.float32)
    got = neighbor_ids(torch.from_numpy(features), 10)
    unit = torch.nn.functional.normalize(torch.from_numpy(features).double(), dim=1)
    apart = (unit[:, None] - unit).square().sum(2).fill_diagonal_(torch.inf)
    assert torch.equal(got, apart.topk(10, largest=False).indices)


def test_zeros_have_no_neighbours_and_are_none() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    assert neighbor_ids(features, 3).tolist() == [[2, 3, -1], [-1, -1, -1], [0, 3, -1], [2, 0, -1]]
    features[2:] = 0
    assert (neighbor_ids(features, 1) < 0).all(), "one alone"


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_what_does_not_vary_has_no_neighbours(value: float) -> None:
    assert (neighbor_ids(torch.full((6, 3), value), 2) < 0).all()


def test_of_equally_similar_images_the_first_are_taken() -> None:
    assert neighbor_ids(torch.eye(30), 4)[[0, 2, 29]].tolist() == [[1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3]]


def test_an_image_is_left_out_by_its_index_and_not_by_its_rank() -> None:
    features = torch.randn(20, 5).repeat(2, 1)  # every image has an exact copy
    ids = neighbor_ids(features, 1).flatten()
    assert torch.equal(ids, (torch.arange(40) + 20) % 40)


def test_length_does_not_matter() -> None:
    features = torch.randn(100, 5, dtype=torch.float64)
    stretched = features * torch.rand(100, 1, dtype=torch.float64).add(0.1)
    assert torch.equal(neighbor_ids(features, 7), neighbor_ids(stretched, 7))


@pytest.mark.parametrize("k", [0, 20, 21])
def test_neighbours_that_do_not_exist_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} neighbours need 1 <= k <= 19"):
        neighbor_ids(torch.randn(20, 3), k)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4), cols=st.integers(1, 4), n=st.integers(2, 60), k=st.integers(1, 12), seed=st.integers(0, 99)
)
def test_overlap_is_the_size_of_the_intersection_of_sets(rows: int, cols: int, n: int, k: int, seed: int) -> None:
    generator, k = torch.Generator().manual_seed(seed), min(k, n)
    a, b = random_ids(rows, n, k, generator), random_ids(cols, n, k, generator)
    expected = [
        [np.mean([len(set(p) & set(q)) / k for p, q in zip(x, y, strict=True)]) for y in b.tolist()] for x in a.tolist()
    ]
    np.testing.assert_allclose(mutual_knn(a, b).numpy(), expected, atol=1e-12)


def test_overlap_does_not_depend_on_how_images_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(
        30, 700, 50, torch.Generator().manual_seed(0)
    )  # several chunks: 2**24 / (60 * 60 * 50) = 93 images
    halves = (mutual_knn(ids[:, :350], ids[:, :350]) + mutual_knn(ids[:, 350:], ids[:, 350:])) / 2
    torch.testing.assert_close(mutual_knn(ids, ids), halves)


def test_unrelated_layers_overlap_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    n, k = 1000, 10
    metric = MutualKNN(["a", "b"], k=k)
    metric.update({name: torch.randn(n, 8, generator=generator) for name in ("a", "b")}, index=torch.arange(n))
    overlap = metric.compute()
    assert overlap.diagonal().tolist() == [1, 1]
    assert float(overlap[0, 1]) == pytest.approx(k / (n - 1), rel=0.15)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(4, 25), st.data())
def test_overlap_of_lists_of_any_length_is_over_the_longer_one(
    rows: int, cols: int, n: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    ids = random_ids(rows + cols, n, data.draw(st.integers(1, n - 1)), generator)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < data.draw(st.floats(0, 1)), -1)
    got = mutual_knn(ids[:rows], ids[rows:])
    for i in range(rows):
        for j in range(cols):
            pairs = [
                (set(a) - {-1}, set(b) - {-1}) for a, b in zip(ids[i].tolist(), ids[rows + j].tolist(), strict=True)
            ]
            shares = [len(a & b) / max(len(a), len(b)) for a, b in pairs if a | b]
            np.testing.assert_allclose(got[i, j], np.mean(shares) if shares else np.nan, atol=1e-9)


def test_no_neighbours_have_nothing_in_common_and_no_overlap() -> None:
    none, some = torch.full((1, 6, 2), -1), random_ids(1, 6, 2, torch.Generator().manual_seed(0))
    assert bool(mutual_knn(none, none).isnan())
    assert float(mutual_knn(none, some)) == 0


def test_neighbours_of_different_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(6, 3\)"):
        mutual_knn(torch.zeros(1, 5, 3, dtype=torch.long), torch.zeros(1, 6, 3, dtype=torch.long))


# -- the metric ------------------------------------------------------------------------------------------------------


def layers(n: int = 200) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, 6, generator=generator)
    return {"a": a, "b": a @ torch.randn(6, 30, generator=generator), "c": a[:, :2] + 0.1}


def test_the_metric_compares_every_row_with_every_column() -> None:
    features, index = layers(), torch.arange(200)
    own, other = MutualKNN(["a", "b", "c"], k=7), MutualKNN(["c"], ["b", "a"], k=7)
    own.update(features, index=index)
    other.update({"c": features["c"]}, {"a": features["a"], "b": features["b"]}, index=index)
    ids = torch.stack([torch.from_numpy(sklearn_ids(value.numpy(), 7)) for value in features.values()])
    torch.testing.assert_close(own.compute(), mutual_knn(ids, ids))
    torch.testing.assert_close(other.compute(), mutual_knn(ids[2:], ids[[1, 0]]))
    assert own.compute().dtype == torch.float64


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 90))
def test_the_order_of_images_does_not_matter(seed: int, batch: int) -> None:
    # Classes are alike in crowds: which of them count as neighbours must not hang on the order either.
    features = layers() | {"ties": torch.eye(4)[torch.arange(200) % 4]}
    whole, shuffled = MutualKNN(list(features)), MutualKNN(list(features))
    whole.update(features, index=torch.arange(200))
    for index in torch.randperm(200, generator=torch.Generator().manual_seed(seed)).split(batch):
        shuffled.update({name: value[index] for name, value in features.items()}, index=index)
    assert torch.equal(whole.compute(), shuffled.compute())


@pytest.mark.parametrize(
    "flat", [torch.ones(200, 5), torch.zeros(200, 5), torch.full((200, 5), torch.nan), torch.rand(200, 1) + 0.1]
)
def test_a_layer_without_neighbours_is_nan_and_named(flat: Tensor) -> None:
    metric = MutualKNN(["a", "flat"], ["flat", "b"])
    features = layers() | {"flat": flat}
    metric.update(features, index=torch.arange(200))
    with pytest.warns(UserWarning, match="or is not finite: flat$"):
        overlap = metric.compute()
    assert overlap.isnan().tolist() == [[True, False], [True, True]]


def test_an_image_fed_twice_is_reported() -> None:
    metric = MutualKNN(["a"])
    metric.update({"a": torch.randn(20, 3)}, index=torch.arange(20))
    metric.update({"a": torch.randn(1, 3)}, index=torch.tensor([13]))
    with pytest.raises(ValueError, match="image 13 was fed twice"):
        metric.compute()


def test_too_few_images_are_reported() -> None:
    metric = MutualKNN(["a"], k=10)
    metric.update({"a": torch.randn(10, 3)}, index=torch.arange(10))
    with pytest.raises(ValueError, match="k=10 neighbours need more than 10 images, got 10"):
        metric.compute()


def test_a_layer_with_other_images_than_the_index_is_reported() -> None:
    with pytest.raises(ValueError, match="layer b has 4 images, the index 2"):
        MutualKNN(["a", "b"]).update({"a": torch.randn(2, 3), "b": torch.randn(4, 3)}, index=torch.arange(2))


def test_views_are_compared_layer_by_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    n, k = 1000, 10
    x = layers(n)
    y = {"a": x["a"], "b": torch.randn(n, 30, generator=generator), "c": torch.ones(n, 2)}
    views, pairs = InvarianceKNN(list(x), k=k), MutualKNN(list(x), list(x), k=k)
    for index in torch.randperm(n, generator=generator).split(300):
        views.update({a: v[index] for a, v in x.items()}, {a: v[index] for a, v in y.items()}, index=index)
    pairs.update(x, y, index=torch.arange(n))
    with pytest.warns(UserWarning, match="or is not finite: c$"):
        same, unrelated, collapsed = views.compute().tolist()
    assert same == 1
    assert unrelated == pytest.approx(k / (n - 1), rel=0.15)
    assert np.isnan(collapsed)
    with pytest.warns(UserWarning, match="or is not finite: c$"):
        np.testing.assert_allclose(views.compute(), pairs.compute().diagonal(), rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(4, 25), st.data())
def test_jaccard_is_that_of_sets(layers: int, others: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    ids = torch.rand(layers + others, n, n, generator=generator).argsort(2)[..., :k]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -1)
    got = jaccard(ids[:layers], ids[layers:])
    for i in range(layers):
        for j in range(others):
            pairs = [
                (set(a) - {-1}, set(b) - {-1}) for a, b in zip(ids[i].tolist(), ids[layers + j].tolist(), strict=True)
            ]
            shares = [len(a & b) / len(a | b) for a, b in pairs if a | b]
            expected = np.mean(shares) if shares else np.nan
            np.testing.assert_allclose(got[i, j], expected, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e19, 1e37])
def test_features_of_any_scale_vary_or_do_not(scale: float) -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert not is_degenerate(scale * x)
    assert is_degenerate(scale * x[:1].expand(40, 8))
    assert is_degenerate(scale * torch.full_like(x, torch.nan))
