"""Check whether this machine is ready, or whether a method is right; one line per check, with the fix if it fails.

python -m ssl_geometry.doctor
srun --nodes=1 --gpus-per-node=1 python -m ssl_geometry.doctor --data.root data/imagenet     # on a node of the cluster
python -m ssl_geometry.doctor --method my_package.MyMethod --model.temperature 0.2           # trains it for seconds

With ``--method`` it checks a method instead of the machine. Trained at small size on the CPU, it must resume bit for
bit, have the loss and gradients of one process on two, run under autocast and torch.compile, move its moving averages
once per step of the optimiser, and not collapse. The same checks run in a test:
:func:`ssl_geometry.conformance.check_method`.
"""

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ssl_geometry.cli import Parser, run_command
from ssl_geometry.errors import ExitCode, Interrupted, UserError, first_line
from ssl_geometry.progress import progress_bar

PROGRAM = "python -m ssl_geometry.doctor"
DESCRIPTION = (
    "Check whether this machine is ready, or with --method whether a method is right: one line per check, with the fix "
    "if it fails (exit code 1). A method is trained at small size on the CPU, which takes about half a minute."
)
PARITY = "two_processes"


def examine(args: Sequence[str]) -> None:
    """Print all lines.

    Args:
        args: command line.

    Raises:
        Interrupted: with code 1, where something is to be done.
    """
    words = list(args)
    parser = Parser(prog=PROGRAM, description=DESCRIPTION)
    parser.add_argument("--runs", type=str, default="runs", help="folder that runs will be written to")
    parser.add_argument("--data.root", type=str, default="data", help="folder of the images")
    parser.add_argument("--skip_parity", action="store_true", help="do not compare two processes with one (10 s)")
    parser.add_argument(
        "--method",
        type=str | None,
        help="import path of a method that is checked instead of the machine, such as my_package.MyMethod; its options "
        "are --model.OPTION, as in fit (listed by --method CLASS --help). What is not given is small",
    )
    parser.add_argument(
        "--checks", type=list[str] | None, help="of a method: names of the only checks to run, such as '[waits, views]'"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    method = _method(words)
    if method is not None:
        parser.add_class_arguments(method, "model", fail_untyped=False)
    options = parser.parse_args(words)
    console = Console(highlight=False, soft_wrap=True)
    if method is None:
        _examine_machine(options, console)
    else:
        given = {word.partition("=")[0].removeprefix("--model.").partition(".")[0].rstrip("+") for word in words}
        if "--model" in given:
            raise UserError("--model: give its options one by one, --model.OPTION VALUE")
        taken = options.model.as_dict() if "model" in options else {}
        chosen = {name: value for name, value in taken.items() if name in given}
        _examine_method(method, chosen, options, console)


def _method(words: Sequence[str]) -> type | None:
    """The class that ``--method`` names."""
    given = [word.partition("=")[2] for word in words if word.startswith("--method=")]
    given += [value for word, value in itertools.pairwise(words) if word == "--method"]
    if not given:
        return None
    from ssl_geometry.methods import Method

    path = given[-1]
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--method {path}: {first_line(error)}; expected the import path of a class, such as "
            "ssl_geometry.methods.SimCLR"
        ) from error
    except Exception as error:
        raise UserError(f"--method {path}: cannot be imported ({type(error).__name__}: {first_line(error)})") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"--method {path}: no subclass of ssl_geometry.methods.Method")
    return found


def _examine_machine(options: Any, console: Console) -> None:
    from ssl_geometry import machine  # torch and all else that is looked at, for which --help does not wait

    wrong = 0
    for finding in machine.findings(Path(options.runs), Path(options.data.root), not options.skip_parity):
        wrong += bool(finding.to_do)
        _print(console, "do" if finding.to_do else "fine", f"{finding.subject}: {finding.detail}", finding.to_do)
    if wrong:
        raise Interrupted(f"{wrong} thing{'s' * (wrong > 1)} to do", code=ExitCode.FAULT)


def _examine_method(method: Any, chosen: dict[str, Any], options: Any, console: Console) -> None:
    from ssl_geometry.conformance import CHECKS, check_method, small_options

    names = options.checks or [check.__name__ for check in CHECKS]
    names = [name for name in names if name != PARITY or not options.skip_parity]
    if not names:
        raise UserError(f"--checks [{PARITY}]: --skip_parity leaves nothing to check; leave it out")
    used = small_options(method, chosen).items()
    console.print(f"{method.__name__} with {', '.join(f'{name}={value}' for name, value in used)}", markup=False)
    wrong = 0
    with progress_bar(shown=console.is_terminal, console=console, transient=True) as progress:
        task = progress.add_task(f"checking {names[0]}", total=len(names))
        for done, verdict in enumerate(check_method(method, chosen, names, "--checks"), 1):
            wrong += verdict.is_fault
            mark = "do" if verdict.is_fault else "fine" if verdict.applies else "-"
            _print(console, mark, f"{verdict.check.replace('_', ' ')}: {verdict.evidence}", verdict.fix)
            progress.update(task, advance=1, description=f"checking {names[min(done, len(names) - 1)]}")
    if wrong:
        raise Interrupted(f"{wrong} fault{'s' * (wrong > 1)} in {method.__name__}", code=ExitCode.FAULT)


def _print(console: Console, mark: str, text: str, to_do: str) -> None:
    color = {"do": "red", "fine": "green", "-": "dim"}[mark]
    console.print(Text.assemble((f"{mark:<4}", color), f" {text}", f"\n      -> {to_do}" if to_do else ""))


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.doctor``."""
    run_command(examine, args, interrupted="interrupted")


if __name__ == "__main__":
    main()
