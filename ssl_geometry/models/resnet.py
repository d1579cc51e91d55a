"""ResNets for small and large images, of any width, with torchvision's parameter names and initialisation.

At width 1 with the ``imagenet`` stem, torchvision's state dict without ``fc`` loads strictly, and the features are
torchvision's.
"""

from typing import Any, Literal, get_args

import torchvision.models.resnet as tv
from torch import nn

from ssl_geometry.errors import UserError

Stem = Literal["cifar", "imagenet"]

RESNETS: dict[str, tuple[type[nn.Module], list[int]]] = {
    "resnet10": (tv.BasicBlock, [1, 1, 1, 1]),
    "resnet18": (tv.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (tv.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (tv.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (tv.Bottleneck, [3, 4, 23, 3]),
}
"""The kind of block, and how many of it in each of the four stages."""

STEM_CHANNELS = 64
"""At width 1; torchvision's first stage has as many planes, the later ones more."""


class ResNet(tv.ResNet):
    """torchvision's ResNet without the classifier.

    Args:
        block: torchvision's ``BasicBlock`` or ``Bottleneck``.
        layers: number of blocks in each of the four stages.
        stem: ``imagenet`` is the 7x7 stride-2 convolution and max-pool, ``cifar`` a 3x3 stride-1 convolution.
        width: multiplies every channel count.

    Raises:
        UserError: an unknown stem, or a width that leaves no channel.

    References:
        He et al., *Deep residual learning for image recognition*, 2016. Small stem: Chen et al., *A simple framework
        for contrastive learning of visual representations*, 2020, appendix B.9.

    Example:
        >>> import torch
        >>> ResNet(*RESNETS["resnet50"])(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 2048])
    """

    def __init__(
        self, block: type[nn.Module], layers: list[int], *, stem: Stem = "imagenet", width: float = 1.0
    ) -> None:
        channels = round(STEM_CHANNELS * width)
        if stem not in get_args(Stem):
            raise UserError(f"stem={stem!r} is unknown; expected 'cifar' or 'imagenet'")
        if channels < 1:
            raise UserError(f"width={width} leaves the stem no channel; expected at least {1 / STEM_CHANNELS}")
        self.width = width  # read by _make_layer, which torchvision's constructor calls
        super().__init__(block, layers, num_classes=1)
        self.num_features: int = self.inplanes
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Identity()

    def _make_layer(self, block: type[nn.Module], planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == STEM_CHANNELS:  # the first stage, which follows the scaled stem
            self.inplanes = round(STEM_CHANNELS * self.width)
        return super()._make_layer(block, round(planes * self.width), *args, **kwargs)
