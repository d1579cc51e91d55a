"""Names, presets and depths of a network's layers.

A name is the module's dotted path in the bare network, without prefixes of ``torch.compile``, DDP or a method's
``backbone``. torchvision's ResNets and timm's vision transformers have additional names: ``stem``, ``pooled``, and in a
ResNet ``layer3.2.residual``, the branch of block ``layer3.2`` before the addition. Any other network is treated as the
sequence of its child modules, in the order of their registration; a container, and a module that contains a stack of
equal blocks (an encoder, a stage), is replaced by its children.

Presets: ``post_residual`` (block outputs), ``residual``, ``blocks`` (both), ``stages`` (last block of each stage or
stack, or of each quarter of a single stack, as of a transformer), ``head`` (every leaf of a method's ``head``), ``all``
(stem, blocks, pooled, head).
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ssl_geometry.errors import UserError, did_you_mean
from ssl_geometry.models.evaluating import evaluating

HEAD_STEP = 0.1
"""Difference in depth between consecutive leaves of a head, starting from the end of the backbone at 1."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_names(
    model: nn.Module,
    layers: str | Sequence[str] = "all",
    option: str = "layers",
    example: Callable[[], Tensor] | None = None,
) -> list[str]:
    """Names of the chosen layers, in forward order and without repeats.

    Args:
        model: a network, or a method: a module with the submodules ``backbone`` and ``head``.
        layers: a preset, a name, a glob over all names (``"layer4.*"``; ``*`` matches dots too), or a list of these.
        option: where the user chose them, for the message.
        example: creates an input of two images for the network; None for a method, or if the input is not known.

    Returns:
        The names. Modules that do not run on the example (a loss, a memory bank, a metric, an auxiliary classifier) are
        not layers.

    Raises:
        UserError: nothing chosen, or a preset, name or glob that matches no layer of this network.

    Example:
        >>> from ssl_geometry.models import build_backbone
        >>> layer_names(build_backbone("resnet10"), ["pooled", "layer[12].?.residual", "stem"])
        ['stem', 'layer1.0.residual', 'layer2.0.residual', 'pooled']
    """
    named, presets = named_layers(model)
    patterns = [layers] if isinstance(layers, str) else layers
    if not patterns:
        raise UserError(f"{option}={layers!r} chooses no layer; leave it out for all of them")
    surely = _is_known(backbone_of(model)) and all(pattern in presets for pattern in patterns)
    ran = set(named) if surely else _that_run(model, named, example)
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in named if name in ran and (name == pattern or fnmatchcase(name, pattern))]
        found = [name for name in presets.get(pattern, []) if name in ran] or found
        if not found and pattern in named:
            raise UserError(
                f"{option}={pattern!r} does not run when {type(unwrapped(model)).__name__} is measured, or gives no "
                "row for each image; leave it out"
            )
        if not found:
            usable = [preset for preset, names in presets.items() if names]
            raise UserError(
                f"{option}={pattern!r} matches no layer of {type(unwrapped(model)).__name__}; "
                f"{did_you_mean(pattern, [*usable, *named])} (presets: {', '.join(usable)})"
            )
        chosen.update(found)
    return [name for name in named if name in chosen]


def _that_run(model: nn.Module, named: dict[str, nn.Module], example: Callable[[], Tensor] | None) -> set[str]:
    """Names of the modules that run on an example and return a row for each image; all if there is no example."""
    method = unwrapped(model)
    view: Any = getattr(method, "clean_view", None)
    if example is None and view is None:  # Taps raise where a layer does not run
        return set(named)
    device = next((parameter.device for parameter in method.parameters()), torch.device("cpu"))  # raw pixels have none
    size = 0 if example is not None else view.spec["size"]
    ran: set[str] = set()

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = output if isinstance(output, list | tuple) else [output]
        first = next((x for x in outputs if isinstance(x, Tensor)), None)
        if first is not None and first.ndim > 1 and len(first) == 2:
            ran.add(name)

    handles = [module.register_forward_hook(partial(note, name)) for name, module in named.items()]
    try:
        with evaluating(method), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            method(torch.zeros(2, 3, size, size, device=device) if example is None else example())
    finally:
        for handle in handles:
            handle.remove()
    return ran


