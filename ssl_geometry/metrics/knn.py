"""Accuracy of a nearest-neighbour classifier on frozen features, over batches and ranks."""

import warnings

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ssl_geometry.geometry.classification import check_labels
from ssl_geometry.geometry.duplicates import row_keys
from ssl_geometry.geometry.knn import directions_vary, knn_predict


class KNNAccuracy(Metric):
    """Top-1 accuracy of the weighted k-nearest-neighbour classifier (cosine similarity).

    Args:
        k: number of neighbours; the bank must have at least as many images.
        temperature: a neighbour votes with weight exp(cosine / temperature); None for a majority vote.

    References:
        Wu et al., *Unsupervised feature learning via non-parametric instance discrimination*, 2018.

    Example:
        >>> knn = KNNAccuracy(k=1)
        >>> knn.update_bank(torch.eye(3), torch.arange(3))
        >>> knn.update(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 1, 2]))
        >>> round(float(knn.compute()), 3)
        0.667
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    bank: list[Tensor]
    bank_labels: list[Tensor]
    queries: list[Tensor]
    query_labels: list[Tensor]

    def __init__(self, k: int = 20, temperature: float | None = 0.07) -> None:
        super().__init__()
        self.k, self.temperature = k, temperature
        for state in ("bank", "bank_labels", "queries", "query_labels"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update_bank(self, features: Float[Tensor, "B D"], labels: Int64[Tensor, " B"]) -> None:
        """Add training images, each once over all ranks; every rank must add a batch, which may be empty."""
        self._computed = None  # a cached result is out of date
        self.bank.append(features.detach().float())
        self.bank_labels.append(labels)

    def update(self, features: Float[Tensor, "B D"], labels: Int64[Tensor, " B"]) -> None:
        """Add test images with their classes; every rank must add some."""
        self.queries.append(features.detach().float())
        self.query_labels.append(labels)

    def compute(self) -> Float[Tensor, ""]:
        """The accuracy in [0, 1]; NaN, with one warning, if all features of the bank have the same direction.

        Images are sorted by a hash of their features, so the result does not depend on their rank.

        Raises:
            ValueError: features that are not finite, negative labels, no query, a bank of fewer than k images, or a
                temperature that is not above 0.
        """
        try:
            return self._accuracy()
        except ValueError as error:
            raise ValueError(f"accuracy of {self.k} nearest neighbours: {error}") from error

    def _accuracy(self) -> Float[Tensor, ""]:
        labels, truth = dim_zero_cat(self.bank_labels), dim_zero_cat(self.query_labels)
        if not len(labels) or not len(truth):
            raise ValueError(f"nearest neighbours: {len(labels)} images in the bank and {len(truth)} test images")
        num_classes = int(torch.maximum(labels.max(), truth.max())) + 1
        check_labels(truth, num_classes)
        bank, labels = _in_order(dim_zero_cat(self.bank), labels)
        queries, truth = _in_order(dim_zero_cat(self.queries), truth)
        predicted = knn_predict(queries, bank, labels, num_classes, self.k, self.temperature)
        if not directions_vary(bank):
            warnings.warn(
                f"accuracy of {self.k} nearest neighbours is NaN: features of all {len(bank)} images have the same "
                "direction",
                stacklevel=3,
            )
            return torch.full((), torch.nan, device=bank.device)
        return (predicted == truth).double().mean().float()


def _in_order(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted by a hash of the features, duplicates by their labels."""
    order = labels.argsort(stable=True)
    order = order[row_keys(features[order]).argsort(stable=True)]
    return features[order], labels[order]
