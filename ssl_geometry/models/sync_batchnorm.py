"""Batch normalisation over the images of all processes on the CPU, where torch has none.

On GPUs ``torch.nn.SyncBatchNorm`` does this with kernels of its own. With the one here several CPU processes train the
network that one process trains, so that what holds on many GPUs can be shown on a machine without any.
"""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Normalises with the mean and variance of the images of all processes; with one process, as torch does.

    Sums run in float64, so that their order, which depends on the number of processes, does not show in float32.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions: (B, C, …)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, …) channel by channel."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        over = [0, *range(2, input.ndim)]
        x = input.double()
        count = x.new_full((1,), input.numel() // input.shape[1])
        sums = _SumOverProcesses.apply(torch.cat([x.sum(over), x.square().sum(over), count]))
        total, squares, n = sums.split([input.shape[1], input.shape[1], 1])
        mean = total / n
        variance = (squares / n - mean.square()).clamp_min(0)
        if self.track_running_stats:
            self._track(mean.detach(), (variance * n / (n - 1)).detach())
        shape = [1, -1] + [1] * (input.ndim - 2)
        y = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        sums = sums.clone()
        dist.all_reduce(sums)
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class SyncBatchNormOnCPU(LayerSync):
    """Plugin of the trainer: batch norm layers become :class:`SyncBatchNorm` while it trains, in place."""

    def __init__(self) -> None:
        self._classes: dict[nn.Module, type[nn.Module]] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """Change the layers' class; their parameters, buffers and hooks stay."""
        for module in model.modules():
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):  # others may do more than normalise
                self._classes[module] = type(module)
                module.__class__ = SyncBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Give the layers their class back."""
        for module, cls in self._classes.items():
            module.__class__ = cls
        self._classes.clear()
        return model
