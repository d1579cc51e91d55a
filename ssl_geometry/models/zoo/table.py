"""The published checkpoints that this package knows by name."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

FBAI = "https://dl.fbaipublicfiles.com"
PCL = "https://storage.googleapis.com/sfr-pcl-data-research/PCL_checkpoint"
SIMCLR_V2 = "https://storage.googleapis.com/simclr-checkpoints/simclrv2/pretrained/r50_1x_sk0/model.ckpt-250228"
PYCONTRAST = "https://www.dropbox.com/sh/87d24jqsl6ra7t2"


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint, and where its backbone is in its files.

    Args:
        name: by which ``--models`` takes it.
        family: supervised, contrastive, non-contrastive or prototype.
        epochs: of its training; None where its authors do not say.
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


PROTOTYPES = ("projection_head", "prototypes")
SAME_PADDING = "TensorFlow and JAX pad a strided layer at its far side, PyTorch at both"

TABLE: dict[str, Checkpoint] = {
    row.name: row
    for row in (
        Checkpoint(
            "supervised",
            "supervised",
            None,
            76.13,
            ("https://download.pytorch.org/models/resnet50-0676ba61.pth",),
            sha256="0676ba61",
            notes="torchvision's ResNet50_Weights.IMAGENET1K_V1",
        ),
        Checkpoint(
            "insdis",
            "contrastive",
            200,
            59.5,
            (f"{PYCONTRAST}/AACcsSIt1_Njv7GsmsuzZ6Sta/InsDis.pth?dl=1",),
            container="model",
            prefix="module.encoder.",
        ),
        Checkpoint(
            "moco-v1",
            "contrastive",
            200,
            60.6,
            (f"{FBAI}/moco/moco_checkpoints/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar",),
            container="state_dict",
            prefix="module.encoder_q.",
        ),
        Checkpoint(
            "pcl-v1",
            "prototype",
            200,
            61.5,
            (f"{PCL}/PCL_v1_epoch200.pth.tar",),
            container="state_dict",
            prefix="module.encoder_q.",
        ),
        Checkpoint(
            "pirl",
            "contrastive",
            200,
            61.7,
            (f"{PYCONTRAST}/AADN4jKnvTI0U5oT6hTmQZz8a/PIRL.pth?dl=1",),
            container="model",
            prefix="module.encoder.",
        ),
        Checkpoint(
            "pcl-v2",
            "prototype",
            200,
            67.6,
            (f"{PCL}/PCL_v2_epoch200.pth.tar",),
            container="state_dict",
            prefix="module.encoder_q.",
        ),
        Checkpoint(
            "simclr-v1",
            "contrastive",
            1000,
            69.1,
            ("https://storage.googleapis.com/simclr-gcs/checkpoints/ResNet50_1x.zip",),
            normalize="none",
            format="tensorflow",
            container="state_dict",
            notes=f"images in [0, 1] without mean and deviation; {SAME_PADDING} (its max-pooling)",
        ),
        Checkpoint(
            "moco-v2",
            "contrastive",
            800,
            71.1,
            (f"{FBAI}/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",),
            container="state_dict",
            prefix="module.encoder_q.",
        ),
        Checkpoint(
            "simclr-v2",
            "contrastive",
            800,
            71.7,
            (f"{SIMCLR_V2}.index", f"{SIMCLR_V2}.data-00000-of-00001"),
            normalize="none",
            format="tensorflow",
            container="resnet",
            notes=f"images in [0, 1] without mean and deviation; {SAME_PADDING} (its max-pooling)",
        ),
        Checkpoint(
            "sela-v2",
            "prototype",
            400,
            71.8,
            (f"{FBAI}/deepcluster/selav2_400ep_pretrain.pth.tar",),
            prefix="module.",
            drops=PROTOTYPES,
        ),
        Checkpoint(
            "infomin",
            "contrastive",
            800,
            73.0,
            (f"{PYCONTRAST}/AAAzMTynP3Qc8mIE4XWkgILUa/InfoMin_800.pth?dl=1",),
            container="model",
            prefix="module.encoder.",
        ),
        Checkpoint(
            "byol",
            "non-contrastive",
            1000,
            74.3,
            ("https://storage.googleapis.com/deepmind-byol/checkpoints/pretrain_res50x1.pkl",),
            format="haiku",
            container="experiment_state",
            drops=("projector", "predictor", "classifier"),
            notes=f"{SAME_PADDING} (its first and strided 3x3 convolutions, its max-pooling)",
        ),
        Checkpoint(
            "deepcluster-v2",
            "prototype",
            800,
            75.2,
            (f"{FBAI}/deepcluster/deepclusterv2_800ep_pretrain.pth.tar",),
            prefix="module.",
            drops=PROTOTYPES,
        ),
        Checkpoint(
            "swav",
            "prototype",
            800,
            75.3,
            (f"{FBAI}/deepcluster/swav_800ep_pretrain.pth.tar",),
            prefix="module.",
            drops=PROTOTYPES,
        ),
        Checkpoint(
            "dino",
            "non-contrastive",
            800,
            75.3,
            (f"{FBAI}/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",),
            drops=("fc", "head"),
        ),
        Checkpoint(
            "dino-vits16",
            "non-contrastive",
            800,
            77.0,
            (f"{FBAI}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",),
            architecture="vit_small_patch16_224",
            drops=("head",),
        ),
    )
}
"""By name."""
