"""What all commands share: a parser that tells a mistake in one line, and the exit codes. It loads in no time."""

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning_utilities.core.rank_zero import rank_zero_only

from ssl_geometry.errors import ExitCode, Interrupted, UserError, nearest
from ssl_geometry.ranges import check_arguments, check_value, expected, imported, one_line, without_annotated


class Parser(ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what was wrong and what was meant, and exit with code 2."""
        if self.exit_on_error is False or "--debug" in sys.argv:
            super().error(message, ex)
        print(f"error: {self.one_line(message)}", file=sys.stderr)
        sys.exit(ExitCode.MISTAKE)

    def one_line(self, message: str) -> str:
        """A parser's message without the list of types that it tried."""
        if found := re.search(r"unrecognized arguments: (--[\w.-]+)", message):
            known = [f"--{action.dest}" for action in self._actions]
            return f"unknown option {found[1]!r}; {nearest(found[1], known)} (see --help)"
        return one_line(message, {action.dest: annotation(action) for action in self._actions})

    def restrict(self, option: str, hint: Any) -> None:
        """Give an option of somebody else's class a range.

        Args:
            option: such as ``trainer.max_epochs``.
            hint: an annotation with a range, see :mod:`ssl_geometry.ranges`.
        """
        action = next(action for action in self._actions if action.dest == option)
        action.hint = hint  # type: ignore[attr-defined]
        action.help = f"{(action.help or '').rstrip(' .')} ({expected(hint)})"

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """The options, each in its range.

        Raises:
            UserError: outside.
        """
        options = super().parse_args(*args, **kwargs)
        for action in self._actions:
            name = next((name for name in action.option_strings if name.startswith("--")), action.dest)
            value = options.get(action.dest)
            check_value(annotation(action), value, name)
            for part in value if isinstance(value, list) else [value]:  # classes with their arguments
                if isinstance(part, Namespace) and isinstance(owner := imported(part.get("class_path", "")), type):
                    check_arguments(owner, vars(part.get("init_args") or Namespace()), f"{name}.")
        return options

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """With ranges as words."""
        return without_annotated(super().format_help(*args, **kwargs))


def annotation(action: argparse.Action) -> Any:
    """What an option was declared to take."""
    return getattr(action, "hint", None) or getattr(action, "_typehint", None)


def run_command(command: Callable[[Sequence[str]], Any], args: Sequence[str] | None, interrupted: str) -> None:
    """Run a command: a user's mistake is one line and exit code 2; ``--debug`` shows the traceback.

    Args:
        command: takes the command line.
        args: the command line; None takes the process's.
        interrupted: what to say to Ctrl-C.
    """
    args = sys.argv[1:] if args is None else args
    _quiet()
    try:
        command(args)
    except UserError as error:
        if "--debug" in args:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ExitCode.MISTAKE)
    except Interrupted as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)


def _quiet() -> None:
    """Show what this package says; of Lightning and torch, warnings that a user can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logger = logging.getLogger("ssl_geometry")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.addFilter(lambda _: getattr(rank_zero_only, "rank", 0) == 0)  # Lightning's, where it is loaded
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    for message in (
        "LightningCLI's args parameter",  # options are passed on after base files are put in
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "The number of training batches .* is smaller than the logging interval",
        ".*does not have many workers",
        "The `srun` command is available",  # ssl_geometry.slurm says it where it matters
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message)


def mistake_behind(error: BaseException | None) -> UserError | None:
    """The user's mistake that caused an error, if there is one: parsers wrap what constructors say."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error
