"""Batch norm over several processes is that of one on the whole batch: plain, compiled, and with CUDA's kernels.

The kernels of CUDA are stood in for by what their documentation says that they compute.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_geometry.callbacks import LastCheckpoint, StopOnNaN, StopOnSignal
from ssl_geometry.metrics import ProbeBank
from ssl_geometry.models import sync_batchnorm
from ssl_geometry.models.sync_batchnorm import SyncBatchNorm, SyncBatchNormAct, SyncBatchNormPlugin
from ssl_geometry.models.taps import Taps
from tests.distributed.conftest import Ranks
from tests.fake_cuda import FakeCuda

KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def share(rank: int, world_size: int, images: int, empty: bool = False) -> slice:
    """Unequal shares of the images; none for the first process if so wanted."""
    ends = [round(images * (i / world_size) ** 1.5) for i in range(world_size + 1)]
    if empty and world_size > 1:
        ends[1] = 0
    return slice(ends[rank], ends[rank + 1])


def over_processes(tensors: list[Tensor]) -> list[Tensor]:
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors


def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA's kernels compute, in float64; the layer takes the way of a GPU."""

    def shaped(x: Tensor, *values: Tensor | None) -> list[Any]:
        shape = [1, -1] + [1] * (x.ndim - 2)
        return [1.0 if value is None else value.double().view(shape) for value in values]

    def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x.double(), [0, *range(2, x.ndim)], correction=0)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return mean.to(dtype), (variance + eps).rsqrt().to(dtype)

    def elemt(x: Tensor, weight: Any, bias: Any, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
        mean, invstd, scale = shaped(x, mean, invstd, weight)
        shift = 0.0 if bias is None else shaped(x, bias)[0]
        return ((x.double() - mean) * invstd * scale + shift).to(x.dtype)

    def reduce(g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Any, *needed: bool) -> tuple[Tensor, ...]:
        over = [0, *range(2, x.ndim)]
        first, second = g.double().sum(over), (g.double() * (x.double() - shaped(x, mean)[0])).sum(over)
        return tuple(value.to(mean.dtype) for value in (first, second, second * invstd, first))

    def backward(
        g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Any, first: Tensor, second: Tensor, count: Tensor
    ) -> Tensor:
        assert count.dtype == torch.int32
        n = count.sum()
        mean, s, scale, first, second = shaped(x, mean, invstd, weight, first / n, second / n)
        return ((g.double() - first - (x.double() - mean) * s.square() * second) * s * scale).to(x.dtype)

    for name, kernel in {
        "batch_norm_stats": stats,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": reduce,
        "batch_norm_backward_elemt": backward,
    }.items():
        monkeypatch.setattr(torch, name, kernel)
    monkeypatch.setattr(sync_batchnorm, "_normalized", sync_batchnorm._Fused.apply)


def layer(
    rank: int, world_size: int, way: str, kind: str | int, options: dict[str, Any], empty: bool, offset: float = 3.0
) -> list[Tensor]:
    """Output, gradients and running statistics of two steps, the shares of the images gathered in place."""
    generator = torch.Generator().manual_seed(6)
    dims = 4 if kind == "with activation" else int(kind)
    norm: nn.Module = (BatchNormAct2d if kind == "with activation" else KINDS[dims])(5, **options).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if world_size > 1:
            norm = SyncBatchNormPlugin().apply(norm)
            if way == "kernels":
                kernels_on_the_cpu(monkeypatch)
        found: list[Tensor] = []
        for _ in range(2):
            x = offset + torch.randn([12, 5, *[4] * (dims - 2)], generator=generator, dtype=torch.float64)
            target = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            mine = share(rank, world_size, 12, empty)
            x.requires_grad_(True)
            y = norm(x[mine])
            norm.zero_grad()
            (y * target[mine]).sum().backward()
            assert x.grad is not None
            whole = torch.zeros_like(x)
            whole[mine] = y.detach()
            gradients = [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                for parameter in norm.parameters()
            ]
            found += over_processes([whole, x.grad, *gradients])
    return [*found, *norm.buffers()]


@pytest.mark.parametrize("empty", [False, True], ids=["uneven", "a process without images"])
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False, "eps": 0.1}],
    ids=lambda options: "".join(options),
)
@pytest.mark.parametrize("way", ["plain", "kernels"])
def test_it_is_the_batch_norm_of_one_process(ranks: Ranks, way: str, options: dict[str, Any], empty: bool) -> None:
    for kind in (*KINDS, "with activation"):
        expected = layer(0, 1, way, kind, options, empty)
        for got in ranks(layer, way, kind, options, empty):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_nothing_cancels_around_a_large_mean(ranks: Ranks) -> None:
    """Squares of 1e8 leave no digit of a variance of 1 in float64."""
    expected = layer(0, 1, "plain", 4, {}, empty=False, offset=1e8)
    for got in ranks(layer, "plain", 4, {}, False, 1e8):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_processes_are_put_together_in_float32_without_cancelling() -> None:
    """Means near 1e4, variances near 1e-4: in float32, E(x^2) - E(x)^2 is noise of order 10."""
    generator = torch.Generator().manual_seed(0)
    parts = [1e4 + 1e-2 * torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (7, 50, 11)]
    rows = [
        torch.cat([part.mean(0), part.var(0, correction=0), part.new_tensor([len(part)])]).float() for part in parts
    ]
    mean, variance, n = sync_batchnorm._combined(torch.stack([*rows, torch.zeros_like(rows[0])]))
    whole = torch.cat(parts)
    assert n.tolist() == [68]
    torch.testing.assert_close(mean.double(), whole.mean(0), rtol=2e-7, atol=0)
    torch.testing.assert_close(variance.double(), whole.var(0, correction=0), rtol=0.05, atol=0)  # means are rounded
    naive = sum((part.float().square().sum(0) for part in parts), torch.zeros(6)) / 68 - whole.float().mean(0).square()
    assert (naive / whole.var(0) - 1).abs().median() > 1e3


