"""Gram matrices of images, centred without cancellation; small ones are concatenated to one vector per layer and batch.

A layer's activations on a batch become the strict upper triangles of its U-centred Gram matrices, one small matrix
per ``gram_size`` consecutive images. The images of a Gram matrix must be a random sample: shuffle them first. If
they are sorted by class, or evenly distributed over classes, every sum is biased, and with fewer images than classes
class CKA is 0/0.

Order of the steps: the batch mean is subtracted from the features *before* the Gram matrix is formed, because a float32
Gram matrix that is dominated by its mean loses the variation that CKA measures (untrained and collapsed networks). Then
follows U-centring (Song et al. 2012; Székely & Rizzo 2014), whose inner product is n(n-3) times the unbiased HSIC, and
finally products in float64. A U-centred matrix of rounding alone counts as 0.

Default protocol: flattened activations, linear kernel, 64 images in a Gram matrix. Pooling, a random projection, an
RBF kernel and dropping leading principal components are options; each gives a different number.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

Features = Literal["flatten", "pool", "project"]
Kernel = Literal["linear", "rbf"]
MIN_GRAM_SIZE = 4
"""The unbiased HSIC divides by n(n-3): it needs four images."""
DUST = 8
"""A U-centred Gram matrix of at most this many roundings of its Gram matrix counts as 0. An exact 0 gives up to 2.3 of
them (one active image in groups of 4 to 256, widths of 1 to 32,768, on a CPU), Gaussian features of width 32,768 give
45,000."""


def u_center(gram: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """U-centre Gram matrices: rows and columns sum to zero without the diagonal.

    Args:
        gram: symmetric matrices over n >= 4 images.

    Returns:
        The U-centred matrices, with a zero diagonal.

    Raises:
        ValueError: n < 4.

    References:
        Székely & Rizzo, *Partial distance correlation with methods for dissimilarities*, 2014, eq. 3.1; Song et al.,
        *Feature selection via dependence maximization*, 2012, eq. 5.

    Example:
        >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> bool(u_center(x @ x.T).sum(1).abs().max() < 1e-5)
        True
    """
    n = gram.shape[-1]
    if n < MIN_GRAM_SIZE:
        raise ValueError(f"unbiased CKA needs at least {MIN_GRAM_SIZE} images in a Gram matrix, got {n}")
    diagonal = torch.eye(n, dtype=torch.bool, device=gram.device)
    gram = gram.masked_fill(diagonal, 0)
    means = gram.sum(-1) / (n - 2)
    means = means - means.sum(-1, keepdim=True) / (2 * (n - 1))
    return (gram - means.unsqueeze(-1) - means.unsqueeze(-2)).masked_fill(diagonal, 0)


def gram_vector(
    activations: Float[Tensor, "B ..."],
    gram_size: int = 64,
    *,
    features: Features = "flatten",
    kernel: Kernel = "linear",
    bandwidth: float = 0.5,
    drop_top: int = 0,
) -> Float[Tensor, " P"]:
    """One layer's activations on a batch as a Gram vector, the input of CKA.

    The batch is split into groups of ``gram_size`` consecutive images, which must come in random order. Each group
    gives the strict upper triangle of its U-centred Gram matrix. A shorter last group has fewer pairs; one of fewer
    than four images is left out, because it has no unbiased HSIC.

    Args:
        activations: any shape with images first, computed in float32 (float64 stays float64).
        gram_size: images in a Gram matrix. HSIC is unbiased for every size; cost grows with it.
        features: "flatten" all dimensions after the first; "pool" (see :func:`pool`); "project" the flattened
            activations to 1,024 dimensions (see :func:`project`).
        kernel: "linear", or "rbf": exp(-d²/2s²) with s = ``bandwidth`` times the median distance in the group, over
            all n² pairs (including those of an image with itself).
        bandwidth: of the RBF kernel, in median distances.
        drop_top: leading principal components of each group that are left out, before the kernel: how much of CKA
            rests on a few dominant directions.

    Returns:
        P values: n(n-1)/2 for each group of n images. All zero for a group whose U-centred Gram matrix is 0 but for
        rounding: one that is constant, that has a single active image (its unbiased HSIC is exactly 0), whose
        differences underflow when squared (below 1e-19 in float32), or of which nothing is left without its leading
        components. NaN where activations are not finite or overflow when squared (1e19), and where the median distance
        of an RBF kernel is 0.

    Raises:
        ValueError: ``gram_size`` < 4, ``drop_top`` < 0, or an unknown kind of features or kernel.

    Example:
        >>> gram_vector(torch.randn(130, 3, 8, 8), gram_size=64).shape  # two groups of 64; two images are left out
        torch.Size([4032])
    """
    if gram_size < MIN_GRAM_SIZE:
        raise ValueError(f"gram_size must be at least {MIN_GRAM_SIZE}, got {gram_size}")
    x = _features(activations, features)
    options = kernel, bandwidth, drop_top
    vectors = [_triangle(centred_gram(group, *options)).flatten() for group in _grouped(x, gram_size)]
    return torch.cat([x.new_empty(0), *vectors])


def _grouped(x: Tensor, gram_size: int) -> list[Tensor]:
    """The images of whole Gram matrices, (G, n, ...), and of the short last one."""
    whole = len(x) // gram_size
    groups = x[: whole * gram_size].unflatten(0, (whole, gram_size)), x[whole * gram_size :].unsqueeze(0)
    return [group for group in groups if len(group) and group.shape[1] >= MIN_GRAM_SIZE]


def _triangle(matrices: Shaped[Tensor, "G n n"]) -> Shaped[Tensor, "G n*(n-1)/2"]:
    n = matrices.shape[1]
    rows, cols = torch.triu_indices(n, n, 1, device=matrices.device)
    return matrices[:, rows, cols]


def class_vector(labels: Int64[Tensor, " B"], num_classes: int, gram_size: int = 64) -> Float[Tensor, " P"]:
    """Classes as one more layer: the Gram vector of one-hot labels.

    Args:
        labels: class of each image, in [0, num_classes), or (B, C) zeros and ones where images show several.
        num_classes: number of classes.
        gram_size: images in a Gram matrix, as for the layers it is compared with.

    Returns:
        P values, as in :func:`gram_vector`; zero for a group of one class.

    Example:
        >>> labels = torch.arange(64) % 10
        >>> v = class_vector(labels, num_classes=10)
        >>> w = gram_vector(10 * torch.randn(10, 32)[labels])  # classes collapsed onto their means
        >>> bool(v @ w / (v.norm() * w.norm()) > 0.8)
        True
    """
    return gram_vector((F.one_hot(labels, num_classes) if labels.ndim == 1 else labels).float(), gram_size)


def class_weights(labels: Int64[Tensor, " B"], sizes: Int64[Tensor, " C"], gram_size: int = 64) -> Float[Tensor, " P"]:
    """What makes up for images that were drawn class by class: the weight of each entry of a Gram vector.

    N images that hold the classes in proportion hold fewer pairs of one class than N images drawn at random: for class
    c with n_c of them (n_c - 1)/n_c times as many (half, for two images of each of a thousand classes). A pair of
    images of class c therefore counts n_c/(n_c - 1) times. Both Gram vectors of a product take the root of that.

    Args:
        labels: class of each image of the batch.
        sizes: images of each class in all that is measured.
        gram_size: images in a Gram matrix.

    Returns:
        P values, as in :func:`gram_vector`: 1 for images of two classes.

    Example:
        >>> class_weights(torch.tensor([0, 0, 1, 2]), sizes=torch.tensor([2, 2, 9])).square()
        tensor([2.0000, 1.0000, 1.0000, 1.0000, 1.0000, 1.0000])
    """
    weights = torch.where(sizes > 1, sizes / (sizes - 1).clamp_min(1), 1.0).sqrt()
    groups = _grouped(labels, gram_size)
    matrices = [torch.where(_same_class(group), weights[group].unsqueeze(2), 1.0) for group in groups]
    return torch.cat([weights.new_zeros(0), *(_triangle(matrix).flatten() for matrix in matrices)])


def same_class_pairs(
    labels: Int64[Tensor, " B"] | Int64[Tensor, "B C"], num_classes: int, gram_size: int = 64
) -> Int64[Tensor, " C"]:
    """Pairs of images of each class in the Gram matrices of a batch: what class CKA rests on.

    Example:
        >>> same_class_pairs(torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]), num_classes=3, gram_size=4)  # 0 0 0 1 and 1 2 2 2
        tensor([3, 0, 3])
    """
    hot = F.one_hot(labels, num_classes) if labels.ndim == 1 else labels
    counts = [group.sum(1) for group in _grouped(hot, gram_size)]
    images = torch.cat([hot.new_zeros(1, num_classes), *counts])
    return (images * (images - 1)).sum(0) // 2


def _same_class(labels: Int64[Tensor, "G n"] | Int64[Tensor, "G n C"]) -> Bool[Tensor, "G n n"]:
    if labels.ndim == 2:
        return labels.unsqueeze(2) == labels.unsqueeze(1)
    return labels.float() @ labels.float().mT > 0


def gram_groups(vectors: Float[Tensor, "L P"], gram_size: int) -> list[Float[Tensor, "G L p"]]:
    """The Gram matrices in vectors of one batch: all whole ones, and the short last one.

    Args:
        vectors: of L layers, as in :func:`gram_vector`.
        gram_size: images in a Gram matrix, as the vectors were made.

    Returns:
        Up to two tensors, one for each size of Gram matrices.

    Raises:
        ValueError: no batch has vectors of that length with that ``gram_size``.

    Example:
        >>> v = torch.stack([gram_vector(torch.randn(140, 3)) for _ in range(2)])
        >>> [tuple(group.shape) for group in gram_groups(v, 64)]  # two of 64 images, one of 12
        [(2, 2, 2016), (1, 2, 66)]
    """
    length = gram_size * (gram_size - 1) // 2
    whole, rest = divmod(vectors.shape[1], length)
    last = images_of(rest)
    if rest and last * (last - 1) // 2 != rest:
        raise ValueError(f"Gram vectors of length {vectors.shape[1]:,} were not made with gram_size={gram_size}")
    groups = []
    if whole:
        groups.append(vectors[:, : whole * length].unflatten(1, (whole, length)).transpose(0, 1))
    if rest:
        groups.append(vectors[:, whole * length :].unsqueeze(0))
    return groups


def images_of(pairs: int) -> int:
    """How many images have so many pairs.

    Example:
        >>> images_of(2016)
        64
    """
    return (1 + math.isqrt(1 + 8 * pairs)) // 2


def pool(activations: Float[Tensor, "B ..."]) -> Float[Tensor, "B D"]:
    """Average over positions: of maps (B, C, H, W) over all that follows the channels, of tokens (B, T, D) over T.

    Args:
        activations: maps, channels first as :class:`~ssl_geometry.models.taps.Taps` gives them, tokens, or vectors
            (B, D), which stay as they are.

    Returns:
        A vector for each image; averages are summed and given in float32 where the activations have fewer bits.

    Example:
        >>> pool(torch.rand(2, 8, 4, 4)).shape, pool(torch.rand(2, 17, 8)).shape, pool(torch.rand(2, 8)).shape
        (torch.Size([2, 8]), torch.Size([2, 8]), torch.Size([2, 8]))
    """
    if activations.ndim == 2:
        return activations
    over = 1 if activations.ndim == 3 else tuple(range(2, activations.ndim))
    return activations.mean(over, dtype=torch.promote_types(activations.dtype, torch.float32))


def project(features: Float[Tensor, "B D"], dims: int = 1024) -> Float[Tensor, "B E"]:
    """A fixed random projection that keeps inner products in expectation, without a matrix.

    Every coordinate is given a random sign and added to one of ``dims`` sums (a count sketch). The signs and the sums
    are a function of the width alone: the same in every call and process. It blurs: CKA of projected features shrinks
    by about 1 + P/dims, where P is the participation ratio of the features (their effective dimension).

    Args:
        features: vectors of any width.
        dims: width to reduce to; narrower vectors stay as they are.

    Returns:
        Vectors of width min(D, dims).

    References:
        Charikar, Chen & Farach-Colton, *Finding frequent items in data streams*, 2002; Weinberger et al., *Feature
        hashing for large scale multitask learning*, 2009, lemma 2.

    Example:
        >>> x = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
        >>> z = project(x)
        >>> z.shape, bool((z.norm(dim=1) / x.norm(dim=1) - 1).abs().max() < 0.1)
        (torch.Size([2, 1024]), True)
    """
    width = features.shape[1]
    if width <= dims:
        return features
    order, signs = _sketch(width, dims, features.device)
    return features.index_select(1, order).mul_(signs).unflatten(1, (-1, dims)).sum(1)


@lru_cache(maxsize=16)
def _sketch(width: int, dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)  # on the CPU: the same numbers for every device
    order = torch.randperm(width, generator=generator)
    signs = torch.randint(2, (width,), generator=generator, dtype=torch.int8) * 2 - 1
    rest = (0, -width % dims)  # the last row of sums is filled up with coordinate 0 times 0
    return F.pad(order, rest).to(device), F.pad(signs, rest).to(device)


def _features(activations: Float[Tensor, "B ..."], kind: Features) -> Float[Tensor, "B D"]:
    if kind == "flatten":
        if activations.ndim == 4 and activations.is_contiguous(memory_format=torch.channels_last):
            activations = activations.movedim(1, -1)  # a view that flattens without a copy; CKA ignores feature order
        return activations.flatten(1)
    x = activations.to(torch.promote_types(activations.dtype, torch.float32))
    if kind == "pool":
        return pool(x)
    if kind == "project":
        return project(x.flatten(1))
    raise ValueError(f"features must be 'flatten', 'pool' or 'project', got {kind!r}")


def centred_gram(
    x: Float[Tensor, "G n D"], kernel: Kernel, bandwidth: float, drop_top: int, dtype: torch.dtype | None = None
) -> Float[Tensor, "G n n"]:
    """U-centred :func:`gram_matrix`; what is rounding alone is 0."""
    gram = gram_matrix(x, kernel, bandwidth, drop_top)
    centred = u_center(gram.to(dtype or gram.dtype))
    # Entry ij of a Gram matrix is known to eps |x_i| |x_j|. Where nothing beyond that is left, such as of one active
    # image (a dead ReLU), dust would be divided by itself and read 1.
    own = gram.diagonal(dim1=1, dim2=2).double()
    rounding = torch.finfo(gram.dtype).eps * (own.sum(1).square() - own.square().sum(1)).clamp_min(0).sqrt()
    norm = torch.linalg.vector_norm(centred, dim=(1, 2), dtype=torch.float64)
    return centred.masked_fill((norm <= DUST * rounding)[:, None, None], 0)


def gram_matrix(x: Float[Tensor, "G n D"], kernel: Kernel, bandwidth: float, drop_top: int) -> Float[Tensor, "G n n"]:
    """Gram matrices of G groups of n images, of features that have the mean of their group subtracted."""
    # Everything follows from the linear Gram matrix of centred features. Zero where they are constant.
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups, n, width = x.shape
    gram = x.new_zeros(groups, n, n, dtype=dtype)
    level = x.new_zeros(groups, 1, 1, dtype=dtype)
    half = n // 2
    # On a CPU the features come in slices that stay in the cache: the centred copy costs 40 ms instead of 70, of 2,270
    # for the forward (ResNet-18, 17 layers, 256 images, one thread). Leaving out the lower left quarter of the
    # symmetric matrix saves 20 more; finer blocks save nothing.
    with torch.autocast(x.device.type, enabled=False):
        for part in x.split(512 if x.device.type == "cpu" else width, dim=2):
            part = part.to(dtype)
            mean = part.mean(1, keepdim=True)
            centered = part - mean
            gram[:, :half].baddbmm_(centered[:, :half], centered.mT)
            gram[:, half:, half:].baddbmm_(centered[:, half:], centered[:, half:].mT)
            level.baddbmm_(mean, mean.mT)
    gram[:, half:, :half] = gram[:, :half, half:].mT
    # What rounding leaves of identical rows is not variation: such a group carries no information about the images.
    resolution = 8 * torch.finfo(dtype).eps
    own = gram.diagonal(dim1=1, dim2=2)
    tiny = torch.finfo(dtype).tiny  # squares below it have lost their digits
    variation = own.mean(1)
    constant = variation.isfinite() & (variation <= (resolution**2 * level.flatten()).clamp_min(tiny))
    if drop_top < 0:
        raise ValueError(f"drop_top must be at least 0, got {drop_top}")
    if drop_top:
        values, vectors = torch.linalg.eigh(gram.double())
        values, vectors = values[:, :-drop_top], vectors[..., :-drop_top]
        constant |= values.sum(1) <= n * torch.finfo(dtype).eps * own.sum(1)  # the rounding of what was left out
        gram = (vectors * values.unsqueeze(1) @ vectors.mT).to(dtype)
    if kernel == "rbf":
        own = gram.diagonal(dim1=1, dim2=2)
        squares = (own.unsqueeze(1) + own.unsqueeze(2) - 2 * gram).clamp_min(0)  # distances; rounding goes below 0
        entries = squares.flatten(1).sort(1).values  # torch.median is not deterministic on CUDA
        middles = entries[:, (entries.shape[1] - 1) // 2], entries[:, entries.shape[1] // 2]
        median = (middles[0] + middles[1]) / 2
        gram = (-squares / (2 * bandwidth**2 * median[:, None, None])).exp()
    elif kernel != "linear":
        raise ValueError(f"kernel must be 'linear' or 'rbf', got {kernel!r}")
    return gram.masked_fill(constant[:, None, None], 0)
