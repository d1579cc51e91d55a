"""CKA between layers, views and classes, accumulated over batches and ranks.

The state is a matrix of sums for each of a few blocks of Gram matrices: it does not grow with the number of images,
ranks add theirs up, and leaving out one block at a time gives a standard error. torchmetrics hands out a result of
one number as a scalar: ``compute()`` of a single pair of layers has no dimensions.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import Metric

from ssl_geometry.geometry.cka import cka_matrix, class_vector, jackknife


class LayerwiseCKA(Metric):
    """Unbiased minibatch CKA of every row layer with every column layer, by one matrix product a batch.

    Feed it Gram vectors (:func:`ssl_geometry.geometry.cka.gram_vector`), taken where the activations are, so that no
    activation outlives its layer. Both networks must see the same images in the same batches.

    Args:
        rows: names of the row layers.
        cols: names of the column layers; None compares the row layers with themselves.
        gram_size: images in a Gram matrix, as the vectors were made.
        blocks: number of blocks that Gram matrices are dealt into in turn, for the standard error.

    Raises:
        KeyError: a batch lacks one of the layers.
        ValueError: the Gram vectors of rows and columns differ in length, or were made with another ``gram_size``.

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
        >>> cka.standard_error().shape
        torch.Size([8, 16])
    """

    full_state_update = False
    is_differentiable = False
    cross: Tensor
    rows_self: Tensor
    cols_self: Tensor

    def __init__(
        self, rows: Sequence[str], cols: Sequence[str] | None = None, gram_size: int = 64, blocks: int = 16
    ) -> None:
        super().__init__()
        self.rows = list(rows)
        self.cols = None if cols is None else list(cols)
        self.gram_size, self.blocks, self._batches = gram_size, blocks, 0
        width = len(self.rows if self.cols is None else self.cols)
        for name, shape in (
            ("cross", (len(self.rows), width)),
            ("rows_self", (len(self.rows),)),
            ("cols_self", (width,)),
        ):
            self.add_state(name, torch.zeros((blocks, *shape), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        x: Mapping[str, Float[Tensor, " P"]],
        y: Mapping[str, Float[Tensor, " P"]] | None = None,
        batch: int | None = None,
    ) -> None:
        """Add one batch.

        Args:
            x: the Gram vector of each row layer.
            y: the Gram vector of each column layer; None takes them from ``x``.
            batch: number of the batch over all ranks, which makes the standard error the same for any number of
                ranks; None counts this rank's batches.
        """
        batch = self._batches if batch is None else batch
        self._batches += 1
        rows = torch.stack([x[name] for name in self.rows]).double()
        if self.cols is None:
            cols = rows
        else:
            cols = torch.stack([(x if y is None else y)[name] for name in self.cols]).to(rows)
        if rows.shape[1] != cols.shape[1]:
            raise ValueError(
                f"Gram vectors of rows and columns differ in length ({rows.shape[1]:,} and {cols.shape[1]:,}): "
                "both must come from the same images with the same gram_size"
            )
        for first, a, b in zip(*self._groups(rows, batch), self._groups(cols, batch)[1], strict=True):
            block = (first + torch.arange(len(a), device=a.device)) % self.blocks
            self.cross.index_add_(0, block, a @ b.mT)
            self.rows_self.index_add_(0, block, a.square().sum(2))
            self.cols_self.index_add_(0, block, b.square().sum(2))

    def _groups(self, vectors: Float[Tensor, "L P"], batch: int) -> tuple[list[int], list[Float[Tensor, "G L p"]]]:
        """The whole Gram matrices of a batch and its short last one, and the number of the first of each kind."""
        length = self.gram_size * (self.gram_size - 1) // 2
        whole, rest = divmod(vectors.shape[1], length)
        last = (1 + math.isqrt(1 + 8 * rest)) // 2
        if rest and last * (last - 1) // 2 != rest:
            raise ValueError(
                f"Gram vectors of length {vectors.shape[1]:,} were not made with gram_size={self.gram_size}"
            )
        starts, groups = [], []
        if whole:
            starts.append(batch * whole)
            groups.append(vectors[:, : whole * length].unflatten(1, (whole, length)).transpose(0, 1))
        if rest:
            starts.append((batch + 1) * whole)
            groups.append(vectors[:, whole * length :].unsqueeze(0))
        return starts, groups

    def compute(self) -> Float[Tensor, "L M"]:
        """The matrix of CKA, float64; NaN (with one warning that names the layers) where a layer does not vary."""
        rows, cols = self.rows_self.sum(0), self.cols_self.sum(0)
        owns = [*zip(self.rows, rows.tolist(), strict=True)]
        owns += zip(self.cols or [], cols.tolist(), strict=False)
        flat = dict.fromkeys(name for name, own in owns if not own > 0)
        if flat:
            warnings.warn(
                f"CKA is NaN for layers that do not vary over the images, or are not finite: {', '.join(flat)}",
                stacklevel=2,
            )
        return cka_matrix(self.cross.sum(0), rows, cols)

    def standard_error(self) -> Float[Tensor, "L M"]:
        """Standard error of :meth:`compute` over the choice of images, by the jackknife over blocks of Gram matrices.

        Like ``compute`` it sums over ranks: every rank must call it. NaN with fewer than two Gram matrices.
        """
        with self.sync_context():
            return jackknife(self.cross, self.rows_self, self.cols_self)[1]


class InvarianceCKA(LayerwiseCKA):
    """CKA of each layer with itself when the same images are seen under another augmentation: 1 is invariant.

    Args:
        layers: names of the layers.
        gram_size: as of :class:`LayerwiseCKA`.
        blocks: as of :class:`LayerwiseCKA`.

    References:
        Grigg et al., *Do self-supervised and supervised methods learn similar visual representations?*, 2021.

    Example:
        >>> from ssl_geometry.geometry.cka import gram_vector
        >>> cka = InvarianceCKA(["layer"])
        >>> for features in torch.randn(2, 64, 10):
        ...     cka.update({"layer": gram_vector(features)}, {"layer": gram_vector(-2 * features)})
        >>> cka.compute().allclose(torch.ones(1, dtype=torch.float64))
        True
    """

    def __init__(self, layers: Sequence[str], gram_size: int = 64, blocks: int = 16) -> None:
        super().__init__(layers, layers, gram_size, blocks)

    def update(  # type: ignore[override]
        self, x: Mapping[str, Float[Tensor, " P"]], y: Mapping[str, Float[Tensor, " P"]], batch: int | None = None
    ) -> None:
        """Add one batch.

        Args:
            x: the Gram vector of each layer under one draw of the augmentation.
            y: the same under another draw, of the same images in the same order.
            batch: as of :meth:`LayerwiseCKA.update`.
        """
        super().update(x, y, batch)

    def compute(self) -> Float[Tensor, " L"]:
        """CKA of each layer, float64; NaN where it does not vary."""
        return super().compute().diagonal()

    def standard_error(self) -> Float[Tensor, " L"]:
        """Its standard error; every rank must call it."""
        return super().standard_error().diagonal()


class ClassCKA(LayerwiseCKA):
    """CKA of each layer with the one-hot classes: 1 where every class is a point, all equally far apart.

    To have classes as one more column of a larger matrix, feed :func:`ssl_geometry.geometry.cka.class_vector` to
    :class:`LayerwiseCKA`.

    Args:
        layers: names of the layers.
        num_classes: number of classes.
        gram_size: as of :class:`LayerwiseCKA`.
        blocks: as of :class:`LayerwiseCKA`.

    References:
        Grigg et al., *Do self-supervised and supervised methods learn similar visual representations?*, 2021.

    Example:
        >>> from ssl_geometry.geometry.cka import gram_vector
        >>> cka = ClassCKA(["layer"], num_classes=10)
        >>> for labels in torch.randint(10, (2, 64)):
        ...     cka.update({"layer": gram_vector(torch.eye(10)[labels])}, labels)
        >>> cka.compute().allclose(torch.ones(1, dtype=torch.float64))
        True
    """

    def __init__(self, layers: Sequence[str], num_classes: int, gram_size: int = 64, blocks: int = 16) -> None:
        super().__init__(layers, ["classes"], gram_size, blocks)
        self.num_classes = num_classes

    def update(  # type: ignore[override]
        self, x: Mapping[str, Float[Tensor, " P"]], labels: Int64[Tensor, " B"], batch: int | None = None
    ) -> None:
        """Add one batch.

        Args:
            x: the Gram vector of each layer.
            labels: class of each image.
            batch: as of :meth:`LayerwiseCKA.update`.
        """
        super().update(x, {"classes": class_vector(labels, self.num_classes, self.gram_size)}, batch)

    def compute(self) -> Float[Tensor, " L"]:
        """CKA of each layer with the classes, float64; NaN where it does not vary."""
        return super().compute().squeeze(1)

    def standard_error(self) -> Float[Tensor, " L"]:
        """Its standard error; every rank must call it."""
        return super().standard_error().squeeze(1)
