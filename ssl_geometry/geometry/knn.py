"""Classes by a vote of the nearest neighbours among images of known class.

Protocol: the k nearest clean (un-augmented) training images by cosine similarity, ranked in float64 where float32
cannot (see :mod:`ssl_geometry.geometry.neighbors`), vote with weight exp(cosine / temperature), as in Wu et al. 2018,
computed from 1 - cosine, which keeps its digits where all cosines round to 1. Images of equal features all vote. An
image of zero features has no direction: it is nobody's neighbour, and has no neighbour and no class.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_geometry.geometry.classification import check_features, check_labels
from ssl_geometry.geometry.duplicates import row_blocks
from ssl_geometry.geometry.neighbors import nearest

VOTES = 2**24
"""Votes (of queries times classes, float64) that are counted at once."""


def directions_vary(features: Float[Tensor, "N D"]) -> bool:
    """Whether more than rounding tells directions apart; otherwise no neighbour is better than another.

    Rows of one direction that were rounded to float32 lie about 2.5e-8 around their mean, as unit vectors (root mean
    square); features vary where it is more than eps (1.2e-7 in float32).

    Example:
        >>> rays = torch.rand(50, 1) * torch.rand(8)
        >>> directions_vary(rays), directions_vary(torch.eye(5))
        (False, True)
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    features = features[(features != 0).any(1)]
    if not len(features):
        return False
    base = _unit(features[:1])  # sums of differences to it do not cancel
    total, squares = torch.zeros_like(base[0]), base.new_zeros(())
    for part in row_blocks(features):
        apart = _unit(features[part]) - base
        total += apart.sum(0)
        squares += apart.square().sum()
    variance = squares / len(features) - (total / len(features)).square().sum()
    return bool(variance > torch.finfo(features.dtype).eps ** 2)


def _unit(features: Tensor) -> Tensor:
    wide = features.double()
    return wide / wide.norm(dim=1, keepdim=True)


def knn_search(
    queries: Float[Tensor, "N D"], bank: Float[Tensor, "M D"], k: int = 20
) -> tuple[Float[Tensor, "N K"], Int64[Tensor, "N K"]]:
    """The k most similar images of the bank, the most similar first, of equally similar ones the smaller number.

    The first columns are the search for a smaller k: one search does for votes of several k and kinds.

    Args:
        queries: features to classify.
        bank: features with known classes.
        k: neighbours of each query.

    Returns:
        1 - cosine, float32, and numbers of the images in the bank; NaN and -1 where there is none: for queries of
        zeros, and beyond the images of the bank that are not zeros.

    Raises:
        ValueError: k < 1, a bank of fewer than k images, or features that are not finite.

    Example:
        >>> distance, neighbours = knn_search(torch.tensor([[1.0, 0.1]]), torch.eye(2), k=2)
        >>> neighbours
        tensor([[0, 1]])
    """
    if not 1 <= k <= len(bank):
        raise ValueError(
            f"{k} nearest neighbours in a bank of {len(bank)} images: expected 1 to as many as the bank has"
        )
    check_features("nearest neighbours: bank", bank)
    check_features("nearest neighbours: queries", queries)
    asked, known = ((features != 0).any(1).nonzero()[:, 0] for features in (queries, bank))
    distances = torch.full((len(queries), k), torch.nan, device=queries.device)
    ids = torch.full((len(queries), k), -1, device=queries.device)
    if len(asked) and len(known):
        columns = min(k, len(known))
        found = nearest(queries[asked], bank[known], columns, index="exact", duplicates=True)
        distances[asked, :columns], ids[asked, :columns] = found.values, known[found.ids]
    return distances, ids


def knn_vote(
    distances: Float[Tensor, "N K"],
    neighbours: Int64[Tensor, "N K"],
    labels: Int64[Tensor, " M"],
    num_classes: int,
    temperature: float | None = 0.07,
) -> Int64[Tensor, " N"]:
    """Predict classes by a vote of neighbours.

    Args:
        distances: 1 - cosine of each neighbour, the smallest first; see :func:`knn_search`.
        neighbours: their numbers in the bank, -1 for none.
        labels: classes of the bank, in [0, num_classes).
        num_classes: number of classes.
        temperature: a neighbour votes with weight exp(cosine / temperature); None counts heads.

    Returns:
        The class with the largest vote for each query (of votes that are equal within float64's rounding the smallest
        class); -1 without a neighbour.

    Raises:
        ValueError: labels out of range, or a temperature that is not above 0.

    Example:
        >>> distances, neighbours = knn_search(torch.tensor([[1.0, 0.1]]), torch.eye(2), k=2)
        >>> [int(knn_vote(distances[:, :k], neighbours[:, :k], torch.tensor([3, 1]), 4, None)) for k in (1, 2)]
        [3, 1]
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature {temperature:g} of the nearest neighbours' votes: expected above 0, or None")
    check_labels(labels, num_classes)
    rounding = distances.shape[1] * torch.finfo(torch.float64).eps
    predicted = []
    for near, ids in zip(*(part.split(max(1, VOTES // num_classes)) for part in (distances, neighbours)), strict=True):
        # exp(s/T) up to a factor that every vote of the query shares: no overflow at small temperatures
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
    """Predict classes by a vote of the k most similar images of the bank: :func:`knn_search`, then :func:`knn_vote`.

    Args:
        queries: features to classify.
        bank: features with known classes.
        labels: classes of the bank, in [0, num_classes).
        num_classes: number of classes.
        k: neighbours that vote.
        temperature: a neighbour votes with weight exp(cosine / temperature); None counts heads.

    Returns:
        The class with the largest vote for each query (of equal votes the smallest class); -1 for queries of zeros.

    Raises:
        ValueError: as of the two.

    References:
        Wu et al., *Unsupervised feature learning via non-parametric instance discrimination*, 2018, section 3.4.

    Example:
        >>> bank = torch.eye(3).repeat(4, 1)
        >>> knn_predict(torch.eye(3) + 0.1, bank, torch.arange(3).repeat(4), num_classes=3, k=4)
        tensor([0, 1, 2])
    """
    return knn_vote(*knn_search(queries, bank, k), labels, num_classes, temperature)
