"""The nearest-neighbour classifier against scikit-learn's."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.geometry.knn import directions_vary, knn_predict, knn_vote
from ssl_geometry.geometry.neighbors import nearest_directions
from ssl_geometry.metrics import KNNAccuracy
from tests.fake_cuda import FakeCuda


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 60),
    bank=st.integers(1, 200),
    dim=st.integers(2, 30),
    classes=st.integers(1, 9),
    k=st.integers(1, 30),
    temperature=st.sampled_from([0.07, 0.5]),
    seed=st.integers(0, 10**6),
)
def test_weighted_vote_agrees_with_scikit_learn(
    queries: int, bank: int, dim: int, classes: int, k: int, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, dim, generator=generator)
    b = torch.randn(bank, dim, generator=generator)
    labels = torch.randint(classes, (bank,), generator=generator)
    k = min(k, bank)
    model = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        weights=lambda distance: torch.exp((1 - torch.from_numpy(distance)) / temperature).numpy(),
    )
    expected = model.fit(b.double().numpy(), labels.numpy()).predict(q.double().numpy())
    got = knn_predict(q, b, labels, classes, k, temperature)
    assert (got.numpy() != expected).sum() <= 1, "one query may be a tie within float32"


def test_majority_vote_counts_heads() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, 0.6]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_predict(query, bank, labels, 2, k=3, temperature=None).item() == 1
    assert knn_predict(query, bank, labels, 2, k=3, temperature=0.01).item() == 0


def test_tiny_temperature_does_not_overflow() -> None:
    bank, labels = torch.randn(50, 8), torch.arange(50) % 5
    assert torch.equal(knn_predict(bank, bank, labels, 5, k=10, temperature=1e-4), labels)


def test_accuracy_counts_every_query_once() -> None:
    torch.manual_seed(0)
    bank, labels = torch.randn(300, 16), torch.randint(4, (300,))
    queries, truth = bank[:101] + 0.01 * torch.randn(101, 16), labels[:101].clone()
    truth[:10] = (truth[:10] + 1) % 4
    metric = KNNAccuracy(k=1)
    for part in range(0, 300, 70):
        metric.update_bank(bank[part : part + 70], labels[part : part + 70])
    for part in range(0, 101, 33):
        metric.update(queries[part : part + 33], truth[part : part + 33])
    assert float(metric.compute()) == pytest.approx(91 / 101)


def test_one_search_does_for_several_k_and_votes() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(90, 6, generator=generator), torch.randn(40, 6, generator=generator)
    labels = torch.randint(3, (90,), generator=generator)
    neighbours, distances, _ = nearest_directions(queries, bank, k=50)
    assert (distances.diff(dim=1) >= 0).all()
    for k in (1, 20, 50):
        for temperature in (0.07, None):
            expected = knn_predict(queries, bank, labels, 3, k, temperature)
            assert torch.equal(knn_vote(distances[:, :k], neighbours[:, :k], labels, 3, temperature), expected)


def test_all_k_neighbours_vote() -> None:
    """The six nearest are outvoted by the nine behind them."""
    bank = torch.tensor([[1.0, 0.1]] * 6 + [[1.0, 0.9]] * 9)
    labels = torch.tensor([0] * 6 + [1] * 9)
    predicted = [int(knn_predict(torch.tensor([[1.0, 0.0]]), bank, labels, 2, k, temperature=None)) for k in (6, 15)]
    assert predicted == [0, 1]


def reference(queries: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int, temperature: float | None) -> Tensor:
    """The vote in float64 throughout, by squared differences of unit vectors, without any of our code."""
    x, y = (F.normalize(part.double() / part.double().abs().max(), dim=1) for part in (queries, bank))
    predicted = []
    for row in x:
        distance = (row - y).square().sum(1) / 2
        near = distance.sort(stable=True)
        ids, values = near.indices[:k], near.values[:k]
        weights = torch.ones(k, dtype=torch.float64) if temperature is None else (-values / temperature).exp()
        votes = torch.bincount(labels[ids], weights=weights, minlength=classes)
        predicted.append(int((votes >= votes.max() * (1 - 1e-14)).nonzero()[0]))
    return torch.tensor(predicted)


def clusters(classes: int, n: int, width: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and bank of separated classes, all within a share ``spread`` of one direction."""
    generator = torch.Generator().manual_seed(seed)
    labels, truth = torch.arange(n) % classes, torch.arange(n // 4) % classes
    centers = torch.randn(classes, width, generator=generator)
    bank, queries = (
        1 + spread * (centers[of] + 0.1 * torch.randn(len(of), width, generator=generator)) for of in (labels, truth)
    )
    return queries, truth, bank, labels


@pytest.mark.parametrize("temperature", [0.07, None])
@pytest.mark.parametrize("classes", [5, 60])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 1e-5, 1e-6])
def test_collapsed_features_are_classified_as_in_float64(
    spread: float, classes: int, temperature: float | None
) -> None:
    queries, truth, bank, labels = clusters(classes, 600, 32, spread)
    expected = reference(queries, bank, labels, classes, 20, temperature)
    predicted = knn_predict(queries, bank, labels, classes, 20, temperature)
    assert (predicted != expected).sum() <= (0 if classes == 5 else 1)
    metric = KNNAccuracy(temperature=temperature)
    metric.update_bank(bank, labels)
    metric.update(queries, truth)
    right = float((expected == truth).double().mean())
    assert float(metric.compute()) == pytest.approx(right, abs=0 if classes == 5 else 1 / len(truth))
    assert right > (0.99 if classes == 5 else 0.6)


