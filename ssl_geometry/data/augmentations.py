"""Random operations on batches of images, and the counter-based random numbers behind them.

Numbers are a pure function of (seed, epoch, sample index, view, operation): a hash, not a generator with a state.
Images are float32 in [0, 1]. Each operation gives what ``torchvision.transforms.v2.functional`` gives for the same
parameters; one that skips an image (``p``) acts with its identity parameters: shapes never depend on random numbers,
and nothing here waits for the device.
"""

import hashlib
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_geometry.errors import UserError

Params = dict[str, Tensor]
"""Parameters of one operation: name -> tensor with one row an image."""


def uniform(
    index: Int64[Tensor, " B"], *, seed: int, epoch: int, view: int, stream: str | int, n: int
) -> Float[Tensor, "B n"]:
    """Random numbers that depend on the arguments alone: no state, the same on every device.

    The counter ``index * odd + number * odd`` starts at a 64-bit hash of (seed, epoch, view, stream) and goes through
    the finaliser of SplitMix64.

    Args:
        index: sample indices, int64 (B,).
        seed: seed of the run.
        epoch: epoch.
        view: number of the view.
        stream: what the numbers are for: the name of an operation.
        n: how many numbers for each sample.

    Returns:
        float32 (B, n), uniform in [0, 1) with 24 random bits.

    References:
        Steele, Lea & Flood, *Fast splittable pseudorandom number generators*, 2014; Stafford's mix 13.

    Example:
        >>> both = uniform(torch.tensor([7, 8]), seed=0, epoch=3, view=1, stream="crop", n=2)
        >>> one = uniform(torch.tensor([8]), seed=0, epoch=3, view=1, stream="crop", n=2)
        >>> torch.equal(both[1:], one)
        True
    """
    counter = torch.arange(n, device=index.device) * PER_NUMBER + stream_key(seed, epoch, view, stream)
    return hashed(index[:, None] * PER_SAMPLE + counter)


PER_SAMPLE, PER_NUMBER = -0x61C8864680B583EB, -0x3B314601E57A13AD


