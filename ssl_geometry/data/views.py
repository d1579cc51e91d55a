"""Random views of whole batches of images, made on the device that holds them.

The random numbers behind a view are a pure function of (seed, epoch, sample index, view, operation): a counter-based
hash, not a generator with a state. So the image of a sample is the same for any world size, batch split and order, in
a resumed run or not (bit for bit), and on any device (to float32 rounding); and an operation draws the same numbers
alone and inside a policy, which makes single augmentations comparable (common random numbers).

Images come as uint8, are float32 in [0, 1] while the operations act, and are normalised last. Each operation gives
what ``torchvision.transforms.v2.functional`` gives for the same parameters. An operation that skips an image (``p``)
acts with its identity parameters: shapes never depend on random numbers, and nothing here waits for the device.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import groupby
from typing import Any, Required, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from ssl_geometry.data.augmentations import OPS
from ssl_geometry.data.geometric import Crop
from ssl_geometry.data.operation import Op, Params
from ssl_geometry.data.photometric import Blur
from ssl_geometry.data.random_numbers import PER_NUMBER, PER_SAMPLE, hashed, stream_key
from ssl_geometry.errors import UserError, did_you_mean

Augment = str | dict[str, Any] | list[Any]
"""How views are made, as plain data: an operation or a policy, ``{name: {option: value}}``, or a list of these."""


class ViewSpec(TypedDict, total=False):
    """How some of the training views of each image are made, as plain data: ``{augment: simclr, count: 2}``."""

    augment: Required[Augment]
    """A policy (simclr, byol, supervised, none), an operation, either with options, or a list of these."""
    size: int
    """Side in pixels; the method's ``image_size`` where it is left out."""
    count: int
    """How many views are made this way; 1 where it is left out, or all that the method takes, made one way."""


NORMALIZE = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of each channel, by name."""
CPU_CHUNK = 200_000
"""How many values a CPU works on at a time: under a megabyte, which stays in the cache from one operation to the next.

