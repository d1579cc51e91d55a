"""Measurement images: the same ones in every measurement of every network, from any data set.

They are kept in memory as uint8, in one fixed random order, and every process takes whole batches of them: so numbers
depend neither on the number of processes nor on who measures.
"""

import itertools
import multiprocessing as mp
from collections.abc import Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import PIL.Image
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from ssl_geometry.data.images import Images, digest, resize, shuffled, stratified, to_rgb
from ssl_geometry.data.loader import Loader
from ssl_geometry.data.plan import BatchPlan, cores, every_nth, size_within
from ssl_geometry.data.sources import FIXED
from ssl_geometry.errors import UserError, first_line
from ssl_geometry.measure.processes import this_process
from ssl_geometry.measure.requests import Split
from ssl_geometry.progress import progress_bar
from ssl_geometry.ranges import at_least, check_argument, check_arguments

FEW = 512
"""So many images are read without worker processes."""


class _Chosen(Dataset):
    """Some items of a map-style data set, as uint8; a mistake is handed back whole, for torch would wrap it."""

    def __init__(self, dataset: Any, rows: Sequence[int], image_size: int | None) -> None:
        self.dataset, self.rows, self.image_size = dataset, rows, image_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int | None] | UserError:
        place = f"image {self.rows[i]} of {type(self.dataset).__name__}"
        try:
            item = self.dataset[self.rows[i]]
            image, *others = (item or (None,)) if isinstance(item, tuple | list) else (item,)
            pixels = _pixels(image)
            if pixels is not None:
                label = int(others[0]) if others and _is_class(others[0]) else -1
                unlabelled = label < 0  # as torchvision marks the unlabelled images of STL10
                return F.pil_to_tensor(resize(to_rgb(pixels), self.image_size)), None if unlabelled else label
        except (OSError, IndexError) as error:  # a damaged file; fewer images than the length
            return UserError(f"{place} cannot be read ({type(error).__name__}: {first_line(error)})")
        found = type(image).__name__
        if isinstance(image, Tensor | np.ndarray):
            found = f"a {image.dtype} {'tensor' if isinstance(image, Tensor) else 'array'} {tuple(image.shape)}"
        is_uint8 = str(getattr(image, "dtype", "")).endswith("uint8")
        advice = "give the data set without its transform (transform=None), and the transform as clean=…"
        if is_uint8:
            advice = "a tensor is (3, H, W) or (H, W), an array (H, W, 3) or (H, W)"
        elif isinstance(image, dict | str | bytes):
            advice = "give a data set whose items are images, or tuples that begin with an image and its label"
        return UserError(f"{place} is {found}, expected a PIL image or uint8: {advice}")


def _pixels(image: Any) -> PIL.Image.Image | None:
    """An image of any usual kind, grey ones among them; None for what is none."""
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
        image = image.movedim(-1, 0) if image.ndim == 3 else image  # arrays are (H, W, 3)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim in (2, 3):
        image = image if image.ndim == 3 else image[None]
        return F.to_pil_image(image) if len(image) in (1, 3, 4) else None
    return image if isinstance(image, PIL.Image.Image) else None


def _is_class(label: Any) -> bool:
    """Whether it is one whole number."""
    if isinstance(label, Tensor | np.ndarray):
        return np.asarray(label).size == 1 and np.asarray(label).dtype.kind in "biu"
    return isinstance(label, Integral)


