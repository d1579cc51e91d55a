"""The commands: ``ssl-geometry fit …`` is ``python -m ssl_geometry.fit …``; without one, all are listed."""

import ast
import shutil
import sys
import textwrap
from pathlib import Path
from runpy import run_module

from ssl_geometry.errors import ExitCode, did_you_mean

COMMANDS = ("fit", "compare", "probe", "survey", "report", "zoo", "doctor")
USAGE = "usage: ssl-geometry COMMAND [--option VALUE ...]   (--help shows the options of a command)"


def summary(command: str) -> str:
    """The first line of a command's docstring, which is read and not imported."""
    module = Path(__file__).with_name(command)
    source = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def entry(command: str) -> str:
    """A command and its summary, wrapped at the width of the terminal."""
    width = shutil.get_terminal_size().columns
    return textwrap.fill(f"  {command:<8} {summary(command)}", width, subsequent_indent=" " * 11)


def main() -> None:
    """Run the command that is the first argument, or print all of them with what they do."""
    command = next(iter(sys.argv[1:]), "--help")
    if command in COMMANDS:
        del sys.argv[1]
        # As with python -m: Lightning starts the other processes of a node by the module that runs.
        run_module(f"ssl_geometry.{command}", run_name="__main__", alter_sys=True)
    elif command in ("-h", "--help"):
        print(USAGE, "", *map(entry, COMMANDS), sep="\n")
    else:
        print(f"error: no command {command!r}; {did_you_mean(command, COMMANDS)}", file=sys.stderr)
        sys.exit(ExitCode.MISTAKE)


if __name__ == "__main__":
    main()
