"""The activations of a network's layers, in forward order."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssl_geometry.errors import UserError
from ssl_geometry.models.layers import backbone_of, layer_names, named_layers, unwrapped

LAST_AXIS = r"(LayerNorm|RmsNorm|RMSNorm)(?!.*2d)"
"""Kinds of normalisation over the last axis, by their names in torch and timm."""


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
        named, presets = named_layers(model)
        exact = bool(layers) and not isinstance(layers, str)
        exact = exact and all(name in named and (presets.get(name) or [name]) == [name] for name in layers)
        # Names that were chosen before need no forward to see what runs: one pass over the images stays one.
        self.names = [name for name in named if name in set(layers)] if exact else layer_names(model, layers)
        self._net = unwrapped(model)
        self._backbone = backbone_of(model)
        self._last_axis = any(re.search(LAST_AXIS, type(part).__name__) for part in self._backbone.modules())
        self._reduce = reduce or (lambda name, activation: activation.clone())
        self._square = True  # as views are; of forwards that others run, the images are not seen
        self._handles: list[RemovableHandle] = []
        self.captured = None

    def __enter__(self) -> Self:
        named, _ = named_layers(self._net)
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
