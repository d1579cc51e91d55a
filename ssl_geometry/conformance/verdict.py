"""What a check found: it holds, it does not and why, or it does not apply."""

import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import lightning
import torch

HERE = Path(__file__).parent
PACKAGE = HERE.parent
NOT_THE_METHODS = (*(f"{Path(str(module.__file__)).parent}/" for module in (torch, lightning)), f"{HERE}/")
"""Folders whose lines are not what a method's author can change."""
STANDARD_LIBRARY = f"{sysconfig.get_path('stdlib')}/"
INSTALLED = "/site-packages/"


@dataclass(frozen=True)
class Verdict:
    """One line of a report.

    Args:
        evidence: what was seen, in one line.
        fix: what to change, where something is wrong; empty otherwise.
        applies: whether the check means anything for this method.
        check: name of the check.
    """

    evidence: str
    fix: str = ""
    applies: bool = True
    check: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether something is wrong."""
        return bool(self.fix)

    def __str__(self) -> str:
        """As text for an assertion in a test.

        Example:
            >>> print(Verdict("loss of batch 3 is nan", fix="lower --model.lr", check="trains"))
            trains: loss of batch 3 is nan -> lower --model.lr
        """
        return f"{self.check}: {self.evidence}" + (f" -> {self.fix}" if self.fix else "")


class NotApplicable(Exception):
    """A check means nothing for this method; the message says why."""


def line_of(error: BaseException) -> str:
    """The innermost line of an error that its reader may be able to change, as ``file.py:12``."""
    frames: list[tuple[str, int]] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return innermost(reversed(frames))


def current_line() -> str:
    """The innermost line that is running now and is neither torch's, Lightning's nor of this package's checks."""
    frames: list[tuple[str, int]] = []
    frame = sys._getframe(1)
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return innermost(frames)


def innermost(frames: Iterable[tuple[str, int]]) -> str:
    """The first of frames, given from the inside out, outside of torch, Lightning and the checks.

    A line of another package, or of the base of all methods, comes with the line that called it.

    Example:
        >>> innermost([(f"{HERE}/trial.py", 1), (sysconfig.__file__, 1), ("/home/me/my_method.py", 40)])
        'my_method.py:40'
    """
    lines: list[str] = []
    for file, number in frames:
        if file.startswith((*NOT_THE_METHODS, "<")) or (file.startswith(STANDARD_LIBRARY) and INSTALLED not in file):
            continue
        library = file.startswith(str(PACKAGE)) or INSTALLED in file
        if not (library and lines):
            lines.append(f"{Path(file).name}:{number}")
        if not library:
            break
    return ", called at ".join(lines[:2])


def listed(names: Sequence[str], shown: int = 2) -> str:
    """The first of some names.

    Example:
        >>> listed(["a", "b", "c", "d"])
        'a, b and 2 more'
    """
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def verb(names: Sequence[str], one: str = "is", many: str = "are") -> str:
    """As many as there are names."""
    return one if len(names) == 1 else many
