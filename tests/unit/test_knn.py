"""The nearest-neighbour classifier against scikit-learn's."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from ssl_geometry.errors import UserError
from ssl_geometry.geometry.probes import knn_predict, knn_search, knn_vote
from ssl_geometry.metrics import KNNAccuracy


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
    got = knn_predict(q, b, labels, classes, k, temperature, chunk=7)
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
    similarity, neighbours = knn_search(queries, bank, k=50, chunk=7)
    assert (similarity.diff(dim=1) <= 0).all()
    for k in (1, 20, 50):
        for temperature in (0.07, None):
            expected = knn_predict(queries, bank, labels, 3, k, temperature)
            assert torch.equal(knn_vote(similarity[:, :k], neighbours[:, :k], labels, 3, temperature), expected)


def test_all_k_neighbours_vote() -> None:
    """The six nearest are outvoted by the nine behind them."""
    bank = torch.tensor([[1.0, 0.1]] * 6 + [[1.0, 0.9]] * 9)
    labels = torch.tensor([0] * 6 + [1] * 9)
    predicted = [int(knn_predict(torch.tensor([[1.0, 0.0]]), bank, labels, 2, k, temperature=None)) for k in (6, 15)]
    assert predicted == [0, 1]


BAD = [
    ({"k": 0}, "0 nearest neighbours in a bank of 12 images"),
    ({"k": 13}, "13 nearest neighbours in a bank of 12 images: expected 1 to as many"),
    ({"temperature": 0.0}, "temperature 0 .*: expected above 0"),
    ({"temperature": -1.0}, "temperature -1 "),
    ({"temperature": float("nan")}, "temperature nan "),
    (
        {"queries": torch.randn(5, 3).index_fill(0, torch.tensor([1, 4]), torch.nan)},
        "queries: features of 2 of 5 images",
    ),
    ({"bank": torch.randn(12, 3).index_fill(0, torch.tensor([7]), torch.inf)}, "bank: features of 1 of 12 images"),
    ({"labels": torch.arange(12) % 4 - 1}, "labels from -1 to 2"),
]


@pytest.mark.parametrize(("changed", "words"), BAD)
def test_what_cannot_be_classified_is_told(changed: dict[str, Any], words: str) -> None:
    given = {"queries": torch.randn(5, 3), "bank": torch.randn(12, 3), "labels": torch.arange(12) % 4, "k": 3}
    given |= changed
    with pytest.raises(ValueError, match=words):
        knn_predict(**given, num_classes=4)
    metric = KNNAccuracy(given["k"], given.get("temperature", 0.07))
    metric.update_bank(given["bank"], given["labels"])
    metric.update(given["queries"], torch.arange(5) % 4)
    with pytest.raises(UserError, match=words.replace("-1 to 2", "-1 to")):
        metric.compute()


def test_banks_and_queries_that_are_none_are_told() -> None:
    with pytest.raises(ValueError, match="20 nearest neighbours in a bank of 0 images"):
        knn_predict(torch.randn(2, 3), torch.empty(0, 3), torch.empty(0, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="labels from 0 to 5: expected 0 to 4"):
        knn_predict(torch.randn(2, 3), torch.randn(6, 3), torch.arange(6), 5, k=2)
    none = torch.empty(0, 3), torch.empty(0, dtype=torch.long)
    for bank, queries in ((none, (torch.randn(4, 3), torch.arange(4))), ((torch.randn(4, 3), torch.arange(4)), none)):
        metric = KNNAccuracy(k=1)
        metric.update_bank(*bank)
        metric.update(*queries)
        with pytest.raises(ValueError, match=r"0 .*in the bank|0 to classify"):
            metric.compute()
    metric = KNNAccuracy(k=1)
    metric.update_bank(torch.randn(4, 3), torch.arange(4))
    metric.update(torch.randn(4, 3), torch.arange(4) - 1)
    with pytest.raises(ValueError, match="labels from -1 to 2"):
        metric.compute()
