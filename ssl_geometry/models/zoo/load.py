"""A published file to a backbone: its container opened, its names translated, every weight accounted for."""

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ssl_geometry.errors import UserError
from ssl_geometry.models.zoo.pickles import Record, read_pickle
from ssl_geometry.models.zoo.table import Checkpoint
from ssl_geometry.models.zoo.tensorbundle import is_bundle, read_bundle

SHOWN = 3
"""Names in an error message."""
TRACKED = "num_batches_tracked"
"""Counted by batch norm in training, without effect on what it gives."""
PLAIN: list[Any] = [
    argparse.Namespace,  # the command line, which training scripts keep next to the weights
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""What torch files may hold next to tensors and builtin containers."""


class Loaded(NamedTuple):
    """What became of the tensors of a file."""

    used: int
    """Those that are in the backbone."""
    dropped: int
    """Those of heads, of other branches or of an optimiser."""


class _Read(NamedTuple):
    weights: dict[str, Tensor]
    """By torchvision's or timm's names."""
    dropped: int


def load_checkpoint(backbone: nn.Module, checkpoint: Checkpoint, file: Path) -> Loaded:
    """Put the weights of a published checkpoint into a backbone.

    Args:
        backbone: what :func:`ssl_geometry.models.build_backbone` gives for the checkpoint's architecture.
        checkpoint: its row of the table.
        file: its file: the first of :attr:`Checkpoint.file_names`, or one that was downloaded by hand.

    Returns:
        How many tensors of the file are in the backbone, and how many are not.

    Raises:
        UserError: no such file, a file that is damaged or holds code, or weights of another architecture.
    """
    if not file.is_file():
        raise UserError(f"{checkpoint.name}: {file}: no such file")
    if checkpoint.format == "haiku":
        read = _from_haiku(checkpoint, file)
    elif checkpoint.format == "tensorflow" and is_bundle(file):
        read = _from_tensorflow(file, backbone)
    else:
        read = _from_torch(checkpoint, file)
    load_strictly(backbone, read.weights, f"{checkpoint.name}: {file}")
    return Loaded(len(read.weights), read.dropped)


def load_strictly(backbone: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put weights into a network; each of its own must be given, and no other.

    Args:
        backbone: the network.
        weights: by name; batch norm's ``num_batches_tracked`` may be left out.
        source: whose weights they are, for the error message.

    Raises:
        UserError: names that are missing or unknown, or other shapes.

    Example:
        >>> load_strictly(nn.Linear(2, 1), {"weight": torch.ones(1, 3)}, "x.pth")
        Traceback (most recent call last):
        ssl_geometry.errors.UserError: x.pth: 1 missing (bias), 1 misshaped (weight is 1x3, expected 1x2): a checkpoint
        of another architecture?
    """
    own = backbone.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith(TRACKED)]
    unexpected = [name for name in weights if name not in own]
    misshaped = [
        f"{name} is {_shape(value)}, expected {_shape(own[name])}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    parts = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    wrong = [
        f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})"
        for kind, names in parts.items()
        if names
    ]
    if wrong:
        raise UserError(f"{source}: {', '.join(wrong)}: a checkpoint of another architecture?")
    backbone.load_state_dict({**own, **weights})


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))  # a copy that can be written to


# -- torch -------------------------------------------------------------------------------------------------------------


def why_unreadable(file: Path, error: Exception) -> str:
    """Why torch does not read a file, in words of our own: torch's own advice is to load it whatever it runs.

    Args:
        file: that ``torch.load`` refused, with ``weights_only``.
        error: that it raised.
    """
    with file.open("rb") as stream:
        start = stream.read(4)
    if not start:
        return "the file is empty"
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it contains code ({found[1]}), which is never run"
    if start.startswith(b"PK"):
        return "the file is cut short or damaged"
    if start.startswith(b"\x80"):
        return "a raw pickle, which may contain code and is never loaded"
    return "not a file written by torch.save"


def _from_torch(checkpoint: Checkpoint, file: Path) -> _Read:
    try:
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy, about old names in old files
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if found := re.search(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)", str(error)):
            raise UserError(f"{file}: holds {found[1]}, which is not plain data; nothing of it was loaded") from error
        reason = why_unreadable(file, error)
        raise UserError(f"{file}: not a whole, plain checkpoint ({reason}); delete it and fetch it again") from error
    if checkpoint.container:
        state = state.get(checkpoint.container) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        inside = f" under {checkpoint.container!r}" if checkpoint.container else ""
        raise UserError(f"{file}: holds no state dict{inside}: not the checkpoint {checkpoint.name}?")
    weights = {}
    for key, value in state.items():
        name = key.removeprefix(checkpoint.prefix)
        if key.startswith(checkpoint.prefix) and name.partition(".")[0] not in checkpoint.drops:
            if not isinstance(value, Tensor):
                raise UserError(f"{file}: {key} is a {type(value).__name__}, expected a tensor")
            weights[_from_simclr_v2(name)] = value
    return _Read(weights, len(state) - len(weights))


