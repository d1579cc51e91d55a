"""Images of one split, uint8 RGB with labels: pixels where the data set is an array, else a reader of single images.

Every image becomes 8-bit RGB: turned upright by its EXIF tag, 16-bit grey scaled to 8 bits, transparency laid over
white. With ``image_size`` the shorter side is resized (bilinear, antialiased) and the middle is cut out. An image's
``index`` is its place in the split on disk, whatever subset is used.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssl_geometry.errors import UserError, argument, first_line
from ssl_geometry.progress import progress_bar

T = TypeVar("T")
AnyImage = TypeVar("AnyImage", PIL.Image.Image, Tensor)


def data_option(name: str) -> str:
    """An argument of the data module, as the user typed it; see :func:`ssl_geometry.errors.argument`."""
    return argument(name, "data", "DataModule")


class Unreadable(UserError):
    """An image that cannot be decoded."""


class ImageReader(Protocol):
    """Images by their place on disk."""

    def __getitem__(self, i: int) -> PIL.Image.Image:
        """The image at place ``i``."""

    def origin(self, i: int) -> str:
        """Where that image comes from, for messages."""


class Files:
    """Images in files."""

    def __init__(self, paths: Sequence[str]) -> None:
        # One array, not a list: counting references to a string copies its memory page in every worker process.
        self.paths = np.array([os.fsencode(path) for path in paths])

    def __getitem__(self, i: int) -> PIL.Image.Image:
        return PIL.Image.open(self.origin(i))

    def origin(self, i: int) -> str:
        """Path of an image."""
        return os.fsdecode(self.paths[i])


class Items:
    """Images of a torchvision data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, i: int) -> PIL.Image.Image:
        return self.dataset[i][0]

    def origin(self, i: int) -> str:
        """Number and data set of an image."""
        return f"image {i} of {type(self.dataset).__name__}"


