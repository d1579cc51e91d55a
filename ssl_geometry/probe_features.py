"""Features that ``probe`` trains on: one pass over clean images, and where they are kept."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.devices import MOST_OF_FREE, as_size, free_memory
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.classification import check_features
from ssl_geometry.geometry.logistic import converged_probes_bytes
from ssl_geometry.launching import together
from ssl_geometry.measure.engine import layer_widths, measure_together
from ssl_geometry.measure.features import Features
from ssl_geometry.measure.frozen import POOLED, FrozenFeatures
from ssl_geometry.measure.measurement import Occasion
from ssl_geometry.measure.processes import agreeing, of_each, this_process
from ssl_geometry.measure.subject import Subject
from ssl_geometry.methods.raw_pixels import RawPixels
from ssl_geometry.runs.networks import Loaded
from ssl_geometry.shared_options import chosen_layers

LESS_MEMORY = "set fewer images, fewer --probes.layers (such as [stages]), or another --device"


def extract(model: Loaded, options: Any, progress: Any, console: Console) -> FrozenFeatures:
    """Features of clean training and test images; each image is processed once, by one of the processes.

    Raises:
        UserError: features that fit neither into memory nor on the disk.
        ValueError: features that are not finite.
    """
    data, name, method = options.data, model.name, model.method
    wanted = [POOLED] if isinstance(method, RawPixels) else [*chosen_layers(method.network, options), POOLED]
    subject = Subject.of(method, name)
    layers = subject.layers(wanted, option=options.layers_option)
    with together(options, name):
        widths = layer_widths(subject, layers, data.image_shape)
    folder = kept_where(name, widths, options, console)
    features = Features(widths, {"bank": options.train_images, "test": None}, folder=folder)
    batches = sum(len(data.loader(*part)) for part in (("bank", options.train_images), ("test", None)))
    task = progress.add_task(f"{name}: features", total=batches)
    occasion = Occasion(subject, data, options.out.name, model.epochs or 0)
    measure_together([features], occasion, lambda: progress.advance(task), lambda: together(options, name))
    train, test = features.of("bank"), features.of("test")
    for layer in layers:
        check_features(f"layer {layer}", train[layer])
        check_features(f"layer {layer}, test images", test[layer])
    (labels, index), (test_labels, _) = (
        known(data, *part) for part in (("bank", options.train_images), ("test", None))
    )
    labels, index, test_labels = (values.to(options.device) for values in (labels, index, test_labels))
    depths, agree = subject.depths(layers), partial(together, options, name)
    asked = options.train_images
    return FrozenFeatures(occasion, depths, train, labels, index, test, test_labels, asked, folder, agree, method)


def known(data: DataModule, split: Any, images: int | None = None) -> tuple[Tensor, Tensor]:
    """Labels and indices of all images of a split, in its order."""
    loader = data.loader(split, images)
    return loader.images.labels[loader.sampler.rows], loader.images.index[loader.sampler.rows]


def kept_where(name: str, widths: Mapping[str, int], options: Any, console: Console) -> Path | None:
    """The folder for features that exceed the free memory of some process; None where they fit into memory.

    Raises:
        UserError: they do not fit on the disk either, or one layer and its classifiers do not fit into memory.
    """
    data, (rank, world_size) = options.data, this_process()
    bank, test = (len(known(data, *part)[0]) for part in (("bank", options.train_images), ("test", None)))
    features, images, widest = sum(widths.values()), bank + test, max(widths.values())
    stored, work = 4 * features * images, 0
    if "linear_augmented" in options.evaluations:
        stored += 4 * widths[POOLED] * bank
    if world_size > 1:
        stored *= 2  # upper bound: all in the first process, and as much in the others of its machine
    if not {"layers", "labels"}.isdisjoint(options.evaluations):
        device = torch.device(options.device).type
        work = converged_probes_bytes(bank, widest, data.num_classes, multi_label=data.multi_label, device=device)
    free, work_bytes = free_memory("cpu"), work if options.device == "cpu" else 0
    is_short = any(of_each(stored + work_bytes > MOST_OF_FREE * free))
    with agreeing():
        if rank == 0:
            asked, there = options.train_images or bank, free_memory(options.device)
            if (needed := 4 * widest * max(bank, test) + work) > MOST_OF_FREE * there:
                raise UserError(
                    f"--train_images {asked}: the widest layer of {name}, {widest:,} features of {max(bank, test):,} "
                    f"images, and the classifiers on it take about {as_size(needed)}, {as_size(there)} are free on "
                    f"{options.device}; {LESS_MEMORY}"
                )
        if rank == 0 and is_short:
            folder = next(path for path in (options.out.absolute(), *options.out.absolute().parents) if path.exists())
            kept, left = f"{features:,} features of {images:,} images", shutil.disk_usage(folder).free
            if stored > MOST_OF_FREE * left:
                raise UserError(
                    f"--train_images {asked}: {kept} of {name} take {as_size(stored)}, {as_size(free)} of memory are "
                    f"free and {as_size(left)} on the disk of --out {options.out}; {LESS_MEMORY}, or an --out on "
                    "another disk"
                )
            message = f"{as_size(free)} of memory are free, so in files in {options.out}, removed at the end"
            console.print(f"        kept  {name}: {kept}, {as_size(stored)}; {message}")
    return options.out if is_short else None
