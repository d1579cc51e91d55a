"""Which commands there are: ``python -m ssl_geometry``."""

import ast
from pathlib import Path

COMMANDS = ("fit", "compare", "probe", "survey", "report", "zoo", "doctor")
USAGE = "usage: python -m ssl_geometry.COMMAND [--option VALUE ...]   (--help shows the options of a command)"


def summary(command: str) -> str:
    """The first line of a command's docstring, which is read and not imported."""
    module = Path(__file__).with_name(command)
    source = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def main() -> None:
    """Print the commands, a line for each."""
    print(USAGE, "", *(f"  {command:<8} {summary(command)}" for command in COMMANDS), sep="\n")


if __name__ == "__main__":
    main()
