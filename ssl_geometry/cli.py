"""What all commands share: a parser that reports a mistake in one line, and the exit codes. It loads in no time."""

import argparse
import errno
import importlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning_utilities.core.rank_zero import rank_zero_only

from ssl_geometry.errors import ExitCode, Interrupted, UserError, did_you_mean, first_line
from ssl_geometry.ranges import check_arguments, check_value, expected, imported, parameters, range_of

TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'list'>": "a list such as [a, b]",
    "<class 'collections.abc.Sequence'>": "a list such as [a, b]",
    "<class 'dict'>": "a mapping such as {a: b}",
    "<class 'NoneType'>": "",
}
"""How the parser names a type, and how a user does."""

OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Files that may not be read or written, and disks that are full: no fault of the program."""


class HelpFormatter(DefaultHelpFormatter):
    """Writes types in words, before lines are wrapped."""

    def _expand_help(self, action: argparse.Action) -> str:
        return types_in_words(super()._expand_help(action))


class Parser(ArgumentParser):
    """Reports a mistake in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """What was wrong and what was meant, as all mistakes.

        Raises:
            UserError: always; with ``--debug``, the parser's own error.
        """
        if self.exit_on_error is False or "--debug" in sys.argv:
            super().error(message, ex)
        raise UserError(self.one_line(message)) from ex

    def one_line(self, message: str) -> str:
        """A parser's message without the list of types that it tried."""
        if found := re.search(r"unrecognized arguments: (--[\w.-]+)", message):
            known = [f"--{action.dest}" for action in self._actions]
            return f"unknown option {found[1]!r}; {did_you_mean(found[1], known)} (see --help)"
        if found := re.search(r"unrecognized arguments: (\S+)", message):
            return f"{found[1]!r} belongs to no option; a flag such as --overwrite takes no value (see --help)"
        line = one_line(message, {action.dest: annotation(action) for action in self._actions})
        words = (f"--{action.dest} " for action in self._actions if not action.option_strings)
        return line.removeprefix(next(filter(line.startswith, words), ""))

    def restrict(self, option: str, hint: Any) -> None:
        """Give an option of somebody else's class a range.

        Args:
            option: such as ``trainer.max_epochs``.
            hint: an annotation with a range, see :mod:`ssl_geometry.ranges`.
        """
        action = next(action for action in self._actions if action.dest == option)
        action.hint = hint  # type: ignore[attr-defined]
        action.help = f"{(action.help or '').rstrip(' .')} ({expected(hint)})"

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any
    ) -> Any:
        """The options, each in its range; a flag of a class, such as ``--probes.logistic``, needs no value.

        Raises:
            UserError: outside.
        """
        words = list(sys.argv[1:] if args is None else args)
        nested = self._switch_on(words)
        options = super().parse_args(words, *more, **kwargs)
        for option, group in nested.items():  # of a class that is known by now
            *_, part = value if isinstance(value := options.get(group), list) else [value]
            owner = imported(part.get("class_path") or "") if isinstance(part, Namespace) else None
            argument = parameters(owner).get(option.rpartition(".")[2]) if owner else None
            if argument and not _is_flag(argument.annotation):
                self.error(f"argument {option}: expected one argument")
        for action in self._actions:
            name = next((name for name in action.option_strings if name.startswith("--")), action.dest)
            value = options.get(action.dest)
            check_value(annotation(action), value, name)
            for part in value if isinstance(value, list) else [value]:  # classes with their arguments
                if isinstance(part, Namespace) and (owner := imported(part.get("class_path") or "")):
                    check_arguments(owner, vars(part.get("init_args") or Namespace()), f"{name}.")
        return options

    def _switch_on(self, words: list[str]) -> dict[str, str]:
        """Give each flag without a value its value, in place.

        Returns:
            Those that belong to a class which a command line or a config file names, to the option of that class.
        """
        actions = {action.dest: action for action in self._actions}
        nested = {}
        for place, (word, following) in enumerate(zip(words, [*words[1:], "--"], strict=False)):
            if not re.fullmatch(r"--[\w-]+(\.\w+)+", word) or not re.match("-[^0-9.]", following):
                continue
            name = word.removeprefix("--")
            if name not in actions:
                groups = (group for group, action in actions.items() if getattr(action, "_typehint", None) is not None)
                group = max((group for group in groups if name.startswith(f"{group}.")), key=len, default=None)
                if group is None:
                    continue
                nested[word] = group
            elif not _is_flag(annotation(actions[name])):
                continue
            words[place] = f"{word}=true"
        return nested

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """With lists and flags as they are typed."""
        text = super().format_help(*args, **kwargs).replace("[ITEM,...]", "'[ITEM, ...]'")
        return re.sub(r"\{true,false(,null)?\}", r"[\g<0>]", text)