def present(model: nn.Module, layers: str | Sequence[str] | None, default: str | Sequence[str]) -> str | Sequence[str]:
    """The requested layers, or those of a default that the network has.

    If the default contains no layer of the backbone, all layers: the head alone does not represent the network.

    Args:
        model: a network or a method.
        layers: as in :func:`layer_names`; None for the default.
        default: presets, names and globs.

    Example:
        >>> present(nn.Sequential(nn.Linear(2, 2)), None, ["post_residual", "pooled", "layer4.*"])
        ['post_residual']
    """
    if layers is not None:
        return layers
    named, presets = named_layers(model)
    patterns = [default] if isinstance(default, str) else default
    found = {name: presets.get(name) or [layer for layer in named if fnmatchcase(layer, name)] for name in patterns}
    of_backbone = set(itertools.chain(*found.values())) - set(presets["head"])
    return [name for name, layers in found.items() if layers] if of_backbone else "all"


def layer_depths(model: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """Relative depths of layers: a common axis for networks of different depth.

    Args:
        model: the network or method that has the layers.
        names: exact names; a later call of a module (``relu:1``) is as deep as the first.

    Returns:
        The depth of each name. The L layers of ``all`` in the backbone are at i / (L - 1), whatever its head: 0 is the
        first, 1 the last. The leaves of a head follow at 1.1, 1.2, ... Modules between two layers are interpolated;
        those before the first and after the last layer of the backbone (or head) have its depth.

    Raises:
        UserError: a name that no layer of this network has.

    Example:
        >>> from ssl_geometry.models import build_backbone
        >>> layer_depths(build_backbone("resnet10"), ["stem", "layer2.0", "layer3.0.conv1", "pooled"])
        {'stem': 0.0, 'layer2.0': 0.444..., 'layer3.0.conv1': 0.476..., 'pooled': 1.0}
    """
    named, presets = named_layers(model)
    position = {id(module): i for i, module in enumerate(named.values())}  # the same for both names of one module
    head = [position[id(named[name])] for name in presets["head"]]
    backbone = [position[id(named[name])] for name in presets["all"] if name not in presets["head"]] or [0]
    after = 1 + HEAD_STEP * np.arange(1, len(head) + 1)
    depths = {}
    for name in names:
        module = named.get(name.partition(":")[0])
        if module is None:
            raise UserError(f"{name!r} is no layer of {type(unwrapped(model)).__name__}; {did_you_mean(name, named)}")
        at = position[id(module)]
        in_head = bool(head) and at >= head[0]
        place = np.interp(at, head, after) if in_head else np.interp(at, backbone, np.linspace(0, 1, len(backbone)))
        depths[name] = float(place)
    return depths


def backbone_of(model: nn.Module) -> nn.Module:
    """The network itself; for a method, its backbone."""
    outer = unwrapped(model)
    return unwrapped(dict(outer.named_children()).get("backbone", outer))


def unwrapped(module: nn.Module) -> nn.Module:
    """The plain module inside ``torch.compile`` and DDP."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(module, OptimizedModule):
            module = module._orig_mod
        else:
            return module


def _post_order(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules in post-order, in which a forward pass usually finishes them; a method's head comes last."""
    module = unwrapped(module)
    for name, child in sorted(module.named_children(), key=lambda item: item[0] == "head"):
        yield from _post_order(child, path if name == "backbone" else f"{path}.{name}".lstrip("."))
    yield path, module


def named_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """All layer names with their modules, and the presets, both in forward order."""
    outer = unwrapped(model)
    parts = dict(outer.named_children())
    net = backbone_of(outer)
    tree = dict(_post_order(net))
    aliases: dict[str, str] = {}
    stages: list[str] = []
    if isinstance(net, ResNet):
        blocks = [path for path in tree if re.fullmatch(r"layer[1-4]\.\d+", path)]
        stages = list({block.partition(".")[0]: block for block in blocks}.values())
        aliases = {"maxpool": "stem", "avgpool": "pooled"}
        for kind, last_norm in ((BasicBlock, "bn2"), (Bottleneck, "bn3")):
            aliases |= {f"{b}.{last_norm}": f"{b}.residual" for b in blocks if isinstance(tree[b], kind)}
    elif _is_vision_transformer(net):
        blocks = [path for path in tree if re.fullmatch(r"blocks\.\d+", path)]
        stages = _quarters(blocks)
        aliases = {"patch_embed": "stem", "fc_norm": "pooled"}
    else:
        blocks = list(_unrolled(net))
        stacks = [[name for name in stack if name in blocks] for stack in _stacks(net)]
        stacks = [stack for stack in stacks if stack]
        stages = _quarters(stacks[0]) if len(stacks) == 1 else [stack[-1] for stack in stacks]
    heads = getattr(outer, "measured_heads", [name for name in parts if name == "head"]) if "backbone" in parts else []
    head = [
        path
        for name in heads
        for path, module in _post_order(outer.get_submodule(name), name)
        if not list(module.children())
    ]

    named: dict[str, nn.Module] = {}
    seen: set[int] = set()  # by identity: torchmetrics compares its modules by their values
    for path, module in _post_order(outer):
        if not path or id(module) in seen or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue  # the network itself, a shared module under a further name, a module without a forward
        seen.add(id(module))
        named.pop(path, None)  # a method's head goes before a backbone's
        named[path] = module
        if path in aliases:
            named[aliases[path]] = module
    residual = [alias for alias in aliases.values() if alias.endswith(".residual")]
    presets = {
        "all": [*aliases.values(), *blocks, *head],
        "blocks": [*blocks, *residual],
        "post_residual": blocks,
        "residual": residual,
        "stages": stages,
        "head": head,
    }
    return named, {preset: [name for name in named if name in names] for preset, names in presets.items()}


def _is_known(net: nn.Module) -> bool:
    """Whether the architecture is known, so that all presets run."""
    return isinstance(net, ResNet) or _is_vision_transformer(net)


def _is_vision_transformer(net: nn.Module) -> bool:
    from timm.models import VisionTransformer  # a third of a second, which ResNets do without

    return isinstance(net, VisionTransformer)


def _quarters(blocks: Sequence[str]) -> list[str]:
    return [blocks[math.ceil(len(blocks) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)]


def _unrolled(module: nn.Module, path: str = "") -> Iterator[str]:
    """The child modules of an unknown architecture; containers and stacks are replaced by their children."""
    for name, child in module.named_children():
        child, child_path = unwrapped(child), f"{path}.{name}".lstrip(".")
        if isinstance(child, CONTAINERS) or _holds_a_stack(child):
            yield from _unrolled(child, child_path)
        else:
            yield child_path


def _holds_a_stack(module: nn.Module) -> bool:
    """Whether a module contains a stack of blocks: an encoder, a stage, a wrapped network."""
    parts = [unwrapped(child) for child in module.children()]
    return any(_is_stack(part) if isinstance(part, CONTAINERS) else _holds_a_stack(part) for part in parts)


def _is_stack(container: nn.Module) -> bool:
    """Whether a container has two blocks of the same class."""
    kinds = [type(part) for _, part in _blocks(container)]
    return len(set(kinds)) < len(kinds)


def _blocks(container: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children that have children themselves and are not containers."""
    parts = [(name, unwrapped(part)) for name, part in container.named_children()]
    return [(name, part) for name, part in parts if list(part.children()) and not isinstance(part, CONTAINERS)]


def _stacks(net: nn.Module) -> Iterator[list[str]]:
    """The names of the blocks of each stack."""
    for path, module in _post_order(net):
        if isinstance(module, CONTAINERS) and _is_stack(module):
            yield [f"{path}.{name}".lstrip(".") for name, _ in _blocks(module)]
