"""k-nearest-neighbour classification.

Protocol: the k nearest clean (un-augmented) training images by cosine similarity, ranked in float64 where float32
cannot (see :mod:`ssl_geometry.geometry.neighbors`), vote with weight exp(cosine / temperature), as in Wu et al. 2018.
Weights are computed from 1 - cosine, which keeps its digits where all cosines round to 1. Duplicates all vote. A zero
feature vector has no direction: it is not a neighbour of any image, and gets no neighbours and no prediction.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_geometry.geometry.classification import check_labels
from ssl_geometry.geometry.neighbors import nearest_directions
from ssl_geometry.geometry.overlap import is_degenerate

VOTES = 2**24
"""Block size of the vote (queries times classes, float64)."""


def directions_vary(features: Float[Tensor, "N D"]) -> bool:
    """Whether directions differ by more than rounding; otherwise neighbours are meaningless.

    Rows of one direction that were rounded to float32 lie about 2.5e-8 around their mean, as unit vectors (root mean
    square); features vary where it is more than eps (1.2e-7 in float32).

    Example:
        >>> rays = torch.rand(50, 1) * torch.rand(8)
        >>> directions_vary(rays), directions_vary(torch.eye(5))
        (False, True)
    """
    return not is_degenerate(features[(features != 0).any(1)], roundings=1)


def knn_vote(
    distances: Float[Tensor, "N K"],
    neighbours: Int64[Tensor, "N K"],
    labels: Int64[Tensor, " M"],
    num_classes: int,
    temperature: float | None = 0.07,
) -> Int64[Tensor, " N"]:
    """Predict classes by a vote of neighbours.

    Args:
        distances: 1 - cosine of each neighbour, the smallest first; of
            :func:`~ssl_geometry.geometry.neighbors.nearest_directions`.
        neighbours: their indices in the bank, -1 for none.
        labels: classes of the bank, in [0, num_classes).
        num_classes: number of classes.
        temperature: a neighbour votes with weight exp(cosine / temperature); None for a majority vote.

    Returns:
        The class with the largest vote for each query (ties within float64 rounding go to the smallest class); -1
        without neighbours.

    Raises:
        ValueError: labels out of range, or a temperature that is not above 0.

    Example:
        >>> ids, distances, _ = nearest_directions(torch.tensor([[1.0, 0.1]]), torch.eye(2), k=2)
        >>> [int(knn_vote(distances[:, :k], ids[:, :k], torch.tensor([3, 1]), 4, None)) for k in (1, 2)]
        [3, 1]
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature {temperature:g} of the nearest neighbours' votes: expected above 0, or None")
    check_labels(labels, num_classes)
    rounding = distances.shape[1] * torch.finfo(torch.float64).eps
    predicted = []
    for near, ids in zip(*(part.split(max(1, VOTES // num_classes)) for part in (distances, neighbours)), strict=True):
        # exp(s/T) up to a common factor of all votes of a query: no overflow at small temperatures
        weights = torch.ones_like(near, dtype=torch.float64)
        if temperature is not None:
            weights = ((near[:, :1].double() - near.double()) / temperature).exp()
        weights = weights.masked_fill(ids < 0, 0)
        votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels[ids.clamp_min(0)], weights)
        most = votes.amax(1, keepdim=True)
        first = (votes >= most * (1 - rounding)).byte().argmax(1)
        predicted.append(torch.where(ids[:, 0] < 0, -1, first))
    return torch.cat(predicted)


def knn_predict(
    queries: Float[Tensor, "N D"],
    bank: Float[Tensor, "M D"],
    labels: Int64[Tensor, " M"],
    num_classes: int,
    k: int = 20,
    temperature: float | None = 0.07,
) -> Int64[Tensor, " N"]:
    """Search the k most similar images of the bank and predict classes by :func:`knn_vote`.

    Args:
        queries: features of test images.
        bank: features of training images.
        labels: classes of the bank, in [0, num_classes).
        num_classes: number of classes.
        k: number of neighbours.
        temperature: a neighbour votes with weight exp(cosine / temperature); None for a majority vote.

    Returns:
        The class with the largest vote for each query (ties go to the smallest class); -1 for zero vectors.

    Raises:
        ValueError: k that is not between 1 and the number of images in the bank, features that are not finite, or as of
            the vote.

    References:
        Wu et al., *Unsupervised feature learning via non-parametric instance discrimination*, 2018, section 3.4.

    Example:
        >>> bank = torch.eye(3).repeat(4, 1)
        >>> knn_predict(torch.eye(3) + 0.1, bank, torch.arange(3).repeat(4), num_classes=3, k=4)
        tensor([0, 1, 2])
    """
    found = nearest_directions(queries, bank, k)
    return knn_vote(found.values, found.ids, labels, num_classes, temperature)
