"""CKA between layers, views and classes, accumulated over batches and ranks.

The state is a matrix of sums for each of a few blocks of Gram matrices: it does not grow with the number of images,
sums of ranks add up, and leaving out one block at a time gives an error bar. Images must come in random order, because
those of a Gram matrix are treated as a random sample. torchmetrics returns results of one number as scalars:
``compute()`` of a single pair of layers has no dimensions.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from ssl_geometry.geometry.cka import cka_matrix
from ssl_geometry.geometry.gram import class_vector, class_weights, gram_groups, images_of, same_class_pairs
from ssl_geometry.geometry.jackknife import deviations, interval, jackknife, standing

FLAT = (
    "no Gram matrix varies by more than rounding (a layer is constant, active for one image of each, or "
    "varies by less than 1e-19 in float32; of classes, no two images share one, or all do)"
)
INFINITE = "activations are not finite, or above 1e19, whose squares float32 does not hold"
BLOCKS = 16
"""Number of blocks of the jackknife; Gram matrices are assigned to them cyclically."""
FEW_PAIRS = 100
"""With fewer pairs of images of one class, class CKA is only accurate to about 0.1."""
RARE = 0.1
"""Classes below this share of the largest class are named in the warning about few pairs."""
LONELY = 0.1
"""Largest share of same-class pairs that classes of a single image may have; CKA is low by half of that share."""


class LayerwiseCKA(Metric):
    """Unbiased minibatch CKA of every row layer with every column layer, by one matrix product per batch.

    It takes Gram vectors (:func:`ssl_geometry.geometry.gram.gram_vector`), computed inside the hooks so that
    activations need not be stored. Both networks must see the same images in the same batches.

    Args:
        rows: names of the row layers.
        cols: names of the column layers; None compares the row layers with themselves.
        gram_size: images in a Gram matrix, as in the vectors.
        blocks: number of blocks of the jackknife, to which Gram matrices are assigned cyclically.

    Raises:
        KeyError: a batch lacks one of the layers.
        ValueError: the Gram vectors of rows and columns differ in length, or were made with another ``gram_size``.

    References:
        Nguyen, Raghu & Kornblith, *Do wide and deep networks learn the same things?*, 2021.

    Example:
        >>> from torchvision.models import resnet18, resnet34
        >>> from ssl_geometry.geometry.gram import gram_vector
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
        >>> low, high = cka.interval()  # 95 %, over the choice of images
        >>> low.shape
        torch.Size([8, 16])
    """

    full_state_update = False
    is_differentiable = False
    weights: Tensor
    cross: Tensor
    rows_self: Tensor
    cols_self: Tensor

    def __init__(
        self, rows: Sequence[str], cols: Sequence[str] | None = None, gram_size: int = 64, blocks: int = BLOCKS
    ) -> None:
        super().__init__()
        self.rows = list(rows)
        self.cols = None if cols is None else list(cols)
        self.gram_size, self.blocks, self._grams = gram_size, blocks, 0
        width = len(self.rows if self.cols is None else self.cols)
        for name, shape in (
            ("cross", (len(self.rows), width)),
            ("rows_self", (len(self.rows),)),
            ("cols_self", (width,)),
            ("weights", ()),
        ):
            self.add_state(name, torch.zeros((blocks, *shape), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        x: Mapping[str, Float[Tensor, " P"]],
        y: Mapping[str, Float[Tensor, " P"]] | None = None,
        first_gram: int | None = None,
    ) -> None:
        """Add one batch.

        Args:
            x: the Gram vector of each row layer.
            y: the Gram vector of each column layer; None takes them from ``x``.
            first_gram: number of Gram matrices in earlier batches, over all ranks, so that the standard error is the
                same for any number of ranks; None counts those of this rank.
        """
        number = self._grams if first_gram is None else first_gram
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
        for a, b in zip(*(gram_groups(vectors, self.gram_size) for vectors in (rows, cols)), strict=True):
            block = (number + torch.arange(len(a), device=a.device)) % self.blocks
            number += len(a)
            self.cross.index_add_(0, block, a @ b.mT)
            self.rows_self.index_add_(0, block, a.square().sum(2))
            self.cols_self.index_add_(0, block, b.square().sum(2))
            pairs = a.shape[2]
            self.weights.index_add_(0, block, self.weights.new_full((len(a),), 2 * (pairs - images_of(pairs))))
        self._grams = number

    def compute(self) -> Float[Tensor, "L M"]:
        """The matrix of CKA, float64; NaN, with a warning that names layers and reason, where it is undefined."""
        return self._shown(self._cka(self.cols or []))

    def _shown(self, matrices: Float[Tensor, "... L M"]) -> Tensor:
        """The pairs of layers of this metric."""
        return matrices

    def _cka(self, named: Sequence[str]) -> Float[Tensor, "L M"]:
        """The matrix; ``named`` are the columns that warnings can name."""
        rows, cols = self.rows_self.sum(0), self.cols_self.sum(0)
        owns = [*zip(self.rows, rows.tolist(), strict=True)]
        owns += zip(named, cols.tolist(), strict=False)
        flat = dict.fromkeys(name for name, own in owns if own == 0)
        infinite = dict.fromkeys(name for name, own in owns if not math.isfinite(own))
        for names, reason in ((flat, FLAT), (infinite, INFINITE)):
            if names:
                warnings.warn(f"CKA is NaN, because {reason}: {', '.join(names)}", stacklevel=3)
        return cka_matrix(self.cross.sum(0), rows, cols)

    def standard_error(self) -> Float[Tensor, "L M"]:
        """Standard error of :meth:`compute` over the choice of images, by the jackknife over blocks of Gram matrices.

        Like ``compute`` it sums over ranks: every rank must call it. NaN with fewer than two Gram matrices.
        """
        with self.sync_context():
            return self._jackknife()[1]

    def interval(self, level: float = 0.95) -> tuple[Float[Tensor, "L M"], Float[Tensor, "L M"]]:
        """The confidence interval of :meth:`compute` over the choice of images.

        Student's t on the jackknife, see :func:`ssl_geometry.geometry.jackknife.interval`. Every rank must call it.

        Args:
            level: confidence level.
        """
        with self.sync_context():
            return interval(*self._jackknife(), int(standing(self.weights).sum()), level)

    def _jackknife(self) -> tuple[Float[Tensor, "L M"], Float[Tensor, "L M"]]:
        value, error = jackknife(self.cross, self.rows_self, self.cols_self, self.weights)
        return self._shown(value), self._shown(error)

    def deviations(self) -> Float[Tensor, "K L M"]:
        """The contribution of each of K blocks of Gram matrices to :meth:`standard_error`; every rank must call it.

        Metrics that saw the same images in the same batches have the same blocks: the deviations of a difference of
        their results are the differences of theirs, and its standard error the root of the sum of their squares.
        """
        with self.sync_context():
            return self._shown(deviations(self.cross, self.rows_self, self.cols_self, self.weights)[1])


class InvarianceCKA(LayerwiseCKA):
    """CKA of each layer with itself under two augmented views of the same images: 1 is invariant.

    Gram vectors of one view are the rows, those of the other the columns, with the images in the same order. Results
    are per layer, (L,).

    Args:
        layers: names of the layers.
        gram_size: as in :class:`LayerwiseCKA`.
        blocks: as in :class:`LayerwiseCKA`.

    References:
        Grigg et al., *Do self-supervised and supervised methods learn similar visual representations?*, 2021.

    Example:
        >>> from ssl_geometry.geometry.gram import gram_vector
        >>> cka = InvarianceCKA(["layer"])
        >>> for features in torch.randn(2, 64, 10):
        ...     cka.update({"layer": gram_vector(features)}, {"layer": gram_vector(-2 * features)})
        >>> cka.compute().allclose(torch.ones(1, dtype=torch.float64))
        True
    """

    def __init__(self, layers: Sequence[str], gram_size: int = 64, blocks: int = BLOCKS) -> None:
        super().__init__(layers, layers, gram_size, blocks)

    def _shown(self, matrices: Float[Tensor, "... L L"]) -> Float[Tensor, "... L"]:
        return matrices.diagonal(dim1=-2, dim2=-1)


class ClassCKA(LayerwiseCKA):
    """CKA of each layer with the one-hot classes: 1 if every class is a point, with equal distances between classes.

    To add the classes as a column of a larger matrix, pass :func:`ssl_geometry.geometry.gram.class_vector` to
    :class:`LayerwiseCKA`.

    Args:
        layers: names of the layers.
        num_classes: number of classes.
        gram_size: as in :class:`LayerwiseCKA`. A Gram matrix of n images has n(n - 1)/2C same-class pairs of each of C
            classes, on which class CKA rests: use a larger size for many classes.
        blocks: as in :class:`LayerwiseCKA`.
        sizes: number of images of each class, if they were drawn class by class (see
            :func:`ssl_geometry.geometry.gram.class_weights`); None for a random sample.

    References:
        Grigg et al., *Do self-supervised and supervised methods learn similar visual representations?*, 2021.

    Example:
        >>> from ssl_geometry.geometry.gram import gram_vector
        >>> cka = ClassCKA(["layer"], num_classes=10)
        >>> for labels in torch.randint(10, (2, 64)):
        ...     cka.update({"layer": gram_vector(torch.eye(10)[labels])}, labels)
        >>> cka.compute().allclose(torch.ones(1, dtype=torch.float64))
        True
    """

    pairs: Tensor
    """Pairs of images of each class in all Gram matrices."""
    images: Tensor
    """Images of each class."""

    def __init__(
        self,
        layers: Sequence[str],
        num_classes: int,
        gram_size: int = 64,
        blocks: int = BLOCKS,
        sizes: Int64[Tensor, " C"] | None = None,
    ) -> None:
        super().__init__(layers, ["classes"], gram_size, blocks)
        self.num_classes, self.sizes = num_classes, sizes
        for state in ("pairs", "images"):
            self.add_state(state, torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(  # type: ignore[override]
        self, x: Mapping[str, Float[Tensor, " P"]], labels: Int64[Tensor, " B"], first_gram: int | None = None
    ) -> None:
        """Add one batch.

        Args:
            x: the Gram vector of each layer.
            labels: class of each image.
            first_gram: as in :meth:`LayerwiseCKA.update`.
        """
        classes = class_vector(labels, self.num_classes, self.gram_size)
        self.pairs += same_class_pairs(labels, self.num_classes, self.gram_size)
        self.images += (F.one_hot(labels, self.num_classes) if labels.ndim == 1 else labels).sum(0)
        if self.sizes is not None:
            self.sizes = self.sizes.to(labels.device)
            weights = class_weights(labels, self.sizes, self.gram_size)
            classes, x = classes * weights, {layer: x[layer] * weights for layer in self.rows}
        super().update(x, {"classes": classes}, first_gram)

    def compute(self) -> Float[Tensor, " L"]:
        """CKA of each layer with the classes, float64; NaN where undefined; a warning where it rests on few pairs."""
        alone, pairs = self._alone, self._decisive_pairs()
        no_classes = float(self.cols_self.sum()) == 0
        if alone:
            warnings.warn(
                "class CKA is NaN, because it rests on pairs of images of one class, and "
                f"{alone} of {self.num_classes} classes have a single image",
                stacklevel=2,
            )
        elif pairs < FEW_PAIRS:
            rests = f"{'is NaN, because it rests' if no_classes else 'rests'} on {pairs} pair{'s' * (pairs != 1)}"
            rests += f" of images of one class{self._few_images()}"
            larger = int(self.images.sum()) > self.gram_size
            more = f", or more of them in a Gram matrix (gram_size {self.gram_size})," if larger else ""
            warnings.warn(
                f"class CKA {rests}; more images{more} would give more pairs",
                stacklevel=2,
            )
        elif no_classes:
            warnings.warn(
                "class CKA is NaN, because all images of a Gram matrix are of one class; shuffle the images",
                stacklevel=2,
            )
        value = self._shown(self._cka(named=()))
        return torch.full_like(value, torch.nan) if alone else value

    def _decisive_pairs(self) -> int:
        """Same-class pairs that determine class CKA: if one class has most images, those of the other classes."""
        others = self.images <= self.images.sum() / 2
        return int(self.pairs[others].sum())

    def _few_images(self) -> str:
        """Text that names the rare classes."""
        images = self.images.tolist()
        total, largest = sum(images), max(images)
        if largest == total:
            return f" next to another: all {total:,} images are of class {images.index(largest)}"
        rare = [(n, c) for c, n in enumerate(images) if 0 < n < RARE * largest]
        if not rare:
            return ""
        shown = ", ".join(f"class {c} ({n} of {total:,} images)" for n, c in sorted(rare)[:3])
        return f", for few images are of {shown}{', …' if len(rare) > 3 else ''}"

    def _shown(self, matrices: Float[Tensor, "... L 1"]) -> Float[Tensor, "... L"]:
        return matrices.squeeze(-1)

    def _jackknife(self) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
        value, error = super()._jackknife()
        return (value, torch.full_like(error, torch.nan)) if self._alone else (value, error)

    @property
    def _alone(self) -> int:
        """Number of classes of a single image, if they are too many for class CKA to be defined; else 0."""
        if self.sizes is None:
            return 0
        alone = (self.sizes == 1).sum()
        return int(alone) if alone > LONELY * self.sizes.square().sum() else 0
