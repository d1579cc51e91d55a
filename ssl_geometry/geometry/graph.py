"""Statistics of nearest-neighbour graphs: degrees, symmetry, components, classes.

A graph is ids (N, K): the neighbours of each of N points, -1 where a point has fewer than K.
"""

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor


def in_degrees(ids: Int64[Tensor, "N K"]) -> Int64[Tensor, " N"]:
    """How many points have each point as a neighbour.

    Example:
        >>> in_degrees(torch.tensor([[1, 2], [2, -1], [1, -1]]))
        tensor([0, 2, 2])
    """
    return torch.bincount(ids[ids >= 0], minlength=len(ids))


def hubness(ids: Int64[Tensor, "N K"]) -> Float[Tensor, ""]:
    """Skewness of the in-degrees: well above 0 where a few points are neighbours of very many others.

    Returns:
        The skewness, float64; NaN where all in-degrees are equal.

    References:
        Radovanović et al., *Hubs in space*, 2010.

    Example:
        >>> float(hubness(torch.tensor([[1], [0], [1], [1]]))) > 0.5
        True
    """
    from scipy.stats import skew  # half a second to import

    degrees = in_degrees(ids).cpu().numpy()
    return torch.tensor(skew(degrees) if np.ptp(degrees) else np.nan, dtype=torch.float64)


def label_purity(ids: Int64[Tensor, "N K"], labels: Int64[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Share of each point's neighbours that are of its class.

    Args:
        ids: the graph.
        labels: class of each point.

    Returns:
        Shares in [0, 1], float64; NaN for a point without neighbours.

    Example:
        >>> label_purity(torch.tensor([[1, 2], [0, -1], [-1, -1]]), torch.tensor([0, 0, 1]))
        tensor([0.5000, 1.0000,    nan], dtype=torch.float64)
    """
    there = ids >= 0
    same = (labels[ids.clamp_min(0)] == labels[:, None]) & there
    return same.sum(1).double() / there.sum(1)


def reciprocal(ids: Int64[Tensor, "N K"]) -> Float[Tensor, ""]:
    """Share of edges that go both ways: j is a neighbour of i, and i of j.

    Returns:
        The share, float64; NaN for a graph without edges.

    Example:
        >>> reciprocal(torch.tensor([[1], [0], [0]]))
        tensor(0.6667, dtype=torch.float64)
    """
    there = _adjacency(ids)
    return torch.tensor(there.multiply(there.T).sum(), dtype=torch.float64) / there.sum()


def components(ids: Int64[Tensor, "N K"]) -> tuple[int, float]:
    """Number of connected components (edges are undirected), and the share of points in the largest.

    Example:
        >>> components(torch.tensor([[1], [0], [3], [2], [2]]))
        (2, 0.6)
    """
    number, part = connected_components(_adjacency(ids), directed=False)
    return int(number), float(np.bincount(part).max()) / len(ids)


def _adjacency(ids: Int64[Tensor, "N K"]) -> csr_array:
    """The adjacency matrix: 1 where the column is a neighbour of the row."""
    ids = ids.cpu()
    rows, columns = (ids >= 0).nonzero(as_tuple=True)
    return csr_array((np.ones(len(rows)), (rows.numpy(), ids[rows, columns].numpy())), shape=(len(ids), len(ids)))


def graph_statistics(ids: Int64[Tensor, "N K"], labels: Int64[Tensor, " N"] | None = None) -> dict[str, float]:
    """All statistics of a graph.

    Args:
        ids: the graph.
        labels: class of each point; None leaves the purity out.

    Returns:
        ``degree`` (mean number of neighbours), ``hubness``, ``reciprocal``, ``components``, ``largest_component`` and
        ``purity`` (the mean over points that have neighbours).

    Example:
        >>> graph_statistics(torch.tensor([[1], [0], [3], [2]]), torch.tensor([0, 0, 1, 1]))["purity"]
        1.0
    """
    ids = ids.cpu()
    number, largest = components(ids)
    found = {
        "degree": float((ids >= 0).sum(1).double().mean()),
        "hubness": float(hubness(ids)),
        "reciprocal": float(reciprocal(ids)),
        "components": float(number),
        "largest_component": largest,
    }
    if labels is not None:
        found["purity"] = float(label_purity(ids, labels.cpu()).nanmean())
    return found
