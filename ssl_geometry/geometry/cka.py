"""CKA: unbiased and in minibatches for every pair of layers, from one vector a layer and batch; and in full.

A layer's activations on a batch become the strict upper triangles of its U-centred Gram matrices, one small matrix
for each ``gram_size`` consecutive images, laid end to end in one vector. With those vectors as rows, the unbiased
HSIC of all pairs of layers is a single matrix product. Sums over batches are ratios of averages, not averages of
ratios (Nguyen et al. 2021). The images of a Gram matrix must be a random sample: shuffle them first. Sorted by class,
or dealt out evenly, they bias every sum, and with fewer images than classes class CKA is 0/0.

Order of the steps, and why: the batch mean is subtracted from the features *before* the Gram matrix is formed,
because in float32 a Gram matrix that is dominated by its mean loses what CKA measures (untrained and collapsed
networks); then U-centring (Song et al. 2012; Székely & Rizzo 2014), whose inner product is n(n-3) times the unbiased
HSIC; then products in float64. Nothing is clamped and no epsilon enters a ratio: what cannot be computed is NaN. A
U-centred matrix that is rounding alone counts as 0.

Default protocol: flattened activations, linear kernel, 64 images in a Gram matrix. Pooling, a random projection, an
RBF kernel and leaving out leading principal components are options; each gives another number.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from scipy.special import stdtrit
from torch import Tensor
from torch.nn import functional as F

Features = Literal["flatten", "pool", "project"]
Kernel = Literal["linear", "rbf"]
Estimator = Literal["unbiased", "biased"]

MIN_GRAM_SIZE = 4
"""The unbiased HSIC divides by n(n-3): it needs four images."""

DUST = 8
"""A U-centred Gram matrix is 0 below so many roundings of its Gram matrix; what is exactly 0 leaves up to 2.3 of them
(one active image in groups of 4 to 256, widths of 1 to 32,768, on a CPU), Gaussian features of width 32,768 45,000."""
LEAST_BLOCK = 0.25
"""Share of the largest block's weight that makes a block: few images vary less than their weight says, and error bars
with their degree of freedom cover 0.89 to 0.92 (196, 212, 260 images) instead of 0.94 to 0.95."""


def u_center(gram: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """U-centre Gram matrices: rows, columns and the whole sum to zero with the diagonal left out.

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
    """One layer's activations on a batch as the vector that enters CKA.

    The batch is cut into groups of ``gram_size`` consecutive images, which must come in random order. Each group gives
    the strict upper triangle of its U-centred Gram matrix. A shorter last group counts with its own number of pairs;
    one of fewer than four images is left out, because no unbiased HSIC of it exists.

    Args:
        activations: any shape with images first, computed in float32 (float64 stays float64).
        gram_size: images in a Gram matrix. HSIC is unbiased for every size; cost grows with it.
        features: "flatten" over all that follows the images; "pool" (see :func:`pool`); "project" the flattened
            activations to 1,024 dimensions (see :func:`project`).
        kernel: "linear", or "rbf": exp(-d²/2s²) with s = ``bandwidth`` times the median distance in the group, over
            all n² pairs (an image and itself included).
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
    vectors = [_triangle(_centred_gram(group, *options)).flatten() for group in _grouped(x, gram_size)]
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
        P values, as of :func:`gram_vector`; zero for a group of one class.

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
        P values, as of :func:`gram_vector`: 1 for images of two classes.

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
        vectors: of L layers, as of :func:`gram_vector`.
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


def _centred_gram(
    x: Float[Tensor, "G n D"], kernel: Kernel, bandwidth: float, drop_top: int, dtype: torch.dtype | None = None
) -> Float[Tensor, "G n n"]:
    gram = _gram(x, kernel, bandwidth, drop_top)
    centred = u_center(gram.to(dtype or gram.dtype))
    # Entry ij of a Gram matrix is known to eps |x_i| |x_j|. Where nothing beyond that is left, such as of one active
    # image (a dead ReLU), dust would be divided by itself and read 1.
    own = gram.diagonal(dim1=1, dim2=2).double()
    rounding = torch.finfo(gram.dtype).eps * (own.sum(1).square() - own.square().sum(1)).clamp_min(0).sqrt()
    norm = torch.linalg.vector_norm(centred, dim=(1, 2), dtype=torch.float64)
    return centred.masked_fill((norm <= DUST * rounding)[:, None, None], 0)


def _gram(x: Float[Tensor, "G n D"], kernel: Kernel, bandwidth: float, drop_top: int) -> Float[Tensor, "G n n"]:
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
    spread = own.mean(1)
    constant = spread.isfinite() & (spread <= (resolution**2 * level.flatten()).clamp_min(tiny))
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


def hsic(
    k: Float[Tensor, "n n"],
    l: Float[Tensor, "n n"],  # noqa: E741
    estimator: Estimator = "unbiased",
) -> Float[Tensor, ""]:
    """Hilbert-Schmidt independence criterion of two Gram matrices over the same images.

    Args:
        k: a Gram matrix.
        l: another one.
        estimator: "unbiased" (HSIC_1, n >= 4; can be negative) or "biased" (tr(KHLH)/(n-1)², n >= 2).

    Returns:
        The estimate, float64.

    Raises:
        ValueError: too few images, or an unknown estimator.

    References:
        Gretton et al., *Measuring statistical dependence with Hilbert-Schmidt norms*, 2005, eq. 9 (biased); Song et
        al., *Feature selection via dependence maximization*, 2012, eq. 5 (unbiased).

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> bool(hsic(x @ x.T, x @ x.T) > 0)
        True
    """
    n = len(k)
    if estimator == "unbiased":
        return (u_center(k.double()) * u_center(l.double())).sum() / (n * (n - 3))
    if estimator != "biased":
        raise ValueError(f"estimator must be 'unbiased' or 'biased', got {estimator!r}")
    if n < 2:
        raise ValueError(f"biased CKA needs at least 2 images, got {n}")
    return (_center(k.double()) * _center(l.double())).sum() / (n - 1) ** 2


def _center(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def cka(
    x: Float[Tensor, "N ..."],
    y: Float[Tensor, "N ..."],
    *,
    kernel: Kernel = "linear",
    bandwidth: float = 0.5,
    drop_top: int = 0,
    estimator: Estimator = "unbiased",
) -> Float[Tensor, ""]:
    """CKA of two representations of the same images, all in one N x N Gram matrix.

    Args:
        x: one representation, flattened over all that follows the images.
        y: the other.
        kernel: "linear", or "rbf", as of :func:`gram_vector`.
        bandwidth: of the RBF kernel, in median distances.
        drop_top: leading principal components of each representation that are left out.
        estimator: "unbiased", or "biased", which is meaningless where features outnumber images: independent
            Gaussians read D/(N+D) instead of 0.

    Returns:
        CKA, float64; NaN where a representation does not vary.

    Raises:
        ValueError: too few images, ``drop_top`` < 0, or an unknown kernel or estimator.

    References:
        Kornblith et al., *Similarity of neural network representations revisited*, 2019.

    Example:
        >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> round(float(cka(x, 3 * x + 1)), 4)
        1.0
    """
    options = kernel, bandwidth, drop_top
    if estimator == "unbiased":
        k, l = (_centred_gram(part.flatten(1)[None], *options, torch.float64) for part in (x, y))  # noqa: E741
        return _ratio((k * l).sum(), k.square().sum(), l.square().sum())
    k, l = (_gram(part.flatten(1)[None], *options)[0] for part in (x, y))  # noqa: E741
    return _ratio(hsic(k, l, estimator), hsic(k, k, estimator), hsic(l, l, estimator))


def feature_cka(x: Float[Tensor, "N D"], y: Float[Tensor, "N E"]) -> Float[Tensor, ""]:
    """Unbiased linear CKA from D x E products: the value of :func:`cka`, for images that outnumber features.

    Args:
        x: one representation.
        y: another one of the same N >= 4 images.

    Returns:
        CKA, float64; NaN where a representation does not vary, or in one image alone.

    Raises:
        ValueError: N < 4.

    References:
        Song et al., *Feature selection via dependence maximization*, 2012, eq. 5, for centred features.

    Example:
        >>> x, y = torch.randn(2, 1000, 8, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(feature_cka(x, x + y), cka(x, x + y))
        True
    """
    n = len(x)
    if n < MIN_GRAM_SIZE:
        raise ValueError(f"unbiased CKA needs at least {MIN_GRAM_SIZE} images, got {n}")
    x, y = (part.double() - part.double().mean(0) for part in (x, y))

    def products(a: Tensor, b: Tensor) -> Tensor:
        """n(n-3) times HSIC_1."""
        a2, b2 = a.square().sum(1), b.square().sum(1)
        whole = (a.T @ b).square().sum()
        value = whole - n / (n - 2) * (a2 @ b2) + a2.sum() * b2.sum() / ((n - 1) * (n - 2))
        return value.where(value.abs() > DUST * n * torch.finfo(value.dtype).eps * whole, 0)

    return _ratio(products(x, y), products(x, x), products(y, y))


def _ratio(cross: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return cka_matrix(cross.view(1, 1), x.view(1), y.view(1)).squeeze()


def cka_matrix(
    cross: Float[Tensor, "... L M"], rows: Float[Tensor, "... L"], cols: Float[Tensor, "... M"]
) -> Float[Tensor, "... L M"]:
    """CKA from sums of products of Gram vectors.

    Args:
        cross: for each pair of layers, the sum over batches of the product of their Gram vectors.
        rows: the same of each row layer with itself.
        cols: the same of each column layer with itself.

    Returns:
        ``cross / sqrt(rows * cols)``; NaN where a layer's own HSIC is not positive. Slightly negative values are
        right: the estimator is unbiased.

    References:
        Nguyen, Raghu & Kornblith, *Do wide and deep networks learn the same things?*, 2021, eq. 2.

    Example:
        >>> v = torch.stack([gram_vector(torch.randn(64, 5)) for _ in range(2)])
        >>> h = v @ v.T
        >>> torch.allclose(cka_matrix(h, h.diagonal(), h.diagonal()).diagonal(), torch.ones(2))
        True
    """
    rows = torch.where(rows > 0, rows, torch.nan)
    cols = torch.where(cols > 0, cols, torch.nan)
    # Two roots instead of the root of a product: exact 1 on the diagonal, and no overflow for large activations.
    return cross / rows.sqrt().unsqueeze(-1) / cols.sqrt().unsqueeze(-2)


def jackknife(
    cross: Float[Tensor, "J ... L M"],
    rows: Float[Tensor, "J ... L"],
    cols: Float[Tensor, "J ... M"],
    weights: Float[Tensor, " J"],
) -> tuple[Float[Tensor, "... L M"], Float[Tensor, "... L M"]]:
    """CKA and its standard error over the choice of images, by leaving out one block of Gram matrices at a time.

    A block of share 1/h of all weights gives the pseudo-value h CKA - (h - 1) CKA without it; their variance, each
    divided by h - 1, is the squared error. With equal blocks this is the ordinary jackknife.

    Args:
        cross: the sums that :func:`cka_matrix` takes, for each of J disjoint blocks of Gram matrices.
        rows: the same of each row layer with itself.
        cols: the same of each column layer with itself.
        weights: what a block counts in these sums: of each of its Gram matrices of n images, n (n - 3). Blocks of
            little or none are counted with the one before; see :func:`standing`.

    Returns:
        CKA of all blocks together, and its standard error; NaN where fewer than two blocks stand.

    References:
        Busing, Meijer & van der Leeden, *Delete-m jackknife for unequal m*, 1999, eq. 8.

    Example:
        >>> vectors = torch.stack([gram_vector(torch.randn(640, d)) for d in (3, 5)])
        >>> blocks = vectors.view(2, 10, -1).transpose(0, 1)  # ten Gram matrices, a block each
        >>> own = blocks.square().sum(2)
        >>> value, error = jackknife(blocks @ blocks.mT, own, own, torch.ones(10))
        >>> value.shape, error.shape
        (torch.Size([2, 2]), torch.Size([2, 2]))
    """
    value, moves = deviations(cross, rows, cols, weights)
    return value, (len(moves) * moves.square().mean(0)).sqrt()


def standing(weights: Float[Tensor, " J"]) -> Bool[Tensor, " J"]:
    """Which blocks stand for themselves; what little the others hold (a short last Gram matrix) joins the one before.

    Example:
        >>> standing(torch.tensor([3904.0, 3904.0, 4.0, 0.0]))  # Gram matrices of 64, 64 and 4 images, and none
        tensor([ True,  True, False, False])
    """
    return (weights > 0) & (weights >= LEAST_BLOCK * weights.max())


def deviations(
    cross: Float[Tensor, "J ... L M"],
    rows: Float[Tensor, "J ... L"],
    cols: Float[Tensor, "J ... M"],
    weights: Float[Tensor, " J"],
) -> tuple[Float[Tensor, "... L M"], Float[Tensor, "K ... L M"]]:
    """CKA, and what each block makes of its standard error.

    Args:
        cross: as of :func:`jackknife`.
        rows: the same of each row layer with itself.
        cols: the same of each column layer with itself.
        weights: as of :func:`jackknife`.

    Returns:
        CKA, and a deviation for each of the K blocks that stand (see :func:`standing`): their squares sum up to the
        squared standard error, and the deviations of a sum or difference are the sums or differences of the deviations.
    """
    alone = standing(weights)
    number = int(alone.sum())
    # In the circle that blocks are dealt in: wherever the dealing began, the same Gram matrices are joined.
    place = (alone.cumsum(0) - 1) % max(number, 1)
    cross, rows, cols, weights = (
        part.new_zeros(max(number, 1), *part.shape[1:]).index_add_(0, place, part)[:number]
        for part in (cross, rows, cols, weights.to(cross))
    )
    total = cross.sum(0), rows.sum(0), cols.sum(0)
    value = cka_matrix(*total)
    without = cka_matrix(total[0] - cross, total[1] - rows, total[2] - cols)
    h = (weights.sum() / weights).view(-1, *[1] * (cross.ndim - 1))
    pseudo = h * value - (h - 1) * without
    center = ((1 - 1 / h) * (value - without)).sum(0) + value
    return value, (pseudo - center) / ((h - 1) * len(h)).sqrt()


def interval(
    value: Float[Tensor, "..."], error: Float[Tensor, "..."], blocks: int, level: float = 0.95
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The error bar of a jackknife: Student's t with as many degrees of freedom as blocks, less one.

    Args:
        value: the estimate.
        error: its standard error, as of :func:`jackknife`.
        blocks: that stand; see :func:`standing`.
        level: how often the bar is to cover the truth.

    Returns:
        Both ends; NaN with fewer than two blocks.

    Example:
        >>> low, high = interval(torch.tensor(0.5), torch.tensor(0.1), blocks=4)
        >>> round(float(low), 2), round(float(high), 2)  # 3.18 standard errors: four blocks know their spread badly
        (0.18, 0.82)
    """
    reach = float(stdtrit(blocks - 1, (1 + level) / 2)) * error if blocks > 1 else torch.full_like(error, torch.nan)
    return value - reach, value + reach


def permuted_cka(
    x: Sequence[Float[Tensor, "L P"]],
    y: Sequence[Float[Tensor, "M P"]],
    gram_size: int = 64,
    draws: int = 200,
    seed: int = 0,
) -> Float[Tensor, "S L M"]:
    """CKA of all pairs of layers when the images of one network are permuted: what unrelated networks would read.

    In each draw the images of every Gram matrix of ``y`` change places, in all layers alike, so that what was searched
    for over layers (such as the most similar one) has a null that was searched in the same way.

    Args:
        x: for each batch, the Gram vectors of one network's layers.
        y: for each batch, those of the other's, of the same images.
        gram_size: images in a Gram matrix.
        draws: permutations.
        seed: of the permutations.

    Returns:
        S = ``draws`` matrices of CKA, float32; see :func:`permutation_p` for what to do with them.

    References:
        Phipson & Smyth, *Permutation p-values should never be zero*, 2010.

    Example:
        >>> v = torch.stack([gram_vector(torch.randn(640, 5)) for _ in range(3)])
        >>> null = permuted_cka([v[:1]], [v[1:]])
        >>> null.shape, bool(null.abs().max() < 0.2)
        (torch.Size([200, 1, 2]), True)
    """
    generator = torch.Generator().manual_seed(seed)
    by_size: dict[int, list[list[Tensor]]] = {}
    for parts in zip(*([gram_groups(part.float(), gram_size) for part in network] for network in (x, y)), strict=True):
        for a, b in zip(*parts, strict=True):
            by_size.setdefault(a.shape[2], [[], []])[0].append(a)
            by_size[a.shape[2]][1].append(b)
    null = torch.zeros(draws, len(x[0]), len(y[0]), dtype=torch.float64)
    own = [torch.zeros(len(network[0]), dtype=torch.float64) for network in (x, y)]
    for pairs, both in by_size.items():
        a, b = (torch.cat(groups).transpose(0, 1).contiguous() for groups in both)  # (L, G, p)
        for total, vectors in zip(own, (a, b), strict=True):
            total += torch.linalg.vector_norm(vectors, dim=(1, 2), dtype=torch.float64).square()
        n = images_of(pairs)
        rows, cols = torch.triu_indices(n, n, 1)
        place = torch.zeros(n, n, dtype=torch.long)
        place[rows, cols] = place[cols, rows] = torch.arange(pairs)
        offsets = pairs * torch.arange(a.shape[1]).unsqueeze(1)
        for draw in null:
            order = torch.rand(a.shape[1], n, generator=generator).argsort(1)
            moved = (place[order[:, rows], order[:, cols]] + offsets).flatten()
            draw += a.flatten(1) @ b.flatten(1)[:, moved].T
    return cka_matrix(null, *own).float()


def permutation_p(value: Float[Tensor, "..."], null: Float[Tensor, "S ..."]) -> Float[Tensor, "..."]:
    """How often permuted images read at least the value: (1 + #{null >= value}) / (S + 1); NaN where there is none.

    Example:
        >>> permutation_p(torch.tensor([0.9, 0.1]), torch.tensor([[0.2, 0.2], [0.1, 0.1], [0.0, 0.0]]))
        tensor([0.2500, 0.7500])
    """
    share = (1 + (null >= value).sum(0)) / (len(null) + 1)
    return share.where(value.isfinite() & null.isfinite().all(0), torch.nan)