@pytest.mark.parametrize("scale", [1e-19, 1e-12, 1e12, 1e19])
@pytest.mark.parametrize("spread", [1.0, 1e-5])
def test_the_scale_changes_no_vote(scale: float, spread: float) -> None:
    queries, _, bank, labels = clusters(7, 400, 16, spread)
    queries, bank = queries * scale, bank * scale
    assert torch.equal(knn_predict(queries, bank, labels, 7), reference(queries, bank, labels, 7, 20, 0.07))


@pytest.mark.parametrize("temperature", [0.07, None])
def test_of_equally_near_images_the_first_vote_and_of_equal_votes_the_smaller_class_wins(
    temperature: float | None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(12, 8, generator=generator)
    bank, labels = points.repeat(6, 1), torch.randint(9, (72,), generator=generator)
    queries = points + 0.01 * torch.randn(12, 8, generator=generator)
    for k in (1, 2, 4, 6):  # ties at the end of the lists, and of votes
        expected = reference(queries, bank, labels, 9, k, temperature)
        assert torch.equal(knn_predict(queries, bank, labels, 9, k, temperature), expected)


def test_features_that_point_one_way_have_no_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    rays = (0.1 + torch.rand(100, 1, generator=generator)) * torch.randn(32, generator=generator)
    for bank in (torch.ones(100, 32), rays, 1e19 * rays, torch.zeros(100, 32)):
        assert not directions_vary(bank)
        metric = KNNAccuracy()
        metric.update_bank(bank, torch.arange(100) % 5)
        metric.update(bank[:10], torch.arange(10) % 5)
        with pytest.warns(UserWarning, match="20 nearest neighbours is NaN: features of all 100 images") as seen:
            assert metric.compute().isnan()
        assert len(seen) == 1
    assert directions_vary(1 + 1e-6 * torch.randn(100, 32, generator=generator))


def test_images_of_zeros_have_no_neighbour_and_are_nobodys() -> None:
    bank, labels = torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3)
    bank[::4] = 0
    queries = torch.cat([torch.eye(4) + 0.1, torch.zeros(1, 4)])
    neighbours, distances, _ = nearest_directions(queries, bank, k=11)
    assert (neighbours[4] == -1).all()
    assert (neighbours[:, 9:] == -1).all()
    assert distances.isnan().equal(neighbours == -1)
    assert not (neighbours[:4, :9] % 4 == 0).any()
    assert knn_predict(queries, bank, labels, 4, k=3).tolist()[1:] == [1, 2, 3, -1]
    metric = KNNAccuracy(k=3)
    metric.update_bank(bank, labels)
    metric.update(queries[1:], torch.tensor([1, 2, 3, 0]))
    assert float(metric.compute()) == 0.75


