"""The backbones by name: ResNets, and timm's vision transformers."""

from collections.abc import Iterable

from torch import nn

from ssl_geometry.errors import UserError, nearest
from ssl_geometry.models.resnet import RESNETS, ResNet, Stem
from ssl_geometry.models.vit import build_vit, vit_names

__all__ = ["RESNETS", "SMALL_IMAGE", "ResNet", "Stem", "build_backbone", "build_vit", "vit_names", "why_unknown"]

SMALL_IMAGE = 64
"""Up to this side, in pixels, a ResNet gets the small stem unless another is chosen."""


def build_backbone(
    name: str, *, stem: Stem | None = None, width: float = 1.0, image_size: int | None = None
) -> nn.Module:
    """Build a randomly initialised network from images (B, 3, H, W) to features (B, num_features).

    Args:
        name: ``resnet10``, ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, or one of timm's vision
            transformers, such as ``vit_tiny_patch16_224``.
        stem: of a ResNet; ``imagenet`` is the 7x7 stride-2 convolution and max-pool, ``cifar`` a 3x3 stride-1
            convolution; None takes ``cifar`` for images of at most 64 pixels.
        width: multiplies every channel count of a ResNet.
        image_size: side of the images in pixels; None is the size in the name. A ResNet takes images of any size.

    Returns:
        The network; its attribute ``num_features`` is the number of features.

    Raises:
        UserError: an unknown name, an impossible value, or an option that the named network does not have.

    Example:
        >>> import torch
        >>> net = build_backbone("resnet18", stem="cifar", width=0.25)
        >>> net(torch.rand(2, 3, 32, 32)).shape, net.num_features
        (torch.Size([2, 128]), 128)
    """
    if name in RESNETS:
        small = image_size is not None and image_size <= SMALL_IMAGE
        return ResNet(*RESNETS[name], stem=stem or ("cifar" if small else "imagenet"), width=width)
    if name not in vit_names():
        raise UserError(f"backbone {name!r} is unknown; {why_unknown(name, [*RESNETS, *vit_names()])}")
    if stem is not None or width != 1:
        raise UserError(f"stem={stem!r} and width={width} are for ResNets; leave them out for backbone {name!r}")
    return build_vit(name, image_size)


def why_unknown(name: str, known: Iterable[str]) -> str:
    """What is wrong with the name of a backbone, as text for an error message.

    Args:
        name: what the user wrote, with or without a tag of timm's weights.
        known: the valid names.

    Returns:
        That timm has such a network and it is not supported, or the valid names most like ``name``.

    Example:
        >>> why_unknown("resnet19", RESNETS)
        "did you mean 'resnet18', 'resnet10', 'resnet101'?"
        >>> why_unknown("convnext_atto", RESNETS)
        "timm has it, but only ResNets with torchvision's layers (resnet10, resnet18, resnet34, resnet50, resnet101) and
         timm's plain vision transformers (such as vit_tiny_patch16_224) are supported, see docs/zoo.md"
    """
    import timm  # a third of a second

    resnets = f"ResNets with torchvision's layers ({', '.join(RESNETS)})"
    transformers = "timm's plain vision transformers (such as vit_tiny_patch16_224)"
    architecture = name.partition(".")[0]
    if timm.is_model(architecture) and architecture not in {*RESNETS, *vit_names()}:
        return f"timm has it, but only {resnets} and {transformers} are supported, see docs/zoo.md"
    return nearest(name, known, otherwise=f"expected one of the {resnets} or of {transformers}, see docs/zoo.md")
