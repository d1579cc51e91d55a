"""Overlap of the nearest neighbours of two representations: do they agree on which images are similar?

Protocol: exact search by cosine similarity, the image itself excluded by its index, k = 10 by default. Unrelated
representations of N images overlap by k/(N-1), so a value is only comparable for equal N.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.geometry.duplicates import row_blocks
from ssl_geometry.geometry.neighbors import RANKING, nearest_directions

NEAREST = f"cosine, {RANKING}; zeros have no neighbours and are none"
"""How neighbours are defined, for protocols."""

DEGENERATE = 8
"""Directions that differ by at most this many roundings of the features' dtype count as equal."""


def neighbor_ids(features: Float[Tensor, "N D"], k: int = 10) -> Int64[Tensor, "N k"]:
    """The k most similar images of each image, by cosine similarity, itself excluded by its index.

    The search is :func:`ssl_geometry.geometry.neighbors.nearest_directions`; duplicates are neighbours.

    Args:
        features: a vector for each image.
        k: number of neighbours, fewer than N.

    Returns:
        Indices of the neighbours of each image, most similar first, ties by index. -1 where there is none: zero vectors
        have no neighbours and are none, and :func:`is_degenerate` features have no neighbours at all.

    Raises:
        ValueError: k < 1 or k >= N.

    Example:
        >>> angle = torch.tensor([0.0, 0.1, 0.3, 1.0])
        >>> neighbor_ids(torch.stack([angle.cos(), angle.sin()], 1), k=1).flatten()
        tensor([1, 0, 1, 2])
    """
    # Degenerate features are searched as zeros, which have no neighbours.
    return nearest_directions(torch.zeros_like(features) if is_degenerate(features) else features, k=k).ids


def mutual_knn(ids_a: Int64[Tensor, "L N k"], ids_b: Int64[Tensor, "M N k"]) -> Float[Tensor, "L M"]:
    """Mutual k-nearest-neighbour overlap of every pair of layers: the mean of |A and B| / k over images.

    Args:
        ids_a: neighbours of each image in each layer, without repetitions (see :func:`neighbor_ids`); -1 where there
            are fewer than k: k is then the larger of the two numbers.
        ids_b: the same of other layers, for the same images and k.

    Returns:
        Overlap in [0, 1], float64; images without neighbours in both layers are left out, NaN where all are. Unrelated
        layers overlap by k/(N-1) on average.

    Raises:
        ValueError: different images or k.

    References:
        Huh et al., *The Platonic representation hypothesis*, 2024, appendix A.

    Example:
        >>> a = torch.tensor([[[1, 2], [0, 2], [1, 3], [2, 1]]])
        >>> b = torch.tensor([[[1, 3], [0, 2], [0, 3], [2, 0]]])
        >>> mutual_knn(a, torch.cat([a, b]))
        tensor([[1.0000, 0.6250]], dtype=torch.float64)
    """
    return _mean(shared / torch.maximum(a[:, :, None], b[:, None]) for shared, a, b in _shared(ids_a, ids_b))


def jaccard(ids_a: Int64[Tensor, "L N K"], ids_b: Int64[Tensor, "M N K"]) -> Float[Tensor, "L M"]:
    """Jaccard overlap of every pair of layers: the mean of |A and B| / |A or B| over images.

    It suits images with different numbers of neighbours, such as those of an NNK graph.

    Args:
        ids_a: neighbours of each image in each layer, without repetitions; -1 where there are fewer than K.
        ids_b: the same of other layers, for the same images and K.

    Returns:
        Overlap in [0, 1], float64; images without neighbours in both layers are left out, NaN where all are.

    Raises:
        ValueError: different images or K.

    Example:
        >>> a, b = torch.tensor([[[1, 2], [0, 2], [1, -1]]]), torch.tensor([[[1, -1], [0, 2], [0, -1]]])
        >>> jaccard(a, b)
        tensor([[0.5000]], dtype=torch.float64)
    """
    return _mean(shared / (a[:, :, None] + b[:, None] - shared) for shared, a, b in _shared(ids_a, ids_b))


def _mean(parts: Iterable[Float[Tensor, "P L M"]]) -> Float[Tensor, "L M"]:
    """The mean over the images of all parts, except those whose overlap is 0 / 0."""
    sums = [torch.stack([part.nansum(0), (~part.isnan()).sum(0)]) for part in parts]
    total, images = torch.stack(sums).sum(0)
    return total / images


def _shared(
    ids_a: Int64[Tensor, "L N K"], ids_b: Int64[Tensor, "M N K"]
) -> Iterator[tuple[Float[Tensor, "P L M"], Float[Tensor, "P L"], Float[Tensor, "P M"]]]:
    """Block by block of images: how many neighbours each pair of layers shares, and how many each layer has."""
    if ids_a.shape[1:] != ids_b.shape[1:]:
        raise ValueError(
            f"neighbours of the same N images with the same k are needed, got (N, k) = {tuple(ids_a.shape[1:])} "
            f"and {tuple(ids_b.shape[1:])}"
        )
    both = torch.cat([ids_a, ids_b]).transpose(0, 1).contiguous()
    _, layers, k = both.shape
    width = layers * k
    for part in both.split(max(1, 2**24 // (layers * width))):
        # Equal ids of one image in all layers get equal slots; memory does not grow with N.
        candidates = part.flatten(1)
        slots = torch.searchsorted(candidates.sort(1).values, candidates).view_as(part)
        there = (part >= 0).float()  # -1 stands for no neighbour
        member = torch.zeros(len(part), layers, width, device=both.device).scatter_(2, slots, there)
        a, b = member.split([len(ids_a), len(ids_b)], dim=1)
        yield (a @ b.mT).double(), a.sum(2).double(), b.sum(2).double()


def is_degenerate(features: Float[Tensor, "N D"], roundings: float = DEGENERATE) -> bool:
    """Whether all directions are equal within rounding, so that neighbours are meaningless; also true for NaN.

    Args:
        features: a vector for each image; a zero vector counts as a direction of its own.
        roundings: largest root mean square deviation from the mean direction, in roundings of the features' dtype.

    Example:
        >>> is_degenerate(torch.ones(5, 3)), is_degenerate(torch.eye(5))
        (True, False)
    """
    # In blocks of float64: float32 squares overflow at 1e19.
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in row_blocks(features):
        total += _directions(features[part]).sum(0)
    mean = total / len(features)
    apart = mean.new_zeros(())
    for part in row_blocks(features):
        apart += (_directions(features[part]) - mean).square().sum()
    resolution = roundings * torch.finfo(torch.promote_types(features.dtype, torch.float32)).eps
    return not bool(apart / len(features) > resolution**2 * mean.square().sum())


def _directions(features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    return F.normalize(features.double(), dim=1, eps=torch.finfo(torch.float64).tiny)  # zeros stay zeros
