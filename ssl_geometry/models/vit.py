"""timm's vision transformers as backbones: pooled features out, randomly initialised, for images of any size."""

from functools import cache
from typing import Any

from torch import nn

from ssl_geometry.errors import UserError


@cache
def vit_names() -> list[str]:
    """Names of timm's plain vision transformers.

    Returns:
        The names that :func:`build_vit` takes.

    Example:
        >>> "vit_tiny_patch16_224" in vit_names()
        True
    """
    import timm  # a third of a second, which ResNets do without

    return timm.list_models(module="vision_transformer")


def build_vit(
    name: str, image_size: int | None = None, any_size: bool = False, patch_size: int | None = None
) -> nn.Module:
    """Build one of timm's vision transformers without its classifier.

    Args:
        name: one of :func:`vit_names`.
        image_size: side of the images in pixels; None is the size in the name.
        any_size: takes images of other sizes too, with interpolated position embeddings.
        patch_size: side of the patches in pixels, such as 4 for images of 32; None is the size in the name.

    Returns:
        The network: images (B, 3, H, H) to features (B, num_features), pooled as the named model does it.

    Raises:
        UserError: patches do not tile the image.

    References:
        Dosovitskiy et al., *An image is worth 16x16 words*, 2021.

    Example:
        >>> import torch
        >>> net = build_vit("vit_tiny_patch16_224", image_size=64)
        >>> net(torch.rand(2, 3, 64, 64)).shape, net.num_features
        (torch.Size([2, 192]), 192)
        >>> build_vit("vit_tiny_patch16_224", image_size=32, patch_size=4).patch_embed.num_patches
        64
    """
    import timm

    options: dict[str, Any] = {} if patch_size is None else {"patch_size": patch_size}
    net: Any = timm.create_model(
        name, pretrained=False, num_classes=0, img_size=image_size, dynamic_img_size=any_size, **options
    )
    patch = net.patch_embed.patch_size[0]
    if image_size is not None and image_size % patch:
        raise UserError(
            f"image_size={image_size} cuts the patches of {name!r}; expected a multiple of {patch}, or a patch_size"
        )
    return net
