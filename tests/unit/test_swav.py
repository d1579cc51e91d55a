"""SwAV: optimal transport, its loss, the queue, and the prototypes."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightly.loss import SwaVLoss
from torch import Tensor

from ssl_geometry.methods import Method
from ssl_geometry.methods.parts.prototypes import sinkhorn
from tests.methods import build, by_hand, images

NO_QUEUE: dict[str, Any] = {"queue_size": 0}


def swav(**options: Any) -> Method:
    return by_hand(build("SwAV", **options).double(), 3)


def vectors(seed: int, views: int, number: int = 12) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(views, number, 8, generator=generator, dtype=torch.float64))


@given(images=st.integers(1, 6), number=st.integers(2, 6), queued=st.integers(0, 5), seed=st.integers(0, 99))
def test_sinkhorn_is_that_of_the_paper(images: int, number: int, queued: int, seed: int) -> None:
    """Listing A.1, in float64 NumPy, which does not work in logarithms."""
    logits = np.random.default_rng(seed).uniform(-20, 20, (images + queued, number))
    expected = np.exp(logits) / np.exp(logits).sum()
    for _ in range(3):
        expected = expected / expected.sum(0) / number
        expected = expected / expected.sum(1, keepdims=True) / len(expected)
    rows = torch.from_numpy(logits)
    found = sinkhorn(rows[:images], rows[images:] if queued else None)
    np.testing.assert_allclose(found, expected[:images] * len(expected), rtol=1e-9, atol=1e-12)


def test_sinkhorn_fills_all_prototypes_equally() -> None:
    logits = 5 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 0] += 10  # nearly all images would go there
    found = sinkhorn(logits, iterations=1000)
    torch.testing.assert_close(found.sum(0), torch.full((5,), 8.0, dtype=torch.float64))
    torch.testing.assert_close(found.sum(1), torch.ones(40, dtype=torch.float64))
    assert sinkhorn(logits.float() * 1e4).isfinite().all()


@pytest.mark.parametrize("views", [2, 5])
def test_loss_is_that_of_lightly(views: int) -> None:
    method, outputs = swav(**NO_QUEUE), vectors(0, views)
    similarities = [F.normalize(view) @ method.get_parameter("prototypes.weight").T for view in outputs]
    expected = SwaVLoss()(similarities[:2], similarities[2:])
    torch.testing.assert_close(method.loss(outputs, images(12)), expected[0])


def test_the_queue_holds_the_last_images_and_balances_them_too() -> None:
    method = swav(queue_size=24)
    first, second, third = (vectors(seed, 2) for seed in range(3))
    for outputs in (first, second):
        method.loss(outputs, images(12))
    weight = method.get_parameter("prototypes.weight")
    queued = [F.normalize(torch.cat(rows)) for rows in zip(first, second, strict=True)]
    similarities = [F.normalize(view) @ weight.T for view in third]
    expected = SwaVLoss()(similarities, [], [rows @ weight.T for rows in queued])
    torch.testing.assert_close(method.loss(third, images(12)), expected[0])


@pytest.mark.parametrize("epoch", [0, 1])
def test_queue_and_prototypes_wait_for_their_epoch(epoch: int) -> None:
    method = swav(queue_from_epoch=1, freeze_prototypes_epochs=1)
    without = swav(**NO_QUEUE)
    method.trainer.current_epoch = epoch  # type: ignore[misc]
    without.get_parameter("prototypes.weight").data.copy_(method.get_parameter("prototypes.weight"))
    outputs = vectors(0, 3)
    same = torch.equal(method.loss(outputs, images(12)), without.loss(outputs, images(12)))
    assert same == (epoch == 0)
    method.training_step(images(12), 0).backward()
    method.on_after_backward()
    assert (method.get_parameter("prototypes.weight").grad is None) == (epoch == 0)


def test_prototypes_are_of_unit_length_in_each_step() -> None:
    method = swav()
    for _ in range(2):
        lengths = method.get_parameter("prototypes.weight").norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
        method.training_step(images(12), 0).backward()
        method.get_parameter("prototypes.weight").data.mul_(3)
        method.after_step(0.5)


def test_assignments_take_no_gradient() -> None:
    """That of lightly, whose assignments are computed without one."""
    method, outputs = swav(**NO_QUEUE), tuple(view.requires_grad_() for view in vectors(0, 3))
    found = torch.autograd.grad(method.loss(outputs, images(12)), outputs)
    similarities = [F.normalize(view) @ method.get_parameter("prototypes.weight").T for view in outputs]
    expected = torch.autograd.grad(SwaVLoss()(similarities[:2], similarities[2:]), outputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
