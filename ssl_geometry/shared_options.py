"""Options that ``compare``, ``probe`` and ``survey`` share; defaults are those that the runs were measured with."""

import hashlib
import inspect
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from ssl_geometry.cli import Parser
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.devices import check_nodes
from ssl_geometry.errors import UserError
from ssl_geometry.models.layers import layer_names, present
from ssl_geometry.ranges import Seed, at_least
from ssl_geometry.runs.networks import config_of_spec, network_names, split_seeds

logger = logging.getLogger(__name__)
LONGEST = 80
"""Characters of the folder that is named after the networks in it."""
MODELS = (
    "networks, each NAME=SPEC or SPEC. SPEC: a run directory or a checkpoint; a published checkpoint by name, such as "
    "byol (python -m ssl_geometry.zoo list), or byol:FILE where its file was downloaded by hand; torchvision:NAME or "
    "timm:NAME with their weights; random[:SEED], the first network untrained; random:ARCH[@PIXELS][:SEED], an "
    "untrained network of that architecture. NAME=SPEC,SPEC,SPEC: seeds of one recipe"
)
"""What ``--models`` takes."""
LAYERS_HELP = "which layers: all, blocks, post_residual, residual, stages, head, names, globs, or a list of these"
Convert = Callable[[Any], Any]
Sources = Mapping[str, Mapping[str, Convert]]
"""Option of a command to the options of ``fit`` that decide the same numbers, and what makes such a value one of the
command's."""


def unchanged(value: Any) -> Any:
    """A value of ``fit`` that is one of the command's as it is."""
    return value


IMAGES: Sources = {
    "data.dataset": {"data.dataset": lambda path: Path(path).name},  # a folder of images may have moved
    **{
        f"data.{name}": {f"data.{name}": unchanged}
        for name in ("dataset_args", "image_size", "limit_test", "measure_size", "eval_batch_size")
    },
}
"""Options of the data that every measurement depends on."""


def networks_parser(command: str, description: str, group: str, layers: str, several: bool = False) -> Parser:
    """The parser of a command that measures networks, with the options that such commands share.

    Args:
        command: its name, such as ``compare``.
        description: of what it does.
        group: of the options for the measured layers, such as ``cka`` for ``--cka.layers``.
        layers: the default of these, for the help.
        several: processes may share the images.
    """
    program = f"python -m ssl_geometry.{command}"
    usage = f"{program} --models [NAME=]SPEC [[NAME=]SPEC ...] [--option VALUE ...]"
    about = f"{description} Options that runs were measured with while they learned are defaults here."
    parser = Parser(prog=program, usage=usage, description=about)
    parser.add_argument("--models", type=str, nargs="+", required=True, help=MODELS)
    parser.add_argument("--out", type=str | None, help=f"folder of the results (default: runs/{command}/NAME-NAME)")
    parser.add_argument(
        f"--{group}.layers",
        type=str | list[str] | None,
        help=f"{LAYERS_HELP} (default: as the first run was measured, else {layers})",
    )
    parser.add_argument(
        "--device",
        type=str,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to measure: cpu, cuda or cuda:NUMBER",
    )
    if several:
        one = Annotated[int, at_least(1)]
        parser.add_argument("--devices", type=one, default=1, help="number of processes per node that share the images")
        parser.add_argument(
            "--num_nodes", type=one, default=1, help="number of nodes; a SLURM job sets it and --devices"
        )
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.add_argument("--seed_everything", type=Seed, default=0, help="seed of the validation split, as in fit")
    parser.add_class_arguments(DataModule, "data", fail_untyped=False)
    parser.link_arguments("seed_everything", "data.seed")
    return parser