class MeasurementImages:
    """Images to measure on, with or without labels, and labelled training images for probes.

    They may be given in any order, sorted by class too: they are shuffled, by a permutation that depends on their
    number alone.

    Args:
        images: uint8 (N, 3, H, W), kept on the host.
        labels: class of each image, (N,) of whole numbers from 0; None leaves out what needs labels.
        train_images: uint8 (M, 3, H, W), that probes learn from; None leaves probes out.
        train_labels: class of each of them, (M,) of whole numbers from 0.
        num_classes: None takes one more than the largest label.
        batch_size: images per forward, in each process.

    Raises:
        UserError: images that are not uint8 (N, 3, H, W), or none, other labels than images, labels that are no
            classes, or training images without labels.

    Example:
        >>> images = MeasurementImages(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 2]))
        >>> images.num_classes, [len(batch["index"]) for batch in images.loader("measure")]
        (3, [5])
    """

    multi_label = False
    origin = "images"
    size_option, batch_option = "n", "batch_size"

    def __init__(
        self,
        images: UInt8[Tensor, "N 3 H W"],
        labels: Int64[Tensor, " N"] | None = None,
        train_images: UInt8[Tensor, "M 3 H W"] | None = None,
        train_labels: Int64[Tensor, " M"] | None = None,
        num_classes: Annotated[int, at_least(1)] | None = None,
        batch_size: Annotated[int, at_least(1)] = 256,
    ) -> None:
        check_arguments(MeasurementImages, {"num_classes": num_classes, "batch_size": batch_size}, "")
        images = _tensor("images", images)
        self._sets = {"measure": _checked("images", images, labels, num_classes)}
        if (train_images is None) != (train_labels is None):
            raise UserError("train_images, train_labels: one is given without the other; probes learn from both")
        if train_images is not None:
            if labels is None:
                raise UserError(
                    "train_images: probes are tested on the measurement images, which have no labels; leave them out"
                )
            self._sets["bank"] = _checked("train_images", train_images, train_labels, num_classes)
        known = torch.cat([part.labels for part in self._sets.values()])
        self.num_classes = 0 if labels is None else num_classes or int(known.max()) + 1
        self.num_test = len(images)
        self.measure_size, self.image_shape = len(images), tuple(images.shape[1:])
        self.eval_batch_size = batch_size
        self._drawn_by_class = False
        self._ids = {name: _digest(part) for name, part in self._sets.items()}

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        n: int | None = None,
        *,
        train: Any = None,
        n_train: int | None = None,
        num_classes: int | None = None,
        image_size: int | None = None,
        batch_size: int = 256,
    ) -> Self:
        """Images of any map-style data set of images, or of tuples that start with an image and its label.

        Images are PIL or uint8: a tensor (3, H, W) or (H, W), an array (H, W, 3) or (H, W); grey ones become RGB. Where
        the data set has ``targets`` or ``labels``, images are chosen with the classes in proportion; else at random,
        and their labels are those of their items.

        Args:
            dataset: that the measurement images are taken from, without a transform.
            n: how many; None takes 2,048, or all where there are fewer.
            train: labelled data set that probes learn from.
            n_train: how many of it; None takes 10,000, or all where there are fewer.
            num_classes: None takes one more than the largest label.
            image_size: the shorter side is resized, the middle cut out; None leaves images as they are, all of one
                size.
            batch_size: images per forward, in each process.

        Raises:
            UserError: items that are no images, images of several sizes while ``image_size`` is None, or more images
                asked for than there are.

        Example:
            >>> items = [(torch.full((3, 8, 8), number, dtype=torch.uint8), number % 2) for number in range(6)]
            >>> images = MeasurementImages.from_dataset(items, n=4)
            >>> images.measure_size, images.num_classes, images.measure_sizes
            (4, 2, None)
        """
        for name, asked in {"n": n, "n_train": n_train, "image_size": image_size}.items():
            check_argument(Annotated[int, at_least(1)] | None, asked, name)
        images, labels = _read(dataset, n, 2048, "n", image_size)
        given: dict[str, Any] = {}
        if train is not None:
            train_images, train_labels = _read(train, n_train, 10_000, "n_train", image_size)
            if train_labels is None:
                raise UserError(f"train={type(train).__name__}: its items have no labels, which probes learn")
            given = {"train_images": train_images, "train_labels": train_labels}
        found = cls(images, labels, num_classes=num_classes, batch_size=batch_size, **given)
        found.num_test, found._drawn_by_class = len(dataset), _targets(dataset) is not None
        return found

    def loader(self, split: Split, images: int | None = None) -> Loader:
        """Batches of this process: it gets every R-th batch of the one list.

        Args:
            split: "measure", or "bank" for the training images.
            images: the first so many.

        Raises:
            UserError: training images where none were given.
        """
        if split not in self._sets:
            raise UserError("probes need labelled training images: MeasurementImages.from_dataset(…, train=…)")
        part = self._sets[split]
        rank, world_size = this_process()
        rows = torch.arange(len(part))[:images]
        return Loader(part, BatchPlan(rows, every_nth(len(rows), self.eval_batch_size, rank, world_size)))

    @property
    def has_training_images(self) -> bool:
        """Whether there is something that probes can learn from."""
        return "bank" in self._sets

    @property
    def measure_sizes(self) -> Int64[Tensor, " C"] | None:
        """Measurement images of each class, where they were drawn class by class; None where they were not."""
        labels = self._sets["measure"].labels
        return labels.bincount(minlength=self.num_classes) if self._drawn_by_class else None

    @property
    def measure_ids(self) -> str:
        """Hash of the measurement images in their order."""
        return self._ids["measure"]

    @property
    def trained_on(self) -> dict[str, Any]:
        """Which labelled training images classifiers learn from, for protocols."""
        return {"hash": self._ids.get("bank")}

    def tested(self, split: Split) -> dict[str, Any]:
        """Which images classifiers are tested on, for protocols."""
        return {"split": split, "n": self.measure_size}


