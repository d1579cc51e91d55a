"""Which values an option takes: declared once, in the annotation of the argument, and held to in one line.

    def __init__(self, temperature: Annotated[float, above(0)] = 0.5) -> None:
        check_arguments(SimCLR, locals(), "--model.")

A command's parser reads the same annotations: it refuses what lies outside before anything is loaded, and shows the
range in ``--help``. Values stay plain numbers, so that a checkpoint that holds them is plain data.
"""

import importlib
import inspect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ssl_geometry.errors import UserError

LARGEST_SEED = 2**32 - 1
SMALLEST_IMAGE = 8
"""Side in pixels below which the last stage of a ResNet has nothing left to see."""
NAME = re.compile(r"\w[\w .+=@#()~-]*(?<![ .])")
"""One folder that any file system and shell takes, and that `RUN,RUN` and `NAME=RUN` can be read with."""
LONGEST_NAME = 128
PROJECT = re.compile(r"[^/\\#?%:\x00-\x1f]{1,128}")
"""What W&B takes as the name of a project."""


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds; an option that takes a list takes a list of such numbers.

    Args:
        low: the least value, or with ``above`` what all values are greater than.
        high: the greatest value, or with ``below`` what all values are less than.
        above: whether ``low`` itself is out.
        below: whether ``high`` itself is out.
        also: one more value, such as 0 for "off", or -1 for "no limit".
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        if value == self.also:
            return True
        more = value > self.low if self.above else value >= self.low
        less = value < self.high if self.below else value <= self.high
        return more and less and (isinstance(value, int) or math.isfinite(value))

    def __repr__(self) -> str:
        """As it stands in an error and in ``--help``."""
        if not (self.above or self.below or math.isinf(self.high)):
            text = f"from {self.low:,.10g} to {self.high:,.10g}"
        else:
            text = f"{'above' if self.above else 'at least'} {self.low:,.10g}"
            if not math.isinf(self.high):
                text += f", {'below' if self.below else 'at most'} {self.high:,.10g}"
        return text if self.also is None else f"{text}, or {self.also}"


def at_least(low: float, also: float | None = None) -> Range:
    """From a least value on.

    Example:
        >>> 0 in at_least(1), 1 in at_least(1), at_least(2, also=0)
        (False, True, at least 2, or 0)
    """
    return Range(low, also=also)


def above(low: float, at_most: float = math.inf) -> Range:
    """Greater than a bound.

    Example:
        >>> above(0), above(0, at_most=1)
        (above 0, above 0, at most 1)
        >>> math.nan in above(0), math.inf in above(0)
        (False, False)
    """
    return Range(low, at_most, above=True)


def between(low: float, high: float, below: bool = False) -> Range:
    """Between two bounds, which are in; with ``below`` the upper one is not.

    Example:
        >>> between(0, 1), between(0, 1, below=True)
        (from 0 to 1, at least 0, below 1)
    """
    return Range(low, high, below=below)


Seed = Annotated[int, between(0, LARGEST_SEED)]
Pixels = Annotated[int, at_least(SMALLEST_IMAGE)]


def check_value(hint: Any, value: Any, option: str) -> None:
    """Refuse what lies outside the range of an annotation; a list is held to it item by item.

    Args:
        hint: the annotation.
        value: what was given.
        option: as it was typed.

    Raises:
        UserError: outside.

    Example:
        >>> check_value(Annotated[int, at_least(1)] | None, 0, "--keep")
        Traceback (most recent call last):
        ssl_geometry.errors.UserError: --keep 0: expected a whole number of at least 1
    """
    limits = range_of(hint)
    items = value if isinstance(value, list | tuple) else [value]
    numbers = [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]
    outside = limits is not None and not all(number in limits for number in numbers)
    if outside or (get_origin(hint) is Literal and value not in get_args(hint)):
        raise UserError(f"{option} {_as_typed(value)}: expected {expected(hint)}")


def check_argument(hint: Any, value: Any, option: str) -> None:
    """Refuse what is of another kind than an annotation names, or outside its range, in a script (a parser has looked).

    Args:
        hint: the annotation.
        value: what was given.
        option: name of the argument.

    Raises:
        UserError: such a value.

    Example:
        >>> check_argument(Annotated[int, at_least(1)] | None, 8.5, "n")
        Traceback (most recent call last):
        ssl_geometry.errors.UserError: n 8.5: expected a whole number of at least 1
    """
    if not _suits(hint, value):
        raise UserError(f"{option} {_as_typed(value)}: expected {expected(hint)}")
    check_value(hint, value, option)


def _suits(hint: Any, value: Any) -> bool:
    """Whether a value is of the kind that an annotation of plain values names; of other annotations, anything is.

    Example:
        >>> _suits(int, 8.5), _suits(float, 8), _suits(list[str] | None, ["stem"]), _suits(list[str], "stem")
        (False, True, True, False)
    """
    kinds, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        return _suits(kinds[0], value)
    if origin in (Union, UnionType):
        return any(_suits(kind, value) for kind in kinds)
    if origin in (list, Sequence):
        plain = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
        return plain and all(_suits(kind, item) for item in value for kind in kinds)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return not isinstance(hint, type) or hint not in (bool, str, NoneType) or isinstance(value, hint)


