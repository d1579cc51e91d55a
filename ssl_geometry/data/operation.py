"""The base of all random operations on batches of images.

Images are float32 in [0, 1]. Each operation gives what ``torchvision.transforms.v2.functional`` gives for the same
parameters; one that skips an image (``p``) acts with its identity parameters: shapes never depend on random numbers,
and nothing waits for the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from ssl_geometry.errors import UserError

Limits = Mapping[str, float]
"""Option to the largest value that it takes."""
Params = dict[str, Tensor]
"""Parameters of one operation: name -> tensor with one row per image."""


def per_image(values: Tensor) -> Tensor:
    """(B,) -> (B,1,1,1), to meet images."""
    return values[:, None, None, None]


@dataclass(frozen=True)
class Op:
    """One random operation on a batch of images.

    Args:
        size: side of the view in pixels.
    """

    name: ClassVar[str]
    n: ClassVar[int]
    """Number of random numbers per image."""
    numbers: ClassVar[Limits] = {}
    """Options that are a number from 0 to this."""
    ranges: ClassVar[Limits] = {}
    """Options that are two numbers, low and high, above 0 and up to this."""

    size: int

    def __post_init__(self) -> None:
        for option, most in self.numbers.items():
            value = getattr(self, option)
            self._check(option, isinstance(value, int | float) and 0 <= value <= most, f"a number in [0, {most}]")
        for option, most in self.ranges.items():
            value = getattr(self, option)
            ok = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
            self._check(option, ok and 0 < value[0] <= value[1] <= most, f"[low, high] in (0, {most}]")

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """Random numbers -> parameters, one row per image, independent of the image size."""
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


@dataclass(frozen=True)
class Sometimes(Op):
    """An operation that skips an image with probability 1 - ``p``: its first random number decides."""

    numbers: ClassVar[Limits] = {"p": 1}

    p: float = 0.5

    def sample(self, u: Float[Tensor, "B n"]) -> Params:
        """Whether it acts alone, under the name of the operation: bool."""
        return {self.name: self.acts(u)}

    def acts(self, u: Float[Tensor, "B n"]) -> Bool[Tensor, " B"]:
        """Which images it does not skip."""
        return u[:, 0] < self.p