class Images:
    """One split of a data set, or some rows of it.

    Args:
        labels: class of each row, (N,) int64, -1 where it is unknown; or, where an image may show several, (N,C) int64
            of zeros and ones.
        source: pixels of the rows, (N,3,H,W) uint8, or the images on disk.
        size: side in pixels that images on disk are brought to; None leaves them, and they must then be all the same.
        index: place of each row on disk, (N,) int64; by default 0, 1, ….

    Example:
        >>> images = Images(torch.tensor([1, 0]), torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
        >>> images.shape, images[torch.tensor([1])]["label"]
        ((3, 4, 4), tensor([0]))
    """

    def __init__(
        self,
        labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"],
        source: UInt8[Tensor, "N 3 H W"] | ImageReader,
        size: int | None = None,
        index: Int64[Tensor, " N"] | None = None,
    ) -> None:
        self.labels = labels
        self.source = source
        self.size = size
        self.index = torch.arange(len(labels)) if index is None else index
        self._shape: tuple[int, ...] | None = None
        self._options = {
            name: data_option(name) for name in ("image_size", "on_error")
        }  # here: threads know no command

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether the pixels are there, decoded."""
        return isinstance(self.source, Tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """(3, height, width) of every image.

        Raises:
            UserError: where this takes reading an image, and that fails.
        """
        if self._shape is None:
            if isinstance(self.source, Tensor):
                self._shape = tuple(self.source.shape[1:])
            else:
                self._shape = (3, self.size, self.size) if self.size else tuple(self._open(0).shape)
        return self._shape

    @property
    def nbytes(self) -> int:
        """Bytes of all images once decoded."""
        return len(self) * int(np.prod(self.shape))

    def __getitem__(self, rows: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """A batch: ``image`` uint8 (B,3,H,W), ``label`` int64 (B,), ``index`` int64 (B,).

        Args:
            rows: which rows, (B,) int64, on the device of the pixels.

        Raises:
            UserError: where an image cannot be read, or differs in size while ``size`` is None.
        """
        if isinstance(self.source, Tensor):
            image = self.source[rows]
        else:
            image = torch.stack([self._read(row) for row in rows.tolist()])
        return {"image": image, "label": self.labels[rows], "index": self.index[rows]}

    def select(self, rows: Int64[Tensor, " n"]) -> "Images":
        """The given rows as a split of their own; ``index`` still holds their place on disk."""
        source = self.source[rows] if isinstance(self.source, Tensor) else self.source
        return Images(self.labels[rows], source, self.size, self.index[rows])

    def to(self, device: torch.device) -> "Images":
        """The same rows with pixels, labels and index on ``device``; what is not decoded stays as it is."""
        if not isinstance(self.source, Tensor):
            return self
        return Images(self.labels.to(device), self.source.to(device), self.size, self.index.to(device))

    def decode(self, threads: int, show: bool = False) -> "Images":
        """Read every image once and keep the pixels in memory.

        Args:
            threads: images read at the same time.
            show: draw a progress bar where it takes longer than two seconds.

        Raises:
            UserError: where an image cannot be read, or differs in size while ``size`` is None.
        """
        if self.in_memory:
            return self
        pixels = torch.empty(len(self), *self.shape, dtype=torch.uint8)

        def keep(row: int) -> None:
            pixels[row] = self._read(row)

        for _ in _in_threads(keep, range(len(self)), threads, "decoding" if show else None):
            pass
        return Images(self.labels, pixels, self.size, self.index)

    def unreadable(self, rows: Sequence[int], threads: int, show: bool = False) -> list[tuple[int, str]]:
        """Read every image once to find those that cannot be.

        Args:
            rows: which rows to try.
            threads: images read at the same time.
            show: draw a progress bar where it takes longer than two seconds.

        Returns:
            (row, path) of each damaged image.
        """

        def damaged(row: int) -> bool:
            try:
                self._open(row)
            except Unreadable:
                return True
            return False

        if isinstance(self.source, Tensor):
            return []
        found = zip(rows, _in_threads(damaged, rows, threads, "checking" if show else None), strict=True)
        return [(row, self.source.origin(int(self.index[row]))) for row, bad in found if bad]

    def _read(self, row: int) -> UInt8[Tensor, "3 H W"]:
        image = self._open(row)
        if image.shape != self.shape:
            raise UserError(
                f"{self._options['image_size']} None: {self._origin(row)} has {size_text(image.shape)} pixels, others "
                f"have {size_text(self.shape)}; set an image size to bring all images to one"
            )
        return image

    def _open(self, row: int) -> UInt8[Tensor, "3 h w"]:
        assert not isinstance(self.source, Tensor)
        try:
            return F.pil_to_tensor(resize(to_rgb(self.source[int(self.index[row])]), self.size))
        except Exception as error:  # given a damaged file, a decoder raises whatever it happens to trip over
            raise Unreadable(
                f"{self._origin(row)} cannot be read as an image ({first_line(error)}): repair or remove it, or leave "
                f"out all such files with {self._options['on_error']} skip"
            ) from error

    def _origin(self, row: int) -> str:
        assert not isinstance(self.source, Tensor)
        return self.source.origin(int(self.index[row]))


def digest(parts: Iterable[str | Tensor]) -> str:
    """Hash of texts and of the bytes of tensors, one after another: 16 hexadecimal digits.

    Example:
        >>> digest(["three", torch.zeros(3)]), digest(["three", torch.zeros(3, dtype=torch.uint8)])
        ('a16008a71f226445', '73fd28edbfe7437f')
    """
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(part.encode())
        else:
            total.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any image as 8-bit RGB: upright, 16 bits scaled to 8, transparency over white.

    Args:
        image: of any PIL mode except 32-bit float, whose range is unknown.

    Returns:
        The image in mode RGB.

    Raises:
        ValueError: for an image of float pixels.

    Example:
        >>> to_rgb(PIL.Image.new("RGBA", (1, 1), (200, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("float pixels have no known range")
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize(image: AnyImage, size: int | None) -> AnyImage:
    """Bring the shorter side to ``size`` (bilinear, antialiased) and cut out the middle square; None leaves it."""
    if size is None:
        return image
    return F.center_crop(F.resize(image, [size], antialias=True), [size])


def stratified(labels: Int64[Tensor, " N"], *seed: int) -> Int64[Tensor, " N"]:
    """A random order in which every beginning holds the classes in proportion.

    A sample's place is (r + u)/n, where r is its rank in a random order of the n samples of its class, and u a random
    number of that class in [0, 1); samples are sorted by place. So the first k hold each class k n/N times but for
    rounding (exactly, where all classes are of one size and share k), and contain the first k - 1.

    Args:
        labels: class of each sample, (N,) int64; where samples have several, (N,C), the order is random.
        seed: one or more whole numbers; the order is a pure function of labels and seed.

    Returns:
        Positions 0…N-1, (N,) int64.

    Example:
        >>> labels = torch.tensor([0] * 90 + [1] * 30)
        >>> labels[stratified(labels, 0)[:12]].sum()
        tensor(3)
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    if labels.ndim == 2:
        return torch.from_numpy(order)
    _, group, counts = np.unique(labels.numpy()[order], return_inverse=True, return_counts=True)
    rank = np.empty(len(order))
    rank[np.argsort(group, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
    return torch.from_numpy(order[np.argsort((rank + random.random(len(counts))[group]) / counts[group])])


def shuffled(n: int, *seed: int) -> Int64[Tensor, " n"]:
    """A random order of the first n of a list, fixed by its seed: that of fewer is the same with the others left out.

    It takes out what a :func:`stratified` order puts in. There a class comes once a round, so images that follow each
    other are no random sample (of C equal classes, none of C in a row share one), and an estimate that takes them for
    one is biased.

    Args:
        n: how many.
        seed: one or more whole numbers.

    Returns:
        Positions 0…n-1, (n,) int64.

    Example:
        >>> order = shuffled(8, 0)
        >>> order, order[order < 4].equal(shuffled(4, 0))
        (tensor([3, 2, 1, 6, 0, 7, 4, 5]), True)
    """
    return torch.from_numpy(np.random.default_rng(seed).random(n).argsort())


def size_text(shape: Sequence[int]) -> str:
    """Width and height of (…, H, W).

    Example:
        >>> size_text((3, 24, 32))
        '32×24'
    """
    return f"{shape[-1]}×{shape[-2]}"


def _in_threads(work: Callable[[int], T], rows: Sequence[int], threads: int, title: str | None) -> Iterator[T]:
    """``work`` of every row, in order; a progress bar named ``title`` appears after two seconds."""
    start = time.monotonic()
    shown = False
    progress = progress_bar()
    task = progress.add_task(f"{title} images", total=len(rows))
    chunks = [
        rows[i : i + 64] for i in range(0, len(rows), 64)
    ]  # one task per image would double the time for small images
    with ThreadPoolExecutor(threads) as pool:
        try:
            for results in pool.map(lambda chunk: [work(row) for row in chunk], chunks):
                progress.advance(task, len(results))
                if title and not shown and time.monotonic() - start > 2:
                    progress.start()
                    shown = True
                yield from results
        finally:
            if shown:  # else it ends with an empty line all the same
                progress.stop()
            pool.shutdown(cancel_futures=True)
