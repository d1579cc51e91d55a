"""Lengths of vectors, differences and their inner products, without cancellation."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.geometry.duplicates import row_blocks


@dataclass(frozen=True)
class Rows:
    """Vectors before rounding to float32: rows with a divisor and, for products, a center that is subtracted."""

    features: Float[Tensor, "N D"]
    divisor: float | None = 1.0
    """A power of two; None divides every row by its length."""
    center: Float[Tensor, " D"] | None = None
    """float64."""

    def __getitem__(self, rows: Int64[Tensor, " n"] | slice) -> "Rows":
        return replace(self, features=self.features[rows])

    def divided(self, rows: Int64[Tensor, " n"] | slice) -> Float[Tensor, "n D"]:
        """Some rows in float64, without subtracting the center, so that equal differences of rows stay equal."""
        some = self.features[rows].to(torch.float64, copy=True)
        return some.div_(some.norm(dim=1, keepdim=True) if self.divisor is None else self.divisor)

    def centered(self, dtype: torch.dtype) -> Float[Tensor, "N D"]:
        """All rows minus the center, rounded once."""
        if self.center is None and self.divisor == 1:
            return self.features.to(dtype).contiguous()
        points = torch.empty(self.features.shape, dtype=dtype, device=self.features.device)
        for part in row_blocks(self.features):
            points[part] = self.divided(part).sub_(0 if self.center is None else self.center)
        return points


@torch.no_grad()
def centered(
    features: Float[Tensor, "N D"], queries: Float[Tensor, "Q D"] | None = None, *, unit: bool = True
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "Q D"]]:
    """Features (and queries) minus their mean, so that float32 distinguishes close ones.

    Args:
        features: a vector for each image.
        queries: other vectors, from which the same mean is subtracted; None for the features themselves.
        unit: normalise all to unit length first.

    Returns:
        Centred features and queries, at least float32. Differences of unit vectors keep their precision even where all
        cosines round to 1 (untrained and collapsed networks).

    Raises:
        ValueError: features that are not finite, or zero vectors with ``unit``.

    Example:
        >>> points, _ = centered(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
        >>> points
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    for x in (features,) if queries is None else (features, queries):
        vector_lengths(x, unit)
    sample = features[:: len(features) // 256 + 1]
    origin = (unit_vectors(sample) if unit else sample.double()).mean(0)
    points = Rows(features, None if unit else 1.0, origin)
    moved = points.centered(dtype)
    return moved, moved if queries is None else replace(points, features=queries).centered(dtype)


def products(
    points: Float[Tensor, "N D"],
    rows: Int64[Tensor, "Q K"],
    centers: Float[Tensor, "Q D"],
    other: tuple[Int64[Tensor, "Q M"], Float[Tensor, "Q D"]] | None = None,
    *,
    out: Float[Tensor, "Q K M"] | None = None,
) -> Float[Tensor, "Q K M"]:
    """Inner products of the differences between each query and its candidates.

    Args:
        points: a vector for each image.
        rows: candidates of each query.
        centers: the queries.
        other: candidates and queries on the other side of the product; None for the same.
        out: where to write.

    Returns:
        (x_j - c) · (x_m - c') of each query, in the dtype of the points.

    Example:
        >>> line = torch.tensor([[0.0], [1.0], [3.0]])
        >>> products(line, torch.tensor([[1, 2]]), line[:1])
        tensor([[[1., 3.],
                 [3., 9.]]])
    """
    queries, k = rows.shape
    width = k if other is None else other[0].shape[1]
    result = points.new_empty(queries, k, width) if out is None else out
    # On a CPU the differences of a few queries stay in a core's cache until they are multiplied, and of a symmetric
    # product only what lies below the diagonal is formed, 16 columns at once: a quarter less time (K = 50, D = 2048).
    numbers, block = (2**19, 16) if points.device.type == "cpu" else (2**28, k)
    step = max(1, numbers // ((k + width) * points.shape[1]))
    for start in range(0, queries, step):
        r = slice(start, start + step)
        a = _differences(points, rows[r], centers[r])
        if other is not None:
            torch.bmm(a, _differences(points, other[0][r], other[1][r]).mT, out=result[r])
            continue
        for column in range(0, k, block):
            end = column + block
            part = a[:, column:] @ a[:, column:end].mT
            result[r, column:, column:end] = part
            result[r, column:end, end:] = part[:, block:].mT
    return result


def _differences(
    points: Float[Tensor, "N D"], rows: Int64[Tensor, "Q K"], centers: Float[Tensor, "Q D"]
) -> Float[Tensor, "Q K D"]:
    return points.index_select(0, rows.flatten()).view(*rows.shape, -1).sub_(centers.unsqueeze(1))


def products_of_directions(
    features: Float[Tensor, "N D"], rows: Int64[Tensor, "Q K"], queries: Float[Tensor, "Q D"]
) -> Float[Tensor, "Q K K"]:
    """:func:`products` of unit vectors, all in float64."""
    parts = []
    step = max(1, 2**19 // (rows.shape[1] * features.shape[1]))
    for ids, centers in zip(rows.split(step), queries.split(step), strict=True):
        apart = unit_vectors(features[ids]) - unit_vectors(centers).unsqueeze(1)
        parts.append(apart @ apart.mT)
    return torch.cat(parts)


def vector_lengths(x: Float[Tensor, "N D"], unit: bool = False) -> Float[Tensor, " N"]:
    """Length of each vector, at least float64; refuses vectors that are not finite and, with ``unit``, zero vectors.

    Raises:
        ValueError: invalid vectors, with their number.

    Example:
        >>> vector_lengths(torch.tensor([[3.0, 4.0]]))
        tensor([5.], dtype=torch.float64)
    """
    lengths = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float64))
    if bad := int((~lengths.isfinite()).sum()):
        raise ValueError(f"features must be finite, {bad} of {len(x)} images have NaN or infinite values")
    if unit and (zero := int((lengths == 0).sum())):
        raise ValueError(f"the cosine needs vectors of some length, {zero} of {len(x)} images are zero vectors")
    return lengths


def unit_vectors(x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Vectors divided by their lengths, in float64; NaN for zero vectors, which have no direction.

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [   nan,    nan]], dtype=torch.float64)
    """
    return F.normalize(x.double(), dim=-1, eps=0)