def check_arguments(owner: type, values: Mapping[str, Any], prefix: str) -> None:
    """Refuse arguments of a class outside the ranges in the annotations of its constructor, and those that it inherits.

    Args:
        owner: the class.
        values: of its arguments; others are left alone.
        prefix: of its options, such as ``--model.``.

    Raises:
        UserError: outside, or null where a value is needed.
    """
    for name, parameter in parameters(owner).items():
        if name not in values:
            continue
        hint, value = parameter.annotation, values[name]
        if value is None and parameter.default is not None and _is_ours(hint):
            raise UserError(f"{prefix}{name} null: expected {expected(hint)}")
        if value is not parameter.default:
            check_argument(hint, value, prefix + name)


def check_name(name: str, option: str) -> None:
    """Refuse what is no name of one folder.

    Args:
        name: of a run or an experiment.
        option: that gave it.

    Raises:
        UserError: a path, a name of other characters, or one that is too long.

    Example:
        >>> check_name("my run#1", "--run_id")
        >>> check_name("../x", "--run_id")
        Traceback (most recent call last):
        ssl_geometry.errors.UserError: --run_id ../x: expected the name of one folder: letters, digits, spaces and ...
    """
    shown = name if name.isprintable() else repr(name)[1:-1]
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    if size := max(0, len(name.encode(errors="replace")) - LONGEST_NAME):
        raise UserError(f"{option} {shown}: {size + LONGEST_NAME} bytes; expected a name of at most {LONGEST_NAME}")
    if not NAME.fullmatch(name):
        raise UserError(
            f"{option} {shown}: expected the name of one folder: letters, digits, spaces and any of .+=@#()~_-, a "
            "letter or digit first, no space or dot at its end"
        )


def check_project(name: str, option: str) -> None:
    """Refuse what W&B does not take as the name of a project.

    Raises:
        UserError: with the characters.
    """
    if not PROJECT.fullmatch(name):
        shown = name if name.isprintable() else repr(name)[1:-1]
        raise UserError(f"{option} {shown[:60]}: expected 1 to 128 characters, none of /\\#?%:")


def expected(hint: Any) -> str:
    """An annotation in words.

    Example:
        >>> expected(list[Annotated[float, above(0, at_most=1)]])
        'numbers above 0, at most 1'
    """
    if hint is bool or bool in get_args(hint):
        return "true or false"
    if hint is str:
        return "text"
    if values := _literals(hint):
        return f"one of {', '.join(values)}"
    text = str(hint)
    if "str" in text and not range_of(hint):
        single = get_origin(hint) in (Union, UnionType) and str in get_args(hint)
        if not re.search(r"list\[|Sequence\[", text):
            return "text"
        return "a name, or a list such as [a, b]" if single else "a list such as [a, b]"
    whole, several = "int" in text and "float" not in text, re.search(r"list\[|Sequence\[", text)
    kind = ("whole numbers" if whole else "numbers") if several else ("a whole number" if whole else "a number")
    limits = range_of(hint)
    if limits is None:
        return kind if "int" in text or "float" in text else "a value"
    return f"{kind} {'of ' if str(limits).startswith('at ') else ''}{limits}"


def imported(path: str) -> type | None:
    """The class of an import path; None where there is none.

    Args:
        path: such as ``ssl_geometry.methods.SimCLR``.
    """
    module, _, name = path.rpartition(".")
    with suppress(Exception):  # any error of an import; the parser has reported it already
        found = getattr(importlib.import_module(module), name, None)
        return found if isinstance(found, type) else None
    return None


@cache
def parameters(owner: type) -> dict[str, inspect.Parameter]:
    """Arguments of a class's constructor and of those that it hands the rest to, with their annotations."""
    found: dict[str, inspect.Parameter] = {}
    for base in owner.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        constructor = vars(base)["__init__"]
        try:
            hints = get_type_hints(constructor, include_extras=True)
            taken = list(inspect.signature(constructor).parameters.values())[1:]
        except (NameError, TypeError, ValueError):  # annotations that mean something to a type checker alone
            continue
        for parameter in taken:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                annotation = hints.get(parameter.name, Any)
                found.setdefault(parameter.name, parameter.replace(annotation=annotation))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
            break  # it hands nothing on
    return found


def range_of(hint: Any) -> Range | None:
    """The range in an annotation, wherever in it.

    Example:
        >>> range_of(list[Annotated[int, at_least(1)]] | None), range_of(int)
        (at least 1, None)
    """
    own = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range)]
    return next(iter(own), None) or next((found for part in get_args(hint) if (found := range_of(part))), None)


def _literals(hint: Any) -> list[str]:
    """The values of an annotation that lists them."""
    values = [value for value in get_args(hint) if isinstance(value, str)]
    return values or [value for part in get_args(hint) for value in _literals(part)]


def _is_ours(hint: Any) -> bool:
    """Whether an annotation describes in words what is expected, and does not allow null."""
    return type(None) not in get_args(hint) and (hint in (bool, str) or bool(range_of(hint) or _literals(hint)))


def _as_typed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_typed, value))}]"
    if value is None:
        return "null"
    return f"{value:.12g}" if isinstance(value, float) else str(value)