def _read(
    dataset: Any, n: int | None, usual: int, option: str, image_size: int | None
) -> tuple[UInt8[Tensor, "n 3 H W"], Int64[Tensor, " n"] | None]:
    """Some images of a data set, the classes in proportion."""
    name = type(dataset).__name__
    if isinstance(dataset, str | Path) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        inside = "; give its data set: loader.dataset" if isinstance(dataset, DataLoader) else ""
        raise UserError(f"{name} is no map-style data set, whose items have numbers{inside}")
    if not len(dataset):
        raise UserError(f"{name} has no images")
    count = size_within(option, n, usual, len(dataset), f"{name} has {len(dataset):,} images")
    targets = _targets(dataset)
    order = shuffled(len(dataset), FIXED) if targets is None else stratified(targets, FIXED)
    rows = order[:count]
    # where workers are not forked, they run a script that has no `if __name__ == "__main__"` again
    are_forked = (mp.get_start_method(allow_none=True) or mp.get_all_start_methods()[0]) == "fork"
    workers = min(8, cores() - 1) if count > FEW and are_forked else 0
    loader = DataLoader(
        _Chosen(dataset, rows.tolist(), image_size),
        batch_size=64,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # else its workers' seed is drawn from the global generator
    )
    images: list[Tensor] = []
    labels: list[int | None] = []
    with progress_bar(shown=count > FEW, transient=True) as progress:
        task = progress.add_task("reading images", total=count)
        for item in itertools.chain.from_iterable(loader):
            if isinstance(item, UserError):
                raise item
            image, label = item
            labels.append(label)
            if images and image.shape != images[0].shape:
                sizes = [f"{shape[-1]} x {shape[-2]}" for shape in (images[0].shape, image.shape)]
                raise UserError(
                    f"image_size: images of {name} differ in size ({sizes[0]}, {sizes[1]} pixels); "
                    "give an image_size to bring all to one"
                )
            images.append(image)
            progress.advance(task)
    known = [label for label in labels if label is not None]
    if len(known) == count:  # those of a target_transform, where the data set has one
        return torch.stack(images), torch.tensor(known)
    return torch.stack(images), None if targets is None else targets[rows]


def _targets(dataset: Any) -> Int64[Tensor, " N"] | None:
    """The labels of a data set that knows them without reading its images."""
    for name in ("targets", "labels"):
        known: Any = getattr(dataset, name, None)
        if hasattr(known, "__len__") and len(known) == len(dataset):
            with suppress(TypeError, ValueError, RuntimeError):  # such as the boxes of a detection data set
                labels = torch.as_tensor(known)
                if labels.ndim == 1 and not labels.is_floating_point() and labels.min() >= 0:
                    return labels.long()
    return None


def _tensor(name: str, values: Any) -> Tensor:
    """Arrays and lists too."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: no tensor, array or list of numbers ({first_line(error)})") from error


def _checked(name: str, images: Any, labels: Any, num_classes: int | None) -> Images:
    """Images with their labels in a fixed random order: a Gram matrix has to be a random sample of them."""
    images = _tensor(name, images)
    labels = None if labels is None else _tensor(f"labels of {name}", labels)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        found = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise UserError(f"{name} is {found}, expected uint8 (N, 3, H, W)")
    if labels is None:
        labels = torch.full((len(images),), -1)
    elif labels.shape != images.shape[:1]:
        raise UserError(f"{name}: {len(images)} images have labels of shape {tuple(labels.shape)}")
    elif labels.is_floating_point() or labels.min() < 0:
        given = f"{labels.dtype}" if labels.is_floating_point() else f"from {labels.min()} on"
        raise UserError(f"{name}: labels are {given}, expected whole numbers from 0; leave them out where unknown")
    elif num_classes and labels.max() >= num_classes:
        raise UserError(f"num_classes {num_classes}: {name} have labels up to {labels.max()}; set {labels.max() + 1}")
    order = shuffled(len(images), FIXED, 1)
    return Images(labels.long().cpu()[order], images.cpu()[order])


def _digest(images: Images) -> str:
    assert isinstance(images.source, Tensor)
    return digest([str(tuple(images.source.shape)), images.source, images.labels])
