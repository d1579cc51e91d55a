"""One LightningDataModule for every method: batches of uint8 images, the same for any number of processes.

A batch is a dict: ``image`` uint8 (B,3,H,W), ``label`` int64 (B,) (or (B,C), see ``DataModule.multi_label``), and
``index`` int64 (B,), the place of each image in its split on disk. Global batch b of epoch e holds the same images
in the same order for any number of processes, on either storage path, in a resumed run or not: the order is a pure
function of (seed, epoch), and each process takes its slice. Evaluation never pads or repeats: process r of R takes the
batches r, r + R, … of the one list.

Splits: ``val_fraction`` of the training images is the validation split (stratified, by ``seed``). The test split has
one fixed stratified order; ``limit_test`` and the measurement set take its beginning, the same in every run. The
measurement images then come in a fixed random order: a stratified one deals the classes out in rounds, and CKA takes
images that follow each other for a random sample.
"""

import itertools
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor

from ssl_geometry.data.images import Images, data_option, digest, shuffled, stratified
from ssl_geometry.data.loader import Batch, Loader
from ssl_geometry.data.plan import BatchPlan, cores, evenly, every_nth, shares, size_within
from ssl_geometry.data.sources import FIXED, load, torchvision_class
from ssl_geometry.errors import UserError
from ssl_geometry.ranges import Pixels, Seed, at_least, between, check_arguments

logger = logging.getLogger(__name__)

BATCH_SIZE = 256  # these two unless others are asked for, or the data set has less
MEASURE_SIZE = 2048
AUTO_BYTES = 2 * 2**30  # an image folder that decodes to no more than this is kept in memory
BANK_SIZE = 50_000  # training images at most that vote in nearest-neighbour classification
AUTO_SHARE = 0.25  # of the free memory of a CUDA device may go to images
MUCH_DROPPED = 0.1  # of the training images of an epoch


