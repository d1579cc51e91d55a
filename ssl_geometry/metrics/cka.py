"""CKA between the layers of networks, accumulated over batches and ranks.

The state is a matrix of sums: it does not grow with the number of images, and ranks add theirs up.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from ssl_geometry.geometry.cka import cka_matrix


class LayerwiseCKA(Metric):
    """Unbiased minibatch CKA of every row layer with every column layer, by one matrix product a batch.

    Feed it Gram vectors (:func:`ssl_geometry.geometry.cka.gram_vector`), taken where the activations are, so that no
    activation outlives its layer. Both networks must see the same images in the same batches.

    Args:
        rows: names of the row layers.
        cols: names of the column layers; None compares the row layers with themselves.

    Raises:
        KeyError: a batch lacks one of the layers.

    References:
        Nguyen, Raghu & Kornblith, *Do wide and deep networks learn the same things?*, 2021.

    Example:
        >>> from torchvision.models import resnet18, resnet34
        >>> from ssl_geometry.geometry.cka import gram_vector
        >>> from ssl_geometry.models.taps import Taps
        >>> reduce = lambda name, activations: gram_vector(activations)
        >>> a = Taps(resnet18().eval(), "post_residual", reduce)
        >>> b = Taps(resnet34().eval(), "post_residual", reduce)
        >>> cka = LayerwiseCKA(a.names, b.names)
        >>> with a, b, torch.no_grad():
        ...     for images in torch.rand(2, 16, 3, 32, 32):
        ...         cka.update(a(images), b(images))
        >>> cka.compute().shape
        torch.Size([8, 16])
    """

    full_state_update = False
    is_differentiable = False
    cross: Tensor
    rows_self: Tensor
    cols_self: Tensor

    def __init__(self, rows: Sequence[str], cols: Sequence[str] | None = None) -> None:
        super().__init__()
        self.rows = list(rows)
        self.cols = None if cols is None else list(cols)
        width = len(self.rows if self.cols is None else self.cols)
        for name, shape in (
            ("cross", (len(self.rows), width)),
            ("rows_self", (len(self.rows),)),
            ("cols_self", (width,)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Mapping[str, Float[Tensor, " P"]], y: Mapping[str, Float[Tensor, " P"]] | None = None) -> None:
        """Add one batch.

        Args:
            x: the Gram vector of each row layer.
            y: the Gram vector of each column layer; None where the row layers are compared with themselves.
        """
        rows = torch.stack([x[name] for name in self.rows]).double()
        if self.cols is None:
            cols = rows
        else:
            cols = torch.stack([(x if y is None else y)[name] for name in self.cols]).to(rows)
        self.cross += rows @ cols.T
        self.rows_self += rows.square().sum(1)
        self.cols_self += cols.square().sum(1)

    def compute(self) -> Float[Tensor, "L M"]:
        """The matrix of CKA, float64; NaN (with one warning that names the layers) where a layer does not vary."""
        flat = [name for name, own in zip(self.rows, self.rows_self, strict=True) if not own > 0]
        flat += [name for name, own in zip(self.cols or [], self.cols_self, strict=False) if not own > 0]
        if flat:
            warnings.warn(
                f"CKA is NaN for layers whose output does not vary over the images: {', '.join(flat)}", stacklevel=2
            )
        return cka_matrix(self.cross, self.rows_self, self.cols_self)
