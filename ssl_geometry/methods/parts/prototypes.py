"""What DINO and SwAV share: views of an image are assigned to prototypes, and find each other's assignment."""

import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssl_geometry.methods.parts.gather import gathered

BOTTLENECK = 256
"""Width of the layer before the prototypes of DINO."""


class Prototypes(nn.Linear):
    """Cosine similarities of unit vectors to prototypes.

    Rows are divided by their lengths in each forward, which is weight normalisation with all gains 1; the layer can be
    copied, and measured as any other, unlike one with a parametrization.

    Args:
        width: D, of the vectors.
        number: K, of the prototypes.

    Example:
        >>> prototypes = Prototypes(2, 3)
        >>> _ = nn.init.constant_(prototypes.weight, 5.0)
        >>> prototypes(torch.tensor([[1.0, 0.0]]))
        tensor([[0.7071, 0.7071, 0.7071]], grad_fn=<MmBackward0>)
    """

    def __init__(self, width: int, number: int) -> None:
        super().__init__(width, number, bias=False)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """One similarity for each prototype."""
        return F.linear(x, F.normalize(self.weight))


def prototype_head(width: int, hidden_dim: int, number: int, batch_norm: bool) -> nn.Module:
    """Lightly's head of DINO, with :class:`Prototypes` in place of its last layer.

    Args:
        width: of the backbone's features.
        hidden_dim: width of the two hidden layers.
        number: of the prototypes.
        batch_norm: whether hidden layers have batch norm.

    Returns:
        Features (B, width) to similarities (B, number).
    """
    from lightly.models.modules.heads import DINOProjectionHead

    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about the layer that is replaced
        head = DINOProjectionHead(width, hidden_dim, BOTTLENECK, number, batch_norm)
    head.last_layer = Prototypes(BOTTLENECK, number)
    return head


def swapped_cross_entropy(
    targets: Sequence[Float[Tensor, "B K"]], logits: Iterable[Float[Tensor, "B K"]]
) -> Float[Tensor, ""]:
    """Cross-entropy of each view with the assignment of each other view, averaged over images and pairs of views.

    Args:
        targets: probabilities of prototypes, of the first views.
        logits: of the same views in this order, then of further ones; of a generator, one is in memory at a time.

    References:
        Caron et al., *Unsupervised learning of visual features by contrasting cluster assignments*, 2020, equation 2;
        *Emerging properties in self-supervised vision transformers*, 2021, equation 3.

    Example:
        >>> sure, unsure = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> swapped_cross_entropy([sure], [100 * sure, unsure])  # the view itself does not count
        tensor(0.6931)
    """
    found = [view.log_softmax(1) for view in logits]
    pairs = [(target, view) for i, target in enumerate(targets) for j, view in enumerate(found) if i != j]
    return -torch.stack([torch.linalg.vecdot(target, view).mean() for target, view in pairs]).mean()


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "B K"], queued: Float[Tensor, "Q K"] | None = None, iterations: int = 3
) -> Float[Tensor, "B K"]:
    """Assignments of images to prototypes that use all prototypes equally, over the images of all processes.

    Rows and columns of ``exp(logits)`` are scaled in turn, in logarithms, which do not overflow.

    Args:
        logits: similarities over epsilon, of this process's images; every process has equally many.
        queued: the same of earlier images, which count as images of the batch; the same in all processes.
        iterations: how often columns, then rows are scaled.

    Returns:
        Probabilities: rows sum to 1, and columns, over all processes and the queue, to (WB + Q) / K in the limit of
        many iterations.

    References:
        Cuturi, *Sinkhorn distances*, 2013; Caron et al., *Unsupervised learning of visual features by contrasting
        cluster assignments*, 2020, section 3.1 and listing A.1.

    Example:
        >>> sinkhorn(torch.tensor([[4.0, 0.0], [4.0, 0.0]]))  # both like the first; they share it
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    for _ in range(iterations):
        batch = gathered(logits.logsumexp(0, keepdim=True))
        rest = [] if queued is None else [queued.logsumexp(0, keepdim=True)]
        total = torch.cat([batch, *rest]).logsumexp(0)
        logits = (logits - total).log_softmax(1)
        queued = None if queued is None else (queued - total).log_softmax(1)
    return logits.exp()
