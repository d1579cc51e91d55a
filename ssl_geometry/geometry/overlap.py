"""Do two representations agree on which images are alike? The overlap of their nearest neighbours.

Protocol: cosine similarity, searched exactly, the image itself left out by its index, k = 10 by default. The overlap
of unrelated representations of N images is k/(N-1): a number without its N says little.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.geometry.duplicates import row_blocks
from ssl_geometry.geometry.neighbors import RANKING, nearest_directions

NEAREST = f"cosine, {RANKING}; zeros have no neighbours and are none"
"""Which neighbours are compared, for protocols."""

ALIKE = 8
"""Roundings of the features' dtype up to which directions do not differ."""


def neighbor_ids(features: Float[Tensor, "N D"], k: int = 10) -> Int64[Tensor, "N k"]:
    """The k images most alike each image, by cosine similarity, itself left out by its index.

    The search is that of :func:`ssl_geometry.geometry.neighbors.nearest_directions`; copies are neighbours.

    Args:
        features: a vector for each image.
        k: neighbours, fewer than N.

    Returns:
        Indices of the neighbours of each image, most similar first, of equally similar ones the smaller first. -1
        where there is none: images of zeros have no direction, nor are they neighbours; and all of :func:`all_alike`.

    Raises:
        ValueError: k < 1 or k >= N.

    Example:
        >>> angle = torch.tensor([0.0, 0.1, 0.3, 1.0])
        >>> neighbor_ids(torch.stack([angle.cos(), angle.sin()], 1), k=1).flatten()
        tensor([1, 0, 1, 2])
    """
    # Those that are alike are searched as zeros, which have no neighbours.
    return nearest_directions(torch.zeros_like(features) if all_alike(features) else features, k=k).ids


def mutual_knn(ids_a: Int64[Tensor, "L N k"], ids_b: Int64[Tensor, "M N k"]) -> Float[Tensor, "L M"]:
    """Mutual k-nearest-neighbour overlap of every pair of layers: the mean of |A and B| / k over images.

    Args:
        ids_a: neighbours of each image in each layer, without repetitions (see :func:`neighbor_ids`); -1 where there
            are fewer than k: k is then the larger of the two numbers.
        ids_b: the same of other layers, for the same images and k.

    Returns:
        Overlap in [0, 1], float64; images without neighbours in both layers are left out, NaN where all are. Unrelated
        layers read k/(N-1) on average.

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
    """Over the images of all parts but for those whose share is 0 / 0."""
    sums = [torch.stack([part.nansum(0), (~part.isnan()).sum(0)]) for part in parts]
    total, images = torch.stack(sums).sum(0)
    return total / images


def _shared(
    ids_a: Int64[Tensor, "L N K"], ids_b: Int64[Tensor, "M N K"]
) -> Iterator[tuple[Float[Tensor, "P L M"], Float[Tensor, "P L"], Float[Tensor, "P M"]]]:
    """For some images after others: neighbours that each pair of layers has in common, and those of each layer."""
    if ids_a.shape[1:] != ids_b.shape[1:]:
        raise ValueError(
            f"neighbours of the same N images with the same k are needed, got (N, k) = {tuple(ids_a.shape[1:])} "
            f"and {tuple(ids_b.shape[1:])}"
        )
    both = torch.cat([ids_a, ids_b]).transpose(0, 1).contiguous()
    _, layers, k = both.shape
    width = layers * k
    for part in both.split(max(1, 2**24 // (layers * width))):
        # Among the candidates of one image in all layers, equal ids get equal slots; memory does not grow with N.
        candidates = part.flatten(1)
        slots = torch.searchsorted(candidates.sort(1).values, candidates).view_as(part)
        there = (part >= 0).float()  # -1 stands for no neighbour
        member = torch.zeros(len(part), layers, width, device=both.device).scatter_(2, slots, there)
        a, b = member.split([len(ids_a), len(ids_b)], dim=1)
        yield (a @ b.mT).double(), a.sum(2).double(), b.sum(2).double()


def all_alike(features: Float[Tensor, "N D"], roundings: float = ALIKE) -> bool:
    """Whether rounding is all that tells directions apart, so that no neighbour is better; true of NaN as well.

    Args:
        features: a vector for each image; zeros are another direction than all others.
        roundings: of the features' dtype, up to which directions do not differ (root mean square around their mean).

    Example:
        >>> all_alike(torch.ones(5, 3)), all_alike(torch.eye(5))
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
