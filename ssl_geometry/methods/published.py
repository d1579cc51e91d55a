"""Networks that others trained, and untrained ones: a backbone with the images that it expects, and no loss."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from ssl_geometry.errors import UserError, did_you_mean, first_line
from ssl_geometry.methods.base import Batch, Method
from ssl_geometry.models import RESNETS, vit_names, why_unknown
from ssl_geometry.models.zoo import TABLE, fetch, load_checkpoint, load_strictly
from ssl_geometry.ranges import Pixels, Seed, check_value

IMAGENET_CLASSES = {1_000, 11_221, 11_821, 21_841, 21_843}
"""Of ImageNet-1k, the processed 21k, 12k, and the two counts of 22k: weights with such a classifier saw labels.

Without one, or with an embedding of images and texts (CLIP), they may have or not.
"""


class Published(Method):
    """A network to measure: its backbone, how it wants its images, and whose it is.

    Args:
        backbone: a ResNet or a vision transformer, as for every method.
        image_size: side of its images in pixels.
        normalize: as its images were normalised when it was trained.
        center_crop: share of an image's side that it sees.
        family: supervised, contrastive, non-contrastive, prototype, untrained, or unknown.
        source: name of the checkpoint.
        kwargs: as for every method.
    """

    num_views = None

    def __init__(
        self,
        backbone: str = "resnet50",
        image_size: int = 224,
        normalize: str | tuple[list[float], list[float]] = "imagenet",
        center_crop: float = 0.875,
        family: str = "unknown",
        source: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            backbone=backbone, image_size=image_size, normalize=normalize, center_crop=center_crop, **kwargs
        )
        self.family = family
        self.source = source
        self.learns_from_labels = None if family in ("untrained", "unknown") else family == "supervised"
        self.eval()

    @property
    def recipe(self) -> str:
        """Versions of one published method are one recipe; untrained networks of one architecture are."""
        if self.family == "untrained":
            return f"untrained {self.init_args['backbone']}"
        return TABLE[self.source].recipe if self.source in TABLE else self.source

    def setup(self, stage: str) -> None:
        """Refuse training.

        Raises:
            UserError: always.
        """
        raise UserError("--model Published: a network to measure, it has no loss; train with SimCLR or Supervised")

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """There is none.

        Raises:
            UserError: always.
        """
        raise UserError("--model Published: a network to measure, it has no loss; train with SimCLR or Supervised")


def from_zoo(name: str, file: Path | None = None) -> Published:
    """A checkpoint of the table, downloaded where it is not yet in the cache.

    Args:
        name: of the checkpoint.
        file: its file, where it was downloaded by hand.

    Returns:
        The network, on the CPU.

    Raises:
        UserError: a download that failed, or a file that is not this checkpoint.
    """
    row = TABLE[name]
    file = file or fetch(row)
    network = Published(row.architecture, row.image_size, row.normalize, family=row.family, source=name)
    load_checkpoint(network.backbone, row, file)
    return network


def from_torchvision(name: str) -> Published:
    """A ResNet with torchvision's default weights, normalised as they say.

    Args:
        name: ``resnet18``, ``resnet34``, ``resnet50`` or ``resnet101``.

    Returns:
        The network, on the CPU.

    Raises:
        UserError: a network that is not offered, or a download that failed.
    """
    known = [name for name in torchvision.models.list_models(torchvision.models) if name in RESNETS]
    if name not in known:
        raise UserError(f"torchvision:{name}: {did_you_mean(name, known)}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, the disk or the file; what is kept of it is torchvision's matter
        raise UserError(f"torchvision:{name}: could not load {weights.url}: {first_line(error)}") from error
    view = weights.transforms()
    (size,), (resized,) = view.crop_size, view.resize_size
    normalize = list(view.mean), list(view.std)
    network = Published(name, size, normalize, size / resized, family="supervised", source=f"torchvision:{name}")
    _take(network, state, "fc.", f"torchvision:{name}")
    return network


def from_timm(name: str) -> Published:
    """A ResNet or a plain vision transformer of timm with its published weights, normalised as they say.

    Weights that were published with a classifier of ImageNet learned from labels; of others that is unknown.

    Args:
        name: of timm, with or without a tag: ``vit_small_patch16_224.dino``.

    Returns:
        The network, on the CPU.

    Raises:
        UserError: a network that is not offered, or a download that failed.
    """
    import timm  # a third of a second

    architecture = name.partition(".")[0]
    known = [known for known in timm.list_pretrained() if known.partition(".")[0] in {*RESNETS, *vit_names()}]
    if name not in known and name not in {known.partition(".")[0] for known in known}:
        raise UserError(f"timm:{name} is unknown; {why_unknown(name, known)}")
    try:
        trained = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of the network, the disk or the file; what is kept of it is timm's matter
        raise UserError(f"timm:{name}: could not load it: {first_line(error)}") from error
    given: dict[str, Any] = trained.pretrained_cfg  # type: ignore[assignment]
    normalize = list(given["mean"]), list(given["std"])
    size = given["input_size"][1]
    family = "supervised" if given["num_classes"] in IMAGENET_CLASSES else "unknown"
    network = Published(architecture, size, normalize, given["crop_pct"], family, source=f"timm:{name}")
    _take(network, trained.state_dict(), "fc.", f"timm:{name}")
    return network


def untrained(text: str) -> Published:
    """An untrained network.

    Args:
        text: ``ARCH``, ``ARCH@PIXELS``, each with or without ``:SEED``, such as ``vit_small_patch16_224@64:1``.

    Returns:
        The network, on the CPU.

    Raises:
        UserError: an architecture that is not known, or no number in range where one is expected.

    Example:
        >>> network = untrained("resnet10@32:1")
        >>> network.family, network.num_features, network.clean_view.size
        ('untrained', 512, 32)
    """
    found = re.fullmatch(r"([^@:]+)(?:@(\d+))?(?::(\d+))?", text)
    if found is None:
        raise UserError(
            f"random:{text}: expected random:ARCH, random:ARCH@PIXELS, or either with :SEED, where ARCH is a name "
            f"without timm: or torchvision: before it, such as resnet18 or vit_tiny_patch16_224"
        )
    seed, size = int(found[3] or 0), int(found[2] or 224)
    check_value(Seed, seed, "--models random:ARCH:SEED")
    check_value(Pixels, size, "--models random:ARCH@PIXELS")
    torch.manual_seed(seed)
    return Published(found[1], size, family="untrained", source=f"random:{text}")


def _take(network: Published, state: Mapping[str, Tensor], head: str, source: str) -> None:
    weights = {name: value for name, value in state.items() if not name.startswith(head)}
    load_strictly(network.backbone, weights, source)