def test_the_order_of_images_changes_nothing() -> None:
    """Several processes hand over banks in another order: equal distances and votes must not tell."""
    queries, truth, bank, labels = clusters(9, 300, 4, 1.0)
    bank, queries = bank.mul(2).round() + 9, queries.mul(2).round() + 9  # many ties
    numbers = set()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        one, two = torch.randperm(300, generator=generator), torch.randperm(75, generator=generator)
        metric = KNNAccuracy(k=7)
        metric.update_bank(bank[one], labels[one])
        metric.update(queries[two], truth[two])
        numbers.add(float(metric.compute()))
    assert len(numbers) == 1


def test_a_pretended_gpu_counts_the_same_votes() -> None:
    queries, truth, bank, labels = clusters(6, 400, 16, 1e-4)
    numbers = []
    for device in ("cpu", "cuda"):
        with FakeCuda() as gpu:
            metric = KNNAccuracy(k=10)
            metric.update_bank(bank.to(device), labels.to(device))
            metric.update(queries.to(device), truth.to(device))
            torch.use_deterministic_algorithms(True)
            try:
                numbers.append(metric.compute().item())
            finally:
                torch.use_deterministic_algorithms(False)
        assert not gpu.faults, gpu.report()
    assert numbers[0] == numbers[1]


BAD = [
    ({"k": 0}, "k=0 neighbours need 1 <= k <= 12, the number of other points"),
    ({"k": 13}, "k=13 neighbours need 1 <= k <= 12"),
    ({"temperature": 0.0}, "temperature 0 .*: expected above 0"),
    ({"temperature": -1.0}, "temperature -1 "),
    ({"temperature": float("nan")}, "temperature nan "),
    (
        {"queries": torch.randn(5, 3).index_fill(0, torch.tensor([1, 4]), torch.nan)},
        "queries: 2 of 5 vectors are not finite",
    ),
    ({"bank": torch.randn(12, 3).index_fill(0, torch.tensor([7]), torch.inf)}, "bank: 1 of 12 vectors are not finite"),
    ({"labels": torch.arange(12) % 4 - 1}, "labels from -1 to 2"),
]


@pytest.mark.parametrize(("changed", "words"), BAD)
def test_what_cannot_be_classified_is_reported(changed: dict[str, Any], words: str) -> None:
    given = {"queries": torch.randn(5, 3), "bank": torch.randn(12, 3), "labels": torch.arange(12) % 4, "k": 3}
    given |= changed
    with pytest.raises(ValueError, match=words):
        knn_predict(**given, num_classes=4)
    metric = KNNAccuracy(given["k"], given.get("temperature", 0.07))
    metric.update_bank(given["bank"], given["labels"])
    metric.update(given["queries"], torch.arange(5) % 4)
    with pytest.raises(ValueError, match=words.replace("-1 to 2", "-1 to")):
        metric.compute()


def test_banks_and_queries_that_are_none_are_reported() -> None:
    with pytest.raises(ValueError, match="k=20 neighbours need 1 <= k <= 0"):
        knn_predict(torch.randn(2, 3), torch.empty(0, 3), torch.empty(0, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="labels from 0 to 5: expected 0 to 4"):
        knn_predict(torch.randn(2, 3), torch.randn(6, 3), torch.arange(6), 5, k=2)
    none = torch.empty(0, 3), torch.empty(0, dtype=torch.long)
    for bank, queries in ((none, (torch.randn(4, 3), torch.arange(4))), ((torch.randn(4, 3), torch.arange(4)), none)):
        metric = KNNAccuracy(k=1)
        metric.update_bank(*bank)
        metric.update(*queries)
        with pytest.raises(ValueError, match=r"0 .*in the bank|0 test images"):
            metric.compute()
    metric = KNNAccuracy(k=1)
    metric.update_bank(torch.randn(4, 3), torch.arange(4))
    metric.update(torch.randn(4, 3), torch.arange(4) - 1)
    with pytest.raises(ValueError, match="labels from -1 to 2"):
        metric.compute()
