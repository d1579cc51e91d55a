"""List, fetch and check published checkpoints.

    python -m ssl_geometry.zoo list
    python -m ssl_geometry.zoo fetch byol swav
    python -m ssl_geometry.zoo check --download

``check`` verifies the hash of each file in the cache, loads it strictly and looks whether its features of random
images are finite.
"""

from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table

from ssl_geometry.cli import Parser, run_command
from ssl_geometry.errors import ExitCode, Interrupted, UserError, did_you_mean
from ssl_geometry.models.zoo import TABLE, Checkpoint, cache_folder, cached, fetch

PROGRAM = "python -m ssl_geometry.zoo"
WIDTH = 200
"""Characters of a line of the table at most: a narrow terminal wraps lines, but cuts no name."""


def listing(rows: Sequence[Checkpoint]) -> Table:
    """A table of checkpoints, and which of them the cache holds."""
    table = Table("name", "family", "architecture", "epochs", "top-1", "images", "in the cache", box=None)
    for row in rows:
        size = sum(file.stat().st_size for file in cached(row))
        images = f"{row.image_size}, {'[0, 1]' if row.normalize == 'none' else row.normalize}"
        here = f"{size / 1e6:.0f} MB" if size else "no"
        table.add_row(row.name, row.family, row.architecture, str(row.epochs or ""), f"{row.top1:.1f}", images, here)
    return table


def check(row: Checkpoint) -> str:
    """Verify one checkpoint.

    Returns:
        What was found, in words.

    Raises:
        UserError: what is wrong with it.
    """
    import torch  # here: a list does not wait for it

    from ssl_geometry.models import build_backbone
    from ssl_geometry.models.zoo import load_checkpoint

    file = fetch(row)
    backbone = build_backbone(row.architecture, image_size=row.image_size).eval()
    loaded = load_checkpoint(backbone, row, file)
    images = torch.rand(2, 3, row.image_size, row.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone(images)
    if not features.isfinite().all():
        raise UserError(f"{row.name}: its features of random images are not finite")
    return f"{loaded.used} tensors loaded, {loaded.dropped} left out, {features.shape[1]} finite features"


def run(args: Sequence[str]) -> None:
    """List, fetch or check checkpoints.

    Raises:
        UserError: an unknown name, or a download that failed.
        Interrupted: with code 1, where a checkpoint is not as it should be.
    """
    parser = Parser(prog=PROGRAM, description="List, fetch and check published checkpoints.")
    parser.add_argument("action", type=Literal["list", "fetch", "check"], help="what to do with them")
    parser.add_argument(
        "names",
        type=str,
        nargs="*",
        default=[],
        help="names of checkpoints; without any, list shows all, and check those in the cache",
    )
    parser.add_argument("--download", action="store_true", help="with check: download what the cache lacks")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    options = parser.parse_args(list(args))
    for name in options.names:
        if name not in TABLE:
            raise UserError(f"{options.action} {name}: {did_you_mean(name, TABLE)}")
    rows = [TABLE[name] for name in options.names or TABLE]
    console, wrong = Console(highlight=False, soft_wrap=True, width=WIDTH), 0
    if options.action == "list":
        console.print(listing(rows))
        console.print(f"cache: {cache_folder()}")
        return
    if options.action == "fetch":
        if not options.names:
            raise UserError(f"fetch: name the checkpoints, such as fetch byol; {did_you_mean('', TABLE)}")
        for row in rows:
            console.print(f"{row.name}  {fetch(row)}")
        return
    here = [row for row in rows if options.download or cached(row)]
    for row in here:
        try:
            console.print(f"[green]fine[/]  {row.name}: {check(row)}")
        except UserError as error:
            wrong += 1
            console.print(f"[red]fail[/]  {row.name}: ", end="")
            console.print(str(error), markup=False)
    for row in rows if options.names else ():
        if row not in here:
            wrong += 1
            console.print(f"[red]fail[/]  {row.name}: not in the cache; fetch it, or --download")
    if not here:
        console.print(f"the cache {cache_folder()} holds none of these")
    if wrong:
        raise Interrupted(f"{wrong} of {len(rows)} not as they should be", code=ExitCode.FAULT)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.zoo``."""
    run_command(run, args, interrupted="interrupted: run the same command again, a download continues where it stopped")


if __name__ == "__main__":
    main()
