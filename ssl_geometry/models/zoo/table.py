"""The published checkpoints that this package knows by name: the rows of ``checkpoints.toml``."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint, and where its backbone is in its files.

    Args:
        name: by which ``--models`` takes it.
        family: supervised, contrastive, non-contrastive or prototype.
        epochs: of its training; None if its authors do not state them.
        top1: linear top-1 accuracy on ImageNet in percent, as its authors state it.
        urls: its files; several are parts of one checkpoint, the first is the one that is read.
        architecture: a name that :func:`ssl_geometry.models.build_backbone` takes.
        normalize: of the images that it was trained on; ``none`` is images in [0, 1].
        format: torch; haiku, a pickle of JAX arrays; or tensorflow, a TensorBundle, for which a file that was
            converted to torch is taken too.
        container: key of the state dict in the file; empty where the file is the state dict.
        prefix: of the backbone's keys; what has another prefix is another part of the method.
        drops: what has the prefix and is no part of the backbone, by the first part of its name.
        sha256: of the first file, or as many of its leading digits as are published.
        notes: what a reader of the numbers should know.
    """

    name: str
    family: Literal["supervised", "contrastive", "non-contrastive", "prototype"]
    epochs: int | None
    top1: float
    urls: tuple[str, ...]
    architecture: str = "resnet50"
    normalize: Literal["imagenet", "none"] = "imagenet"
    format: Literal["torch", "haiku", "tensorflow"] = "torch"
    container: str = ""
    prefix: str = ""
    drops: tuple[str, ...] = ("fc",)
    sha256: str | None = None
    notes: str = ""

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that it was trained on."""
        return 224

    @property
    def recipe(self) -> str:
        """Its method without the version: SimCLR v1 and v2 are not independent evidence.

        Example:
            >>> TABLE["moco-v2"].recipe, TABLE["dino-vits16"].recipe
            ('moco', 'dino-vits16')
        """
        return re.sub(r"-v\d$", "", self.name)

    @property
    def file_names(self) -> tuple[str, ...]:
        """Of its files, as the cache keeps them."""
        return tuple(PurePosixPath(urlsplit(url).path).name for url in self.urls)


def _read(file: Path) -> dict[str, Checkpoint]:
    found = {}
    for name, row in tomllib.loads(file.read_text(encoding="utf-8")).items():
        options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
        found[name] = Checkpoint(name, **{"epochs": None, **options})
    return found


TABLE = _read(Path(__file__).with_name("checkpoints.toml"))
"""By name."""
