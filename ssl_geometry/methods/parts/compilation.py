"""Whether a network is compiled while it trains."""

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_geometry.errors import UserError

logger = logging.getLogger(__name__)


def is_compiled(wanted: bool | None, device: torch.device) -> bool:
    """Decide ``--model.compile`` for a device, and log what was decided.

    Args:
        wanted: the option. None compiles on CUDA where this machine can, unless torch is to be deterministic: which
            kernels a compiler chooses may depend on what it timed, and equal bits may not.
        device: that the network trains on.

    Returns:
        Whether to compile; the same in all processes, each of which must call this.

    Raises:
        UserError: asked for, and this machine, or that of another process, cannot.

    Example:
        >>> is_compiled(None, torch.device("cpu"))
        False
    """
    if wanted is None and (device.type != "cuda" or torch.are_deterministic_algorithms_enabled()):
        reason = "deterministic" if device.type == "cuda" else f"on {device.type}"
        logger.info(f"training runs eagerly ({reason}; --model.compile true compiles it)")
        return False
    if wanted is False:
        return False
    failure = try_out(device)
    if not _everywhere(
        not failure, device
    ):  # some compiled and some not, processes would wait for different collectives
        failure = failure or "another process cannot"
    if failure and wanted:
        raise UserError(f"--model.compile true: this machine cannot compile ({failure}); set false or null")
    if failure:
        logger.warning(f"training runs eagerly, slower than compiled, which this machine cannot do ({failure})")
        return False
    logger.info("training is compiled: the first step takes a minute or more (--model.compile false runs it eagerly)")
    return True


def _everywhere(here: bool, device: torch.device) -> bool:
    """Whether it holds in all processes."""
    if not dist.is_initialized():
        return here
    votes = torch.tensor(int(here), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def try_out(device: torch.device) -> str:
    """Compile a few operations and their gradient: that takes all tools which a network takes, in seconds.

    Args:
        device: to compile for.

    Returns:
        Why it failed, in one line; empty where it did not.
    """

    def sums(x: Tensor) -> Tensor:
        return (2 * x).relu().sum()

    try:
        torch.compile(sums)(torch.ones(8, device=device, requires_grad=True)).backward()
    except Exception as error:  # no Triton, an old GPU, no compiler, no driver library, a cache that cannot be written
        inner = getattr(error, "inner_exception", error)
        return next((line.strip() for line in str(inner).splitlines() if line.strip()), type(inner).__name__)
    return ""
