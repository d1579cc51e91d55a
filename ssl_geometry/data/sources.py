"""Data sets as two splits of images, train and test, with integer labels.

``load`` knows every source: torchvision's data sets, scikit-learn's digits, folders of images. Which images are test
images never depends on a run's seed.
"""

import csv
import inspect
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torchvision
from jaxtyping import Int64
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from ssl_geometry.data.images import Files, Images, Items, data_option, resize, stratified
from ssl_geometry.errors import UserError, did_you_mean, first_line

logger = logging.getLogger(__name__)
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "svhn": "SVHN"}
NAMES = [*TORCHVISION, "digits", "colored_digits", "imagenet"]
TEST_FRACTION = 0.2  # of a data set that comes without a test split
CONTRAST = 0.25  # of a coloured digit with its background, in every channel
FIXED = 2101  # seeds what belongs to the data set and not to a run: the split just named, the order of test images
LIST = "labels.csv"  # next to images that may show several classes: columns `file` and, for each class, 0 or 1


def torchvision_class(dataset: str) -> str | None:
    """Name of the torchvision class behind a data set, None where there is none."""
    prefix = "torchvision.datasets."
    return dataset.removeprefix(prefix) if dataset.startswith(prefix) else TORCHVISION.get(dataset)


def load(
    dataset: str, root: str = "data", image_size: int | None = None, download: bool = False, args: dict | None = None
) -> tuple[Images, Images, list[str]]:
    """A data set's two splits and the names of its classes.

    A folder whose train/ and test/ hold ``labels.csv`` (columns ``file`` and, for each class, 0 or 1) has images of
    several classes each.

    Args:
        dataset: one of ``NAMES``, ``torchvision.datasets.<Class>``, or the path of an image folder.
        root: folder of torchvision's files, or of ImageNet's train/ and val/.
        image_size: side in pixels; None keeps the images' own (16 for both kinds of digits, 256 for ImageNet).
        download: fetch missing files; torchvision checks them against published hashes.
        args: further arguments of the torchvision class.

    Returns:
        Training images, test images, class names in the order of the labels.

    Raises:
        UserError: for an unknown name, missing files, a folder without images, or test classes unknown to training.

    Example:
        >>> train, test, classes = load("digits")
        >>> len(train), len(test), train.shape, len(classes)
        (1438, 359, (3, 16, 16), 10)
    """
    if dataset == "digits":
        return _digits(16 if image_size is None else image_size)
    if dataset == "colored_digits":
        return _digits(16 if image_size is None else image_size, colored=True)
    if dataset == "imagenet":
        return _folder(Path(root), data_option("root"), 256 if image_size is None else image_size)
    if name := torchvision_class(dataset):
        return _torchvision(name, root, image_size, download, args or {})
    if Path(dataset).is_dir() or os.sep in dataset or dataset.startswith("."):
        return _folder(Path(dataset), data_option("dataset"), image_size)
    raise UserError(
        f"{data_option('dataset')} {dataset}: neither a known data set ({did_you_mean(dataset, NAMES)}), "
        f"nor torchvision.datasets.<Class>, nor an existing image folder"
    )


def _digits(size: int, colored: bool = False) -> tuple[Images, Images, list[str]]:
    from sklearn.datasets import load_digits  # here: other data sets do without

    data = load_digits()
    pixels = data.images * (255 / 16)
    pixels = torch.from_numpy(_on_colors(pixels) if colored else pixels).round().to(torch.uint8)
    return *_fifth(_array(pixels, torch.from_numpy(data.target).long(), size)), [str(digit) for digit in range(10)]


def _on_colors(gray: np.ndarray) -> np.ndarray:
    """Grey images (N,H,W) from 0 to 255 on backgrounds of any colour, (N,3,H,W), half of them inverted.

    White on black becomes a contrast of ``CONTRAST`` in every channel: the background is most of what differs.
    """
    random = np.random.default_rng(FIXED)
    darkest = random.uniform(0, 1 - CONTRAST, (len(gray), 3, 1, 1))
    inverted = random.random((len(gray), 1, 1, 1)) < 0.5
    gray = gray[:, None]
    return 255 * darkest + CONTRAST * np.where(inverted, 255 - gray, gray)


