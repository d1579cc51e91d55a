"""NT-Xent against the definition in float64, and against lightly's."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import NTXentLoss
from torch import Tensor

from ssl_geometry.errors import UserError
from ssl_geometry.methods import SimCLR
from ssl_geometry.methods.parts.nt_xent import nt_xent
from tests.fake_cuda import FakeCuda


def definition(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Equation 1 of the paper, view by view."""
    z = torch.cat([first, second])
    z = z / z.norm(dim=1, keepdim=True)
    losses = []
    for i in range(len(z)):
        similarity = (z @ z[i]) / temperature
        others = [k for k in range(len(z)) if k != i]
        losses.append(similarity[others].logsumexp(0) - similarity[(i + len(first)) % len(z)])
    return torch.stack(losses).mean()


def with_gradients(loss, *views: Tensor) -> tuple[Tensor, ...]:
    views = tuple(view.detach().clone().requires_grad_(True) for view in views)
    value = loss(*views)
    return value.detach(), *torch.autograd.grad(value, views)


def random_views(images: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, images, width, generator=torch.Generator().manual_seed(images * width)).to(dtype)
    return first, second


@settings(deadline=None, max_examples=40)
@given(images=st.integers(1, 9), width=st.integers(1, 17), temperature=st.sampled_from([0.01, 0.1, 0.5, 3.0]))
def test_the_definition_in_float64(images: int, width: int, temperature: float) -> None:
    views = random_views(images, width, torch.float64)
    got = with_gradients(lambda *x: nt_xent(*x, temperature=temperature), *views)
    expected = with_gradients(lambda *x: definition(*x, temperature), *views)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("images", [2, 37, 128])
def test_lightlys_loss_and_gradients(images: int, temperature: float) -> None:
    views = random_views(images, 32)
    got = with_gradients(lambda *x: nt_xent(*x, temperature=temperature), *views)
    expected = with_gradients(NTXentLoss(temperature), *views)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-10, 1e10, 1e18, 1e19, 1e20, 1e38])
def test_outputs_of_any_length_give_the_loss_or_nan(scale: float) -> None:
    views = random_views(8, 16)
    loss, *gradients = with_gradients(lambda *x: nt_xent(*x, temperature=0.5), *(scale * view for view in views))
    if scale < 1e19:
        torch.testing.assert_close(loss.double(), definition(*(view.double() for view in views), 0.5))
    else:  # the squares overflow: a loss of right angles, log(2 B - 1), would go on unseen
        assert loss.isnan()
        assert all(gradient.isnan().any() for gradient in gradients)


def test_zeros_are_at_right_angles_to_all() -> None:
    first, second = torch.eye(4)[:2], torch.zeros(2, 4)
    assert float(nt_xent(first, second, 0.5)) == pytest.approx(float(torch.tensor(3.0).log()))


def test_a_small_temperature_stays_finite_in_float32() -> None:
    views = random_views(64, 16)
    got = with_gradients(lambda *x: nt_xent(*x, temperature=1e-3), *views)
    expected = with_gradients(lambda *x: definition(*x, 1e-3), *(view.double() for view in views))
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-3, atol=1e-3)


def test_autocast_leaves_it_in_float32() -> None:
    """Under autocast lightly's products are bfloat16's; here the views alone are rounded."""
    rounded = [view.bfloat16() for view in random_views(64, 32)]
    expected = definition(*(view.double() for view in rounded), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, others = nt_xent(*rounded, temperature=0.1), NTXentLoss(0.1)(*rounded)
    assert got.dtype == torch.float32
    assert abs(float(got) - float(expected)) < 1e-5
    assert abs(float(others) - float(expected)) > 1e-4


def test_it_waits_for_nothing() -> None:
    waits = []
    with FakeCuda() as gpu:
        views = [view.to("cuda").requires_grad_() for view in random_views(64, 32)]
        for name, loss in (("ours", lambda *x: nt_xent(*x, temperature=0.1)), ("lightly's", NTXentLoss(0.1))):
            with gpu.scope(name), torch.autocast("cuda", dtype=torch.bfloat16):
                loss(*views).backward()
            waits.append(sum(note.scope == name for note in gpu.waits))
    assert not gpu.faults, gpu.report()
    assert waits[0] == 0, gpu.report()
    assert waits[1] > 0, "masks"


def test_simclr_reads_checkpoints_that_had_lightlys_loss(tmp_path: Path) -> None:
    method = SimCLR(backbone="resnet10", width=0.25, image_size=16, temperature=0.2)
    assert not any(key.startswith("criterion") for key in method.state_dict())
    before = SimCLR(backbone="resnet10", width=0.25, image_size=16)
    before.criterion = NTXentLoss(0.2, gather_distributed=True)
    method.load_state_dict(before.state_dict())  # strict: lightly's loss keeps nothing there
    views = random_views(8, 16)
    torch.testing.assert_close(method.loss(views, {}), NTXentLoss(0.2)(*views), rtol=1e-6, atol=1e-6)  # type: ignore[typeddict-item]


@pytest.mark.parametrize("temperature", [0.0, -0.5, float("nan")])
def test_an_impossible_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=r"^--model.temperature (0|-0.5|nan)"):
        SimCLR(backbone="resnet10", width=0.25, image_size=16, temperature=temperature)
