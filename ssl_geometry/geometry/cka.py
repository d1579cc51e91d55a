"""Unbiased minibatch CKA of every layer with every layer, from one vector a layer and batch.

A layer's activations on a batch become the strict upper triangles of its U-centred Gram matrices, one small matrix
for each ``gram_size`` consecutive images, laid end to end in one vector. With those vectors as rows, the unbiased
HSIC of all pairs of
layers is a single matrix product. Sums over batches are ratios of averages, not averages of ratios (Nguyen et al.
2021).

Order of the steps, and why: the batch mean is subtracted from the features *before* the Gram matrix is formed, because
in float32 a Gram matrix that is dominated by its mean loses what CKA measures (untrained and collapsed networks); then
U-centring (Song et al. 2012; Székely & Rizzo 2014), whose inner product is n(n-3) times the unbiased HSIC; then
products in float64.
Nothing is clamped and no epsilon enters a ratio: what cannot be computed is NaN.
"""

import torch
from jaxtyping import Float
from torch import Tensor

MIN_GRAM_SIZE = 4
"""The unbiased HSIC divides by n(n-3): it needs four images."""


def u_center(gram: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """U-centre Gram matrices: rows, columns and the whole sum to zero with the diagonal left out.

    Args:
        gram: symmetric matrices over n >= 4 images.

    Returns:
        The U-centred matrices, with a zero diagonal.

    Raises:
        ValueError: n < 4.

    References:
        Székely & Rizzo, *Partial distance correlation with methods for dissimilarities*, 2014, eq. 3.1;
        Song et al., *Feature selection via dependence maximization*, 2012, eq. 5.

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


def gram_vector(activations: Float[Tensor, "B ..."], gram_size: int = 64) -> Float[Tensor, " P"]:
    """One layer's activations on a batch as the vector that enters CKA.

    The batch is cut into groups of ``gram_size`` consecutive images. Each group gives the strict upper triangle of
    its U-centred
    linear Gram matrix. A shorter last group counts with its own number of pairs; one of fewer than four images is
    left out,
    because no unbiased HSIC of it exists.

    Args:
        activations: any shape with images first; flattened over the rest, computed in float32 (float64 stays float64).
        gram_size: images in a Gram matrix. The estimate is unbiased for every size; cost grows with it.

    Returns:
        P values: n(n-1)/2 for each group of n images. All zero for a group that is constant to the resolution of its
        dtype.

    Raises:
        ValueError: ``gram_size`` < 4.

    Example:
        >>> gram_vector(torch.randn(130, 3, 8, 8), gram_size=64).shape  # two groups of 64; two images are left out
        torch.Size([4032])
    """
    if gram_size < MIN_GRAM_SIZE:
        raise ValueError(f"gram_size must be at least {MIN_GRAM_SIZE}, got {gram_size}")
    with torch.autocast(activations.device.type, enabled=False):
        x = activations.flatten(1)
        x = x if x.dtype == torch.float64 else x.float()
        groups = [group for group in x.split(gram_size) if len(group) >= MIN_GRAM_SIZE]
        if not groups:
            return x.new_empty(0)
        return torch.cat([_triangle(group) for group in groups])


def _triangle(x: Float[Tensor, "n D"]) -> Float[Tensor, " n*(n-1)/2"]:
    mean = x.mean(0)
    centered = x - mean
    gram = centered @ centered.T
    # What rounding leaves of identical rows is not variation: such a group carries no information about the images.
    resolution = 8 * torch.finfo(x.dtype).eps
    constant = gram.diagonal().mean() <= resolution**2 * mean.square().sum()
    n = len(x)
    rows, cols = torch.triu_indices(n, n, 1, device=x.device)
    return u_center(gram)[rows, cols].masked_fill(constant, 0)


def cka_matrix(
    cross: Float[Tensor, "L M"], rows: Float[Tensor, " L"], cols: Float[Tensor, " M"]
) -> Float[Tensor, "L M"]:
    """CKA from sums of products of Gram vectors.

    Args:
        cross: for each pair of layers, the sum over batches of the product of their Gram vectors.
        rows: the same of each row layer with itself.
        cols: the same of each column layer with itself.

    Returns:
        ``cross / sqrt(rows * cols)``; NaN where a layer's own HSIC is not positive. Slightly negative values are
        right: the
        estimator is unbiased.

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
    return cross / rows.sqrt()[:, None] / cols.sqrt()[None, :]
