"""What the commands that measure networks share: their options, of which the images of the first run are a default."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from ssl_geometry.cli import Parser
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError
from ssl_geometry.runs import network_names

LONGEST = 80
"""Characters of the folder that is named after the networks in it."""
MODELS = (
    "networks, each NAME=SPEC or SPEC. SPEC: a run directory or a checkpoint; a published checkpoint by name, such as "
    "byol (python -m ssl_geometry.zoo list), or byol:FILE where its file was downloaded by hand; torchvision:NAME or "
    "timm:NAME with their weights; random[:SEED], an untrained twin of the first; random:ARCH[@PIXELS][:SEED], an "
    "untrained network of that architecture"
)
"""What ``--models`` takes."""


def networks_parser(
    command: str, description: str, args: Sequence[str], layers: str | list[str] | None, resumable: bool = False
) -> Parser:
    """The parser of a command that measures networks, with the options that such commands share.

    Args:
        command: its name, such as ``compare``.
        description: of what it does.
        args: command line; the images of the first run that it names are the default of ``--data``.
        layers: default of ``--layers``.
        resumable: started again, the command goes on with what is in ``--out``; others refuse to replace it.
    """
    program = f"python -m ssl_geometry.{command}"
    usage = f"{program} --models [NAME=]SPEC [[NAME=]SPEC ...] [--option VALUE ...]"
    parser = Parser(prog=program, usage=usage, description=description)
    parser.add_argument("--models", type=str, nargs="+", required=True, help=MODELS)
    parser.add_argument("--out", type=str | None, help=f"folder of the results (default: runs/{command}/NAME-NAME)")
    parser.add_argument(
        "--layers",
        type=str | list[str] | None,
        default=layers,
        help="a preset, a name, a glob, or a list",
    )
    parser.add_argument(
        "--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu", help="where to measure"
    )
    if not resumable:
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the results in --out")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.add_class_arguments(DataModule, "data", fail_untyped=False)
    named = [path for spec in _specs(args) for path in spec.split(",")]
    folders = [path.parent.parent if path.is_file() else path for path in map(Path, named)]
    run = next((folder for folder in folders if (folder / "config.yaml").is_file()), None)
    if run is not None:  # the images of the first run, unless told otherwise
        config = yaml.safe_load((run / "config.yaml").read_text())
        trained_on = {"seed": config.get("seed_everything"), **config["data"]}  # the seed is linked, not written twice
        parser.set_defaults({f"data.{name}": value for name, value in trained_on.items() if value is not None})
    return parser


def _specs(args: Sequence[str]) -> Iterator[str]:
    """What the words after ``--models`` say of where networks come from, before the command line is parsed."""
    taken = False
    for word in args:
        if word.startswith("--"):
            taken = word == "--models" or word.startswith("--models=")
            word = word.removeprefix("--models").removeprefix("=")
        if taken and word:
            with suppress(UserError):  # it is told where the networks are loaded
                yield from network_names([word]).values()


def parse_networks(parser: Parser, command: str, args: Sequence[str]) -> Any:
    """Read the command line with a :func:`networks_parser`, to which the command has added its own options.

    Returns:
        The options: ``data`` a data module, ``data_options`` what it was made of, ``out`` a folder.

    Raises:
        UserError: no such device, or results that would be overwritten.
    """
    options = parser.parse_args(list(args))
    names = "-".join(network_names(options.models))
    if len(names) > LONGEST:
        names = f"{names[:LONGEST]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    options.out = Path(options.out or f"runs/{command}/{names}")
    options.data_options = options.data.as_dict()
    options.data = DataModule(**options.data_options)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise UserError(f"--device {options.device}: expected cpu, cuda, or cuda:NUMBER")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: torch finds no GPU here; use --device cpu")
    if (options.out / "records").exists() and not options.get("overwrite", True):
        raise UserError(f"--out {options.out} holds results already: choose another, or --overwrite true")
    return options
