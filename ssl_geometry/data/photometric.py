"""Random operations that change colours: colour jitter, greyscale, solarisation, blur."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ssl_geometry.data.operation import Limits, Params, Sometimes, per_image


def _luma(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


@dataclass(frozen=True)
class Gray(Sometimes):
    """Luma in all three channels.

    Args:
        size: side of the view in pixels.
        p: probability.
    """

    name = "gray"
    n = 1

    p: float = 0.2

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``rgb_to_grayscale`` with three channels."""
        return torch.lerp(images, _luma(images), per_image(params["gray"].float()))


@dataclass(frozen=True)
class Solarize(Sometimes):
    """Values of at least ``threshold`` are inverted.

    Args:
        size: side of the view in pixels.
        p: probability.
        threshold: in [0, 1].
    """

    name = "solarize"
    n = 1
    numbers: ClassVar[Limits] = {"p": 1, "threshold": 1}

    p: float = 0.2
    threshold: float = 0.5

    def apply(self, images: Float[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 H W"]:
        """As ``solarize``."""
        invert = per_image(params["solarize"]) & (images >= self.threshold)
        return torch.lerp(images, 1 - images, invert.float())


@dataclass(frozen=True)
class Color(Sometimes):
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
    numbers: ClassVar[Limits] = {
        "p": 1,
        "brightness": math.inf,
        "contrast": math.inf,
        "saturation": math.inf,
        "hue": 0.5,
    }

    p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1

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
    hue = hue.div_(chroma.clamp(min=1e-12)).div_(6).add_(per_image(turns))
    opposite = 0.5 - torch.arange(3, device=images.device).view(3, 1, 1) / 3
    away = torch.add(hue, opposite, out=images)
    away = away.sub_(away.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    torch.addcmul(value, chroma, away, value=-1, out=images)


@dataclass(frozen=True)
class Blur(Sometimes):
    """Gaussian blur with reflected borders.

    Args:
        size: side of the view in pixels.
        p: probability.
        sigma: standard deviation in pixels, low and high, uniform.
        kernel: side of the kernel in pixels, odd; None: a tenth of the view's side.
    """

    name = "blur"
    n = 2
    ranges: ClassVar[Limits] = {"sigma": math.inf}

    p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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
        taps = [per_image(tap) for tap in (weight / weight.sum(1, keepdim=True)).unbind(1)]
        images = F.pad(images, [self.radius] * 4, mode="reflect")
        images = _weighted_sum([images.narrow(2, start, height) for start in range(len(taps))], taps)
        return _weighted_sum([images.narrow(3, start, width) for start in range(len(taps))], taps)


def _weighted_sum(terms: list[Tensor], weights: list[Tensor]) -> Tensor:
    out = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        out.addcmul_(term, weight)
    return out