def half(rank: int, world_size: int, way: str) -> list[Tensor]:
    """bfloat16 activations in channels-last, parameters in float32."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 8, 4, 4, generator=generator).to(torch.bfloat16, memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(8)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if world_size > 1:
            SyncBatchNormPlugin().apply(norm)
            if way == "kernels":
                kernels_on_the_cpu(monkeypatch)
        mine = x[share(rank, world_size, 6)].requires_grad_(True)
        y = norm(mine)
        y.float().square().mul(y.detach()).sum().backward()
    assert y.dtype == mine.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert mine.grad.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
    assert norm.running_mean.dtype == norm.weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    outputs = torch.zeros(6, 8, 4, 4), torch.zeros(6, 8, 4, 4)
    for whole, value in zip(outputs, (y.detach(), mine.grad), strict=True):
        whole[share(rank, world_size, 6)] = value.float()
    return [*over_processes([*outputs, norm.weight.grad, norm.bias.grad]), *norm.buffers()]  # type: ignore[list-item]


@pytest.mark.parametrize("way", ["plain", "kernels"])
def test_bfloat16_and_channels_last_stay(ranks: Ranks, way: str) -> None:
    expected = half(0, 1, way)
    for got in ranks(half, way):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got[4:], expected[4:], rtol=1e-5, atol=1e-6)


def compiled(rank: int, world_size: int, backend: str | None, wrapped: bool) -> tuple[list[Tensor], int, int]:
    """Gradients and statistics of a small network after two steps on unequal shares; its graphs, and their breaks."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    generator = torch.Generator().manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    net.double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=generator)
    if world_size > 1:
        SyncBatchNormPlugin().apply(net)
    if backend:
        net.compile(backend=backend)
    outer: nn.Module = net
    with pytest.MonkeyPatch.context() as monkeypatch:
        if wrapped and world_size > 1:  # small buckets: torch cuts the graph between them, to send gradients early
            monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 256)
            outer = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.001)  # type: ignore[arg-type]
        for _ in range(2):
            x = torch.randn(9, 3, 8, 8, generator=generator, dtype=torch.float64)
            mine = share(rank, world_size, 9)
            net.zero_grad()
            outer(x[mine]).pow(3).sum().backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    if wrapped:
        gradients = [world_size * gradient for gradient in gradients]  # type: ignore[operator]
    else:
        over_processes(gradients)  # type: ignore[arg-type]
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    assert not (wrapped and backend and world_size > 1) or counters["aot_autograd"]["total"] > 1, counters
    torch._dynamo.reset()
    return [*gradients, *net.buffers()], graphs, breaks  # type: ignore[list-item]


