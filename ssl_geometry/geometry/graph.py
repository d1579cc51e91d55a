"""What a graph of nearest neighbours looks like: who is whose neighbour, and of which class.

A graph is ids (N, K): the neighbours of each of N points, -1 where a point has fewer than K.
"""

import torch
from jaxtyping import Bool, Float, Int64
from scipy.sparse import coo_array
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
    """Skewness of the in-degrees: far above 0 where a few points are neighbours of very many.

    Returns:
        The skewness, float64; NaN where all in-degrees are equal.

    References:
        Radovanović et al., *Hubs in space*, 2010.

    Example:
        >>> float(hubness(torch.tensor([[1], [0], [1], [1]]))) > 0.5
        True
    """
    degrees = in_degrees(ids).double()
    centered = degrees - degrees.mean()
    variance = centered.square().mean()
    return torch.where(variance > 0, centered.pow(3).mean() / variance.pow(1.5), torch.nan)


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
    there, back = ids >= 0, _mutual(ids)
    return back.sum().double() / there.sum()


def _mutual(ids: Int64[Tensor, "N K"]) -> Bool[Tensor, "N K"]:
    """Which edges also go back."""
    n = len(ids)
    rows = torch.arange(n, device=ids.device)[:, None].expand_as(ids)
    there = ids >= 0
    edges, back = (rows * n + ids)[there], ids * n + rows
    return torch.isin(back, edges) & there


def components(ids: Int64[Tensor, "N K"]) -> tuple[int, float]:
    """How many parts the graph falls into (edges taken both ways), and the share of points in the largest.

    Example:
        >>> components(torch.tensor([[1], [0], [3], [2], [2]]))
        (2, 0.6)
    """
    n = len(ids)
    rows, columns = (ids >= 0).cpu().nonzero(as_tuple=True)
    ends = ids.cpu()[rows, columns].numpy()
    graph = coo_array(([1] * len(ends), (rows.numpy(), ends)), shape=(n, n))
    number, part = connected_components(graph, directed=False)
    return int(number), float(torch.from_numpy(part).bincount().max()) / n


def graph_statistics(ids: Int64[Tensor, "N K"], labels: Int64[Tensor, " N"] | None = None) -> dict[str, float]:
    """All of the above in one dictionary.

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
    number, largest = components(ids)
    found = {
        "degree": float((ids >= 0).sum(1).double().mean()),
        "hubness": float(hubness(ids)),
        "reciprocal": float(reciprocal(ids)),
        "components": float(number),
        "largest_component": largest,
    }
    if labels is not None:
        found["purity"] = float(label_purity(ids, labels).nanmean())
    return found