def parse_networks(
    parser: Parser,
    command: str,
    args: Sequence[str],
    group: str,
    layers: str | Sequence[str],
    sources: Sources,
    own_results: str | None = None,
) -> Any:
    """Read the command line with a :func:`networks_parser`, to which the command has added its own options.

    What the command line leaves open is as the first run has it; where runs differ, a line names the option and the
    values.

    Args:
        parser: with all options of the command.
        command: its name.
        args: the command line.
        group: of the options for the measured layers.
        layers: their default, unless a run has other ones.
        sources: options of ``fit`` that decide the same numbers.
        own_results: the file in ``--out`` by which the command knows results that it goes on with; None for a command
            that starts from scratch.

    Returns:
        The options: ``data`` a data module, ``data_options`` what it was made of, ``out`` a folder, ``layers`` None
        unless given, ``default_layers`` what stands for it then, ``layers_option`` where they were given (see
        :func:`chosen_layers`), ``overwrite`` False where a SLURM job continues its own results.

    Raises:
        UserError: no such device, a folder of results that is a training run, or results that would be overwritten
            without ``--overwrite``, unless by the SLURM job that wrote them and was put back into the queue.
    """
    configs = run_configs(args)
    layers_option = f"{group}.layers"
    defaults, unlike = of_runs(configs, {**IMAGES, **sources})
    trained_on = next(iter(configs.values()), {})
    known = inspect.signature(DataModule).parameters.keys() - {"seed"}
    own = {name: value for name, value in defaults.items() if name in sources and name != layers_option}
    own |= {f"data.{name}": value for name, value in (trained_on.get("data") or {}).items() if name in known}
    own["seed_everything"] = trained_on.get("seed_everything")  # that of the data is linked to it
    parser.set_defaults({name: value for name, value in own.items() if value is not None})
    options = parser.parse_args(list(args))
    options.default_layers = defaults.get(layers_option) or layers
    options.layers, options.layers_option = options[layers_option], f"--{layers_option}"
    for option, values in unlike.items():
        if not is_given(option, args):
            logger.warning(f"--{option} differs between the runs: {values}; the first is taken for all")
    names = "-".join(network_names(options.models))
    if len(names) > LONGEST:
        names = f"{names[:LONGEST]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    options.out = Path(options.out or f"runs/{command}/{names}")
    options.data_options = options.data.as_dict()
    options.data = DataModule(**options.data_options)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise UserError(f"--device {options.device}: expected cpu, cuda, or cuda:NUMBER")
    if options.device.startswith("cuda"):
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not gpus:
            raise UserError(f"--device {options.device}: torch finds no GPU here; use --device cpu")
        if int(options.device.partition(":")[2] or 0) >= gpus:
            raise UserError(
                f"--device {options.device}: this machine has {gpus} GPU{'s' * (gpus > 1)}, numbered from 0"
            )
    if "num_nodes" in options:
        check_nodes(options.num_nodes, "--num_nodes")
    _check_writable(options.out)
    if any((options.out / part).exists() for part in ("run.json", "checkpoints")):
        raise UserError(
            f"--out {options.out} is a training run, whose records these would replace: choose another folder"
        )
    is_again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"  # of this job, whose own results these are
    continues = is_again or (own_results is not None and (options.out / own_results).exists())
    if (options.out / "records").exists() and not (options.overwrite or continues):
        raise UserError(f"--out {options.out} holds results already: choose another, or --overwrite")
    options.overwrite &= not is_again
    return options


def _check_writable(out: Path) -> None:
    """Refuse a folder of results that cannot be made or written to, before anything is measured."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if os.path.exists(folder))
    if not there.is_dir():
        raise UserError(f"--out {out}: {there} is a file; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {there} cannot be written to; choose another folder")


def chosen_layers(network: nn.Module, options: Any) -> list[str]:
    """The layers of a network that the options ask for; of a default, those that it has.

    Raises:
        UserError: given layers that the network does not have.
    """
    return layer_names(network, present(network, options.layers, options.default_layers), option=options.layers_option)


def run_configs(args: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The networks of a command line that are runs, or checkpoints of runs, each with the run's configuration.

    Args:
        args: the command line, which is not parsed yet: its defaults depend on the runs.
    """
    found, taken = {}, False
    for word in args:
        if word.startswith("--"):
            taken = word == "--models" or word.startswith("--models=")
            word = word.removeprefix("--models").removeprefix("=")
        if taken and word:
            with suppress(UserError):  # it is reported where the networks are loaded
                for name, spec in split_seeds([word])[0].items():
                    if config := config_of_spec(spec):
                        found[name] = config
    return found


def of_runs(configs: Mapping[str, Mapping[str, Any]], sources: Sources) -> tuple[dict[str, Any], dict[str, str]]:
    """What runs were measured with, as options of a command.

    Args:
        configs: run to its configuration.
        sources: options of ``fit`` that decide the same numbers; those of a monitor that is off do not count.

    Returns:
        Option to its value in the first run that has it, None for a default of ``fit``; and for each option that runs
        do not agree on, all values, each with its runs.

    Example:
        >>> sources = {"gram_size": {"cka.gram_size": unchanged, "invariance.gram_size": unchanged}}
        >>> one = {"cka": {"every_n_epochs": 1, "gram_size": 32}, "invariance": {"every_n_epochs": 0, "gram_size": 64}}
        >>> of_runs({"a": one}, sources)
        ({'gram_size': 32}, {})
        >>> of_runs({"a": one, "b": {"cka": {"every_n_epochs": 5, "gram_size": 64}}}, sources)
        ({'gram_size': 32}, {'gram_size': '32 (a: cka), 64 (b: cka)'})
    """
    first: dict[str, Any] = {}
    unlike: dict[str, str] = {}
    for option, ways in sources.items():
        runs_of: dict[str, list[str]] = {}
        for name, config in configs.items():
            for source, convert in ways.items():
                group, _, key = source.partition(".")
                given = config.get(group) or {}
                if key not in given or given.get("every_n_epochs", 1) == 0:
                    continue
                value = given[key] if given[key] is None else convert(given[key])
                first.setdefault(option, value)
                text = "the default" if value is None else str(value)
                runs_of.setdefault(text, []).append(f"{name}: {group}" if len(ways) > 1 else name)
        if len(runs_of) > 1:
            unlike[option] = ", ".join(f"{text} ({', '.join(runs)})" for text, runs in runs_of.items())
    return first, unlike


def is_given(option: str, args: Sequence[str]) -> bool:
    """Whether a command line names an option, or the group that it is in.

    Example:
        >>> [is_given("data.root", [word]) for word in ("--data.root=x", "--data.roots", "--data=file.yaml", "--root")]
        [True, False, True, False]
    """
    names = "|".join(re.escape(name) for name in (option, option.partition(".")[0]))
    return any(re.match(rf"--({names})(=|$)|--{re.escape(option)}[.+]", word) for word in args)