class DataModule(L.LightningDataModule):
    """Images of any data set for training, validation, test and measurement.

    Args:
        dataset: cifar10, cifar100, stl10, svhn, imagenet, digits (of scikit-learn), colored_digits (the same on
            backgrounds of any colour, half of them inverted), torchvision.datasets.<Class>, or the path of an image
            folder: PATH/train/<class>/ with PATH/test/<class>/ (or val/), or PATH/<class>/, of which a fixed fifth
            becomes the test split; or, for images of several classes each, PATH/train/ and PATH/test/ with a
            labels.csv in each (columns `file` and, for each class, 0 or 1).
        root: folder of the downloaded files, or of ImageNet's train/ and val/. Not used by digits and image folders.
        image_size: side in pixels; the shorter side is resized, the middle cut out. By default the images' own size (16
            for both kinds of digits, 256 for imagenet).
        batch_size: training images in a step, over all processes together; by default 256, or all where there are
            fewer.
        eval_batch_size: images in a batch of validation, test and measurement, in each process.
        val_fraction: share of the training images that is kept for validation, with the classes in proportion. 0 trains
            on all of them.
        measure_size: test images that every measurement looks at; the same ones in every run. By default 2,048, or all
            where there are fewer.
        limit_train: train on this many images at most, with the classes in proportion.
        limit_test: use this many test images at most, with the classes in proportion.
        storage: device keeps all pixels in the memory of the training device, workers read images again in each epoch,
            auto chooses device for what is small: array data sets, and files that decode to at most 2 GiB, within a
            quarter of the free GPU memory.
        num_workers: processes that read images, for each training process. By default as many as cores are left,
            at most 8.
        download: download missing files.
        on_error: what to do with an image that cannot be read. raise stops and names it; skip reads all images once
            before the start and leaves such ones out.
        dataset_args: further arguments of a torchvision class, such as {split: train+unlabeled} for stl10.
        seed: chooses the validation images and the order of training images.

    Raises:
        UserError: for options out of range, and on setup where the data set and the options do not fit.

    Example:
        >>> data = DataModule("digits", measure_size=256)
        >>> data.setup()
        >>> {name: tuple(value.shape) for name, value in next(iter(data.train_dataloader())).items()}
        {'image': (256, 3, 16, 16), 'label': (256,), 'index': (256,)}
    """

    num_classes: int
    """Number of classes; like all below, known after ``setup``."""
    class_names: list[str]
    """Names of the classes, in the order of the labels."""
    image_shape: tuple[int, ...]
    """(3, height, width) of every image."""
    num_train: int
    """Images trained on."""
    num_unlabelled: int
    """Images trained on whose class is unknown."""
    multi_label: bool
    """Whether an image may show several classes: labels are then (B,C) int64 of zeros and ones."""

    def __init__(
        self,
        dataset: str = "cifar10",
        root: str = "data",
        image_size: Pixels | None = None,
        batch_size: Annotated[int, at_least(2)] | None = None,
        eval_batch_size: Annotated[int, at_least(1)] = 256,
        val_fraction: Annotated[float, between(0, 1, below=True)] = 0.1,
        measure_size: Annotated[int, at_least(1)] | None = None,
        limit_train: Annotated[int, at_least(1)] | None = None,
        limit_test: Annotated[int, at_least(1)] | None = None,
        storage: Literal["auto", "device", "workers"] = "auto",
        num_workers: Annotated[int, at_least(0)] | None = None,
        download: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
        dataset_args: dict | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        check_arguments(DataModule, locals(), data_option(""))
        self.size_option, self.batch_option = data_option("measure_size"), data_option("eval_batch_size")
        self.dataset = dataset
        self.root = root
        self.image_size = image_size
        self._batch_size = batch_size
        self.batch_size = batch_size or BATCH_SIZE  # until setup knows how many there are
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self._measure_size = measure_size
        self.measure_size = measure_size or MEASURE_SIZE
        self.limit_train = limit_train
        self.limit_test = limit_test
        self.storage = storage
        self.num_workers = num_workers
        self.download = download
        self.on_error = on_error
        self.dataset_args = dataset_args
        self.seed = seed
        self._train: Images | None = None
        self._test: Images | None = None
        self._rows: dict[str, Tensor] = {}
        self._on_device = False
        self._measure_ids: str | None = None
        self._train_loader: Loader | None = None
        self._resume = {"epoch": 0, "batch": 0}

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls this in one process of each node."""
        if self.download and torchvision_class(self.dataset):
            load(self.dataset, self.root, self.image_size, download=True, args=self.dataset_args)

    def setup(self, stage: str | None = None) -> None:
        """Read the data set and make the splits, once; a later call follows the trainer to another device.

        Raises:
            UserError: where files are missing or damaged, or a split is smaller than what is asked of it.
        """
        trains = self.trainer is not None  # measurements share images by whole batches, whatever their number
        asked = self._batch_size
        if trains and asked and (asked % self._world_size or asked < 2 * self._world_size):
            raise UserError(
                f"{data_option('batch_size')} {asked}: expected a multiple of the {self._world_size} processes, "
                f"at least 2 images for each"
            )
        if self._train is None or self._test is None:
            self._train, self._test = self._read()
        if trains:
            self._check_evaluation()
        if self._on_device:
            self._train, self._test = self._train.to(self._device), self._test.to(self._device)

    def _check_evaluation(self) -> None:
        """Before hours of training: every process gets images in every batch of what is evaluated."""
        for split, name in (("val", "val_fraction"), ("test", "limit_test")):
            n = len(self._rows[split])
            parts = (evenly(n, self.eval_batch_size, rank, self._world_size) for rank in range(self._world_size))
            if n and any(part.start == part.stop for part in itertools.chain.from_iterable(parts)):
                raise UserError(
                    f"{data_option(name)} {getattr(self, name)}: {n} {split} images in batches of at most "
                    f"{self.eval_batch_size} leave some of the {self._world_size} processes without any: raise "
                    f"{data_option(name)}{', or set it to 0' if split == 'val' else ''}"
                )

    def _read(self) -> tuple[Images, Images]:
        train, test, self.class_names = load(self.dataset, self.root, self.image_size, args=self.dataset_args)
        if self.on_error == "skip":
            train, test = self._without_damaged(train), self._without_damaged(test)
        if not (len(train) and len(test)):
            raise UserError(
                f"{self.origin}: {len(train)} training and {len(test)} test images; at least one of "
                "each is needed (a fifth of all are test images where no folder test/ or val/ says which)"
            )
        n_val = round(self.val_fraction * len(train))
        n_train = self.limit_train or len(train)
        train = train.select(stratified(train.labels, self.seed)[: n_val + n_train])
        test = test.select(stratified(test.labels, FIXED)[: self.limit_test])
        there = f"the test split has {len(test)} images"
        self.measure_size = size_within(data_option("measure_size"), self._measure_size, MEASURE_SIZE, len(test), there)
        if train.shape != test.shape:
            raise UserError(
                f"{data_option('image_size')} None: training images have the shape {train.shape}, test images "
                f"{test.shape}; set an image size to bring all to one"
            )
        self.num_classes = len(self.class_names)
        self.multi_label = train.labels.ndim == 2
        self.num_train, self.num_test = len(train) - n_val, len(test)
        self.batch_size = self._batch_size or min(BATCH_SIZE, self._multiple(self.num_train))
        if self.trainer and self._batch_size is None and self.batch_size < BATCH_SIZE:
            there = f"there are {self.num_train} training images"
            logger.info(f"{data_option('batch_size')} {self.batch_size} (by default {BATCH_SIZE}): {there}")
        self.image_shape = train.shape
        labelled = (train.labels.view(len(train), -1) >= 0).all(1).nonzero().squeeze(1)  # STL-10 has others
        self._rows = {
            "train": torch.arange(n_val, len(train)),
            "val": labelled[labelled < n_val],
            "test": torch.arange(len(test)),
            "measure": shuffled(self.measure_size, FIXED, 1),
            "bank": labelled[labelled >= n_val][:BANK_SIZE],
        }
        self.num_unlabelled = self.num_train - int((labelled >= n_val).sum())
        if self.trainer:
            sizes = {"training": self.num_train, "validation": len(self._rows["val"]), "test": len(test)}
            counts = ", ".join(f"{n:,} {split}" for split, n in sizes.items())
            logger.info(f"{counts} images of {self.num_classes:,} classes ({self.dataset})")
        self._on_device = self.storage == "device" or (self.storage == "auto" and self._fits(train, test))
        if self._on_device:
            train, test = (images.decode(self._cores, show=self._rank == 0) for images in (train, test))
        return train, test

    def _multiple(self, images: int) -> int:
        """At most so many images, equally many in each process, and at least two."""
        return max(2, images // self._world_size) * self._world_size

    def _fits(self, *splits: Images) -> bool:
        """Whether ``storage: auto`` keeps the pixels in memory."""
        free = torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else float("inf")
        on_disk = sum(images.nbytes for images in splits if not images.in_memory)
        return on_disk <= AUTO_BYTES and sum(images.nbytes for images in splits) <= AUTO_SHARE * free

    def _without_damaged(self, images: Images) -> Images:
        rows = range(self._rank, len(images), self._world_size)
        damaged = images.unreadable(rows, self._cores, show=self._rank == 0)
        if self._world_size > 1:
            parts: list[list[tuple[int, str]]] = [[] for _ in range(self._world_size)]
            dist.all_gather_object(parts, damaged)
            damaged = sorted(itertools.chain.from_iterable(parts))
        if not damaged:
            return images
        if self._rank == 0:
            warnings.warn(
                f"left out {len(damaged)} of {len(images)} images that cannot be read, the first is {damaged[0][1]}",
                stacklevel=2,
            )
        keep = torch.ones(len(images), dtype=torch.bool)
        keep[[row for row, _ in damaged]] = False
        return images.select(keep.nonzero().squeeze(1))

    def train_dataloader(self) -> Loader:
        """Shuffled batches, a new order each epoch; each process gets its slice of each, the last rest is dropped.

        Raises:
            UserError: where there are fewer training images than one batch takes.
        """
        if self.num_train < self.batch_size:
            raise UserError(
                f"{data_option('batch_size')} {self.batch_size}: the training split has only {self.num_train} images, "
                f"and an incomplete batch is dropped; set that number or less"
            )
        if (dropped := self.num_train % self.batch_size) > MUCH_DROPPED * self.num_train:
            fewer = self._multiple(self.num_train // math.ceil(self.num_train / self.batch_size))
            default = "" if self._batch_size else " (default)"
            logger.warning(
                f"{data_option('batch_size')} {self.batch_size}{default}: incomplete batches are dropped, so each "
                f"epoch leaves out {dropped} of {self.num_train} training images, others each time; a batch size of "
                f"{fewer} leaves out {self.num_train % fewer}"
            )
        slices = shares(self.num_train, self.batch_size, self._rank, self._world_size)
        overfits = getattr(self.trainer, "overfit_batches", 0)  # on the same images in each epoch
        self._train_loader = self._loader("train", self._rows["train"], slices, None if overfits else self.seed)
        self._train_loader.load_state_dict(self._resume)
        return self._train_loader

    def state_dict(self) -> dict[str, int]:
        """Where training is in its images; for the checkpoint."""
        return self._train_loader.state_dict() if self._train_loader else self._resume

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next training loader begins there.

        Lightning hands the state of loaders back too late: the schedule asks for the number of batches, and so for the
        loader, before Lightning knows that it resumes.
        """
        self._resume = state

    def val_dataloader(self) -> Loader | list[Loader]:
        """The validation split, if any, in fixed order, the same number of batches in each process."""
        return self._evaluation("val") if len(self._rows["val"]) else []

    def test_dataloader(self) -> Loader:
        """The test split in fixed order, the same number of batches in each process."""
        return self._evaluation("test")

    def loader(
        self,
        split: Literal["train", "val", "test", "measure", "bank"],
        images: int | None = None,
        seed: int | None = None,
        after: int = 0,
    ) -> Loader:
        """Batches of ``eval_batch_size``; process r of R gets the batches r, r + R, … of the one list.

        Args:
            split: which images; measure is the part of the test split that measurements look at, bank the labelled
                training images that probes learn from and nearest neighbours are found in (at most 50,000).
            images: the first so many of the stratified order, which hold the classes in proportion; None takes all.
            seed: shuffles them again in each epoch (see :class:`BatchPlan`); None leaves them in their fixed order.
            after: leaves out so many at the beginning.
        """
        rows = self._first(split, images)[after:]
        slices = every_nth(len(rows), self.eval_batch_size, self._rank, self._world_size)
        return self._loader(split, rows, slices, seed)

    def _first(self, split: str, images: int | None) -> Int64[Tensor, " n"]:
        """Rows of the first so many images of the split's stratified order, in the order of the split."""
        rows = self._rows[split]
        if images is None:
            return rows
        return rows[rows < images] if split == "measure" else rows[:images]

    def _evaluation(self, split: str) -> Loader:
        rows = self._rows[split]
        return self._loader(split, rows, evenly(len(rows), self.eval_batch_size, self._rank, self._world_size))

    def _loader(self, split: str, rows: Tensor, slices: list[slice], seed: int | None = None) -> Loader:
        images, plan = self._images(split), BatchPlan(rows, slices, seed)
        if self._on_device:
            return Loader(images, plan)
        workers = min(8, self._cores - 1) if self.num_workers is None else self.num_workers
        return Loader(images, plan, workers, pin_memory=self._device.type == "cuda", keep_workers=seed is not None)

    def measured(self, numbers: Sequence[int]) -> Batch:
        """Some measurement images, the same in every process.

        Args:
            numbers: their places in the order of measurement.
        """
        images = self._images("measure")
        return images[self._rows["measure"][list(numbers)].to(images.labels.device)]

    @property
    def measure_labels(self) -> Int64[Tensor, " N"]:
        """Classes of the measurement images; (N,C) where images show several."""
        return self._images("measure").labels[self._rows["measure"]].cpu()

    @property
    def measure_sizes(self) -> Int64[Tensor, " C"] | None:
        """Measurement images of each class, which were drawn class by class; None where images show several."""
        return None if self.multi_label else self.measure_labels.bincount(minlength=self.num_classes)

    @property
    def origin(self) -> str:
        """Where the images come from, for messages."""
        return f"{data_option('dataset')} {self.dataset}"

    def tested(self, split: Literal["measure", "test"]) -> dict[str, Any]:
        """Which images classifiers are tested on, for protocols."""
        tested: dict[str, Any] = {"split": split, "n": len(self._rows[split])}
        if split == "test":
            tested |= {"limit_test": self.limit_test, "measurement images": self.measure_size}
        return tested

    @property
    def trained_on(self) -> dict[str, Any]:
        """Which labelled training images classifiers learn from, for protocols."""
        return {
            "dataset": self.dataset,
            "seed": self.seed,
            "val_fraction": self.val_fraction,
            "limit_train": self.limit_train,
            "dataset_args": self.dataset_args or {},
        }

    @property
    def measure_ids(self) -> str:
        """Hash of the measurement images in their order: name of the data set, place of each on disk, all pixels."""
        if self._measure_ids is None:
            images, rows = self._images("measure"), self._rows["measure"]
            loader = self._loader("measure", rows, every_nth(len(rows), self.eval_batch_size))
            what = f"{Path(self.dataset).name} {self.image_shape}", images.index[rows]
            self._measure_ids = digest(itertools.chain(what, (batch["image"] for batch in loader)))
        return self._measure_ids

    def _images(self, split: str) -> Images:
        images = self._train if split in ("train", "val", "bank") else self._test
        assert images is not None, "call setup() first"
        return images

    @property
    def _cores(self) -> int:
        """Cores for each process of this node."""
        return max(1, cores() // (self.trainer.num_devices if self.trainer else 1))

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    @property
    def _rank(self) -> int:
        if self.trainer:
            return self.trainer.global_rank
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def _world_size(self) -> int:
        if self.trainer:
            return self.trainer.world_size
        return dist.get_world_size() if dist.is_initialized() else 1