Whole batches (256 at 32 px, 32 at 224 px) take up to two and three times as long, most of it in page faults.
"""


def simclr(
    strength: float = 0.5,
    blur: bool = False,
    scale: tuple[float, float] = (0.08, 1.0),
    gray: float = 0.2,
    solarize: float = 0.0,
) -> list[Any]:
    """The views of SimCLR.

    Args:
        strength: of the colour jitter: 0.5 on CIFAR, 1 on ImageNet.
        blur: with Gaussian blur, as on ImageNet.
        scale: share of the image's area that a crop takes, low and high.
        gray: probability of grey.
        solarize: probability of solarisation (not in SimCLR; 0.2 for one view of BYOL).

    Returns:
        Operations, as plain data.

    References:
        Chen et al., *A simple framework for contrastive learning of visual representations*, 2020, appendix A and B.9.
    """
    color = {
        "brightness": 0.8 * strength,
        "contrast": 0.8 * strength,
        "saturation": 0.8 * strength,
        "hue": 0.2 * strength,
    }
    ops: list[Any] = [{"crop": {"scale": scale}}, "flip", {"color": color}, {"gray": {"p": gray}}]
    if blur:
        ops.append("blur")
    if solarize:
        ops.append({"solarize": {"p": solarize}})
    return ops


def byol(blur: float = 1.0, solarize: float = 0.0, scale: tuple[float, float] = (0.08, 1.0)) -> list[Any]:
    """One of the two views of BYOL, whose views are not made alike; Barlow Twins, VICReg, MoCo v3 and DINO share them.

    Args:
        blur: probability of Gaussian blur: 1 for the first view, 0.1 for the second; on CIFAR 0.
        solarize: probability of solarisation: 0 for the first view, 0.2 for the second.
        scale: share of the image's area that a crop takes, low and high.

    Returns:
        Operations, as plain data.

    References:
        Grill et al., *Bootstrap your own latent*, 2020, appendix B, table 6.
    """
    color = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    ops: list[Any] = [{"crop": {"scale": scale}}, "flip", {"color": color}, {"gray": {"p": 0.2}}]
    if blur:
        ops.append({"blur": {"p": blur}})
    if solarize:
        ops.append({"solarize": {"p": solarize}})
    return ops


def supervised(padding: int = 4) -> list[Any]:
    """The views of supervised training on small images: padded crop and flip. (On ImageNet: the list ``[crop, flip]``.)

    Args:
        padding: in pixels.

    Returns:
        Operations, as plain data.
    """
    return [{"pad_crop": {"padding": padding}}, "flip"]


def none() -> list[Any]:
    """No augmentation.

    Returns:
        No operation.
    """
    return []


POLICIES: dict[str, Callable[..., list[Any]]] = {"simclr": simclr, "byol": byol, "supervised": supervised, "none": none}


def _options(name: str) -> list[str]:
    if name in OPS:
        return [field.name for field in fields(OPS[name]) if field.name != "size"]
    return list(inspect.signature(POLICIES[name]).parameters)


def _parse(augment: Augment, size: int) -> list[Op]:
    """Plain data -> operations."""
    if isinstance(augment, str):
        augment = {augment: {}}
    if isinstance(augment, list):
        return [op for part in augment for op in _parse(part, size)]
    if not isinstance(augment, dict):
        raise UserError(f"augment: {augment!r} is neither a name, {{name: {{option: value}}}}, nor a list of these")
    ops: list[Op] = []
    for name, options in augment.items():
        options = {} if options is None else options
        if name not in OPS and name not in POLICIES:
            known = did_you_mean(str(name), [*OPS, *POLICIES])
            raise UserError(f"augment: no operation or policy is called {name!r}; {known}")
        if not isinstance(options, dict):
            raise UserError(
                f"augment: {name} has {options!r}, expected {{option: value}} with options {_options(name)}"
            )
        for option in options:
            if option not in _options(name):
                raise UserError(
                    f"augment: {name} has no option {option!r}; {did_you_mean(str(option), _options(name))}"
                )
        try:
            ops += [OPS[name](size, **options)] if name in OPS else _parse(POLICIES[name](**options), size)
        except TypeError as error:
            raise UserError(f"augment: {name} cannot work with {options!r} ({error})") from error
    return ops


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Views are the same in training of any precision; in double precision Lightning makes float64 the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class View:
    """Images -> views: an augmentation, the size, the normalisation. Plain data makes it, and it pickles.

    Where no operation is a crop, the image comes to the size of the view first, without randomness: its centred square,
    resized bilinearly with antialiasing, or copied as it is when the square has that size already.

    Args:
        augment: ``simclr``, ``byol``, ``supervised``, ``none``, an operation (crop, pad_crop, flip, color, gray, blur,
            solarize, rotate, translate), either one with options ``{name: {option: value}}``, or a list of these, in
            which order they act.
        size: side of the view in pixels.
        normalize: what is done last: none, imagenet, cifar10, half, or a pair of means and standard deviations.
        center_crop: side of the centred square, as a share of the image's shorter side.

    Raises:
        UserError: an unknown name or option, or a value out of range.

    Example:
        >>> images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
        >>> view = View({"simclr": {"strength": 1.0}}, size=6, normalize="half")
        >>> views = view(images, torch.tensor([40, 41]), seed=0, epoch=0, view=1)
        >>> views.shape
        torch.Size([2, 3, 6, 6])
        >>> params = view.params(torch.tensor([40, 41]), seed=0, epoch=0, view=1)
        >>> torch.equal(view.replay(images, params), views)
        True
        >>> View("none", size=8)(images, torch.tensor([40, 41]), seed=0, epoch=0, view=0).equal(images / 255)
        True
    """

    def __init__(
        self,
        augment: Augment = "none",
        *,
        size: int,
        normalize: str | tuple[list[float], list[float]] = "none",
        center_crop: float = 1.0,
    ) -> None:
        if not (isinstance(size, int) and size > 0):
            raise UserError(f"size is {size!r}, expected a number of pixels, 1 or more")
        if not (isinstance(center_crop, int | float) and 0 < center_crop <= 1):
            raise UserError(f"center_crop is {center_crop!r}, expected a share of the side in (0, 1]")
        self.size = size
        self.center_crop = center_crop
        self.mean, self.std = _normalization(normalize)
        self.ops: dict[str, Op] = {}
        for op in _parse(augment, size):
            again = sum(other.name == op.name for other in self.ops.values())
            self.ops[f"{op.name}#{again}" if again else op.name] = op

    @property
    def spec(self) -> dict[str, Any]:
        """All that makes the view, in plain types, policies spelled out; ``View(**view.spec)`` is the same view."""
        return {
            "augment": [{op.name: op.options} for op in self.ops.values()],
            "size": self.size,
            "normalize": [list(self.mean), list(self.std)],
            "center_crop": self.center_crop,
        }

    @_float32_by_default()
    def params(
        self, index: Int64[Tensor, " B"], *, seed: int, epoch: int, view: int | Sequence[int]
    ) -> dict[str, Params]:
        """The random parameters of views, without the views.

        Args:
            index: sample indices, int64 (B,), on the device of the images.
            seed: seed of the run.
            epoch: epoch.
            view: number of the view, or numbers of several.

        Returns:
            Operation -> parameter -> tensor with one row per view, in the order of :meth:`__call__`; a second rotate is
            called ``rotate#1``.

        Example:
            >>> View(["flip", "rotate"], size=32).params(torch.arange(3), seed=0, epoch=0, view=0)["flip"]["flip"].shape
            torch.Size([3])
        """
        if not self.ops:
            return {}
        # the numbers of all operations and views at once: a GPU waits longer for launches than for the sums
        lengths = [op.n for op in self.ops.values()]
        numbers = torch.arange(max(lengths), device=index.device) * PER_NUMBER
        counters = torch.cat(
            [
                numbers[: op.n] + stream_key(seed, epoch, number, stream)
                for number in _numbers(view)
                for stream, op in self.ops.items()
            ]
        ).view(-1, 1, sum(lengths))
        u = hashed((index[:, None] * PER_SAMPLE + counters).flatten(0, 1)).split(lengths, dim=1)
        return {stream: op.sample(part) for (stream, op), part in zip(self.ops.items(), u, strict=True)}

    @_float32_by_default()
    def replay(self, images: UInt8[Tensor, "B 3 H W"], params: dict[str, Params]) -> Float[Tensor, "B 3 S S"]:
        """Views with given parameters.

        Args:
            images: uint8 (B, 3, H, W).
            params: what ``params`` gave.

        Returns:
            float32 (B, 3, size, size), on the device of the images.

        Raises:
            UserError: the images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise UserError(f"images are {str(images.dtype).removeprefix('torch.')}, expected uint8 in 0..255")
        chunk = max(4, CPU_CHUNK // (3 * self.size**2))
        if images.device.type != "cpu" or len(images) <= chunk:
            return self._make(images, params)
        views = torch.empty(len(images), 3, self.size, self.size)
        for start in range(0, len(images), chunk):
            rows = slice(start, start + chunk)
            part = {stream: {name: value[rows] for name, value in own.items()} for stream, own in params.items()}
            views[rows] = self._make(images[rows], part)
        return views

    def _make(self, images: UInt8[Tensor, "B 3 H W"], params: dict[str, Params]) -> Float[Tensor, "B 3 S S"]:
        return _act(self._steps, images, params)

    @property
    def _steps(self) -> "list[Step]":
        """What happens to the pixels, in order."""
        return [("first", self._first), *((stream, op.apply) for stream, op in self.ops.items()), ("last", self._last)]

    def _first(self, images: UInt8[Tensor, "B 3 H W"], params: Params) -> Float[Tensor, "B 3 h w"]:
        images = images / 255
        return images if any(isinstance(op, Crop) for op in self.ops.values()) else self._centered(images)

    def _last(self, images: Float[Tensor, "B 3 S S"], params: Params) -> Float[Tensor, "B 3 S S"]:
        for channel, mean, std in zip(images.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)
        return images

    def __call__(
        self,
        images: UInt8[Tensor, "B 3 H W"],
        index: Int64[Tensor, " B"],
        *,
        seed: int,
        epoch: int,
        view: int | Sequence[int],
    ) -> Float[Tensor, "V*B 3 S S"]:
        """One view of each image, or several.

        Args:
            images: uint8 (B, 3, H, W), on any device.
            index: sample indices, int64 (B,), on the same device.
            seed: seed of the run.
            epoch: epoch.
            view: number of the view; or numbers of V views, which are made together, with as many launches as one.

        Returns:
            float32 (V * B, 3, size, size), on the device of the images: the first view of all images, then the second.
        """
        params = self.params(index, seed=seed, epoch=epoch, view=view)
        return self.replay(images.expand(len(_numbers(view)), *images.shape).flatten(0, 1), params)

    def compiled(self) -> "View":
        """The same view, its pixels made by code of ``torch.compile``: for a GPU, where launches take longer than sums.

        Not the same bits: views are up to 1e-5 apart. Measurements and whoever compares bits take the view as it is.
        """
        return _CompiledView(self)

    def _centered(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 S S"]:
        height, width = images.shape[-2:]
        side = max(1, round(self.center_crop * min(height, width)))
        top, left = round((height - side) / 2), round((width - side) / 2)
        images = images[:, :, top : top + side, left : left + side]
        if side == self.size:
            return images
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)


Step = tuple[str, Callable[[Tensor, Params], Tensor]]
"""The name that an operation's parameters have, and what it does to images."""


def _act(steps: Sequence[Step], images: Tensor, params: dict[str, Params]) -> Tensor:
    for stream, act in steps:
        images = act(images, params.get(stream, {}))
    return images


class _CompiledView(View):
    """A view of which all but the blur is compiled: a compiler that fuses both passes computes the first one again for
    each tap of the second.
    """

    def __init__(self, view: View) -> None:
        super().__init__(**view.spec)
        self._runs: list[Callable[[Tensor, dict[str, Params]], Tensor]] = []
        blurs = {stream for stream, op in self.ops.items() if isinstance(op, Blur)}
        for is_blur, steps in groupby(self._steps, key=lambda step: step[0] in blurs):
            run = partial(_act, list(steps))
            # one graph for each shape of images: training has one
            self._runs.append(run if is_blur else torch.compile(run, dynamic=False))

    def _make(self, images: UInt8[Tensor, "B 3 H W"], params: dict[str, Params]) -> Float[Tensor, "B 3 S S"]:
        for run in self._runs:
            images = run(images, params)
        return images


def _numbers(view: int | Sequence[int]) -> Sequence[int]:
    return [view] if isinstance(view, int) else view


def _normalization(normalize: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel."""
    if isinstance(normalize, str):
        if normalize not in NORMALIZE:
            raise UserError(f"normalize is {normalize!r}; {did_you_mean(normalize, NORMALIZE)}")
        return NORMALIZE[normalize]
    try:
        mean, std = (tuple(float(value) for value in values) for values in normalize)
    except (TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(
            f"normalize is {normalize!r}, expected a name or [[mean, ...], [std > 0, ...]] of three channels"
        )
    return mean, std
