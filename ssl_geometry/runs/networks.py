"""The networks that ``--models`` names: runs, checkpoints, published weights, random ones; and seeds of one recipe."""

import importlib
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ssl_geometry.errors import UserError, did_you_mean
from ssl_geometry.methods import Method
from ssl_geometry.methods.published import from_timm, from_torchvision, from_zoo, untrained
from ssl_geometry.models.zoo import TABLE
from ssl_geometry.ranges import Seed, check_name, check_value
from ssl_geometry.runs.checkpoints import read_checkpoint
from ssl_geometry.runs.compatibility import unlike
from ssl_geometry.runs.run import Run, config_of


class Loaded(NamedTuple):
    """A network that is read back, or made."""

    name: str
    """As it is named on the command line; else the run's id, or the name of a file that is in no run."""
    method: Method
    """On the CPU, weights loaded."""
    epochs: int | None
    """Completed; 0 where they are not known, None was not trained."""
    given: str = ""
    """The name that seeds of one recipe share, where the command line has one."""
    config: Mapping[str, Any] | None = None
    """Of the run that it is."""

    @property
    def architecture(self) -> str:
        """As in ``--model.backbone``."""
        return str(self.method.hparams.get("backbone"))

    @property
    def source(self) -> str:
        """The published checkpoint that it is, or ``torchvision:NAME`` and the like; empty for any other."""
        return getattr(self.method, "source", "")


def network_names(models: Sequence[str]) -> dict[str, str]:
    """The name of each network that ``--models`` asks for, and where it comes from.

    Args:
        models: ``NAME=SPEC``, or a bare ``SPEC``, of which the name is made: a published checkpoint's or an
            architecture's, a run's, or a file's.

    Returns:
        Name to specification.

    Raises:
        UserError: nothing where a name or a specification is expected, a name that is no folder's, or a name twice.

    Example:
        >>> network_names(["mine=runs/cifar10/simclr", "byol", "runs/cifar10/supervised", "random:resnet18@32:1"])
        {'mine': 'runs/cifar10/simclr', 'byol': 'byol', 'supervised': 'runs/cifar10/supervised',
         'random-resnet18-32-1': 'random:resnet18@32:1'}
    """
    named: dict[str, str] = {}
    for model in models:
        name, equals, spec = model.partition("=")
        if not equals or "/" in name:  # a path may hold the sign
            spec, name = model, _name_of(model)
        elif name:  # files and folders are named after it
            check_name(name, "--models")
        if not name or not spec or name in named:
            raise UserError(
                f"--models {' '.join(models)}: expected NAME=PATH, each name once, such as simclr=runs/x/simclr"
            )
        named[name] = spec
    return named


