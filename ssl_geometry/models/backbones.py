"""The backbones by name: ResNets, timm's vision transformers, and whatever an import path leads to."""

import importlib
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from ssl_geometry.errors import UserError, did_you_mean, first_line
from ssl_geometry.models.evaluating import evaluating
from ssl_geometry.models.resnet import RESNETS, ResNet, Stem
from ssl_geometry.models.vit import build_vit, vit_names

__all__ = [
    "RESNETS",
    "SMALL_IMAGE",
    "ResNet",
    "Stem",
    "build_backbone",
    "build_vit",
    "import_path",
    "vit_names",
    "why_unknown",
]

SMALL_IMAGE = 64
"""Up to this side, in pixels, a ResNet gets the small stem unless another is chosen."""


def build_backbone(
    backbone: str | nn.Module,
    *,
    stem: Stem | None = None,
    width: float = 1.0,
    image_size: int | None = None,
    other_sizes: Collection[int] = (),
    patch_size: int | None = None,
) -> nn.Module:
    """Build a network from images (B, 3, H, W) to features (B, num_features), randomly initialised by its name.

    Args:
        backbone: ``resnet10``, ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``; one of timm's vision
            transformers, such as ``vit_tiny_patch16_224``; the import path of a class or function without arguments
            that makes a network, such as ``my_package.convnext``; or a network, which is taken as it is.
        stem: of a ResNet; ``imagenet`` is the 7x7 stride-2 convolution and max-pool, ``cifar`` a 3x3 stride-1
            convolution; None takes ``cifar`` for images of at most 64 pixels.
        width: multiplies every channel count of a ResNet.
        image_size: side of the images in pixels; None is the size in the name. A ResNet takes images of any size.
        other_sizes: of images that it is to take as well; a vision transformer interpolates its position embeddings.
        patch_size: side of a vision transformer's patches in pixels; None is the size in the name.

    Returns:
        The network; its attribute ``num_features`` is the number of features.

    Raises:
        UserError: an unknown name, an impossible value, an option that the named network does not have, or a network
            that does not give pooled features.

    Example:
        >>> import torch
        >>> net = build_backbone("resnet18", stem="cifar", width=0.25)
        >>> net(torch.rand(2, 3, 32, 32)).shape, net.num_features
        (torch.Size([2, 128]), 128)
        >>> build_backbone(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())).num_features
        12
    """
    name = backbone if isinstance(backbone, str) else type(backbone).__name__
    is_resnet = isinstance(backbone, str) and backbone in RESNETS
    is_vit = not is_resnet and name in vit_names()
    if patch_size is not None and not is_vit:
        raise UserError(f"patch_size={patch_size} is for vision transformers; leave it out for backbone {name!r}")
    if is_resnet:
        small = image_size is not None and image_size <= SMALL_IMAGE
        return ResNet(*RESNETS[name], stem=stem or ("cifar" if small else "imagenet"), width=width)
    network = _imported(backbone) if isinstance(backbone, str) and not is_vit else backbone
    if stem is not None or width != 1:
        raise UserError(f"stem={stem!r} and width={width} are for ResNets; leave them out for backbone {name!r}")
    if isinstance(network, str):
        network = build_vit(network, image_size, bool(other_sizes), patch_size)
        num_features = int(network.num_features)  # type: ignore[arg-type]
    else:
        size = image_size or 224
        num_features = _count_features(network, name, size)
        if getattr(network, "num_features", None) != num_features:
            network.num_features = num_features  # type: ignore[assignment]
    for other in sorted(other_sizes):
        if (number := _count_features(network, name, other)) != num_features:
            raise UserError(
                f"backbone {name!r} gives {num_features} features, but {number} for images of {other} pixels; expected "
                "features that are pooled over the image"
            )
    return network


def _count_features(network: nn.Module, name: str, size: int) -> int:
    """How many features a network gives for images of a size."""
    try:
        with evaluating(network), torch.no_grad():
            features = network(torch.zeros(2, 3, size, size))
    except Exception as error:  # whatever a network of the user's raises
        raise UserError(f"backbone {name!r} does not take images of {size} pixels ({_in_short(error)})") from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"backbone {name!r} gives {found} for two images, expected pooled features (2, D)")
    return features.shape[1]


def import_path(network: nn.Module) -> str:
    """Where the class of a network is imported from: what a checkpoint says of a network that no name built.

    Example:
        >>> import_path(nn.Flatten())
        'torch.nn.modules.flatten.Flatten'
    """
    return f"{type(network).__module__}.{type(network).__qualname__}"


def _imported(path: str) -> nn.Module:
    """The network that the class or function of an import path makes."""
    module, _, name = path.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"backbone {path!r} is unknown; {why_unknown(path, [*RESNETS, *vit_names()])}") from error
    except Exception as error:
        raise UserError(
            f"backbone {path!r} cannot be imported ({type(error).__name__}: {first_line(error)})"
        ) from error
    try:
        network = make()
    except TypeError as error:
        raise UserError(
            f"backbone {path!r} cannot be made without arguments ({error}); give the import path of a function that "
            "makes it"
        ) from error
    except Exception as error:
        raise UserError(f"backbone {path!r} cannot be made ({_in_short(error)})") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"backbone {path!r} makes {type(network).__name__}, expected a torch module")
    return network


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


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
    return did_you_mean(name, known, otherwise=f"expected one of the {resnets} or of {transformers}, see docs/zoo.md")
