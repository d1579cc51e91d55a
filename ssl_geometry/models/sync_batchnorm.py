"""Batch normalisation over the images of all processes: one collective forward, one backward, no wait of the host.

Each process sends the mean and variance of its own images and their number; the law of total variance puts them
together, so nothing cancels where the mean is large, and processes may have unequally many images, or none.
``torch.nn.SyncBatchNorm`` drops processes without images by boolean masks: three waits for the device per layer and
step, a break of the compiled graph at each, and it does not run on the CPU.

Two ways to the same numbers. Plain operations, through which torch differentiates: compiled, they fuse with the layers
around them; on the CPU they run in float64, so that several processes train the network that one process trains.
On a GPU that does not compile they would keep float32 copies of all activations, so there the kernels of
``torch.nn.SyncBatchNorm`` do the work: 24 launches forward, 6 backward.
"""

import logging
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ssl_geometry.errors import argument

logger = logging.getLogger(__name__)

STATE = ("running_mean", "running_var", "num_batches_tracked")
SMALLEST_VARIANCE = 1e-30


class SyncBatchNorm(_BatchNorm):
    """Normalises with the mean and variance of the images of all processes; with one process, as torch does.

    Statistics run in float64 on the CPU, where their order, which depends on the number of processes, then does not
    show in float32; elsewhere in float32 at least.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions: (B, C, …)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, …) channel by channel."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        if input.is_cuda and not torch.compiler.is_compiling():
            output, mean, variance, n = _Fused.apply(input, self.weight, self.bias, self.eps)
        else:
            output, mean, variance, n = _normalized(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), n)
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, n: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        unbiased = variance * (n / (n - 1).clamp_min(1))
        for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
            now = now.to(running.dtype)
            share = self.num_batches_tracked.to(now.dtype).reciprocal() if self.momentum is None else self.momentum
            running.lerp_(now, share)


class SyncBatchNormAct(SyncBatchNorm):
    """The same for timm's ``BatchNormAct2d``, whose activation follows in the one module."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W), then drop and activate."""
        return self.act(self.drop(super().forward(input)))