def stream_key(seed: int, epoch: int, view: int, stream: str | int) -> int:
    """Where the counter of these numbers starts: 64 bits, signed."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{view}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def hashed(bits: Int64[Tensor, "B n"]) -> Float[Tensor, "B n"]:
    """Counters -> uniform numbers."""
    # int64 multiplication wraps around; a right shift copies the sign, which the mask takes away again.
    bits = (bits ^ (bits >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    bits = bits ^ (bits >> 31 & 0x1FFFFFFFF)
    return (bits >> 40 & 0xFFFFFF).float() * 2.0**-24


def _per_image(values: Tensor) -> Tensor:
    """(B,) -> (B,1,1,1), to meet images."""
    return values[:, None, None, None]


def _luma(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


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
class Op:
    """One random operation on a batch of images.

    Args:
        size: side of the view in pixels.
    """

    name: ClassVar[str]
    n: ClassVar[int]
    """How many random numbers an image takes."""

    size: int

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """Random numbers -> parameters, one row an image. They do not depend on the images' size."""
        raise NotImplementedError

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 h w"]:
        """The operation with these parameters; images float32 in [0, 1]."""
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """The options, in plain types."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "size"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def _check(self, option: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"augment: {self.name}.{option} is {getattr(self, option)!r}, expected {expected}")

    def _check_number(self, option: str, most: float) -> None:
        value = getattr(self, option)
        self._check(option, isinstance(value, int | float) and 0 <= value <= most, f"a number in [0, {most}]")

    def _check_range(self, option: str, most: float) -> None:
        value = getattr(self, option)
        ok = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
        self._check(option, ok and 0 < value[0] <= value[1] <= most, f"[low, high] in (0, {most}]")


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

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        self._check_range("scale", 1)
        self._check_range("ratio", math.inf)

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
class _Sometimes(Op):
    """An operation that skips an image with probability 1 - ``p``: its first random number decides."""

    p: float = 0.5

    def __post_init__(self) -> None:
        self._check_number("p", 1)

    def acts(self, u: Float[Tensor, "B n"]) -> Bool[Tensor, " B"]:
        return u[:, 0] < self.p


@dataclass(frozen=True)
class Flip(_Sometimes):
    """Left and right change places.

    Args:
        size: side of the view in pixels.
        p: probability.
    """

    name = "flip"
    n = 1

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``flip``: bool."""
        return {"flip": self.acts(u)}

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``horizontal_flip``."""
        return torch.lerp(images, images.flip(-1), _per_image(params["flip"].float()))


@dataclass(frozen=True)
class Gray(_Sometimes):
    """Luma in all three channels.

    Args:
        size: side of the view in pixels.
        p: probability.
    """

    name = "gray"
    n = 1

    p: float = 0.2

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``gray``: bool."""
        return {"gray": self.acts(u)}

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``rgb_to_grayscale`` with three channels."""
        return torch.lerp(images, _luma(images), _per_image(params["gray"].float()))


@dataclass(frozen=True)
class Solarize(_Sometimes):
    """Values of at least ``threshold`` are inverted.

    Args:
        size: side of the view in pixels.
        p: probability.
        threshold: in [0, 1].
    """

    name = "solarize"
    n = 1

    p: float = 0.2
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("threshold", 1)

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``solarize``: bool."""
        return {"solarize": self.acts(u)}

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``solarize``."""
        invert = _per_image(params["solarize"]) & (images >= self.threshold)
        return torch.lerp(images, 1 - images, invert.float())


@dataclass(frozen=True)
class Color(_Sometimes):
    """Colour jitter: brightness, contrast, saturation and hue, in an order of its own for each image.

    Args:
        size: side of the view in pixels.
        p: probability.
        brightness: factors lie in [max(0, 1 - brightness), 1 + brightness].
        contrast: likewise.
        saturation: likewise.
        hue: shifts lie in [-hue, hue], in turns of the colour circle, at most 0.5.
    """

    name = "color"
    n = 9
    HUE: ClassVar[int] = 3

    p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("brightness", "contrast", "saturation"):
            self._check_number(option, math.inf)
        self._check_number("hue", 0.5)

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``brightness``, ``contrast``, ``saturation``: factors; ``hue``: turns; ``order`` (B,4) of the four."""
        skips = ~self.acts(u)
        params = {}
        for number, option in enumerate(("brightness", "contrast", "saturation"), start=1):
            spread = getattr(self, option)
            low, high = max(0.0, 1 - spread), 1 + spread
            params[option] = (low + (high - low) * u[:, number]).masked_fill(skips, 1.0)
        params["hue"] = ((2 * u[:, 4] - 1) * self.hue).masked_fill(skips, 0.0)
        params["order"] = u[:, 5:].argsort(dim=1, stable=True)  # 0 brightness, 1 contrast, 2 saturation, 3 hue
        return params

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """Three blends, the hue, three blends: each image uses the three of them that its order asks for.

        Brightness, contrast and saturation are all clamp(f x + (1 - f) reference), with black, the mean luma and the
        luma as references, so one step serves images that are at different operations; idle steps have f = 1.
        """
        order = params["order"]
        hue_at = (order == self.HUE).byte().argmax(1, keepdim=True)
        place = torch.arange(3, device=images.device)
        idle = torch.cat([place >= hue_at, place + 1 <= hue_at], dim=1)
        kind = torch.cat([order[:, :3], order[:, 1:]], dim=1)
        factors = torch.stack([params[name] for name in ("brightness", "contrast", "saturation", "hue")], dim=1)
        factor = factors.gather(1, kind).masked_fill(idle, 1.0)
        to_mean, to_luma = (1 - factor) * (kind == 1), (1 - factor) * (kind == 2)
        steps = torch.stack([factor, to_mean, to_luma]).permute(2, 0, 1)[..., None, None, None]  # (6,3,B,1,1,1)
        images = images.clone()  # and from here on in place: fresh memory costs a CPU more than the sums
        for number, (factor, to_mean, to_luma) in enumerate(steps):
            if number == 3:
                _shift_hue_(images, params["hue"])
            luma = _luma(images)
            # rows first: one long sum may be split over threads in another way for another batch
            mean = luma.mean(3, keepdim=True).mean(2, keepdim=True).mul_(to_mean)
            reference = luma.mul_(to_luma).add_(mean)
            torch.addcmul(reference, images, factor, out=images).clamp_(0, 1)
        return images