def _from_simclr_v2(name: str) -> str:
    """The name in torchvision of a weight in the usual conversion of SimCLR v2; other names stay.

    Example:
        >>> _from_simclr_v2("net.2.blocks.0.projection.bn.0.weight"), _from_simclr_v2("net.0.1.0.bias")
        ('layer2.0.downsample.1.weight', 'bn1.bias')
        >>> _from_simclr_v2("net.4.blocks.1.net.3.0.running_mean"), _from_simclr_v2("layer1.0.conv1.weight")
        ('layer4.1.bn2.running_mean', 'layer1.0.conv1.weight')
    """
    name = re.sub(r"^net\.0\.0\.(?=\w+$)", "conv1.", name)
    name = re.sub(r"^net\.0\.1\.0\.", "bn1.", name)
    name = re.sub(r"^net\.(\d+)\.blocks\.", r"layer\1.", name)
    name = re.sub(r"^(layer\d\.\d+)\.projection\.shortcut\.", r"\1.downsample.0.", name)
    name = re.sub(r"^(layer\d\.\d+)\.projection\.bn\.0\.", r"\1.downsample.1.", name)
    name = re.sub(r"^(layer\d\.\d+)\.net\.([024])\.", lambda m: f"{m[1]}.conv{int(m[2]) // 2 + 1}.", name)
    return re.sub(r"^(layer\d\.\d+)\.net\.([135])\.0\.", lambda m: f"{m[1]}.bn{int(m[2]) // 2 + 1}.", name)


# -- Haiku (BYOL) ------------------------------------------------------------------------------------------------------

HAIKU_PARAMETERS = {"w": "weight", "scale": "weight", "offset": "bias"}
HAIKU_AVERAGES = {"mean_ema": "running_mean", "var_ema": "running_var"}


def _from_haiku(checkpoint: Checkpoint, file: Path) -> _Read:
    content = read_pickle(file)
    state = content.get(checkpoint.container) if isinstance(content, dict) else None
    state = state.as_dict() if isinstance(state, Record) and state.fields else state
    parts = [state.get(part) if isinstance(state, dict) else None for part in ("online_params", "online_state")]
    if not all(isinstance(part, dict) and all(isinstance(v, dict) for v in part.values()) for part in parts):
        raise UserError(f"{file}: holds no online_params and online_state: not the checkpoint {checkpoint.name}?")
    weights, dropped = {}, 0
    for path, values in [item for part in parts if part for item in part.items()]:
        for key, value in values.items():
            root, _, inside = path.partition("/~/")
            averaged = inside.rpartition("/~/")[2] in HAIKU_AVERAGES
            if root.partition("/")[0] in checkpoint.drops or (averaged and key != "average"):
                dropped += 1
            else:
                if not isinstance(value, np.ndarray):
                    raise UserError(f"{file}: {path} {key} is a {type(value).__name__}, expected an array")
                tensor, name = _tensor(value), _haiku_name(inside, key)
                weights[name] = tensor.permute(3, 2, 0, 1) if key == "w" and tensor.ndim == 4 else tensor.flatten()
    return _Read(weights, dropped)


def _haiku_name(path: str, key: str) -> str:
    """The name in torchvision of a weight in Haiku's ResNet; a name that is not understood stays.

    Example:
        >>> _haiku_name("block_group_1/~/block_0/~/shortcut_batchnorm/~/mean_ema", "average")
        'layer2.0.downsample.1.running_mean'
        >>> _haiku_name("initial_conv", "w"), _haiku_name("block_group_0/~/block_2/~/batchnorm_1", "offset")
        ('conv1.weight', 'layer1.2.bn2.bias')
    """
    module, _, average = path.partition("/~/") if path.startswith("initial_") else path.rpartition("/~/")
    if average not in HAIKU_AVERAGES:
        module, average = path, ""
    kind = HAIKU_AVERAGES.get(average) or HAIKU_PARAMETERS.get(key, key)
    if stem := re.fullmatch(r"initial_(conv|batchnorm)", module):
        return f"{'conv1' if stem[1] == 'conv' else 'bn1'}.{kind}"
    block = re.fullmatch(r"block_group_(\d)/~/block_(\d+)/~/(shortcut_)?(conv|batchnorm)(?:_(\d))?", module)
    if block is None or bool(block[3]) == bool(block[5]):
        return f"{path}/{key}"
    norm = block[4] == "batchnorm"
    layer = f"downsample.{int(norm)}" if block[3] else f"{'bn' if norm else 'conv'}{int(block[5]) + 1}"
    return f"layer{int(block[1]) + 1}.{block[2]}.{layer}.{kind}"


# -- TensorFlow (SimCLR) -----------------------------------------------------------------------------------------------

TENSORFLOW = r"base_model/(conv2d|batch_normalization)(?:_(\d+))?/(kernel|gamma|beta|moving_mean|moving_variance)"
TENSORFLOW_NAMES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def _from_tensorflow(file: Path, backbone: nn.Module) -> _Read:
    def of_backbone(name: str) -> bool:
        return name.startswith("base_model/") and name.count("/") == 2  # an optimiser's slots have one more

    tensors, others = read_bundle(file, of_backbone)
    layers = {
        "conv2d": [conv for conv, _ in _created(backbone)],
        "batch_normalization": [bn for _, bn in _created(backbone)],
    }
    weights = {}
    for name, value in tensors.items():
        found = re.fullmatch(TENSORFLOW, name)
        number = int(found[2] or 0) if found else 0
        if found and number < len(layers[found[1]]):
            name = f"{layers[found[1]][number]}.{TENSORFLOW_NAMES[found[3]]}"
        tensor = _tensor(value)
        weights[name] = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor
    return _Read(weights, len(others))


def _created(backbone: nn.Module) -> Iterator[tuple[str, str]]:
    """Convolutions and batch norms of a ResNet in the order in which SimCLR creates them: a shortcut's first."""
    yield "conv1", "bn1"
    names = {name.rpartition(".")[0] for name in backbone.state_dict()}
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1" in names:
            start = f"layer{stage}.{block}"
            if f"{start}.downsample.0" in names:
                yield f"{start}.downsample.0", f"{start}.downsample.1"
            yield from ((f"{start}.conv{i}", f"{start}.bn{i}") for i in (1, 2, 3) if f"{start}.conv{i}" in names)
            block += 1
