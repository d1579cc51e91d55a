"""Random operations that move pixels: crops, flips, rotations, translations."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_geometry.data.operation import Limits, Op, Params, Sometimes, per_image


def _shift(
    images: Float[Tensor, "B 3 H W"], down: Int64[Tensor, " B"], right: Int64[Tensor, " B"]
) -> Float[Tensor, "B 3 H W"]:
    """Move images by whole pixels; what comes in is zero."""
    height, width = images.shape[-2:]
    row = torch.arange(height, device=images.device) - down[:, None]
    column = torch.arange(width, device=images.device) - right[:, None]
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]
    source = row.clamp(0, height - 1)[:, :, None] * width + column.clamp(0, width - 1)[:, None]
    moved = images.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, 3, -1)).view_as(images)
    return moved.mul_(inside[:, None])


@dataclass(frozen=True)
class Crop(Op):
    """Random resized crop: a box of random area and shape, resized bilinearly with antialiasing.

    The box is drawn as torchvision's ``RandomResizedCrop`` draws it: up to ten attempts, the first that fits counts,
    else the largest centred box of an allowed shape.

    Args:
        size: side of the view in pixels.
        scale: share of the image's area, low and high.
        ratio: width / height, low and high, log-uniform.
    """

    name = "crop"
    n = 22
    attempts: ClassVar[int] = 10
    ranges: ClassVar[Limits] = {"scale": 1, "ratio": math.inf}

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``area`` (B,10) and ``ratio`` (B,10) of each attempt; ``top``, ``left``: share of the free space."""
        # float64, as torchvision; and so that devices whose exp differs in the last bit still round to the same pixel
        area, ratio, corner = u.double().split((self.attempts, self.attempts, 2), dim=1)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        return {
            "area": self.scale[0] + (self.scale[1] - self.scale[0]) * area,
            "ratio": (low + (high - low) * ratio).exp(),
            "top": corner[:, 0],
            "left": corner[:, 1],
        }

    def box(self, params: Params, height: int, width: int) -> tuple[Int64[Tensor, " B"], ...]:
        """Where the crops lie in images of a given size.

        Args:
            params: what ``sample`` gave.
            height: of the images, in pixels.
            width: of the images, in pixels.

        Returns:
            top, left, height and width of every box, int64 (B,), in pixels.
        """
        area = params["area"] * (height * width)
        w = (area * params["ratio"]).sqrt().round()
        h = (area / params["ratio"]).sqrt().round()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.byte().argmax(1, keepdim=True)
        none_fits = ~fits.any(1)
        low, high = self.ratio
        all_w = round(height * high) if width / height > high else width
        all_h = round(width / low) if width / height < low else height
        w = w.gather(1, first).squeeze(1).masked_fill(none_fits, all_w)
        h = h.gather(1, first).squeeze(1).masked_fill(none_fits, all_h)
        top = (params["top"] * (height - h + 1)).floor().masked_fill(none_fits, (height - all_h) // 2)
        left = (params["left"] * (width - w + 1)).floor().masked_fill(none_fits, (width - all_w) // 2)
        return top.long(), left.long(), h.long(), w.long()

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 S S"]:
        """As ``resized_crop(..., antialias=True)``."""
        height, width = images.shape[-2:]
        top, left, h, w = self.box(params, height, width)
        tall = self._resize_rows(images, top, h)
        return self._resize_rows(tall.mT, left, w).mT.contiguous()

    def _resize_rows(
        self, images: Float[Tensor, "B 3 H W"], start: Int64[Tensor, " B"], length: Int64[Tensor, " B"]
    ) -> Float[Tensor, "B 3 S W"]:
        """The antialiased bilinear filter along one axis: each output row is a weighted sum of a few rows."""
        batch, _, height, width = images.shape
        start, length = start[:, None, None], length[:, None, None]
        scale = length / self.size
        support = scale.clamp(min=1)
        center = (torch.arange(self.size, device=images.device) + 0.5)[:, None] * scale
        taps = torch.arange(math.ceil(2 * max(height / self.size, 1)), device=images.device)
        row = (center - support + 0.5).floor() + taps  # counted from the beginning of the box
        weight = (1 - (row + 0.5 - center).abs() / support).clamp(min=0) * ((row >= 0) & (row < length))
        weight = weight / weight.sum(-1, keepdim=True)
        row = start + row.long().clamp(min=0).minimum(length - 1)
        # all rows of the batch in one table, where each output row looks its own up: gathers and sums in one pass
        plane = torch.arange(batch * 3, device=images.device).view(batch, 3, 1, 1) * height
        return F.embedding_bag(
            (plane + row[:, None]).flatten(0, 2),
            images.reshape(-1, width),
            per_sample_weights=weight[:, None].expand(-1, 3, -1, -1).flatten(0, 2),
            mode="sum",
        ).view(batch, 3, self.size, width)


@dataclass(frozen=True)
class PadCrop(Op):
    """Zero padding on all sides, then a random crop of the original size.

    Args:
        size: side of the view in pixels.
        padding: in pixels.
    """

    name = "pad_crop"
    n = 2

    padding: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = isinstance(self.padding, int) and self.padding >= 0
        self._check("padding", ok, "a whole number of pixels, 0 or more")

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``top``, ``left``: the corner in the padded image, int64, in pixels."""
        corner = (u * (2 * self.padding + 1)).long()
        return {"top": corner[:, 0], "left": corner[:, 1]}

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``pad``, then ``crop``."""
        return _shift(images, self.padding - params["top"], self.padding - params["left"])


@dataclass(frozen=True)
class Flip(Sometimes):
    """Left and right change places.

    Args:
        size: side of the view in pixels.
        p: probability.
    """

    name = "flip"
    n = 1

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``horizontal_flip``."""
        return torch.lerp(images, images.flip(-1), per_image(params["flip"].float()))


@dataclass(frozen=True)
class Rotate(Sometimes):
    """Rotation about the centre, bilinear, with black corners.

    Args:
        size: side of the view in pixels.
        p: probability.
        degrees: angles lie in [-degrees, degrees]; counter-clockwise is positive.
    """

    name = "rotate"
    n = 2
    numbers: ClassVar[Limits] = {"p": 1, "degrees": 180}

    p: float = 1.0
    degrees: float = 30.0

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``angle`` in degrees, counter-clockwise."""
        return {"angle": ((2 * u[:, 1] - 1) * self.degrees).masked_fill(~self.acts(u), 0.0)}

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``rotate`` with bilinear interpolation."""
        height, width = images.shape[-2:]
        angle = per_image(params["angle"].deg2rad())[:, 0]
        cos, sin = angle.cos(), angle.sin()
        # by hand: affine_grid multiplies matrices, in TF32 where that is allowed, which moves pixels
        down = (torch.arange(height, device=images.device) + 0.5 - height / 2)[:, None]
        right = torch.arange(width, device=images.device) + 0.5 - width / 2
        source = torch.stack(
            [(cos * right - sin * down) * (2 / width), (sin * right + cos * down) * (2 / height)], dim=-1
        )
        return F.grid_sample(images, source, align_corners=False)


@dataclass(frozen=True)
class Translate(Sometimes):
    """Shift by whole pixels; what comes in is black.

    Args:
        size: side of the view in pixels.
        p: probability.
        fraction: shifts lie within this share of the side, in both directions.
    """

    name = "translate"
    n = 3
    numbers: ClassVar[Limits] = {"p": 1, "fraction": 1}

    p: float = 1.0
    fraction: float = 0.2

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``down``, ``right``: shares of the side."""
        shift = ((2 * u[:, 1:] - 1) * self.fraction).masked_fill(~self.acts(u)[:, None], 0.0)
        return {"down": shift[:, 0], "right": shift[:, 1]}

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``affine`` with whole pixels."""
        height, width = images.shape[-2:]
        return _shift(images, (params["down"] * height).round().long(), (params["right"] * width).round().long())