WHOLE = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
"""The whole compiler, or its part that needs none of C++."""


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize(("backend", "wrapped"), [(None, True), ("aot_eager", True), (WHOLE, False)])
def test_compiled_it_is_one_graph_with_the_right_gradients(ranks: Ranks, backend: str | None, wrapped: bool) -> None:
    expected, _, _ = compiled(0, 1, None, wrapped)
    for got, graphs, breaks in ranks(compiled, backend, wrapped):
        assert (graphs, breaks) == (1 if backend else 0, 0)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def alone(rank: int, world_size: int) -> list[bool]:
    """What needs no other process: the first one does it by itself."""
    if rank:
        return []
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 4, 3, 3, generator=generator)
    same = []
    for options in ({}, {"track_running_stats": False}):
        ours, torchs = nn.BatchNorm2d(4, **options), nn.BatchNorm2d(4, **options)  # type: ignore[arg-type]
        SyncBatchNormPlugin().apply(ours)
        before = [buffer.clone() for buffer in ours.buffers()]
        same.append(torch.equal(ours.eval()(x), torchs.eval()(x)))
        same.append(all(map(torch.equal, before, ours.buffers())))
    return same


def test_a_frozen_layer_asks_no_other_process(ranks: Ranks) -> None:
    assert ranks(alone)[0] == [True] * 4


def test_layers_change_in_place_and_back() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm1d(4), nn.SyncBatchNorm(4), BatchNormAct2d(4)
    )
    state, parameters = net.state_dict(), list(net.parameters())
    plugin = SyncBatchNormPlugin()
    with Taps(net, ["1"], lambda _, output: output.shape) as taps:
        assert plugin.apply(net) is net
        kinds = [nn.Conv2d, SyncBatchNorm, SyncBatchNorm, nn.SyncBatchNorm, SyncBatchNormAct]
        assert [type(module) for module in net] == kinds
        assert taps_hear(taps, net)
    assert list(net.state_dict()) == list(state)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    plugin.revert(net)
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.SyncBatchNorm, BatchNormAct2d]
    assert [type(module) for module in net] == kinds


class Scaled(nn.BatchNorm2d):
    """A kind of batch norm that nobody knows."""


def test_layers_that_are_not_synchronised_are_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    known = nn.BatchNorm2d(4), nn.SyncBatchNorm(4), BatchNormAct2d(4), nn.GroupNorm(2, 4)
    net = nn.Sequential(*known, Scaled(4), Scaled(4))
    SyncBatchNormPlugin().apply(net)
    (line,) = caplog.messages
    assert line.startswith("Trainer.sync_batchnorm: 2 layers (Scaled) are not synchronised")
    caplog.clear()
    SyncBatchNormPlugin().apply(net[:4])
    assert not caplog.messages


def taps_hear(taps: Taps, net: nn.Sequential) -> bool:
    taps.captured = {}
    net[:2](torch.randn(2, 3, 5, 5))
    return taps.captured == {"1": (2, 4, 5, 5)}