def _shift_hue_(images: Float[Tensor, "B 3 H W"], turns: Float[Tensor, " B"]) -> None:
    """Turn the hue in place, keeping value and chroma: HSV without ever forming saturation.

    With h the hue in turns, V the largest channel and C the chroma, a channel is V - C clamp(2 - 6 d, 0, 1), where d is
    the distance on the circle between h and the hue opposite to the channel's own.
    """
    red, green, blue = images.split(1, dim=1)
    largest = torch.maximum(green, blue)
    value = largest.maximum(red)
    chroma = value - torch.minimum(red, green).minimum(blue)
    # 0 or 1, and lerp instead of where: a branch for each pixel costs a CPU thirty times as much. Channels are compared
    # with each other and not with the largest value, which compiled code may round in another way than the channel.
    not_red = largest.sub_(red).sign_().clamp_(min=0)
    not_green = (blue - green).sign_().clamp_(min=0)
    green_or_blue = torch.lerp((blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4), not_green)
    hue = torch.lerp(green - blue, green_or_blue, not_red)
    # grey: chroma 0, and any hue will do
    hue = hue.div_(chroma.clamp(min=1e-12)).div_(6).add_(_per_image(turns))
    opposite = 0.5 - torch.arange(3, device=images.device).view(3, 1, 1) / 3
    away = torch.add(hue, opposite, out=images)
    away = away.sub_(away.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    torch.addcmul(value, chroma, away, value=-1, out=images)


@dataclass(frozen=True)
class Blur(_Sometimes):
    """Gaussian blur with reflected borders.

    Args:
        size: side of the view in pixels.
        p: probability.
        sigma: standard deviation in pixels, low and high, uniform.
        kernel: side of the kernel in pixels, odd; None: a tenth of the view's side.
    """

    name = "blur"
    n = 2

    p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("sigma", math.inf)
        fits = self.kernel is None or (
            isinstance(self.kernel, int) and self.kernel % 2 and 0 < self.kernel < 2 * self.size
        )
        self._check("kernel", bool(fits), f"an odd number below {2 * self.size}, twice the view's side")

    @property
    def radius(self) -> int:
        """Half the kernel, without its middle, in pixels."""
        return max(1, round((self.size / 10 - 1) / 2)) if self.kernel is None else self.kernel // 2

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``sigma`` in pixels; 0 leaves the image as it is."""
        low, high = self.sigma
        return {"sigma": (low + (high - low) * u[:, 1]).masked_fill(~self.acts(u), 0.0)}

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``gaussian_blur``."""
        height, width = images.shape[-2:]
        distance = torch.arange(-self.radius, self.radius + 1, device=images.device)
        # sigma 0 does nothing: far below a pixel, all weight is on the pixel itself
        weight = (-0.5 * (distance / params["sigma"].clamp(min=1e-3)[:, None]) ** 2).exp()
        taps = [_per_image(tap) for tap in (weight / weight.sum(1, keepdim=True)).unbind(1)]
        images = F.pad(images, [self.radius] * 4, mode="reflect")
        images = _weighted_sum([images.narrow(2, start, height) for start in range(len(taps))], taps)
        return _weighted_sum([images.narrow(3, start, width) for start in range(len(taps))], taps)


def _weighted_sum(terms: list[Tensor], weights: list[Tensor]) -> Tensor:
    out = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        out.addcmul_(term, weight)
    return out


@dataclass(frozen=True)
class Rotate(_Sometimes):
    """Rotation about the centre, bilinear, with black corners.

    Args:
        size: side of the view in pixels.
        p: probability.
        degrees: angles lie in [-degrees, degrees]; counter-clockwise is positive.
    """

    name = "rotate"
    n = 2

    p: float = 1.0
    degrees: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("degrees", 180)

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``angle`` in degrees, counter-clockwise."""
        return {"angle": ((2 * u[:, 1] - 1) * self.degrees).masked_fill(~self.acts(u), 0.0)}

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``rotate`` with bilinear interpolation."""
        height, width = images.shape[-2:]
        angle = _per_image(params["angle"].deg2rad())[:, 0]
        cos, sin = angle.cos(), angle.sin()
        # by hand: affine_grid multiplies matrices, in TF32 where that is allowed, which moves pixels
        down = (torch.arange(height, device=images.device) + 0.5 - height / 2)[:, None]
        right = torch.arange(width, device=images.device) + 0.5 - width / 2
        source = torch.stack(
            [(cos * right - sin * down) * (2 / width), (sin * right + cos * down) * (2 / height)], dim=-1
        )
        return F.grid_sample(images, source, align_corners=False)


@dataclass(frozen=True)
class Translate(_Sometimes):
    """Shift by whole pixels; what comes in is black.

    Args:
        size: side of the view in pixels.
        p: probability.
        fraction: shifts lie within this share of the side, in both directions.
    """

    name = "translate"
    n = 3

    p: float = 1.0
    fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("fraction", 1)

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """``down``, ``right``: shares of the side."""
        shift = ((2 * u[:, 1:] - 1) * self.fraction).masked_fill(~self.acts(u)[:, None], 0.0)
        return {"down": shift[:, 0], "right": shift[:, 1]}

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``affine`` with whole pixels."""
        height, width = images.shape[-2:]
        return _shift(images, (params["down"] * height).round().long(), (params["right"] * width).round().long())


OPS: dict[str, type[Op]] = {op.name: op for op in (Crop, PadCrop, Flip, Color, Gray, Blur, Solarize, Rotate, Translate)}
