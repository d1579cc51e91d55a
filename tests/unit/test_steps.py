"""The training step of each method in mixed precision: gradients where they belong, and no wait for the device."""

import pytest
import torch

from ssl_geometry.methods import Method
from ssl_geometry.methods.base import Batch
from tests.fake_cuda import FakeCuda
from tests.methods import METHODS, build, by_hand, images


def step(method: Method, batch: Batch) -> None:
    with torch.autocast(batch["image"].device.type, torch.bfloat16):
        loss = method.training_step(batch, 0)
    loss.backward()
    method.on_after_backward()
    method.after_step(0.5)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_gets_a_gradient_and_a_teacher_none(name: str) -> None:
    method = by_hand(build(name), 2)
    step(method, images(8))
    teacher = set() if method.teacher is None else set(method.teacher.parameters())
    for key, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, f"{key}: DDP waits for each gradient"
        assert parameter not in teacher or parameter.grad is None, key


@pytest.mark.parametrize("name", METHODS)
def test_it_waits_for_nothing(name: str) -> None:
    with FakeCuda() as gpu:
        method = by_hand(build(name).to("cuda"), 2)
        batch: Batch = {key: value.to("cuda") for key, value in images(8).items()}  # type: ignore[assignment,attr-defined]
        with gpu.scope("step"):
            step(method, batch)
    assert not gpu.faults, gpu.report()
    assert not [note for note in gpu.waits if note.scope == "step"], gpu.report()
