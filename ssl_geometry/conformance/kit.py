"""All checks, one after the other."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssl_geometry.conformance.steps import autocast, compile, loss_scale, replay, teacher, views
from ssl_geometry.conformance.trainings import (
    accumulation,
    checkpoint,
    collapse,
    measuring,
    parameters,
    resume,
    trains,
    two_processes,
    waits,
    weight_decay,
)
from ssl_geometry.conformance.trial import Trial, alone
from ssl_geometry.conformance.verdict import NotApplicable, Verdict, line_of
from ssl_geometry.errors import UserError, did_you_mean
from ssl_geometry.methods import Method

Check = Callable[[Trial], Verdict]

CHECKS: tuple[Check, ...] = (
    trains,
    resume,
    checkpoint,
    accumulation,
    measuring,
    replay,
    views,
    parameters,
    teacher,
    weight_decay,
    loss_scale,
    waits,
    autocast,
    compile,
    two_processes,
    collapse,
)
"""All checks, in the order of the report."""
LONGEST = 300
"""Characters of an error's message that are shown."""
OF_AUTOGRAD = {
    "Trying to backward through the graph a second time": "keep x.detach(), not x, from one step to the next: in "
    "queues, centres, moving averages",
    "modified by an inplace operation": "change buffers in after_step, or give the loss a clone of them "
    "(buffer.clone()): backward reads what the loss has read",
}
"""Part of an error's message to its fix; they come from the backward pass, where no line of the method runs."""


def check_method(
    method: type[Method],
    options: Mapping[str, Any] | None = None,
    checks: Sequence[str] | None = None,
    option: str = "checks",
) -> Iterator[Verdict]:
    """Train a method for seconds on the CPU, and check what every method must hold.

    Args:
        method: the class; to be checked on two processes, it must be importable.
        options: of its constructor. What is not given is its default, but for what makes it small: a tiny backbone,
            images of 16 pixels, no warm-up, no compilation.
        checks: names of checks; None runs all.
        option: where the user chose them, for the error message.

    Yields:
        A verdict for each check, as soon as it is known; where the method does not train, that one alone.

    Raises:
        UserError: an unknown check, or options that the method does not take.

    Example:
        >>> from ssl_geometry.methods import SimCLR
        >>> for verdict in check_method(SimCLR, {"output_dim": 8}, checks=["accumulation"]):
        ...     print(verdict)
        accumulation: 12 batches, 4 steps of the optimiser, 4 calls of after_step
    """
    known = {check.__name__: check for check in CHECKS}
    for name in checks or ():
        if name not in known:
            raise UserError(f"{option} {name}: no such check; {did_you_mean(name, known)}")
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(method, options or {}, Path(folder))
        names = list(known if checks is None else checks)
        try:
            with alone():
                trial.build()
        except UserError:
            raise
        except Exception as error:
            yield _raised("trains", error)
            return
        try:
            with alone():
                _ = trial.main
        except Exception as error:
            yield _raised("trains", error)
            return
        try:
            if "two_processes" in names:
                with suppress(Exception), alone():  # the check meets it again
                    _ = trial.pair  # they import while other checks run
            for name in names:
                yield _checked(trial, name, known[name])
        finally:
            if "pair" in vars(trial):
                trial.pair.end()


def _checked(trial: Trial, name: str, check: Check) -> Verdict:
    try:
        with alone():
            return replace(check(trial), check=name)
    except NotApplicable as reason:
        return Verdict(str(reason), applies=False, check=name)
    except Exception as error:  # whatever the method raises
        return _raised(name, error)


def _raised(name: str, error: Exception) -> Verdict:
    message = " ".join(str(error).split())
    for words, fix in OF_AUTOGRAD.items():
        if words in message:
            return Verdict(f"{type(error).__name__}: {message.partition(' (')[0].partition(': [')[0]}", fix, check=name)
    if isinstance(error, UserError):
        evidence, _, fix = message.partition("; ")
        return Verdict(evidence, fix=fix or "see there", check=name)
    message = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
    return Verdict(f"{type(error).__name__} in {line_of(error)}: {message}", fix="see there", check=name)