def split_seeds(models: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """``NAME=RUN,RUN`` as one network per run: seeds of one recipe.

    Args:
        models: as in :func:`network_names`, a specification or several with commas between them.

    Returns:
        Name to specification for each network, and for each the name that was given.

    Raises:
        UserError: as in :func:`network_names`; a network twice under a name, or runs that differ beyond their seed.

    Example:
        >>> split_seeds(["simclr=runs/a,runs/b", "byol"])
        ({'simclr-1': 'runs/a', 'simclr-2': 'runs/b', 'byol': 'byol'},
         {'simclr-1': 'simclr', 'simclr-2': 'simclr', 'byol': 'byol'})
    """
    named: dict[str, str] = {}
    given: dict[str, str] = {}
    for name, specs in network_names(models).items():
        several = specs.split(",")
        _check_seeds(name, several)
        for number, spec in enumerate(several, 1):
            seed = f"{name}-{number}" if len(several) > 1 else name
            if seed in named:
                raise UserError(f"--models {name}={specs}: two networks are named {seed}; set another NAME")
            named[seed], given[seed] = spec, name
    return named, given


def _check_seeds(name: str, specs: Sequence[str]) -> None:
    """Refuse what is not several runs of one recipe."""
    published = {TABLE[kind].recipe: spec for spec in specs if (kind := spec.partition(":")[0]) in TABLE}
    if len(published) > 1:
        raise UserError(
            f"--models {name}={','.join(specs)}: {' and '.join(published.values())} are of different methods; give "
            "each its own NAME"
        )
    seen: dict[Path | str, str] = {}
    first: tuple[str, dict[str, Any]] | None = None
    for spec in specs:
        path = Path(spec)
        of_run = path.parent.parent if path.is_file() and path.parent.name == "checkpoints" else path
        what = of_run.resolve() if path.exists() else spec
        if what in seen:
            raise UserError(f"--models {name}={','.join(specs)}: {spec} is {seen[what]} again; name each once")
        seen[what] = spec
        config = config_of(of_run)
        if config is None:
            continue
        first = first or (spec, config)
        if other := unlike(first[1], config):
            more = f" and {len(other) - 3} more" if len(other) > 3 else ""
            raise UserError(
                f"--models {name}={','.join(specs)}: {first[0]} and {spec} differ in more than their seed, "
                f"{', '.join(other[:3])}{more}; give each its own NAME"
            )


def _name_of(spec: str) -> str:
    kind, _, rest = spec.partition(":")
    if kind in ("torchvision", "timm"):
        return rest
    if kind == "random":
        return re.sub(r"[:@]", "-", spec)
    if kind in TABLE:
        return kind
    path = Path(spec.partition(",")[0])
    if path.name in ("", ".."):
        path = path.resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem if path.is_file() else path.name


def load_networks(models: Sequence[str]) -> dict[str, Loaded]:
    """The networks that ``--models`` names.

    Args:
        models: ``NAME=SPEC`` or ``SPEC``. SPEC is a run or a checkpoint; the name of a published checkpoint (``byol``),
            or ``byol:FILE`` where its file was downloaded by hand; ``torchvision:NAME`` or ``timm:NAME``; ``random``
            or ``random:SEED``, an untrained copy of the first network; or ``random:ARCH``, an untrained network, with
            ``@PIXELS`` and ``:SEED`` or without. Several with commas between them are seeds of one recipe.

    Returns:
        Name to network.

    Raises:
        UserError: a specification that means nothing, a name twice, a path that holds no network, a download or a
            published file that is not what it should be, or one network under two names.
    """
    named, given = split_seeds(models)
    loaded = {name: _load(spec) for name, spec in named.items() if not _is_untrained_copy(spec)}
    if not loaded:
        raise UserError(
            "--models: at least one run or checkpoint; an untrained network takes its architecture from the first (or "
            "name one: random:resnet50)"
        )
    first = next(iter(loaded.values()))[0]
    networks: dict[str, Loaded] = {}
    for name, spec in named.items():
        if name in loaded:
            method, epochs = loaded[name]
        else:
            seed = int(spec.partition(":")[2] or "0")
            check_value(Seed, seed, "--models random:SEED")
            torch.manual_seed(seed)
            method, epochs = type(first)(**first.init_args), None
        networks[name] = Loaded(name, method, epochs, given[name], config_of_spec(spec))
    for a, b in itertools.combinations(networks.values(), 2):
        if _same_weights(a.method, b.method):
            raise UserError(
                f"--models {a.name}={named[a.name]} {b.name}={named[b.name]}: one network, its weights are equal; name "
                "it once, or it counts as two seeds"
            )
    return networks


def config_of_spec(spec: str) -> dict[str, Any] | None:
    """The configuration of the run that a specification is, or that it is a checkpoint of."""
    path = Path(spec)
    return config_of(path.parent.parent if path.is_file() else path)


def _same_weights(a: Method, b: Method) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def _is_untrained_copy(spec: str) -> bool:
    return re.fullmatch(r"random(:-?\d+)?", spec) is not None


def _load(spec: str) -> tuple[Method, int | None]:
    kind, colon, rest = spec.partition(":")
    if kind == "random":
        return untrained(rest), None
    if kind == "torchvision":
        return from_torchvision(rest), 0
    if kind == "timm":
        return from_timm(rest), 0
    if kind in TABLE:
        return from_zoo(kind, Path(rest) if colon else None), TABLE[kind].epochs or 0
    if "/" in spec or Path(spec).exists():
        network = load_method(spec, "--models")
        return network.method, network.epochs
    raise UserError(
        f"--models {spec}: no such run or checkpoint, and no published one; {did_you_mean(kind, TABLE)} (--help lists "
        "the forms of SPEC in NAME=SPEC; a run is NAME=PATH)"
    )


def load_method(path: str | Path, option: str = "path") -> Loaded:
    """A trained network from a run directory or a checkpoint.

    Args:
        path: a run directory (its last checkpoint is read) or a checkpoint file.
        option: the option that named it, for the error message.

    Returns:
        Its name, the method, and its completed epochs.

    Raises:
        UserError: nothing there, not a checkpoint of this framework, or a method that is neither this package's, nor
            imported already, nor the model of the run's config.yaml.
    """
    path = Path(path)
    file = Run(path).last_checkpoint if path.is_dir() else path
    name = file.parent.parent.name if file.parent.name == "checkpoints" else file.stem
    checkpoint = read_checkpoint(file, option)
    method = checkpoint.get("method")
    kinds = {"class_path": str, "init_args": dict}
    if not isinstance(method, dict) or not all(isinstance(method.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{option} {path}: not a checkpoint of ssl_geometry (it does not name its method)")
    cls = _method_class(method["class_path"], file.parent.parent, f"{option} {path}")
    _check_backbone(method["init_args"].get("backbone"), file.parent.parent, f"{option} {path}")
    try:
        network = cls(**method["init_args"])
    except TypeError as error:
        raise UserError(f"{option} {path}: {cls.__name__} here does not take its options ({error})") from error
    try:
        network.load_state_dict(checkpoint["state_dict"])
    except (KeyError, RuntimeError, TypeError) as error:
        reason = shortened(str(error).strip().splitlines()[-1].strip())
        raise UserError(f"{option} {path}: its weights do not fit its own description ({reason})") from error
    network.set_by_class |= network.init_args.keys() - method["init_args"].keys()
    epoch = checkpoint.get("epoch", -1)
    if not isinstance(epoch, int):
        raise UserError(f"{option} {path}: its epoch is damaged ({str(epoch)[:60]!r}, expected a whole number)")
    return Loaded(name, network, epoch + 1)


def shortened(reason: str) -> str:
    """Torch's error about weights, with the first three of the parameters that it lists.

    Example:
        >>> shortened('Missing key(s) in state_dict: "a", "b", "c", "d", "e". ')
        'Missing key(s) in state_dict: "a", "b", "c" and 2 more.'
    """
    names = re.findall(r'"[^"]*"', reason)
    if len(names) <= 3:
        return reason
    return f"{reason.partition(names[0])[0]}{', '.join(names[:3])} and {len(names) - 3} more."


def _check_backbone(backbone: Any, directory: Path, source: str) -> None:
    """Refuse to call what only a checkpoint names: any function could stand there, such as ``os.abort``.

    A class of networks that is imported already may, as what it makes is a network.
    """
    module, _, name = str(backbone).rpartition(".")
    given = ((config_of(directory) or {}).get("model") or {}).get("init_args") or {}
    if not module or backbone == given.get("backbone"):
        return
    cls = getattr(sys.modules.get(module), name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(
            f"{source}: its backbone {backbone} is not imported on the word of a checkpoint: name the run directory "
            "whose config.yaml has it, or in Python import it first, if it is a class of networks"
        )


def _method_class(class_path: str, directory: Path, source: str) -> type[Method]:
    """The class that a checkpoint names; a checkpoint is data, and does not decide what is imported."""
    module = class_path.rpartition(".")[0]
    imported = class_path
    if not module.startswith("ssl_geometry.") and module not in sys.modules:
        imported = str(((config_of(directory) or {}).get("model") or {}).get("class_path"))
        if imported.partition(".")[0] != class_path.partition(".")[0]:
            raise UserError(
                f"{source}: its method {class_path} is not imported on the word of a checkpoint: name the run "
                "directory whose config.yaml has it as its model, or in Python import it first"
            )
    try:
        cls = getattr(importlib.import_module(imported.rpartition(".")[0]), imported.rpartition(".")[2])
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{source}: its method {imported} cannot be imported; put its file on PYTHONPATH") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise UserError(f"{source}: {imported} is no subclass of ssl_geometry.methods.Method")
    if imported != class_path and f"{cls.__module__}.{cls.__qualname__}" != class_path:
        raise UserError(f"{source}: holds the method {class_path}, but the config.yaml of its run names {imported}")
    return cls