def _is_flag(hint: Any) -> bool:
    """Whether an option is true or false, or one of these among others."""
    return hint is bool or any(map(_is_flag, get_args(hint)))


def annotation(action: argparse.Action) -> Any:
    """What an option was declared to take."""
    return getattr(action, "hint", None) or getattr(action, "_typehint", None)


def one_line(message: str, hints: Mapping[str, Any]) -> str:
    r"""A parser's message as one line: the option as typed, the value, and what is expected.

    Args:
        message: of jsonargparse, with all types that it tried.
        hints: annotations of the parser's options.

    Example:
        >>> one_line("Parser key \"k\":\n  Expected a <class 'int'>. Got value: x", {})
        '--k x: expected a whole number'
    """
    lines = message.splitlines()
    places = [i for i, line in enumerate(lines) if 'Parser key "' in line]
    if not places:
        return re.sub(r"^argument ", "", "; ".join(line.strip() for line in lines if line.strip()))
    option = "--" + ".".join(match[1] for i in places if (match := re.search(r'Parser key "([^"]+)"', lines[i])))
    indent = len(lines[places[-1]]) - len(lines[places[-1]].lstrip())
    inner = [line.strip(" -") for line in _block(lines[places[-1] + 1 :], indent)]
    paths = re.findall(r"Problem with given class_path '([^']*)'", message)
    if paths and (problem := next((i for i, line in enumerate(inner) if "class_path" in line), None)) is not None:
        return _class_problem(option, paths[-1], " ".join(inner[problem + 1 : problem + 2]))
    given = [line.partition("Given value: ")[2] for line in inner if "Given value: " in line]
    if given and "LightningModule" in " ".join(inner):
        return _no_class(option, given[0])
    given += [line.partition("Got value: ")[2] for line in inner if "Got value: " in line]
    value = {"None": "null", "True": "true", "False": "false"}.get(given[0], given[0]) if given else ""
    hint = hints.get(option.removeprefix("--"))
    if hint is None and paths and (owner := imported(paths[-1])):
        parameter = parameters(owner).get(option.rpartition(".")[2])
        hint = parameter.annotation if parameter else None
    if nested := re.match(r"NestedArg\(key='([^']*)'", value):  # an option of one that has none
        group = option.rpartition(".")[0]
        owner = imported(paths[-1]) if paths else None
        known = [f"{group}.{name}" for name in parameters(owner)] if owner else [f"--{name}" for name in hints]
        return f"unknown option '{option}.{nested[1]}'; {did_you_mean(f'{group}.{nested[1]}', known, n=1)} (see --help)"
    words = expected(hint) if hint is not None and range_of(hint) else _types(inner)
    is_list = any(re.search(r"Expected a <class '.*(list|Sequence)'>", line) for line in inner)
    if is_list and "," in value and "[" not in value:
        words += f"; write '[{', '.join(part.strip() for part in value.split(','))}]', with the quotes"
    return f"{option} {value}: expected {words}" if words else f"{option}: {'; '.join(line for line in inner if line)}"


def types_in_words(text: str) -> str:
    """The help of an option as plain text, with the types that the parser writes as Python in words.

    Example:
        >>> types_in_words("(type: Optional[Annotated[int, at least 1]], default: null)")
        '(type: int, at least 1, or null, default: null)'
        >>> types_in_words("as in ``val/knn`` (type: Union[list[Annotated[float, above 0]], Optional[Literal['a']]])")
        "as in val/knn (type: Union[list[float, above 0], Literal['a'] | null])"
    """
    text = re.sub(r"Optional\[Annotated\[(\w+), ([^\[\]]*)\]\]", r"\1, \2, or null", text)
    text = re.sub(r"Annotated\[(\w+), ([^\[\]]*)\]", r"\1, \2", text)
    text = re.sub(r"Optional\[(Literal\[[^\[\]]*\]|[\w.]+)\]", r"\1 | null", text)
    return text.replace("``", "")  # code in docstrings


