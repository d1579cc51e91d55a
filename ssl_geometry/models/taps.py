"""Names of a network's layers, and their activations in forward order.

A name is the module's dotted path as it reads on the bare network: ``torch.compile``, DDP and a method's ``backbone``
leave no trace in it. torchvision's ResNets and timm's vision transformers have further names: ``stem``, ``pooled``,
and in a ResNet ``layer3.2.residual``, the branch of block ``layer3.2`` before the addition. Any other network is taken
as the sequence of its child modules, in the order of their registration; a container, and a module that holds a stack
of equal blocks (an encoder, a stage), is replaced by what it holds.

Presets: ``post_residual`` (block outputs), ``residual``, ``blocks`` (both), ``stages`` (last block of each stage or
stack, or of each quarter of a single stack, as of a transformer), ``head`` (every leaf of a method's ``head``), ``all``
(stem, blocks, pooled, head).
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ssl_geometry.errors import UserError, nearest

HEAD_STEP = 0.1
"""Depth from a leaf of a head to the next, the first one counted from the backbone's end at 1."""


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

LAST_AXIS = r"(LayerNorm|RmsNorm|RMSNorm)(?!.*2d)"
"""Kinds of normalisation over the last axis, by their names in torch and timm."""


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
        example: makes an input of two images for the network; None where it is not known what it takes, unless the
            network is a method.

    Returns:
        The names. Modules that do not run on the example (a loss, a memory bank, a metric, an auxiliary classifier) are
        no layers.

    Raises:
        UserError: nothing chosen, or a preset, name or glob that matches no layer of this network.

    Example:
        >>> from ssl_geometry.models import build_backbone
        >>> layer_names(build_backbone("resnet10"), ["pooled", "layer[12].?.residual", "stem"])
        ['stem', 'layer1.0.residual', 'layer2.0.residual', 'pooled']
    """
    named, presets = _layers(model)
    patterns = [layers] if isinstance(layers, str) else layers
    if not patterns:
        raise UserError(f"{option}={layers!r} chooses no layer; leave it out for all of them")
    surely = _is_known(_backbone(model)) and all(pattern in presets for pattern in patterns)
    ran = set(named) if surely else _that_run(model, named, example)
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in named if name in ran and (name == pattern or fnmatchcase(name, pattern))]
        found = [name for name in presets.get(pattern, []) if name in ran] or found
        if not found and pattern in named:
            raise UserError(
                f"{option}={pattern!r} does not run when {type(_eager(model)).__name__} is measured, or gives no row "
                "for each image; leave it out"
            )
        if not found:
            usable = [preset for preset, names in presets.items() if names]
            raise UserError(
                f"{option}={pattern!r} matches no layer of {type(_eager(model)).__name__}; "
                f"{nearest(pattern, [*usable, *named])} (presets: {', '.join(usable)})"
            )
        chosen.update(found)
    return [name for name in named if name in chosen]


def _that_run(model: nn.Module, named: dict[str, nn.Module], example: Callable[[], Tensor] | None) -> set[str]:
    """The names whose modules run on an example, and give a row for each image; all where there is no example."""
    method = _eager(model)
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


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which nothing of training changes: modes, buffers and random numbers are put back.

    Some forwards change buffers in evaluation mode as well. A network, or a transform of its images, that draws random
    numbers draws the same ones each time, and takes none from the streams of training.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2))  # the first is frozen
        >>> with evaluating(net):
        ...     assert not net.training
        >>> [part.training for part in net]
        [False, True]
    """
    modes = {part: part.training for part in module.modules()}
    buffers = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if not nn.parameter.is_lazy(buffer)
    ]
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.default_generator.manual_seed(0)
            for cuda in devices:
                with torch.cuda.device(cuda):
                    torch.cuda.manual_seed(0)
            module.eval()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        with torch.no_grad():
            for part, name, buffer, before in buffers:
                if getattr(part, name) is not buffer:
                    setattr(part, name, buffer)
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        for part, training in modes.items():
            part.training = training


def present(model: nn.Module, layers: str | Sequence[str] | None, default: str | Sequence[str]) -> str | Sequence[str]:
    """The layers that were asked for, or those of a default that the network has.

    All, where the default has none of its backbone: a head alone does not stand for the network.

    Args:
        model: a network or a method.
        layers: as of :func:`layer_names`; None was not asked for anything.
        default: presets, names and globs.

    Example:
        >>> present(nn.Sequential(nn.Linear(2, 2)), None, ["post_residual", "pooled", "layer4.*"])
        ['post_residual']
    """
    if layers is not None:
        return layers
    named, presets = _layers(model)
    patterns = [default] if isinstance(default, str) else default
    found = {name: presets.get(name) or [layer for layer in named if fnmatchcase(layer, name)] for name in patterns}
    of_backbone = set(itertools.chain(*found.values())) - set(presets["head"])
    return [name for name, layers in found.items() if layers] if of_backbone else "all"


