"""SupCon: SimCLR whose positives are all views of images of the same class."""

from typing import Annotated, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.errors import UserError
from ssl_geometry.methods.base import Batch, Decay, Optimizer, Rate
from ssl_geometry.methods.parts.gather import gathered
from ssl_geometry.methods.parts.nt_xent import similarities
from ssl_geometry.methods.simclr import SimCLR
from ssl_geometry.ranges import above

VIEWS = [ViewSpec(augment={"simclr": {"scale": (0.2, 1.0)}}, count=2)]


def sup_con(
    first: Float[Tensor, "B D"], second: Float[Tensor, "B D"], label: Int64[Tensor, " B"], temperature: float
) -> Float[Tensor, ""]:
    """NT-Xent with several positives: the mean over a view's positives of their log-probability among all other views.

    Positives of a view are the other view of its image and, in all processes, both views of the images of its class.

    Args:
        first: outputs of one view of each image, not normalised.
        second: outputs of the other view.
        label: class of each image; one of unknown class, -1, is a positive of its own other view only.
        temperature: tau, above 0.

    Returns:
        The mean over the 2 B views of this process.

    Example:
        >>> first, second = torch.eye(4)[:2], torch.eye(4)[2:]
        >>> sup_con(first, second, torch.tensor([0, 1]), temperature=0.5)  # at right angles: one of three others
        tensor(1.0986)
    """
    logits, own = similarities(first, second, temperature)
    label = label.repeat(2)
    positive = (label[:, None] == gathered(label)) & (label[:, None] >= 0)
    positive.scatter_(1, own[:, None], False).scatter_(1, own.roll(len(first))[:, None], True)
    log_probability = torch.where(positive, logits.log_softmax(1), 0).sum(1) / positive.sum(1)
    return -log_probability.mean()


class SupCon(SimCLR):
    """Supervised contrastive learning: what SimCLR does, with labels; the bridge from it to the supervised network.

    The recipe is the authors' for CIFAR-10: SGD with 0.5 and decay 1e-4 for 1,024 images. They multiply equation 2 by
    temperature / 0.07; here stands equation 2 itself, with a learning rate as many times higher and a decay as many
    times lower, which is the same training. The projection head is SimCLR's.

    Args:
        temperature: tau of the loss, above 0.
        views: how both views are made.
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, class tokens and position embeddings.

    References:
        Khosla et al., *Supervised contrastive learning*, 2020, equation 2.
    """

    learns_from_labels = True

    def __init__(
        self,
        temperature: Annotated[float, above(0)] = 0.1,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "sgd",
        lr: Rate = 0.18,
        weight_decay: Decay = 7e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(temperature, views=views, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)

    def setup(self, stage: str) -> None:
        """Refuse images that show several classes."""
        if self.trainer.datamodule.multi_label:  # type: ignore[attr-defined]
            raise UserError("--model SupCon: it learns one class per image; images of this data set show several")

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """The other views of the same class among all other views."""
        first, second = outputs
        return sup_con(first, second, batch["label"], self.temperature)
