"""LARS: lightly's numbers and state, without its loop."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.utils.lars import LARS as Reference
from torch import Tensor, nn

from ssl_geometry.methods.parts.lars import LARS
from tests.fake_cuda import FakeCuda

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=5)
GRADIENTS = ("random", "zero", "none")


def parameters(shapes: list[tuple[int, ...]], zero: list[bool], dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype) * (not is_zero))
        for shape, is_zero in zip(shapes, zero, strict=True)
    ]


def groups(of: list[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """One with weight decay, one without; each may be empty of parameters but not both."""
    return [{"params": of[::2], "weight_decay": decay}, {"params": of[1::2], "weight_decay": 0.0}]


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    shapes=SHAPES,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    decay=st.sampled_from([0.0, 1e-4, 0.5]),
    momentum=st.sampled_from([(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)]),
)
def test_numbers_and_state_are_those_of_lightly(
    data: st.DataObject,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    decay: float,
    momentum: tuple[float, float, bool],
) -> None:
    n = len(shapes)
    zero = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    kinds = data.draw(st.lists(st.lists(st.sampled_from(GRADIENTS), min_size=n, max_size=n), min_size=4, max_size=4))
    options = dict(zip(("momentum", "dampening", "nesterov"), momentum, strict=True))
    mine, theirs = parameters(shapes, zero, dtype), parameters(shapes, zero, dtype)
    optimizer = LARS(groups(mine, decay), lr=0.3, **options)
    reference = Reference(groups(theirs, decay), lr=0.3, **options)
    generator = torch.Generator().manual_seed(1)
    for step, kinds_now in enumerate(kinds):
        for a, b, kind in zip(mine, theirs, kinds_now, strict=True):
            gradient = torch.randn(a.shape, generator=generator, dtype=dtype) * (kind == "random")
            a.grad, b.grad = (None, None) if kind == "none" else (gradient, gradient.clone())
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.3 / (step + 1)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(optimizer.state_dict(), reference.state_dict(), rtol=1e-6, atol=1e-7)


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("before", [Reference, LARS])
@pytest.mark.parametrize("after", [Reference, LARS])
def test_a_checkpoint_of_either_goes_on_with_either(before: type, after: type) -> None:
    def made(kind: type) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        network.to(memory_format=torch.channels_last)
        return network, kind(groups(list(network.parameters()), 1e-4), lr=0.3, momentum=0.9)

    whole, uninterrupted = made(Reference)
    steps(whole, uninterrupted, 0, 5)
    start, first = made(before)
    steps(start, first, 0, 3)
    network, second = made(after)
    network.load_state_dict(start.state_dict())
    second.load_state_dict(first.state_dict())
    steps(network, second, 3, 5)
    torch.testing.assert_close(network.state_dict(), whole.state_dict(), rtol=1e-6, atol=1e-7)


def test_a_step_waits_for_nothing_and_its_operations_do_not_grow_with_the_parameters() -> None:
    counts = {}
    with FakeCuda() as gpu:
        for kind in (LARS, Reference):
            for n in (4, 40):
                of = [nn.Parameter(torch.ones(3, 3, device="cuda")) for _ in range(n)]
                optimizer = kind(groups(of, 1e-4), lr=0.1, momentum=0.9)
                for name in ("first", f"{kind.__module__} {n}"):  # the first makes the state
                    for parameter in of:
                        parameter.grad = torch.ones_like(parameter)
                    with gpu.scope(name):
                        optimizer.step()
                waits = [note for note in gpu.waits if note.scope == name]
                counts[kind, n] = gpu.launches[name], len(waits)
    assert not gpu.faults, gpu.report()
    assert counts[LARS, 4] == counts[LARS, 40]
    assert counts[LARS, 40][0] < 30
    assert counts[LARS, 40][1] == 0
    assert counts[Reference, 40][1] == 40, "lightly reads two norms of each decayed parameter"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_are_taken_in_float32(dtype: torch.dtype) -> None:
    """A norm of 400 halves overflows at 65,504 in float16; bfloat16 keeps three digits."""
    weight = nn.Parameter(torch.full((20, 20), 4000.0, dtype=dtype))  # of norm 80,000
    weight.grad = torch.full((20, 20), 8.0, dtype=dtype)
    LARS([weight], lr=1.0, weight_decay=1e-3, trust_coefficient=0.5).step()
    expected = 4000 - 0.5 * 80_000 / (160 + 80) * (8 + 4)
    torch.testing.assert_close(weight, torch.full_like(weight, expected), rtol=1e-2, atol=0)


def test_parameters_of_several_dtypes_share_a_group() -> None:
    def made() -> list[nn.Parameter]:
        return [
            nn.Parameter(torch.arange(1, 7, dtype=dtype).view(2, 3))
            for dtype in (torch.float32, torch.float64, torch.float32)
        ]

    mine, theirs = made(), made()
    for optimizer, of in ((LARS, mine), (Reference, theirs)):
        for parameter in of:
            parameter.grad = parameter.detach().sin()
        optimizer(of, lr=0.1, momentum=0.9, weight_decay=1e-2).step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


def test_a_closure_is_run_with_gradients() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def closure() -> Tensor:
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert LARS([weight], lr=0.1).step(closure) == 5
    torch.testing.assert_close(weight.data, torch.tensor([0.8, 1.6]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, expected 0 or more"),
        ({"lr": 0.1, "momentum": -0.1}, "momentum is -0.1"),
        ({"lr": 0.1, "weight_decay": -1}, "weight_decay is -1"),
        ({"lr": 0.1, "nesterov": True}, "requires a momentum"),
        ({"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "nesterov": True}, "no dampening"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS([nn.Parameter(torch.ones(1))], **options)