def layer_depths(model: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """Relative depths of layers, on which networks of different depth share an axis.

    Args:
        model: the network or method that has the layers.
        names: exact names; a later call of a module (``relu:1``) is as deep as the first.

    Returns:
        The depth of each name. The L layers of ``all`` in the backbone lie at i / (L - 1), whatever head it has: 0 is
        the first, 1 the last. The leaves of a head follow at 1.1, 1.2, ... The modules between two layers are spread
        evenly over the gap; those before the first and after the last layer of the backbone (or head) are as deep as
        that.

    Raises:
        UserError: a name that no layer of this network has.

    Example:
        >>> from ssl_geometry.models import build_backbone
        >>> layer_depths(build_backbone("resnet10"), ["stem", "layer2.0", "layer3.0.conv1", "pooled"])
        {'stem': 0.0, 'layer2.0': 0.444..., 'layer3.0.conv1': 0.476..., 'pooled': 1.0}
    """
    named, presets = _layers(model)
    position = {id(module): i for i, module in enumerate(named.values())}  # the same for both names of one module
    head = [position[id(named[name])] for name in presets["head"]]
    backbone = [position[id(named[name])] for name in presets["all"] if name not in presets["head"]] or [0]
    after = 1 + HEAD_STEP * np.arange(1, len(head) + 1)
    depths = {}
    for name in names:
        module = named.get(name.partition(":")[0])
        if module is None:
            raise UserError(f"{name!r} is no layer of {type(_eager(model)).__name__}; {nearest(name, named)}")
        at = position[id(module)]
        in_head = bool(head) and at >= head[0]
        place = np.interp(at, head, after) if in_head else np.interp(at, backbone, np.linspace(0, 1, len(backbone)))
        depths[name] = float(place)
    return depths


class Taps:
    """Hands out the activations of the chosen layers, one forward at a time.

    Inside the ``with`` block, calling the taps runs the network once, eagerly and without DDP's communication, so that
    a compiled or distributed network gives what the bare one gives. Maps come as (B, C, H, W), also from layers whose
    own are (B, H, W, C), such as those of a Swin transformer. What a layer gives is reduced inside its hook,
    before an in-place operation of the next layer can change it. Hooks exist only inside the block; the mode (train or
    eval), gradients, autocast and the random generators are left as they are.

    Args:
        model: a network or method, bare, compiled or wrapped in DDP.
        layers: as for :func:`layer_names`.
        reduce: what to keep of an activation, called as ``reduce(name, activation)`` without gradients and autocast;
            None keeps a copy. Of a tuple, the first tensor is the activation.

    Raises:
        UserError: an unknown layer; on a call, a chosen layer that gave no tensor or one whose channels may be first or
            last, or a call outside the block.

    Example:
        >>> from ssl_geometry.models import build_backbone
        >>> net = build_backbone("resnet10", width=0.25).eval()
        >>> with Taps(net, "stages", lambda name, x: x.mean((2, 3))) as taps:
        ...     {name: tuple(x.shape) for name, x in taps(torch.rand(2, 3, 64, 64)).items()}
        {'layer1.0': (2, 16), 'layer2.0': (2, 32), 'layer3.0': (2, 64), 'layer4.0': (2, 128)}
    """

    names: list[str]
    """The layers, in forward order."""
    captured: dict[str, Any] | None
    """Where activations go. Set it to an empty dict to listen to forwards that others run (inside the block); None
    leaves them alone."""

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "all",
        reduce: Callable[[str, Tensor], Any] | None = None,
    ) -> None:
        named, presets = _layers(model)
        exact = bool(layers) and not isinstance(layers, str)
        exact = exact and all(name in named and (presets.get(name) or [name]) == [name] for name in layers)
        # Names that were chosen before need no forward to see what runs: one pass over the images stays one.
        self.names = [name for name in named if name in set(layers)] if exact else layer_names(model, layers)
        self._net = _eager(model)
        self._backbone = _backbone(model)
        self._last_axis = any(re.search(LAST_AXIS, type(part).__name__) for part in self._backbone.modules())
        self._reduce = reduce or (lambda name, activation: activation.clone())
        self._square = True  # as views are; of forwards that others run, the images are not seen
        self._handles: list[RemovableHandle] = []
        self.captured = None

    def __enter__(self) -> Self:
        named, _ = _layers(self._net)
        self._handles = [named[name].register_forward_hook(partial(self._capture, name)) for name in self.names]
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Any]:
        """Run the network once and return what the layers gave.

        Args:
            images: whatever the network's forward takes.

        Returns:
            What ``reduce`` made of each activation, in the order in which the layers ran. The second call of a module
            that runs several times in one forward is ``name:1``, the third ``name:2``.

        Raises:
            UserError: a layer that did not run, gave no tensor, or a map whose channels may be first or last; or a call
                outside the ``with`` block.
        """
        if not self._handles:
            raise UserError(
                "taps give activations inside their block only; write `with Taps(...) as taps: taps(images)`"
            )
        captured = self.captured = {}
        self._square = isinstance(images, Tensor) and images.shape[-1:] == images.shape[-2:-1]
        try:
            # Graphs that were compiled before the hooks came would pass them by.
            with torch.compiler.set_stance("force_eager"):
                self._net(images)
        finally:
            self.captured = None
        if silent := [name for name in self.names if name not in captured]:
            raise UserError(
                f"layers={silent} did not run in the forward of {type(self._net).__name__}; choose layers without them"
            )
        return captured

    def _capture(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        captured = self.captured
        if captured is None:  # somebody else called the network
            return
        outputs = output if isinstance(output, list | tuple) else [output]
        activation = next((x for x in outputs if isinstance(x, Tensor)), None)
        if activation is None:
            raise UserError(
                f"layers={name!r} gives {type(output).__name__}, expected a tensor or a tuple with one; leave it out"
            )
        if activation.ndim == 4 and self._channels_are_last(name, module, activation.shape):
            activation = activation.movedim(-1, 1)
        calls = sum(key.partition(":")[0] == name for key in captured)
        key = f"{name}:{calls}" if calls else name
        with torch.no_grad(), torch.autocast(activation.device.type, enabled=False):
            captured[key] = self._reduce(key, activation.detach())

    def _channels_are_last(self, name: str, module: nn.Module, shape: Sequence[int]) -> bool:
        """Whether a layer's four dimensions are (B, H, W, C), and not (B, C, H, W).

        Kinds of modules whose names end in ``2d`` have channels first, in torch and timm; linear ones last. Networks
        that normalise over the last axis nowhere have them first. Else the two equal sides of a map tell, and where the
        channels are as many, timm's attributes of the network. What is no square is no map of a square image (heads of
        attention), and stays as it is.

        Raises:
            UserError: none of these decides.
        """
        if "2d" in type(module).__name__:
            return False
        if isinstance(module, nn.Linear):
            return True
        if not self._last_axis:
            return False
        _, first, middle, last = shape
        if first != last and middle in (first, last):
            return middle == first
        if (declared := getattr(self._backbone, "output_fmt", None)) is not None:
            return declared == "NHWC"
        info = getattr(self._backbone, "feature_info", None)
        stages = [re.escape(stage["module"]) for stage in info] if isinstance(info, list) else []
        if stages and re.fullmatch(rf"({'|'.join(stages)})(\.blocks)?(\.\d+)?", name):
            return False  # timm declares what is not NCHW
        if self._square and not first == middle == last:
            return False
        raise UserError(
            f"layers={name!r} gives maps {'x'.join(map(str, shape[1:]))} whose channels may be first or last; leave it "
            "out, or choose another image size"
        )


def _backbone(model: nn.Module) -> nn.Module:
    """The network itself, of a method its backbone."""
    outer = _eager(model)
    return _eager(dict(outer.named_children()).get("backbone", outer))


def _eager(module: nn.Module) -> nn.Module:
    """The plain module inside ``torch.compile`` and DDP."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(module, OptimizedModule):
            module = module._orig_mod
        else:
            return module


def _post_order(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Each module after its children, as a forward usually ends them; a method's head comes last."""
    module = _eager(module)
    for name, child in sorted(module.named_children(), key=lambda item: item[0] == "head"):
        yield from _post_order(child, path if name == "backbone" else f"{path}.{name}".lstrip("."))
    yield path, module


def _layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """All names that can be chosen with their modules, and the presets, both in forward order."""
    outer = _eager(model)
    parts = dict(outer.named_children())
    net = _backbone(outer)
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
    """Whether all presets of a network run, because its kind is known."""
    return isinstance(net, ResNet) or _is_vision_transformer(net)


def _is_vision_transformer(net: nn.Module) -> bool:
    from timm.models import VisionTransformer  # a third of a second, which ResNets do without

    return isinstance(net, VisionTransformer)


def _quarters(blocks: Sequence[str]) -> list[str]:
    return [blocks[math.ceil(len(blocks) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)]


def _unrolled(module: nn.Module, path: str = "") -> Iterator[str]:
    """The child modules of a network of no known kind; containers and stacks are replaced by what they hold."""
    for name, child in module.named_children():
        child, child_path = _eager(child), f"{path}.{name}".lstrip(".")
        if isinstance(child, CONTAINERS) or _holds_a_stack(child):
            yield from _unrolled(child, child_path)
        else:
            yield child_path


def _holds_a_stack(module: nn.Module) -> bool:
    """Whether a module is no block but runs blocks: an encoder, a stage, a network in a wrapper."""
    parts = [_eager(child) for child in module.children()]
    return any(_is_stack(part) if isinstance(part, CONTAINERS) else _holds_a_stack(part) for part in parts)


def _is_stack(container: nn.Module) -> bool:
    """Whether it has two blocks of one class."""
    kinds = [type(part) for _, part in _blocks(container)]
    return len(set(kinds)) < len(kinds)


def _blocks(container: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts that are neither layers nor containers."""
    parts = [(name, _eager(part)) for name, part in container.named_children()]
    return [(name, part) for name, part in parts if list(part.children()) and not isinstance(part, CONTAINERS)]


def _stacks(net: nn.Module) -> Iterator[list[str]]:
    """The names of the blocks of each stack."""
    for path, module in _post_order(net):
        if isinstance(module, CONTAINERS) and _is_stack(module):
            yield [f"{path}.{name}".lstrip(".") for name, _ in _blocks(module)]
