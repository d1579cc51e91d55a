"""SIGReg, what keeps LeJEPA from collapsing: projections are a standard Gaussian in every direction."""

import torch
from jaxtyping import Float
from torch import Tensor

from ssl_geometry.data.random_numbers import uniform
from ssl_geometry.methods.parts.gather import gathered

FARTHEST, KNOTS = 3.0, 17
"""Frequencies that characteristic functions are compared at: so many, from 0 to the farthest."""


def random_directions(number: int, like: Float[Tensor, "... D"], *, seed: int, step: int) -> Float[Tensor, "D K"]:
    """Random unit vectors: the same in all processes, and when a step is repeated.

    Args:
        number: K, how many.
        like: projections; the vectors have their dimension, dtype and device.
        seed: of the run.
        step: of the optimiser.

    Returns:
        One vector per column.

    Example:
        >>> random_directions(3, torch.zeros(10, 8), seed=0, step=0).norm(dim=0)
        tensor([1., 1., 1.])
    """
    rows = torch.arange(like.shape[-1], device=like.device)
    u = uniform(rows, seed=seed, epoch=step, view=0, stream="sigreg", n=number)
    normal = torch.erfinv(2 * u - 1 + 2**-24).to(like.dtype)  # in the middle of u's steps, so never infinite
    return normal / normal.norm(dim=0)


def sigreg(projections: Float[Tensor, "V B D"], directions: Float[Tensor, "D K"]) -> Float[Tensor, ""]:
    """Epps-Pulley statistic of the global batch in each direction, averaged over directions and views.

    The statistic is the number of images times the integral, over frequencies t from -3 to 3 with weights exp(-t²/2),
    of the squared distance between the empirical characteristic function and that of a standard Gaussian.

    Args:
        projections: of V views of the images of this process; every process has equally many images.
        directions: K unit vectors, the same in all processes.

    Returns:
        At least 0. Of Gaussian projections its mean does not depend on the number of images; of others it grows.

    References:
        Balestriero & LeCun, *LeJEPA*, 2025; Epps & Pulley, *A test for normality based on the empirical characteristic
        function*, 1983.

    Example:
        >>> few, more = (sigreg(torch.zeros(2, images, 4), torch.eye(4)) for images in (5, 10))
        >>> round(float(more / few), 3)  # collapsed to a point
        2.0
    """
    t = torch.linspace(0, FARTHEST, KNOTS, dtype=projections.dtype, device=projections.device)
    gaussian = torch.exp(-t.square() / 2)
    angles = (projections @ directions)[..., None] * t
    means = gathered(torch.stack([angles.cos().mean(1), angles.sin().mean(1)])[None])  # one row per process
    real, imaginary = means.mean(0)
    distance = (real - gaussian).square() + imaginary.square()
    images = len(means) * projections.shape[1]
    return 2 * images * torch.trapezoid(distance * gaussian, dx=FARTHEST / (KNOTS - 1)).mean()