def _folder(path: Path, option: str, size: int | None) -> tuple[Images, Images, list[str]]:
    if not path.is_dir():
        raise UserError(f"{option} {path}: no such folder; expected one with train/<class>/ and test/<class>/ or val/")
    if (path / "train" / LIST).is_file():
        return _listed_splits(path, option, size)
    if not _subfolders(path / "train"):
        if set(_subfolders(path)) <= {"train", "val", "test"}:
            raise UserError(f"{option} {path}: no folders of classes in it; expected train/<class>/ or <class>/")
        images, classes = _files(path, option, size)
        return *_fifth(images), classes
    train, classes = _files(path / "train", option, size)
    test_path = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if test_path is None:
        return *_fifth(train), classes
    unknown = sorted(set(_subfolders(test_path)) - set(classes))
    if unknown:
        raise UserError(f"{option} {path}: {test_path.name}/{unknown[0]} is a class without a folder in train/")
    return train, _files(test_path, option, size, classes)[0], classes


def _files(path: Path, option: str, size: int | None, classes: list[str] | None = None) -> tuple[Images, list[str]]:
    """The images of ``path/<class>/``, labelled by ``classes``, by default the folders that are there."""
    present = _subfolders(path)
    classes = classes or present

    others: Counter[str] = Counter()

    def is_image(file: str) -> bool:
        name = os.path.basename(file).lower()
        if name.startswith("."):
            return False
        if not name.endswith(IMG_EXTENSIONS):
            others[os.path.splitext(name)[1] or "without a suffix"] += 1
        return name.endswith(IMG_EXTENSIONS)

    samples = (
        make_dataset(path, {name: i for i, name in enumerate(classes)}, is_valid_file=is_image, allow_empty=True)
        if classes
        else []
    )
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        logger.warning(
            f"{option} {path}: left out {others.total()} files of other types ({kinds}{', …' * (len(others) > 5)}); "
            f"images are *{{{','.join(IMG_EXTENSIONS)}}}"
        )
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    empty = sorted(set(present) - {classes[label] for label in labels.unique().tolist()})
    if not samples or empty:
        raise UserError(
            f"{option} {path}: no images in {empty[0] + '/' if present else 'it'}; expected files "
            f"<class>/*{{{','.join(IMG_EXTENSIONS)}}}"
        )
    return Images(labels, Files([file for file, _ in samples]), size), classes


def _listed_splits(path: Path, option: str, size: int | None) -> tuple[Images, Images, list[str]]:
    train, classes = _listed(path / "train", option, size)
    test_path = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if test_path is not None and not (test_path / LIST).is_file():
        raise UserError(f"{option} {path}: train/ has a {LIST}, {test_path.name}/ has none")
    if test_path is None:
        return *_fifth(train), classes
    test, others = _listed(test_path, option, size)
    if others != classes:
        raise UserError(f"{option} {path}: {test_path.name}/{LIST} has the columns {others}, train/{LIST} {classes}")
    return train, test, classes


def _listed(path: Path, option: str, size: int | None) -> tuple[Images, list[str]]:
    """The images of a folder that ``labels.csv`` names, each with as many classes as it shows."""
    try:
        with (path / LIST).open(newline="", encoding="utf-8-sig") as file:
            columns = next(csv.reader(file), [])  # pandas renames duplicates
        table = pd.read_csv(path / LIST, dtype={"file": str}, keep_default_na=False)
    except (OSError, ValueError) as error:  # empty, ragged, not UTF-8
        raise UserError(f"{option} {path / LIST}: cannot be read as a table ({first_line(error)})") from error
    classes = [str(name) for name in table.columns if name != "file"]
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError(f"{option} {path / LIST}: the column {twice[0]!r} is there twice; keep one")
    if "file" not in table or not classes or not table[classes].isin([0, 1]).all(axis=None):
        raise UserError(f"{option} {path / LIST}: expected a column `file` and a column of 0 and 1 for each class")
    names = table["file"]
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(f"{option} {path / LIST}: {outside[0]} lies outside {path}; files are named from that folder")
    names = names.map(os.path.normpath)  # ./0.png and 0.png/ are 0.png
    if names.duplicated().any():
        raise UserError(f"{option} {path / LIST}: {names[names.duplicated()].iloc[0]} is there twice; keep one row")
    missing = [name for name in names if not os.path.isfile(path / name)]  # False of a name that no system takes
    if missing or table.empty:
        first = [f"{name[:60]}…" if len(name) > 60 else name for name in missing[:1]]
        raise UserError(f"{option} {path / LIST}: {len(missing)} of {len(table)} images are not there: {first}")
    labels = torch.from_numpy(table[classes].to_numpy(np.int64))
    return Images(labels, Files([str(path / name) for name in names]), size), classes


