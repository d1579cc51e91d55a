"""BYOL's loss by its definition, and a teacher that follows ever more slowly."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods import build, by_hand, images

METHOD = build("BYOL")


@settings(deadline=None, max_examples=30)
@given(images=st.integers(1, 9), width=st.integers(1, 17), seed=st.integers(0, 99))
def test_the_definition_in_float64(images: int, width: int, seed: int) -> None:
    """Equation 2, and the same with the views exchanged."""
    outputs = np.random.default_rng(seed).normal(size=(4, images, width))
    predicted, target = np.split(outputs / np.linalg.norm(outputs, axis=2, keepdims=True), 2)
    expected = ((predicted - target[::-1]) ** 2).sum(axis=(0, 2)).mean()
    loss = METHOD.loss(tuple(torch.from_numpy(outputs)), {})  # type: ignore[typeddict-item]
    assert float(loss) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_equal_directions_have_no_loss_and_opposite_ones_the_largest() -> None:
    z = torch.randn(5, 3)
    assert float(METHOD.loss((z, 2 * z, z, 3 * z), {})) == pytest.approx(0, abs=1e-6)  # type: ignore[typeddict-item]
    assert float(METHOD.loss((z, z, -z, -z), {})) == pytest.approx(8)  # type: ignore[typeddict-item]


def test_each_view_predicts_the_teachers_projection_of_the_other() -> None:
    method = by_hand(build("BYOL", teacher_momentum=0.5), 1)
    with torch.no_grad():
        for parameter in method.teacher.parameters():  # type: ignore[union-attr]
            parameter.mul_(0.9)
    views = torch.rand(2, 6, 3, 16, 16).unbind()
    first, second, target_of_first, target_of_second = method.outputs(views, images(6))
    teacher, student = copy.deepcopy(method.teacher), method
    assert teacher is not None
    both = torch.cat(views)  # batch norm sees both views
    torch.testing.assert_close(torch.cat([target_of_first, target_of_second]), teacher(both))
    torch.testing.assert_close(torch.cat([first, second]), student.predictor(student(both)))


@pytest.mark.parametrize("name", ["BYOL", "MoCoV3"])
@pytest.mark.parametrize(("progress", "momentum"), [(1e-9, 0.8), (0.5, 0.9), (1.0, 1.0)])
def test_the_teacher_follows_ever_more_slowly(name: str, progress: float, momentum: float) -> None:
    method = build(name, teacher_momentum=0.8)
    before = copy.deepcopy(method.teacher)
    assert before is not None
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    method.after_step(progress)
    for old, new in zip(before.parameters(), method.teacher.parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(new, old + (1 - momentum))
