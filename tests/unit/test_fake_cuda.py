"""The pretended GPU sees what a GPU would refuse or wait for: a harness that sees nothing finds nothing."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fake_cuda import FakeCuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU, and nothing is pretended")


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with FakeCuda() as pretended:
        yield pretended


def cuda(*shape: int) -> Tensor:
    return torch.rand(*shape, device="cuda")


REFUSED: dict[str, Callable[[], object]] = {
    "add.*two devices": lambda: cuda(3) + torch.rand(3),
    "stack.*two devices": lambda: torch.stack([cuda(3), torch.rand(3)]),
    "mm.*two devices": lambda: cuda(3, 3) @ torch.rand(3, 3),
    "index.*two devices": lambda: torch.rand(3)[torch.arange(2, device="cuda")],
    "add_.*two devices": lambda: torch.zeros(()).add_(cuda(1)[0]),
    "mm.*no CUDA kernel for torch.int64": lambda: torch.ones(2, 2, dtype=torch.long, device="cuda").mm(
        torch.ones(2, 2, dtype=torch.long, device="cuda")
    ),
    "addmm.*two devices": lambda: nn.Linear(3, 2)(cuda(4, 3)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses(gpu: FakeCuda, what: str) -> None:
    REFUSED[what]()
    assert len(gpu.faults) == 1
    assert re.match(what, gpu.faults[0].what), gpu.report()


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "format": lambda x: f"{x[0]:.1f}",
    "repr": repr,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to host": lambda x: x.to("cpu"),
    "copy_ to host": lambda x: torch.empty(4).copy_(x),
    "to the device": lambda x: torch.zeros(3).to(x.device),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "as_tensor": lambda x: torch.as_tensor(np.zeros(3), device="cuda"),
    "mask": lambda x: x[x > 0.5],
    "list": lambda x: x[[0, 2]],
    "host index": lambda x: x[torch.tensor([0, 2])],
    "masked assignment": lambda x: x.index_put_((x > 0.5,), x[:1]),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0.5),
    "masked_select": lambda x: x.masked_select(x > 0.5),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.long)),
    "equal": lambda x: torch.equal(x, x),
    "cholesky": lambda x: torch.linalg.cholesky(torch.eye(2, device="cuda")),
    "eigh": lambda x: torch.linalg.eigvalsh(torch.eye(2, device="cuda")),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits(gpu: FakeCuda, what: str) -> None:
    WAITS[what](cuda(4))
    assert len(gpu.waits) == 1, gpu.report()
    assert gpu.waits[0].where.startswith("tests/unit/test_fake_cuda.py:")
    assert not gpu.faults


FREE: dict[str, Callable[[Tensor], object]] = {
    "number": lambda x: 2 * x + 1,
    "number on the host": lambda x: x * torch.tensor(2.0),
    "assignment": lambda x: x.__setitem__(0, 5.0),
    "masked number": lambda x: x.__setitem__(x > 0.5, 0.0),
    "where": lambda x: torch.where(x > 0.5, x, 0.0),
    "index": lambda x: x[torch.arange(2, device=x.device)],
    "not blocking": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    "same device": lambda x: x.to("cuda").to(torch.float64),
    "one_hot": lambda x: F.one_hot(x.long(), 3),
    "sort": lambda x: x.sort(),
    "full": lambda x: torch.full((3,), 2.0, device=x.device),
    "new_zeros": lambda x: x.new_zeros(3) + x[:3],
    "sized repeats": lambda x: torch.repeat_interleave(torch.ones_like(x, dtype=torch.long), output_size=4),
    "cholesky_ex": lambda x: torch.linalg.cholesky_ex(torch.eye(2, device="cuda")),
}


@pytest.mark.parametrize("what", FREE)
def test_what_does_neither(gpu: FakeCuda, what: str) -> None:
    FREE[what](cuda(4))
    assert not gpu.faults + gpu.waits, gpu.report()


def test_operations_without_a_cuda_kernel(gpu: FakeCuda) -> None:
    torch.histogram(cuda(4), 2)
    assert "aten::histogram.bin_ct: no CUDA kernel" in [fault.what for fault in gpu.faults]


def test_numpy_is_refused_at_once(gpu: FakeCuda) -> None:
    with pytest.raises(TypeError, match="can't convert cuda"):
        cuda(3).numpy()


def test_operations_that_are_not_deterministic_only_where_that_is_asked_for(gpu: FakeCuda) -> None:
    x = cuda(4, 3)
    x.median(1)
    assert not gpu.faults
    torch.use_deterministic_algorithms(True)
    try:
        x.median(1)
        x.new_zeros(2).scatter_reduce_(0, torch.zeros(4, dtype=torch.long, device="cuda"), x[:, 0], "amin")
    finally:
        torch.use_deterministic_algorithms(False)
    assert [fault.what.split(":")[0] for fault in gpu.faults] == ["median", "scatter_reduce_"]


def test_devices_are_those_of_a_gpu(gpu: FakeCuda) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to("cuda")
    x = cuda(4, 3)
    made = (x, x[0], x.detach(), x + 1, x.double(), torch.zeros_like(x), net(x), copy.deepcopy(x), net[0].weight, x.T)
    assert all(y.device == torch.device("cuda", 0) and y.is_cuda and not y.is_cpu for y in made)
    assert x.cpu().device == torch.zeros(2).device == torch.device("cpu")
    assert {value.device.type for value in copy.deepcopy(net).state_dict().values()} == {"cuda"}
    assert not gpu.faults


def test_backward_is_held_to_the_rules_too(gpu: FakeCuda) -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            assert gradient.is_cuda
            return gradient * float(gradient.sum()) + torch.ones(3)

    x = cuda(3).requires_grad_()
    Reads.apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.is_cuda
    assert [wait.what for wait in gpu.waits] == ["_local_scalar_dense"]
    assert [fault.what for fault in gpu.faults] == ["add: operands on two devices"]


def test_optimizers_run_as_on_a_gpu(gpu: FakeCuda) -> None:
    net = nn.Linear(3, 2).to("cuda")
    optimizer = torch.optim.AdamW(net.parameters())
    gpu.waits.clear()
    net(cuda(4, 3)).sum().backward()
    with gpu.scope("optimizer"):
        optimizer.step()
    assert 0 < gpu.launches["optimizer"] < 20, "all parameters in one foreach operation each"
    assert not gpu.faults + gpu.waits, gpu.report()


def test_values_are_those_of_the_cpu(gpu: FakeCuda) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.rand(2, 3, 8, 8)
    there = copy.deepcopy(net).to("cuda")
    torch.testing.assert_close(there(x.to("cuda")).cpu(), net(x), rtol=0, atol=0)


def test_launches_and_bytes_are_counted_by_scope(gpu: FakeCuda) -> None:
    x = cuda(1000)
    with gpu.scope("part"):
        (x.view(10, 100).T + 1).relu()
    assert gpu.launches["part"] == 2
    assert gpu.bytes["part"] == 4 * 4000


def test_a_wait_raises_where_torch_is_asked_to(gpu: FakeCuda) -> None:
    torch.cuda.set_sync_debug_mode("error")
    x = cuda(3)
    with pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()
    torch.cuda.set_sync_debug_mode("default")
    x.sum().item()


def test_collectives_of_nccl_refuse_tensors_of_the_host(gpu: FakeCuda, tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert dist.get_backend() == "nccl"
        dist.all_reduce(cuda(3))
        dist.all_gather_into_tensor(cuda(3), cuda(3))
        functional.wait_tensor(functional.all_reduce(cuda(3), "sum", dist.group.WORLD))
        dist.all_gather_object([None], {"a": 1})
        assert not gpu.faults, gpu.report()
        host = dist.new_group(backend="gloo")
        dist.all_reduce(torch.rand(3), group=host)
        assert not gpu.faults, gpu.report()
        refused: list[Callable[[], object]] = [
            lambda: dist.all_reduce(torch.rand(3)),
            lambda: dist.broadcast(torch.rand(3), 0),
            lambda: functional.wait_tensor(functional.all_reduce(torch.rand(3), "sum", dist.group.WORLD)),
        ]
        for number, call in enumerate(refused):
            call()
            assert len(gpu.faults) == number + 1, gpu.report()
    finally:
        dist.destroy_process_group()


def test_everything_is_put_back() -> None:
    before = torch.cuda.is_available, torch.compile, torch.autocast.__init__, dist.get_backend, nn.Module.compile
    with FakeCuda():
        assert torch.cuda.is_available()
    assert before == (
        torch.cuda.is_available, torch.compile, torch.autocast.__init__, dist.get_backend, nn.Module.compile
    )  # fmt: skip
    assert not torch.cuda.is_available()
