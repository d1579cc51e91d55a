"""Manifold graph metrics: the shape of the polytopes that NNK neighbourhoods span (Cosentino et al. 2022).

For each query, on unit vectors: the number of its NNK neighbours (grows with intrinsic dimension), the diameter of
their polytope (small where the network is invariant, large where it is equivariant), and the affinity of the
directions to them with those of a neighbouring query (1 where the manifold is flat). Two kinds of manifold: semantic,
the images of a class (:func:`same_class_ids`, :func:`manifold_metrics`), and augmentation, the augmented views of an
image (:func:`augmentation_metrics`). A metric is NaN where it is not defined for a query.

The formulas are not checked against the full text of the paper, which was not available; the normalisation is this
project's: directions x_j - x_i are not re-centred, those with a squared singular value below a tenth of the largest are
dropped, and the overlap of two subspaces is divided by the smaller of their dimensions. A polytope of one point has
diameter 0 and no direction.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_geometry.geometry.chunks import over_chunks
from ssl_geometry.geometry.duplicates import row_keys
from ssl_geometry.geometry.neighbors import nearest
from ssl_geometry.geometry.nnk import RESOLUTION
from ssl_geometry.geometry.nnk_solver import NNK, solve_cosine
from ssl_geometry.geometry.vectors import centered, products, vector_lengths

DIRECTIONS = 0.1
"""Directions of at least this share of the largest squared singular value span a neighbourhood."""
SEED = 0
"""Seed of the random images, or views, of the random baselines."""
DISTANCES = 2**22
"""Distances between augmented views (m³ per image, float64) per block; some tens of such arrays are in memory."""


def manifold_metrics(
    features: Float[Tensor, "N D"],
    ids: Int64[Tensor, "N K"],
    result: NNK,
    *,
    seed: int = SEED,
    chunk: int | None = None,
) -> dict[str, Float[Tensor, " N"]]:
    """Size and orientation of every image's NNK neighbourhood.

    Args:
        features: a vector for each image.
        ids: the candidates of each image, -1 for none.
        result: :func:`~ssl_geometry.geometry.nnk.nnk` of the same features and candidates, cosine kernel.
        seed: of the random images that neighbours are compared with.
        chunk: images at once in each thread; None for 256 on a CPU and 8,192 elsewhere.

    Returns:
        For each image, float64:

        - ``neighbors``: number of NNK neighbours; NaN without candidates,
        - ``diameter``: largest distance between two neighbours, in [0, 2]; 0 for a single one, NaN for none,
        - ``affinity``: of its directions with those of its nearest neighbour, in [0, 1]; NaN where either has one,
        - ``affinity_random``: the same with any other image, the baseline,
        - ``angle``, ``angle_random``: mean principal angle in degrees, of the same pairs.

    Raises:
        ValueError: features that are not finite, zero vectors, or shapes that do not fit.

    References:
        Cosentino et al., *The geometry of self-supervised learning models and its impact on transfer learning*, 2022;
        Golub & Van Loan, *Matrix computations*, section 6.4.3, for principal angles.

    Example:
        >>> from ssl_geometry.geometry.nnk import nnk
        >>> angle = torch.arange(8) * torch.pi / 4
        >>> circle = torch.stack([angle.cos(), angle.sin()], 1)
        >>> ids = (torch.arange(8).unsqueeze(1) + torch.tensor([1, 7, 2, 6])) % 8
        >>> metrics = manifold_metrics(circle, ids, nnk(circle, ids))
        >>> metrics["neighbors"][0], metrics["diameter"][0]  # one on each side, a quarter of a turn apart
        (tensor(2., dtype=torch.float64), tensor(1.4142, dtype=torch.float64))
    """
    return _manifold(features, ids, result, seed, chunk)[0]


def manifold_metrics_and_errors(
    features: Float[Tensor, "N D"],
    ids: Int64[Tensor, "N K"],
    result: NNK,
    labels: Int64[Tensor, " N"],
) -> tuple[dict[str, Float[Tensor, " N"]], dict[str, Float[Tensor, ""]]]:
    """:func:`manifold_metrics`, and the standard error of the mean of each over all images.

    The values of two images are not independent where they depend on the same image: mutual nearest neighbours have the
    same affinity, and an outlier is an end of many diameters. sd / sqrt(N) is then too small (for affinities by up to a
    factor of 1.6). The products of the deviations of all pairs of values that share an image (either of the two images
    compared; either end of the diameter) are therefore added to the sum of squares. Deviations of diameters are taken
    from the mean of the class.

    Args:
        features: as in :func:`manifold_metrics`.
        ids: as in :func:`manifold_metrics`.
        result: as in :func:`manifold_metrics`.
        labels: class of each image.

    Returns:
        The metrics of each image, and the standard error of the mean of each metric, float64, NaN for fewer than two
        values. ``benchmarks/results/coverage_manifold.md`` has the coverage of intervals of 1.96 standard errors.

    Raises:
        ValueError: as in :func:`manifold_metrics`.

    References:
        Fafchamps & Gubert, *The formation of risk sharing networks*, 2007, for the errors of dyads.

    Example:
        >>> from ssl_geometry.geometry.nnk import nnk
        >>> x, labels = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
        >>> ids = same_class_ids(x, labels, 20)
        >>> values, errors = manifold_metrics_and_errors(x, ids, nnk(x, ids), labels)
        >>> bool(errors["affinity"] > values["affinity"].std() / 200**0.5)
        True
    """
    values, shared = _manifold(features, ids, result, SEED)
    groups = {"diameter": labels}
    return values, {
        name: _standard_error(value, shared.get(name.replace("angle", "affinity")), groups.get(name))
        for name, value in values.items()
    }


def _manifold(
    features: Float[Tensor, "N D"], ids: Int64[Tensor, "N K"], result: NNK, seed: int, chunk: int | None = None
) -> tuple[dict[str, Float[Tensor, " N"]], dict[str, Int64[Tensor, "N M"]]]:
    """The metrics, and for some of them the images that each value depends on."""
    n, device = len(features), features.device
    if ids.shape != result.active.shape or len(ids) != n:
        raise ValueError(
            f"ids and result must belong to the {n} features, got {tuple(ids.shape)} and {tuple(result.active.shape)}"
        )
    points, _ = centered(features)
    count = result.active.sum(1)
    order = result.active.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(count.max()))]
    rows, active = ids.gather(1, order).clamp_min(0), result.active.gather(1, order)

    shapes = _joined(
        over_chunks(lambda r: _shapes(products(points, rows[r], points[r]).double(), active[r]), n, device, chunk)
    )

    def compare(partner: Int64[Tensor, " N"]) -> tuple[Tensor, Tensor]:
        def work(r: slice) -> tuple[Tensor, Tensor]:
            j = partner[r]
            cross = products(points, rows[r], points[r], (rows[j], points[j])).double()
            return _alignment(_rows(shapes, r), cross, _rows(shapes, j))

        affinity, angle = zip(*over_chunks(work, n, device, chunk), strict=True)
        return torch.cat(affinity), torch.cat(angle)

    closest = rows.gather(1, shapes.nearest.unsqueeze(1)).squeeze(1)
    random = _others(1, n, seed, device).flatten()
    own = torch.arange(n, device=device)
    shared = {
        "diameter": torch.cat([own.unsqueeze(1), rows.gather(1, shapes.ends)], 1),
        "affinity": torch.stack([own, closest], 1),
        "affinity_random": torch.stack([own, random], 1),
    }
    return _named(count, shapes, compare(closest), compare(random)), shared


def _standard_error(
    values: Float[Tensor, " N"], shared: Int64[Tensor, "N M"] | None, groups: Int64[Tensor, " N"] | None
) -> Float[Tensor, ""]:
    """Standard error of the mean of the known values, where values that share an image are not independent."""
    known = ~values.isnan()
    n = known.sum()
    apart = (values - values.nanmean()).where(known, 0)
    total = apart.square().sum()
    if shared is None:
        return (total.sqrt() / n).where(n > 1, torch.nan)
    squares = torch.zeros_like(apart)  # how far the product of two without a shared image is below 0
    if groups is not None:
        classes = groups.unique(return_inverse=True)[1]
        size = torch.zeros_like(apart).index_add_(0, classes, known.double())
        apart = (apart - (torch.zeros_like(apart).index_add_(0, classes, apart) / size)[classes]).where(known, 0)
        # Relative to their own mean, the product of two of n values is -1 / (n - 1) of their variance.
        sums = torch.zeros_like(apart).index_add_(0, classes, apart.square())
        squares = (sums / (size * (size - 1)).clamp_min(1))[classes]
    for rows in torch.arange(len(values), device=values.device).split(max(1, 2**22 // shared.numel())):
        meet = (shared[rows, None, :, None] == shared[None, :, None, :]).flatten(2).any(2)
        meet &= known[rows, None] & known
        meet.scatter_(1, rows.unsqueeze(1), False)
        both = meet.double()
        total = total + apart[rows] @ (both @ apart) + squares[rows] @ both.sum(1)
    return (total.clamp_min(0).sqrt() / n).where(n > 1, torch.nan)


def augmentation_metrics(views: Float[Tensor, "B m D"]) -> dict[str, Float[Tensor, " B"]]:
    """The metrics of :func:`manifold_metrics` for the manifold of each image's augmented views.

    Every view is a query; its candidates are the other views of the image, without duplicates. Each metric is averaged
    over the views for which it is defined. Memory next to the views does not grow with the number of images.

    Args:
        views: features of m >= 3 augmented views of each image.

    Returns:
        For each image, float64, under the same names. Where all views are equal (unit vectors less than 8 eps of their
        dtype apart, 9.5e-7 in float32), the network is invariant and the diameter is 0; a metric that is defined for no
        view is NaN.

    Raises:
        ValueError: no images, fewer than three views, features that are not finite, or zero vectors.

    Example:
        >>> metrics = augmentation_metrics(torch.eye(5).expand(2, 5, 5))  # the corners of a simplex, twice
        >>> metrics["neighbors"], metrics["diameter"]
        (tensor([4., 4.], dtype=torch.float64), tensor([1.4142, 1.4142], dtype=torch.float64))
    """
    images, m = views.shape[:2]
    if images == 0 or m < 3:
        raise ValueError(f"augmentation manifolds need at least 3 views of each image, got {images} images, {m} views")
    lengths = vector_lengths(views.flatten(0, 1), unit=True).view(images, m, 1)
    codes = row_keys(views.flatten(0, 1).float()).view(images, m)
    partners = _others(images, m, SEED, views.device)
    step = max(1, DISTANCES // m**3)
    parts = [
        _of_views(views[r], lengths[r], codes[r], partners[r])
        for r in (slice(start, start + step) for start in range(0, images, step))
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _of_views(
    views: Float[Tensor, "B m D"],
    lengths: Float[Tensor, "B m 1"],
    codes: Int64[Tensor, "B m"],
    partners: Int64[Tensor, "B m"],
) -> dict[str, Float[Tensor, " B"]]:
    """:func:`augmentation_metrics` of one block of images."""
    (images, m), device = codes.shape, views.device
    dtype = torch.promote_types(views.dtype, torch.float32)

    def distances(r: slice) -> Float[Tensor, "b m m"]:
        unit = views[r] / lengths[r]  # float64, because the views of an image may be close to each other
        unit -= unit.mean(1, keepdim=True)
        inner = unit @ unit.mT
        own = inner.diagonal(dim1=1, dim2=2)
        return own.unsqueeze(1) + own.unsqueeze(2) - inner - inner.mT

    squares = torch.cat(over_chunks(distances, images, device))  # all metrics are functions of these
    equal = codes.unsqueeze(1) == codes.unsqueeze(2)
    first = ~equal.tril(-1).any(2)
    varies = squares.flatten(1).amax(1) > (RESOLUTION * torch.finfo(dtype).eps) ** 2
    candidates = ~equal & first.unsqueeze(1) & varies.view(-1, 1, 1)  # a view is not its own candidate either
    candidates = candidates.flatten(0, 1)
    to_query = squares.flatten(0, 1)
    between = squares.unsqueeze(1).expand(images, m, m, m).flatten(0, 1)
    local = (to_query.unsqueeze(2) + to_query.unsqueeze(1) - between) / 2  # (x_a - x_i) · (x_b - x_i)
    result = solve_cosine(local, valid=candidates)

    queries = len(to_query)
    shapes = _joined(over_chunks(lambda r: _shapes(local[r], result.active[r]), queries, device))
    image = torch.arange(images, device=device).repeat_interleave(m)

    def compare(partner: Int64[Tensor, " Q"]) -> tuple[Tensor, Tensor]:
        j = image * m + partner

        def work(r: slice) -> tuple[Tensor, Tensor]:
            # (x_a - x_i) · (x_b - x_j) = (|x_a - x_j|² + |x_b - x_i|² - |x_a - x_b|² - |x_i - x_j|²) / 2
            apart = to_query[r].gather(1, partner[r].unsqueeze(1))
            ends = to_query[j[r]].unsqueeze(2) + to_query[r].unsqueeze(1) - apart.unsqueeze(2)
            return _alignment(_rows(shapes, r), (ends - between[r]) / 2, _rows(shapes, j[r]))

        affinity, angle = zip(*over_chunks(work, queries, device), strict=True)
        return torch.cat(affinity), torch.cat(angle)

    each = _named(result.active.sum(1), shapes, compare(shapes.nearest), compare(partners.flatten()))
    found = {name: values.view(images, m).nanmean(1) for name, values in each.items()}
    found["diameter"] = found["diameter"].where(candidates.view(images, -1).any(1), 0)
    return found


def same_class_ids(features: Float[Tensor, "N D"], labels: Int64[Tensor, " N"], k: int = 50) -> Int64[Tensor, "N k"]:
    """The k most similar images of the same class, by cosine similarity: candidates for semantic manifolds.

    Args:
        features: a vector for each image.
        labels: class of each image.
        k: number of candidates.

    Returns:
        Their indices, most similar first, -1 where the class has fewer. The image itself and its exact duplicates are
        left out; other duplicates count once.

    Raises:
        ValueError: k < 1, labels of other images, features that are not finite, or zero vectors.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])
        >>> same_class_ids(features, torch.tensor([0, 0, 0, 1]), k=2)
        tensor([[ 1,  2],
                [ 0,  2],
                [ 1,  0],
                [-1, -1]])
    """
    if k < 1 or len(labels) != len(features):
        raise ValueError(f"k >= 1 and a label for each image are needed, got k={k}, {len(labels)} of {len(features)}")
    ids = torch.full((len(features), k), -1, device=features.device)
    sizes = labels.unique(return_counts=True)[1].tolist()
    for members in labels.argsort(stable=True).split(sizes):
        if columns := min(k, len(members) - 1):
            found = nearest(features[members], k=columns, index="exact").ids
            ids[members, :columns] = members[found].where(found >= 0, -1)
    return ids


class _Shapes(NamedTuple):
    """Neighbourhoods of Q queries with at most M neighbours and R directions."""

    diameter: Float[Tensor, " Q"]
    ends: Int64[Tensor, "Q 2"]  # positions of the two neighbours with the largest distance
    nearest: Int64[Tensor, " Q"]  # position of the nearest neighbour among the M
    basis: Float[Tensor, "Q M R"]  # orthonormal directions, as combinations of the differences to neighbours
    dims: Int64[Tensor, " Q"]  # number of directions; 0 for fewer than two neighbours


def _shapes(local: Float[Tensor, "Q M M"], active: Bool[Tensor, "Q M"]) -> _Shapes:
    """From the inner products (x_a - x_i) · (x_b - x_i)."""
    own = local.diagonal(dim1=1, dim2=2)
    both = active.unsqueeze(2) & active.unsqueeze(1)
    enough = active.sum(1) >= 2  # for a direction
    squares = (own.unsqueeze(2) + own.unsqueeze(1) - 2 * local).where(both, 0).flatten(1)
    farthest, place = squares.max(1)
    values, vectors = torch.linalg.eigh(local.where(both, 0))
    kept = (values > 0) & (values >= DIRECTIONS * values[:, -1:]) & enough.unsqueeze(1)
    return _Shapes(
        diameter=farthest.sqrt().where(active.any(1), torch.nan),
        ends=torch.stack([place // active.shape[1], place % active.shape[1]], 1),
        nearest=own.where(active, torch.inf).argmin(1),
        basis=vectors * torch.where(kept, values, torch.inf).rsqrt().unsqueeze(1),
        dims=kept.sum(1),
    )


def _joined(parts: list[_Shapes]) -> _Shapes:
    diameter, ends, nearest, basis, dims = zip(*parts, strict=True)
    most = max(1, *(int(part.max()) for part in dims))  # eigenvalues ascend, so the kept ones are last
    return _Shapes(
        torch.cat(diameter),
        torch.cat(ends),
        torch.cat(nearest),
        torch.cat([part[..., -most:] for part in basis]),
        torch.cat(dims),
    )


def _rows(shapes: _Shapes, rows: slice | Tensor) -> _Shapes:
    return _Shapes(*(field[rows] for field in shapes))


def _alignment(
    a: _Shapes, cross: Float[Tensor, "Q M M"], b: _Shapes
) -> tuple[Float[Tensor, " Q"], Float[Tensor, " Q"]]:
    """Affinity and mean principal angle, from the inner products (x_a - x_i) · (x_b - x_j)."""
    overlap = a.basis.mT @ cross @ b.basis
    fewer = torch.minimum(a.dims, b.dims)
    defined = fewer > 0
    affinity = (overlap.square().sum((1, 2)) / fewer).sqrt()
    angles = torch.linalg.svdvals(overlap).clamp_max(1).acos().rad2deg()
    principal = torch.arange(angles.shape[1], device=angles.device) < fewer.unsqueeze(1)
    angle = angles.where(principal, 0).sum(1) / fewer
    return affinity.where(defined, torch.nan), angle.where(defined, torch.nan)


def _named(
    count: Int64[Tensor, " Q"], shapes: _Shapes, closest: tuple[Tensor, Tensor], random: tuple[Tensor, Tensor]
) -> dict[str, Float[Tensor, " Q"]]:
    return {
        "neighbors": count.double().where(count > 0, torch.nan),
        "diameter": shapes.diameter,
        "affinity": closest[0],
        "affinity_random": random[0],
        "angle": closest[1],
        "angle_random": random[1],
    }


def _others(groups: int, n: int, seed: int, device: torch.device) -> Int64[Tensor, "groups n"]:
    """For each of n items another one at random; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, max(n, 2), (groups, n), generator=generator)
    return ((torch.arange(n) + steps) % n).to(device)
