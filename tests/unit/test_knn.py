"""The nearest-neighbour classifier against scikit-learn's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from ssl_geometry.geometry.probes import knn_predict
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


def test_an_empty_bank_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a bank"):
        knn_predict(torch.randn(2, 3), torch.empty(0, 3), torch.empty(0, dtype=torch.long), 2)
