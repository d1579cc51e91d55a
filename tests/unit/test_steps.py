"""The training step of each method in mixed precision: gradients where they belong, and no wait for the device."""

from typing import Any

import pytest
import torch

from ssl_geometry.methods import Method
from ssl_geometry.methods.base import Batch
from tests.fake_cuda import FakeCuda
from tests.methods import METHODS, build, by_hand, images


def backward(method: Method, batch: Batch) -> None:
    with torch.autocast(batch["image"].device.type, torch.bfloat16):
        loss = method.training_step(batch, 0)
    loss.backward()
    method.on_after_backward()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_gets_a_gradient_and_a_teacher_none(name: str) -> None:
    method = by_hand(build(name), 2)
    backward(method, images(8))
    teacher = set() if method.teacher is None else set(method.teacher.parameters())
    for key, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, f"{key}: DDP waits for each gradient"
        assert parameter not in teacher or parameter.grad is None, key


@pytest.mark.parametrize("name", METHODS)
def test_a_step_calls_all_that_is_compiled(name: str) -> None:
    method = by_hand(build(name), 2)
    parts = {name: part for name, part in method.named_modules() if name in method.compiled_parts}
    called: set[str] = set()
    for name_of, part in parts.items():
        part.register_forward_hook(lambda *_, name_of=name_of: called.add(name_of))
    method.training_step(images(8), 0)
    assert called == parts.keys()
    assert called | {"teacher.backbone"} == {*method.compiled_parts, "teacher.backbone"}


SCHEDULED: dict[str, dict[str, Any]] = {
    "DINO": {"weight_decay_end": 0.4, "teacher_temperature": (0.04, 0.07), "warmup_teacher_epochs": 3}
}


@pytest.mark.parametrize("name", METHODS)
def test_it_waits_for_nothing(name: str) -> None:
    """With accumulated gradients, and after an evaluation, which leaves all on the device as well."""
    with FakeCuda() as gpu:
        method = by_hand(build(name, **SCHEDULED.get(name, {})).to("cuda"), 2)
        optimizer: Any = method.build_optimizer(0.1)
        method.trainer.optimizers, method.trainer.precision = [optimizer], "bf16-mixed"  # type: ignore[misc]
        batch: Batch = {key: value.to("cuda") for key, value in images(8).items()}  # type: ignore[assignment,attr-defined]
        for _ in range(2):
            with gpu.scope("step"):
                for _ in range(2):
                    backward(method, batch)
                optimizer.step()
                method.after_step(0.5)
                optimizer.zero_grad()
            with gpu.scope("evaluation"), torch.no_grad():
                features = method.eval().features(batch["image"])
                method.knn.update_bank(features, batch["label"])
                method.evaluate(features, batch, "val")
            method.train()
    assert not gpu.faults, gpu.report()
    assert not [note for note in gpu.waits if note.scope in ("step", "evaluation")], gpu.report()