def _normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """Output, mean (C,), biased variance (C,) and number of values a channel (1,), in plain operations."""
    over, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    values = x.to(torch.float64 if x.device.type == "cpu" else torch.promote_types(x.dtype, torch.float32))
    if x.numel():
        variance, mean = torch.var_mean(values, over, correction=0)
    else:  # the collectives, this one and that of the gradient, need every process
        variance = mean = values.sum(over)
    row = torch.cat([mean, variance, mean.new_full((1,), x.numel() // x.shape[1])])
    mean, variance, n = _combined(_gather(row, dist.get_world_size()))
    y = (values - mean.view(shape)) * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype), mean, variance, n


def _combined(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of all, from those of each process, (R, 2C + 1)."""
    channels = rows.shape[1] // 2
    means, variances, counts = rows.split([channels, channels, 1], 1)
    n = counts.sum(0)
    shares = counts / n.clamp_min(1)
    mean = (shares * means).sum(0)
    apart = means - mean
    variance = (shares * torch.addcmul(variances, apart, apart)).sum(0)
    return mean, variance, n


class _Fused(torch.autograd.Function):
    """The same with the CUDA kernels of torch's: the input is kept as it is, and read twice forward, twice backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        x = _dense(x)
        dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1]
        if x.numel():
            mean, inverse = torch.batch_norm_stats(x, SMALLEST_VARIANCE)
            row = torch.cat([mean, inverse.pow(-2), mean.new_full((1,), x.numel() // channels)])
        else:
            row = x.new_zeros(2 * channels + 1, dtype=dtype)
        rows = row.new_empty(dist.get_world_size(), len(row))
        dist.all_gather_into_tensor(rows.view(-1), row)
        mean, variance, n = _combined(rows)
        inverse = (variance + eps).rsqrt()
        scale, shift = (None if value is None else value.to(dtype) for value in (weight, bias))
        ctx.save_for_backward(x, scale, mean, inverse, n)
        ctx.mark_non_differentiable(mean, variance, n)
        ctx.set_materialize_grads(False)  # of these three
        y = torch.batch_norm_elemt(x, scale, shift, mean, inverse, eps) if x.numel() else torch.empty_like(x)
        return y, mean, variance, n

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, inverse, n = ctx.saved_tensors
        _, for_weight, for_bias, _ = ctx.needs_input_grad
        gradient, sums = _dense(gradients[0]), mean.new_zeros(2 * len(mean))
        of_weight = of_bias = None
        if x.numel():
            first, second, of_weight, of_bias = torch.batch_norm_backward_reduce(
                gradient, x, mean, inverse, scale, True, for_weight, for_bias
            )
            sums = torch.cat([first, second])
        dist.all_reduce(sums)  # of the weight and bias not: their gradients are averaged with all others
        if not x.numel():
            return torch.zeros_like(x), None, None, None
        first, second = sums.chunk(2)
        of_x = torch.batch_norm_backward_elemt(gradient, x, mean, inverse, scale, first, second, n.to(torch.int32))
        return of_x, of_weight if for_weight else None, of_bias if for_bias else None, None


def _dense(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])
    return x if channels_last else x.contiguous()


# As operators of their own, the collectives are nodes of a compiled graph, with a gradient and no break.


@torch.library.custom_op("ssl_geometry::gather", mutates_args=())
def _gather(row: Tensor, processes: int) -> Tensor:
    """The rows of all processes, (D,) to (R, D)."""
    rows = row.new_empty(processes, len(row))
    dist.all_gather_into_tensor(rows.view(-1), row.contiguous())
    return rows


@torch.library.custom_op("ssl_geometry::scatter_sum", mutates_args=())
def _scatter_sum(rows: Tensor) -> Tensor:
    """The row of this process, of the sum over processes; (R, D) to (D,)."""
    row = rows.new_empty(rows.shape[1])
    dist.reduce_scatter_tensor(row, rows.flatten())
    return row


_gather.register_fake(lambda row, processes: row.new_empty(processes, row.shape[0]))
_scatter_sum.register_fake(lambda rows: rows.new_empty(rows.shape[1]))
_gather.register_autograd(lambda ctx, gradient: (_scatter_sum(gradient), None))


class SyncBatchNormPlugin(LayerSync):
    """Plugin of the trainer: batch norm layers become :class:`SyncBatchNorm` while it trains, in place.

    Their statistics are equal in all processes, so DDP does not broadcast them before each forward.
    """

    def __init__(self) -> None:
        self._classes: dict[nn.Module, type[nn.Module]] = {}
        self._ignored: list[str] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Change the layers' class; their parameters, buffers and hooks stay."""
        from timm.layers.norm_act import BatchNormAct2d  # a third of a second, which one process does without

        kinds: dict[type, type[SyncBatchNorm]] = {
            **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), SyncBatchNorm),
            BatchNormAct2d: SyncBatchNormAct,
        }
        others: Counter[str] = Counter()
        for module in model.modules():
            if synchronised := kinds.get(type(module)):  # subclasses may do more than normalise
                self._classes[module] = type(module)
                module.__class__ = synchronised
            elif isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm | nn.SyncBatchNorm):
                others[type(module).__name__] += 1
        if others:
            option = argument("sync_batchnorm", "trainer", "Trainer")
            logger.warning(
                f"{option}: {others.total()} layers ({', '.join(others)}) are not synchronised: each "
                "process normalises with its own images; layers of torch and timm's BatchNormAct2d are"
            )
        equal = [f"{name}.{key}" for name, module in model.named_modules() if module in self._classes for key in STATE]
        self._ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*self._ignored, *equal])
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Give the layers their class back."""
        for module, cls in self._classes.items():
            module.__class__ = cls
        self._classes.clear()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, self._ignored)
        return model
