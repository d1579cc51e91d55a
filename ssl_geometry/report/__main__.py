"""Show what runs have measured, from their records alone: as one HTML page, live in a browser, or in W&B.

python -m ssl_geometry.report runs/demo/simclr runs/demo/supervised -o report.html
python -m ssl_geometry.report runs/demo/simclr --serve

A page never measures: run a command that does (fit, compare, probe) first.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from ssl_geometry.cli import Parser, run_command
from ssl_geometry.progress import progress_bar
from ssl_geometry.ranges import above, between, check_project
from ssl_geometry.report.page import render, smallest_loss, write_page
from ssl_geometry.report.run_records import RunRecords, fingerprint, read_run
from ssl_geometry.report.serve import Server

PROGRAM = "python -m ssl_geometry.report"
USAGE = f"{PROGRAM} RUN [RUN ...] [-o report.html] [--option VALUE ...]"
DESCRIPTION = (
    "Show what runs have measured, from their records alone: one HTML page that needs no network (the default), the "
    "same page served and kept up to date while runs go on, or the curves and figures in W&B."
)


def report(args: Sequence[str]) -> Any:
    """Write the page, or serve it.

    Raises:
        UserError: a run without records, or a place that cannot be written to.
    """
    parser = Parser(prog=PROGRAM, usage=USAGE, description=DESCRIPTION)
    parser.add_argument(
        "runs", metavar="RUN", type=str, nargs="+", help="run directory, or --out of compare, probe or survey"
    )
    parser.add_argument("-o", "--out", type=str, default="report.html", help="file to write the page to")
    parser.add_argument(
        "--max_mb",
        type=Annotated[float, above(0)],
        default=10.0,
        help="largest size of the page, in MB; a larger one shows fewer digits or epochs",
    )
    parser.add_argument("--serve", action="store_true", help="serve the page, and refresh it as records are written")
    parser.add_argument(
        "--port", type=Annotated[int, between(0, 65_535)], default=8000, help="port to serve it at; 0 takes a free one"
    )
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="address to serve it at; 127.0.0.1 is for this machine alone"
    )
    parser.add_argument("--to_wandb", action="store_true", help="send what W&B does not have yet, instead of a page")
    parser.add_argument(
        "--wandb_project", type=str | None, help="W&B project, at most 128 characters (default: the run's own)"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse a run whose records are partly damaged, instead of showing the rest",
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    options = parser.parse_args(list(args))
    paths = list(dict.fromkeys(Path(path) for path in options.runs))
    console = Console(stderr=True)
    limit = 1e6 * options.max_mb
    if options.wandb_project is not None:
        check_project(options.wandb_project, "--wandb_project")
    if options.to_wandb:
        return to_wandb(paths, options.wandb_project, console, options.strict)
    if options.serve:
        return serve(paths, options.host, options.port, limit, console, options.strict)
    started = time.perf_counter()
    page = render(smallest_loss(read(paths, console, strict=options.strict), limit, console.print))
    out = write_page(options.out, page)
    seconds = time.perf_counter() - started
    plural = "s" * (len(paths) > 1)
    print(f"{out}  ({len(paths)} run{plural}, {len(page) / 1e6:.1f} MB, {seconds:.1f} s)")
    return out


def read(paths: Sequence[Path], console: Console, empty: bool = False, strict: bool = False) -> list[RunRecords]:
    """The records of runs, with a bar where there are many."""
    shown = _shown("reading", console, paths) if len(paths) >= 5 else paths
    return [read_run(path, empty, strict) for path in shown]


def _shown(what: str, console: Console, items: Sequence[Any]) -> Iterator[Any]:
    """The items, with a bar."""
    with progress_bar(console=console) as progress:
        yield from progress.track(items, description=what)


def serve(paths: Sequence[Path], host: str, port: int, limit: float, console: Console, strict: bool) -> None:
    """Serve the page until Ctrl-C."""
    read(paths, console, empty=True, strict=strict)  # a mistake is reported now, not in the browser

    def build() -> bytes:
        return smallest_loss([read_run(path, empty=True, strict=strict) for path in paths], limit, console.print)

    with Server(host, port, lambda: [fingerprint(path) for path in paths], build, render) as server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def to_wandb(paths: Sequence[Path], project: str | None, console: Console, strict: bool) -> None:
    """Send runs to W&B, one after the other."""
    from ssl_geometry.report.upload import upload  # W&B and matplotlib, which a page does without

    for path in paths:
        read_run(path, strict=strict)
        sent = upload(path, project, partial(_shown, f"sending {path.name}", console))
        if sent.folder:
            print(
                f"{path}: offline, {sent.numbers:,} numbers and figures written; `wandb sync {sent.folder}` sends them"
            )
        else:
            done = f"{sent.numbers:,} numbers and figures sent" if sent.numbers else "W&B has everything already"
            print(f"{path}: {done}")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.report``."""
    run_command(report, args, interrupted="interrupted: no page was written; --to_wandb goes on where it stopped")


if __name__ == "__main__":
    main()