def pretended(rank: int, world_size: int) -> tuple[str, str, dict[str, tuple[int, int]]]:
    """Faults and waits of two training steps on a pretended GPU; launches and collectives of a layer and of a bank."""
    with FakeCuda(world_size) as gpu:
        gpu.nccl.add(dist.group.WORLD.group_name)  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(4)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
            nn.BatchNorm1d(5, momentum=None),
        ).to("cuda")  # fmt: skip
        SyncBatchNormPlugin().apply(net)
        wrapped = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        bank = ProbeBank({"wide": 6, "narrow": 5}, num_classes=3, sent_in=torch.bfloat16).to("cuda")
        losses = StopOnNaN()
        stop = StopOnSignal(LastCheckpoint(Path("unused")), losses)
        stop._group = dist.new_group(backend="gloo")
        trainer: Any = SimpleNamespace(
            world_size=world_size, log_every_n_steps=1, is_last_batch=False, accumulate_grad_batches=1
        )
        losses.on_train_start(trainer, SimpleNamespace(device=torch.device("cuda")))  # type: ignore[arg-type]
        try:
            for step in range(3):
                x = torch.randn(4 + rank, 3, 8, 8, generator=generator).cuda(non_blocking=True)
                labels = torch.arange(4 + rank, device="cuda") % 3
                with gpu.scope("step" if step else "first"):  # the bank and the optimiser begin in the first
                    with torch.autocast("cuda", torch.bfloat16):
                        y = wrapped(x)
                    loss = nn.functional.cross_entropy(y.float(), labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    with gpu.scope("bank" if step else "first"):
                        bank.step({"wide": y.new_ones(len(y), 6), "narrow": y.detach()}, labels, labels)
                    for callback in (losses, stop):
                        callback.on_train_batch_end(trainer, None, loss, None, step)  # type: ignore[arg-type]
        finally:
            stop.restore()
        norm, x = net[1], torch.randn(4, 6, 8, 8, device="cuda").bfloat16().requires_grad_()
        with gpu.scope("forward"):
            y = norm(x)
        gradient = torch.ones_like(y)
        with gpu.scope("backward"):
            torch.autograd.grad(y, [x, norm.weight, norm.bias], gradient)
        report = gpu.report()
        waits = [str(note) for note in gpu.waits if note.scope in ("step", "bank", "forward", "backward")]
        counts = {scope: (gpu.launches[scope], gpu.collectives[scope]) for scope in ("bank", "forward", "backward")}
    return "".join(map(str, gpu.faults)), "".join(waits) and report, counts


def test_on_a_gpu_no_step_waits(ranks: Ranks) -> None:
    """DDP, batch norm, probes, the check of the loss and the exchange of signals; budgets that must not creep up."""
    budgets = {"bank": (188, 4), "forward": (24, 1), "backward": (6, 1)}  # launches, collectives; two steps of the bank
    for faults, waits, counts in ranks(pretended):
        assert (faults, waits) == ("", "")
        for scope, (launches, collectives) in budgets.items():
            assert counts[scope][0] <= launches, counts
            assert counts[scope][1] == collectives, counts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's kernels of batch norm: no pretended GPU has them")
@pytest.mark.parametrize("other_format", [False, True], ids=["", "gradient in the other format"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [sync_batchnorm._Fused.apply, sync_batchnorm._normalized], ids=["fused", "plain"])
def test_on_cuda_both_ways_are_batch_norm(
    tmp_path: Path, way: Any, dtype: torch.dtype, channels_last: bool, other_format: bool
) -> None:
    formats = (torch.contiguous_format, torch.channels_last)
    x = (torch.randn(8, 5, 6, 6, device="cuda") * 3 + 7).to(dtype).contiguous(memory_format=formats[channels_last])
    gradient = torch.randn_like(x).contiguous(memory_format=formats[channels_last != other_format])
    affine = [torch.randn(5, device="cuda") for _ in range(2)]
    inputs = [value.requires_grad_() for value in (x, *affine)]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        y, mean, variance, n = way(*inputs, 1e-5)
        y.backward(gradient)
    finally:
        dist.destroy_process_group()
    z = F.batch_norm(wide[0], None, None, wide[1], wide[2], training=True, eps=1e-5)
    z.backward(gradient.double())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.double(), z, **tolerance)
    torch.testing.assert_close(mean.double(), wide[0].mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), wide[0].var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    assert float(n) == x.numel() / 5
    for here, there in zip(inputs, wide, strict=True):
        torch.testing.assert_close(here.grad.double(), there.grad, **tolerance)
