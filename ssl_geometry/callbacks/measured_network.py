"""Which network of a LightningModule is measured."""

import logging
from typing import Any

from torch import nn

from ssl_geometry.errors import UserError
from ssl_geometry.measure.processes import is_of_the_first

logger = logging.getLogger(__name__)
logger.addFilter(is_of_the_first)


def usual_path(module: nn.Module) -> str:
    """The default location of the network in a module.

    Raises:
        UserError: it has several parts, and no forward of its own.
    """
    parts = dict(module.named_children())
    if "backbone" in parts:
        return "backbone"
    learns = [name for name, part in parts.items() if next(part.parameters(), None) is not None]
    holders = nn.ModuleList | nn.ModuleDict  # which have no forward
    if len(learns) == 1 and not isinstance(parts[learns[0]], holders) and not list(module.parameters(recurse=False)):
        return learns[0]
    name, choice = type(module).__name__, f"give network=… to measure one of its parts: {', '.join(learns)}"
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    if owner.__name__ in ("LightningModule", "Module"):  # of either package that Lightning goes by
        raise UserError(f"network: {name} has neither a backbone nor a forward; {choice}")
    logger.warning(f"the whole {name} is measured, as it has no backbone; {choice}")
    return ""


def submodule(module: nn.Module, path: str, argument: str) -> nn.Module:
    """The module at an attribute path.

    Args:
        module: where the path starts; an empty one is the module itself.
        path: such as ``student.backbone``.
        argument: that named it.

    Raises:
        UserError: no module is there.
    """
    found: Any = module
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    if not isinstance(found, nn.Module):
        names = ", ".join(name for name, _ in module.named_children())
        raise UserError(f"{argument}={path!r}: no module of {type(module).__name__}; it has {names}")
    return found
