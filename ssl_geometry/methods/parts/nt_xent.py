"""NT-Xent, the loss of SimCLR: of all views of the global batch, each finds the other view of its own image."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_geometry.methods.parts.gather import gathered

SHORTEST = 1e-12


def nt_xent(first: Float[Tensor, "B D"], second: Float[Tensor, "B D"], temperature: float) -> Float[Tensor, ""]:
    """Cross-entropy of each view's partner among all other views, by cosine similarity over temperature.

    In float32 at least, whatever autocast says: bfloat16 is off by 0.03 in a logit at a temperature of 0.1. Nothing
    here waits for the device: a view's similarity to itself is filled with minus infinity, not masked out.

    In several processes the other views are those of all of them, gathered with their gradient. Each process must have
    equally many images. The mean of the processes' losses, and of their gradients, is that of the global batch.

    Args:
        first: outputs of one view of each image, (B, D), not normalised.
        second: outputs of the other view, (B, D).
        temperature: tau, above 0.

    Returns:
        The mean over the 2 B views of this process, float32 (float64 for float64). NaN where the square of an output's
        length overflows (1e19 in float32); lengths below 1e-12 count as that, so that zeros are at right angles to all.

    References:
        Chen et al., *A simple framework for contrastive learning of visual representations*, 2020, equation 1.

    Example:
        >>> first, second = torch.eye(4)[:2], torch.eye(4)[2:]
        >>> nt_xent(first, second, temperature=0.5)  # all at right angles: one of three others by chance
        tensor(1.0986)
    """
    logits, own = similarities(first, second, temperature)
    return F.cross_entropy(logits, own.roll(len(first)))


def similarities(
    first: Float[Tensor, "B D"], second: Float[Tensor, "B D"], temperature: float
) -> tuple[Float[Tensor, "2B 2WB"], Int64[Tensor, " 2B"]]:
    """Cosine similarities over temperature of this process's views, first before second, to those of all W processes.

    Args:
        first: outputs of one view of each image, (B, D), not normalised.
        second: outputs of the other view, (B, D).
        temperature: tau, above 0.

    Returns:
        Logits, in float32 at least, minus infinity for a view and itself; and the column of each view itself:
        ``own.roll(B)`` are those of the other views of the same images.
    """
    with torch.autocast(first.device.type, enabled=False):
        views = torch.cat([first, second])
        views = views.to(torch.promote_types(views.dtype, torch.float32))
        length = torch.linalg.vector_norm(views, dim=1, keepdim=True).clamp_min(SHORTEST)
        with torch.no_grad():  # x / inf would be at a right angle to all, and the loss finite
            length.nan_to_num_(nan=torch.nan, posinf=torch.nan)
        views = views / length
        logits = views @ gathered(views).T / temperature
        start = (dist.get_rank() if dist.is_initialized() else 0) * len(views)
        logits.diagonal(start).fill_(-torch.inf)
        return logits, torch.arange(start, start + len(views), device=views.device)
