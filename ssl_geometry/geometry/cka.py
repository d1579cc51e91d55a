"""CKA: unbiased and in minibatches for every pair of layers, on all images at once, and its permutation null.

With Gram vectors as rows (:mod:`ssl_geometry.geometry.gram`), the unbiased HSIC of all pairs of layers is a single
matrix product. Sums over batches are ratios of averages, not averages of ratios (Nguyen et al. 2021). Nothing is
clamped and no epsilon is added to a ratio; what cannot be computed is NaN.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ssl_geometry.geometry.gram import (
    DUST,
    MIN_GRAM_SIZE,
    Kernel,
    centred_gram,
    gram_groups,
    gram_matrix,
    images_of,
    u_center,
)

Estimator = Literal["unbiased", "biased"]


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
    """CKA of two representations of the same images, with a single N x N Gram matrix each.

    Args:
        x: one representation; all dimensions after the first are flattened.
        y: the other.
        kernel: "linear" or "rbf", as in :func:`gram_vector`.
        bandwidth: of the RBF kernel, in median distances.
        drop_top: leading principal components of each representation that are left out.
        estimator: "unbiased", or "biased", which is meaningless where features outnumber images: independent
            Gaussians get D/(N+D) instead of 0.

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
        k, l = (centred_gram(part.flatten(1)[None], *options, torch.float64) for part in (x, y))  # noqa: E741
        return _ratio((k * l).sum(), k.square().sum(), l.square().sum())
    k, l = (gram_matrix(part.flatten(1)[None], *options)[0] for part in (x, y))  # noqa: E741
    return _ratio(hsic(k, l, estimator), hsic(k, k, estimator), hsic(l, l, estimator))


def feature_cka(x: Float[Tensor, "N D"], y: Float[Tensor, "N E"]) -> Float[Tensor, ""]:
    """Unbiased linear CKA from D x E products: the value of :func:`cka`, faster if images outnumber features.

    Args:
        x: one representation.
        y: another one of the same N >= 4 images.

    Returns:
        CKA, float64; NaN where a representation does not vary, or varies in a single image only.

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
        correct, as the estimator is unbiased.

    References:
        Nguyen, Raghu & Kornblith, *Do wide and deep networks learn the same things?*, 2021, eq. 2.

    Example:
        >>> from ssl_geometry.geometry.gram import gram_vector
        >>> v = torch.stack([gram_vector(torch.randn(64, 5)) for _ in range(2)])
        >>> h = v @ v.T
        >>> torch.allclose(cka_matrix(h, h.diagonal(), h.diagonal()).diagonal(), torch.ones(2))
        True
    """
    rows = torch.where(rows > 0, rows, torch.nan)
    cols = torch.where(cols > 0, cols, torch.nan)
    # Two roots instead of the root of a product: exactly 1 on the diagonal, and no overflow for large activations.
    return cross / rows.sqrt().unsqueeze(-1) / cols.sqrt().unsqueeze(-2)


def permuted_cka(
    x: Sequence[Float[Tensor, "L P"]],
    y: Sequence[Float[Tensor, "M P"]],
    gram_size: int = 64,
    draws: int = 200,
    seed: int = 0,
) -> Float[Tensor, "S L M"]:
    """CKA of all pairs of layers with the images of one network permuted: the null distribution of unrelated networks.

    Each draw permutes the images within every Gram matrix of ``y``, with the same permutation in all layers, so that a
    search over layers (such as for the most similar one) can be repeated on the null.

    Args:
        x: for each batch, the Gram vectors of the layers of one network.
        y: for each batch, those of the other network, for the same images.
        gram_size: images in a Gram matrix.
        draws: permutations.
        seed: of the permutations.

    Returns:
        S = ``draws`` matrices of CKA, float32, such as :func:`permutation_p` takes.

    References:
        Phipson & Smyth, *Permutation p-values should never be zero*, 2010.

    Example:
        >>> from ssl_geometry.geometry.gram import gram_vector
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
    """Permutation p-value, (1 + #{null >= value}) / (S + 1); NaN where value or null are not finite.

    Example:
        >>> permutation_p(torch.tensor([0.9, 0.1]), torch.tensor([[0.2, 0.2], [0.1, 0.1], [0.0, 0.0]]))
        tensor([0.2500, 0.7500])
    """
    share = (1 + (null >= value).sum(0)) / (len(null) + 1)
    return share.where(value.isfinite() & null.isfinite().all(0), torch.nan)
