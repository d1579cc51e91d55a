"""Mistakes of the user, reported in one line.

Who raises what: ``geometry/`` and ``metrics/`` know numbers alone and raise ``ValueError`` (``KeyError`` for a name
that is not there), whether a caller or the data is at fault. All others raise :class:`UserError` for what options,
files or data can have caused. Who hands data to a metric adds what the user knows it by: the epoch
(``callbacks/monitor.py``) or the network (``launching.py``); ``failures.py`` ends a run with the line.
"""

import difflib
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from enum import IntEnum
from functools import wraps
from typing import ParamSpec, TypeVar

P, R = ParamSpec("P"), TypeVar("R")
AS_OPTIONS: ContextVar[bool] = ContextVar("AS_OPTIONS", default=False)
"""Whether messages speak of command-line options (``--cka.layers``) or of a script's arguments (``CKA.layers``)."""


class UserError(ValueError):
    """A mistake that the user can fix: the message names the option, the value, what was expected and the fix.

    The commands print it as one line and exit with code 2; in a library call it is an ordinary ``ValueError``.
    """


class ExitCode(IntEnum):
    """Exit codes of the commands; docs/reliability.md explains what to do about each."""

    DONE = 0
    """Finished; or the run was saved, and SLURM will run its job again."""
    FAULT = 1
    """An unexpected error, with its traceback; or `doctor` or `zoo check` found a problem."""
    MISTAKE = 2
    """One line states the mistake and the fix; nothing is retried."""
    RESUMABLE = 75
    """The run was saved but is not requeued: start it again with `--resume`."""
    INTERRUPTED = 130
    """Ctrl-C."""
    TERMINATED = 143
    """SIGTERM; the run was saved if there was time."""


class Interrupted(Exception):
    """A signal stopped the work after it was saved; the message states what to do next.

    Args:
        message: one line.
        code: of the process's exit.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def as_options(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command so that messages name its options."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        token = AS_OPTIONS.set(True)
        try:
            return command(*args, **kwargs)
        finally:
            AS_OPTIONS.reset(token)

    return run


def argument(name: str, group: str, owner: str) -> str:
    """An argument of a class as the user typed it: an option in a command, an argument in a script.

    Args:
        name: of the argument.
        group: of the command's options that make the class; empty where there is none.
        owner: name of the class.

    Example:
        >>> argument("layers", "cka", "CKA"), as_options(argument)("layers", "cka", "CKA")
        ('CKA.layers', '--cka.layers')
    """
    return f"--{group}.{name}" if AS_OPTIONS.get() and group else f"{owner}.{name}"


def first_line(error: BaseException) -> str:
    r"""The message of an error in one line; its type where it has none.

    Example:
        >>> first_line(ValueError("bad\nworse")), first_line(ValueError())
        ('bad', 'ValueError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, known: Iterable[str], n: int = 3, otherwise: str | None = None) -> str:
    """The known names most similar to ``name``, as text for an error message.

    Args:
        name: what the user wrote.
        known: the valid names.
        n: how many to offer.
        otherwise: text if none is similar; None lists the first valid names.

    Returns:
        ``"did you mean 'a', 'b'?"``, or ``otherwise``.

    Example:
        >>> did_you_mean("cifra10", ["cifar10", "cifar100", "svhn"])
        "did you mean 'cifar10', 'cifar100'?"
        >>> did_you_mean("x", ["cifar10", "svhn"])
        "known: 'cifar10', 'svhn'"
    """
    known = list(known)
    if not known:
        return "there is none"
    matches = difflib.get_close_matches(name, known, n=n, cutoff=0.6)
    if matches:
        return f"did you mean {', '.join(map(repr, matches))}?"
    if otherwise is not None:
        return otherwise
    shown = ", ".join(map(repr, known[:12]))
    return f"known: {shown}{', …' if len(known) > 12 else ''}"
