"""Whether a network is compiled while it trains."""

import importlib.util
import logging
import os
import shutil

import torch

from ssl_geometry.errors import UserError

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (7, 0)
"""Of a GPU that Triton compiles for."""


def is_compiled(wanted: bool | None, device: torch.device) -> bool:
    """Decide ``--model.compile`` for a device, and log what was decided.

    Args:
        wanted: the option. None compiles on CUDA, unless torch is to be deterministic: which kernels a compiler
            chooses may depend on what it timed, and equal bits may not.
        device: that the network trains on.

    Returns:
        Whether to compile.

    Raises:
        UserError: asked for, and something is missing that compiling needs.

    Example:
        >>> is_compiled(None, torch.device("cpu"))
        False
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if wanted is None and (device.type != "cuda" or deterministic):
        reason = "deterministic" if device.type == "cuda" else f"on {device.type}"
        logger.info(f"training runs eagerly ({reason}; --model.compile true compiles it)")
        return False
    if wanted is False:
        return False
    missing = missing_for(device)
    if missing and wanted:
        raise UserError(f"--model.compile true: {missing}; install it, or leave the option out")
    if missing:
        logger.warning(f"training runs eagerly, and slower than it could: {missing} (--model.compile)")
        return False
    logger.info("training is compiled: the first step takes a minute or more (--model.compile false runs it eagerly)")
    return True


def missing_for(device: torch.device) -> str:
    """What compiling for a device lacks on this machine; empty where it lacks nothing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
            return f"Triton needs a GPU of compute capability 7.0, not {capability[0]}.{capability[1]}"
    language, variable, names = (
        ("C", "CC", ("gcc", "clang")) if device.type == "cuda" else ("C++", "CXX", ("g++", "clang++"))
    )
    if not any(map(shutil.which, [os.environ[variable]] if variable in os.environ else names)):
        return f"no {language} compiler was found ({' or '.join(names)}, or one named by ${variable})"
    return ""
