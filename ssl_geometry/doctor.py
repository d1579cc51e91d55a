"""Check whether this machine is ready; each line reports one check, with the fix if it fails.

python -m ssl_geometry.doctor
srun --nodes=1 --gpus-per-node=1 python -m ssl_geometry.doctor --data.root data/imagenet     # on a node of the cluster
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ssl_geometry.cli import Parser, run_command
from ssl_geometry.errors import ExitCode, Interrupted

PROGRAM = "python -m ssl_geometry.doctor"


def examine(args: Sequence[str]) -> None:
    """Print all lines.

    Raises:
        Interrupted: with code 1, where something is to be done.
    """
    parser = Parser(
        prog=PROGRAM,
        description="Check whether this machine is ready: one line per check, with the fix if it fails.",
    )
    parser.add_argument("--runs", type=str, default="runs", help="folder that runs will be written to")
    parser.add_argument("--data.root", type=str, default="data", help="folder of the images")
    parser.add_argument("--skip_parity", action="store_true", help="do not compare two processes with one (10 s)")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    options = parser.parse_args(list(args))
    from ssl_geometry import machine  # torch and all else that is looked at, for which --help does not wait

    console, wrong = Console(highlight=False, soft_wrap=True), 0
    for finding in machine.findings(Path(options.runs), Path(options.data.root), not options.skip_parity):
        wrong += bool(finding.to_do)
        mark = f"[red]do[/]    {finding.subject}" if finding.to_do else f"[green]fine[/]  {finding.subject}"
        console.print(f"{mark}: {finding.detail}" + (f"\n      -> {finding.to_do}" if finding.to_do else ""))
    if wrong:
        raise Interrupted(f"{wrong} thing{'s' * (wrong > 1)} to do", code=ExitCode.FAULT)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.doctor``."""
    run_command(examine, args, interrupted="interrupted")


if __name__ == "__main__":
    main()