def _block(lines: list[str], indent: int) -> Iterator[str]:
    """The lines that are indented deeper, up to the first that is not."""
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return
        yield line


def _types(lines: list[str]) -> str:
    """The types that a parser tried, in words."""
    words, literals = [], []
    for line in lines:
        for kind in re.findall(r"Expected an? (<class [^>]+>|typing\.Literal\[.*?\](?=\.|$))", line):
            if kind.startswith("typing"):
                literals += [value.strip("' ") for value in kind.removeprefix("typing.Literal[")[:-1].split(",")]
            else:
                words.append(TYPES.get(kind, kind))
    if "a number" in words and "a whole number" in words:
        words.remove("a whole number")
    words += [f"one of {', '.join(dict.fromkeys(literals))}"] if literals else []
    return " or ".join(word for word in dict.fromkeys(words) if word)


def _class_problem(option: str, path: str, reason: str) -> str:
    """A class that cannot be imported, or that does not take an option."""
    owner = imported(path)
    if owner and (found := re.search(r"Option '([\w.]+)' is not accepted", reason)):
        known = did_you_mean(found[1], parameters(owner))
        return f"unknown option '{option}.{found[1]}'; {known} (see {option}.help {path})"
    module_name, _, name = path.rpartition(".")
    with suppress(ImportError, ValueError):
        module = importlib.import_module(module_name)
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        if owner is None:
            return f"{option} {path}: {module_name} has no {name}; {did_you_mean(name, classes)}"
    example = "measure.CKA" if option == "--measurements" else "methods.SimCLR"
    return f"{option} {path}: {reason}; expected the import path of a class, such as ssl_geometry.{example}"


def _no_class(option: str, path: str) -> str:
    """A path that names no class, or a class in a file that cannot be imported."""
    reason = "names no class"
    try:
        importlib.import_module(path.rpartition(".")[0] or path)
    except ImportError as error:
        reason = first_line(error)
    except Exception as error:  # whatever a file of the user raises
        return f"{option} {path}: cannot be imported ({type(error).__name__}: {first_line(error)})"
    return f"{option} {path}: {reason}; expected the import path of a class, such as ssl_geometry.methods.SimCLR"


def in_words(error: OSError) -> str:
    """The file that an error of the system is about, where it names one, and the reason."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def run_command(command: Callable[[Sequence[str]], Any], args: Sequence[str] | None, interrupted: str) -> None:
    """Run a command: a user's mistake is one line and exit code 2; ``--debug`` shows the traceback.

    Args:
        command: takes the command line.
        args: the command line; None takes the process's.
        interrupted: message after Ctrl-C.
    """
    args = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal without ±; files are always UTF-8
    _quiet()
    format_before, warnings.formatwarning = warnings.formatwarning, warning_line
    try:
        command(args)
    except UserError as error:
        if "--debug" in args:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ExitCode.MISTAKE)
    except OSError as error:
        if "--debug" in args or error.errno not in OF_THE_MACHINE:
            raise
        print(f"error: {in_words(error)}", file=sys.stderr)
        sys.exit(ExitCode.MISTAKE)
    except Interrupted as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
    finally:
        warnings.formatwarning = format_before


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    r"""A warning as one line, without its place in the source, which is of no use to a user; of one process alone.

    Example:
        >>> warning_line("few\n  pairs", UserWarning, "/x/torchmetrics/metric.py", 714)
        'warning: few pairs\n'
    """
    return f"warning: {' '.join(str(message).split())}\n" if _is_first() else ""


def _is_first() -> bool:
    """Whether this process speaks for all: by Lightning's number of it, where Lightning is loaded."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _quiet() -> None:
    """Show messages of this package, and those warnings of Lightning and torch that a user can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logger = logging.getLogger("ssl_geometry")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.addFilter(lambda _: _is_first())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    for message in (
        "LightningCLI's args parameter",  # options are passed on after base files are put in
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "The number of training batches .* is smaller than the logging interval",
        ".*does not have many workers",
        "The `srun` command is available",  # ssl_geometry.runs.slurm reports it where it matters
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message)


def mistake_behind(error: BaseException | None) -> UserError | None:
    """The user's mistake that caused an error, if there is one: parsers wrap errors of constructors."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error
