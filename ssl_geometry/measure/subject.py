"""A network as measurements see it: the module, its views of an image, and the names of its layers."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from ssl_geometry.data.views import Augment, View
from ssl_geometry.errors import UserError, first_line
from ssl_geometry.models.evaluating import evaluating
from ssl_geometry.models.layers import layer_depths, layer_names, present

HOW_IT_SEES = (
    "clean: how {} sees an image is not known; give "
    "clean=View('none', size=…, normalize=…), or its evaluation transform"
)


class TransformView:
    """The clean view of somebody else's pipeline: a transform from a PIL image to a tensor.

    Args:
        transform: such as that of torchvision's evaluation weights, ``weights.transforms()``.
        image_shape: (3, H, W) of the images that it is made for.

    Raises:
        UserError: on a call, where it does not give tensors (3, S, S) of one size.

    Example:
        >>> from torchvision.transforms import v2
        >>> to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        >>> images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
        >>> TransformView(to_tensor)(images).amin()
        tensor(1.)
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], image_shape: Sequence[int] = (3, 256, 256)) -> None:
        self.transform, self.image_shape = transform, tuple(image_shape)

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The pipeline, for protocols: as text, and what it makes of a test image where the text holds an address.

        The text of a function, or of an object without a ``__repr__``, is its address only, which differs from
        process to process.
        """
        text = repr(self.transform)
        plain = re.sub(r" at 0x[0-9a-f]+", "", text)
        return {"transform": plain} | ({} if plain == text else {"of a test image": self._trial()})

    def _trial(self) -> dict[str, Any]:
        """Shape, mean and standard deviation of the view of a test image, and its mean under a ramp along each axis.

        The image is coarse and fine noise, so that resizing, cropping and normalising all change the numbers.
        """
        random = torch.Generator().manual_seed(0)
        coarse, fine = (torch.rand(1, *shape, generator=random) for shape in ((3, 4, 4), self.image_shape))
        noise = (128 * nn.functional.interpolate(coarse, self.image_shape[1:]) + 127 * fine).to(torch.uint8)
        with evaluating(nn.Identity()):  # restores the random state, from which a transform may draw
            (view,) = self(noise).double()
        ramps = [view.movedim(axis, -1) * torch.linspace(0, 1, size) for axis, size in enumerate(view.shape)]
        numbers = [view.mean(), view.std(), *(ramp.mean() for ramp in ramps)]
        return {"shape": tuple(view.shape), "numbers": [f"{float(number):.2e}" for number in numbers]}

    def __call__(self, images: UInt8[Tensor, "B 3 H W"], *args: Any, **kwargs: Any) -> Float[Tensor, "B 3 S S"]:
        """Each image through the transform, on the device of the images."""
        views = [self.transform(F.to_pil_image(image)) for image in images.cpu()]
        shapes = {tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__ for view in views}
        if len(shapes) != 1 or not isinstance(views[0], Tensor):
            raise UserError(f"clean: the transform gives {', '.join(map(str, shapes))}; expected tensors of one shape")
        return torch.stack(views).to(images.device)


class _Place(nn.ModuleDict):
    """Holds heads whose names are dotted: the ``projector`` of ``projector.0``."""


class _WithHeads(nn.Module):
    """A network and heads that read its features, in one forward; heads keep their names of outside."""

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.measured_heads = tuple(heads)
        for name, head in heads.items():
            *parents, last = name.split(".")
            if name.partition(".")[0] == "backbone":
                raise UserError(f"heads {name!r}: what is called backbone is the network itself; leave it out")
            place: nn.Module = self
            try:
                for parent in parents:
                    if parent not in dict(place.named_children()):
                        place.add_module(parent, _Place())
                    place = place.get_submodule(parent)
                if isinstance(place, _WithHeads | _Place):
                    place.add_module(last, head)
                elif getattr(place, last, None) is not head:  # a user's module is not modified
                    raise KeyError(f"{'.'.join(parents)} is a head itself, without this part")
            except (KeyError, TypeError) as error:  # torch's errors give the reason, too
                raise UserError(f"heads {name!r}: {error.args[0]}") from error

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        if not isinstance(features, Tensor):
            raise UserError(f"heads: they read a tensor of features; the network gives {type(features).__name__}")
        if features.ndim == 4 and features.shape[2:] == (1, 1):
            features = features.flatten(1)
        for name in self.measured_heads:
            try:
                self.get_submodule(name)(features)
            except (RuntimeError, TypeError, ValueError) as error:
                if isinstance(error, UserError | torch.OutOfMemoryError):
                    raise
                shape = " x ".join(map(str, features.shape))
                raise UserError(
                    f"heads {name!r}: does not take the network's features, {shape} ({first_line(error)})"
                ) from error
        return features


class Subject:
    """A network to be measured.

    Args:
        network: its forward takes clean views, (B, 3, S, S); layers are named on it.
        clean: how it sees an image: a view, or a transform from a PIL image to a tensor.
        name: of the network, in the records.
        own: its training views, named ``own``; None if they are not known.
        named_views: name to augmentation, besides policies and operations.
        heads: name to module that reads the network's features, measured under that name.
        image_shape: (3, H, W) of the images, which a transform may leave at their size.

    Raises:
        UserError: a network, view or heads of another kind.

    Example:
        >>> from ssl_geometry.models import build_backbone
        >>> subject = Subject(build_backbone("resnet10", width=0.25), View("none", size=32, normalize="cifar10"))
        >>> subject.layers("stages"), subject.view("crop").size
        (('layer1.0', 'layer2.0', 'layer3.0', 'layer4.0'), 32)
    """

    def __init__(
        self,
        network: nn.Module,
        clean: View | Callable[[Image.Image], Tensor],
        *,
        name: str = "network",
        own: View | None = None,
        named_views: Mapping[str, Augment] | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        image_shape: Sequence[int] = (3, 256, 256),
    ) -> None:
        if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
            raise UserError(f"network is {type(network).__name__}, expected a torch module (no scripted one)")
        if not callable(clean) or isinstance(clean, type):
            raise UserError(f"clean {clean!r}: expected View('none', size=…, normalize=…), or the evaluation transform")
        if not isinstance(heads, Mapping | None):
            raise UserError(f"heads is {type(heads).__name__}, expected {{name: module}}")
        self.image_shape = tuple(image_shape)
        self.network = _WithHeads(network, heads) if heads else network
        self.clean = clean if isinstance(clean, View | TransformView) else TransformView(clean, image_shape)
        self.name, self.own, self.named_views = name, own, named_views or {}

    @classmethod
    def of(cls, method: Any, name: str = "network", network: nn.Module | None = None) -> Self:
        """A method of this package, which knows how it sees images.

        Args:
            method: the method.
            name: of the network, in the records.
            network: part of it, such as its teacher; None for the method's own (``--model.measured``).
        """
        network = method.network if network is None else network
        return cls(network, method.clean_view, name=name, own=method.view, named_views=method.named_views)

    @property
    def device(self) -> torch.device:
        """The device of its parameters; without any, its attribute ``device``, else the CPU."""
        itself = getattr(self.network, "device", torch.device("cpu"))
        return next((parameter.device for parameter in self.network.parameters()), itself)

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters; float32 for a network without any."""
        return next((parameter.dtype for parameter in self.network.parameters()), torch.float32)

    def view(self, name: str) -> View | TransformView:
        """How images are seen; parameters are the same for every network (common random numbers).

        Args:
            name: ``clean``; ``own``, how the network's training views are made; or any policy or operation.

        Returns:
            A view of the network's size and normalisation.

        Raises:
            UserError: an unknown name, training views that are not known, or a random view of a network whose clean
                view is a transform, whose size and normalisation are not known.
        """
        if name == "clean":
            return self.clean
        if name == "own":
            if self.own is None:
                raise UserError("own: how the training views are made is not known; leave this view out")
            return self.own
        if isinstance(self.clean, TransformView):
            raise UserError(
                f"{name}: random views need the network's size and normalisation: give clean=View('none', size=…, "
                "normalize=…) in place of a transform"
            )
        options = {key: self.clean.spec[key] for key in ("size", "normalize", "center_crop")}
        return View(self.named_views.get(name, name), **options)

    def layers(
        self, chosen: str | Sequence[str] | None, default: str | Sequence[str] = "all", option: str = "layers"
    ) -> tuple[str, ...]:
        """Names of layers in forward order; see :func:`~ssl_geometry.models.layers.layer_names`.

        Args:
            chosen: presets, names and globs; None takes those of the default that the network has.
            default: presets, names and globs.
            option: where they were chosen, for the message.
        """
        patterns = present(self.network, chosen, default)
        return tuple(layer_names(self.network, patterns, option, example=self._example))

    def depths(self, layers: Sequence[str]) -> dict[str, float]:
        """Layer to relative depth; see :func:`~ssl_geometry.models.layers.layer_depths`."""
        return layer_depths(self.network, layers)

    def seen(
        self, name: str, images: UInt8[Tensor, "B 3 H W"], index: Int64[Tensor, " B"], draw: int = 0
    ) -> Float[Tensor, "B 3 S S"]:
        """What goes into the network.

        Args:
            name: of the view.
            images: uint8 (B, 3, H, W).
            index: the images' numbers, from which random views draw.
            draw: number of the draw of a random view.

        Returns:
            Views (B, 3, S, S) in the network's dtype.
        """
        return self.view(name)(images, index, seed=0, epoch=0, view=draw).to(self.dtype)

    def _example(self) -> Tensor:
        """Two dummy inputs, to find which layers run."""
        images = torch.zeros(2, *self.image_shape, dtype=torch.uint8, device=self.device)
        return self.seen("clean", images, torch.arange(2, device=self.device))
