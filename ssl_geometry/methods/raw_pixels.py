"""The baseline without a network."""

from typing import Any

from torch import nn

from ssl_geometry.methods.base import Method

PIXEL_SIDE = 32
"""Larger images are averaged down to this side."""


class RawPixels(Method):
    """The baseline without a network: its pooled features are the pixels.

    Args:
        kwargs: of a trained method, for its views.
    """

    num_views = None

    def __init__(self, **kwargs: Any) -> None:
        fixed = {"backbone": "resnet10", "width": 0.25, "channels_last": False, "compile": False, "measured": "student"}
        super().__init__(**{**kwargs, **fixed})
        side = min(kwargs["image_size"], PIXEL_SIDE)
        pixels = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
        self.backbone = nn.Sequential()  # in place of the small network that the base built
        self.backbone.add_module("pooled", pixels)
        self.num_features = 3 * side**2