def _subfolders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _torchvision(
    name: str, root: str, size: int | None, download: bool, args: dict[str, Any]
) -> tuple[Images, Images, list[str]]:
    if name not in torchvision.datasets.__all__:
        raise UserError(
            f"{data_option('dataset')} torchvision.datasets.{name}: no such class; "
            f"{did_you_mean(name, torchvision.datasets.__all__)}"
        )
    kind = getattr(torchvision.datasets, name)
    parameters = _parameters(kind)
    common = {"root": root, "download": download}
    given = {key: value for key, value in common.items() if key in parameters} | args

    def build(**split: bool | str) -> Any:
        try:
            return kind(**given | split)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{data_option('dataset_args')} {args}: {name} does not take them: {first_line(error)}"
            ) from error
        except (OSError, RuntimeError) as error:
            files = Path(root, getattr(kind, "base_folder", "")).absolute()
            fix = (
                "the download failed; put them there"
                if download
                else f"they are not; set {data_option('download')} true"
            )
            raise UserError(
                f"{data_option('root')} {root}: {name} should be in {files}, but {fix} or name the folder that has "
                f"them ({first_line(error)})"
            ) from error

    if "train" in parameters:
        train, test = build(train=True), build(train=False)
    elif "split" in parameters:
        train = build()  # each class's own default, or that of dataset_args
        try:
            test = build(split="test")
        except UserError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            test = build(split="val")
    else:
        train = test = build()
    labels = _labels(train)
    images = _wrap(train, labels, size)
    known = getattr(train, "classes", None) or getattr(train, "categories", None) or []
    classes = [name if isinstance(name, str) else ", ".join(name) for name in known]  # some give synonyms
    if len(classes) <= labels.max():
        classes = [str(label) for label in range(int(labels.max()) + 1)]
    return *(_fifth(images) if test is train else (images, _wrap(test, _labels(test), size))), classes


def _parameters(kind: type) -> set[str]:
    """Names of the arguments of a class, those included that it hands on to a base class."""
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            names |= parameters.keys()
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return names


def _labels(dataset: Any) -> Int64[Tensor, " N"]:
    """Labels of a torchvision data set; each class keeps them under a name of its own."""
    kept = vars(dataset)
    name = next((name for name in ("targets", "labels", "_labels", "y") if name in kept), None)
    try:
        if name:
            labels = torch.as_tensor(kept[name])
        else:  # pairs of path and label, or at last the images themselves
            labels = torch.as_tensor([label for _, label in kept.get("samples", kept.get("_samples", dataset))])
    except (TypeError, ValueError, RuntimeError):
        labels = torch.empty(0)
    if labels.ndim != 1 or labels.is_floating_point():
        raise UserError(
            f"{data_option('dataset')} torchvision.datasets.{type(dataset).__name__}: has no single class label for "
            "each image"
        )
    return labels.long()


def _wrap(dataset: Any, labels: Int64[Tensor, " N"], size: int | None) -> Images:
    pixels = torch.as_tensor(dataset.data) if isinstance(getattr(dataset, "data", None), np.ndarray | Tensor) else None
    if pixels is None or pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4) or len(pixels) != len(labels):
        return Images(labels, Items(dataset), size)
    return _array(pixels, labels, size)


def _array(pixels: Tensor, labels: Int64[Tensor, " N"], size: int | None) -> Images:
    """Images from grey (N,H,W), (N,H,W,3) or (N,3,H,W) pixels."""
    if pixels.ndim == 3:
        pixels = pixels[:, None].expand(-1, 3, -1, -1)
    elif pixels.shape[-1] == 3:
        pixels = pixels.movedim(-1, 1)
    return Images(labels, resize(pixels, size).contiguous())


def _fifth(images: Images) -> tuple[Images, Images]:
    """Split off ``TEST_FRACTION`` of the images, the same ones always, as the test split."""
    order = stratified(images.labels, FIXED)
    n_test = round(TEST_FRACTION * len(order))
    return images.select(order[n_test:].sort().values), images.select(order[:n_test].sort().values)
