"""DINO: its loss, centre, temperature and schedules; what the teacher sees; when the prototypes learn."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightly.loss import DINOLoss
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_geometry.data.views import ViewSpec
from ssl_geometry.errors import UserError
from ssl_geometry.methods import DINO, Method
from ssl_geometry.methods.parts.prototypes import swapped_cross_entropy
from tests.methods import build, by_hand, images
from tests.unit.test_method import train

CROPS = [ViewSpec(augment="crop", count=2), ViewSpec(augment="crop", size=8, count=2)]


def logits(seed: int, views: int, images: int = 3, number: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(views, images, number, generator=generator, dtype=torch.float64))


@given(number=st.integers(2, 6), views=st.integers(2, 5), images=st.integers(1, 4), seed=st.integers(0, 99))
def test_swapped_cross_entropy_is_that_of_lightly(number: int, views: int, images: int, seed: int) -> None:
    teacher, student = logits(seed, 2, images, number), logits(seed + 1, views, images, number)
    reference = DINOLoss(number, teacher_temp=0.5, student_temp=1.0)(list(teacher), list(student))
    found = swapped_cross_entropy([(2 * view).softmax(1) for view in teacher], student)
    torch.testing.assert_close(found, reference)


def test_loss_and_centre_are_those_of_lightly_over_steps() -> None:
    method = by_hand(build("DINO", teacher_temperature=(0.5, 0.5), temperature=0.25).double(), 3)
    reference = DINOLoss(8, teacher_temp=0.5, student_temp=0.25, center_momentum=0.9).double()
    for step in range(3):
        teacher, student = logits(step, 2), logits(step + 9, 4)
        found = method.loss((*teacher, *student), images(3))
        torch.testing.assert_close(found, reference(list(teacher), list(student)))
        method.after_step(1 / 3)
        torch.testing.assert_close(method.center.value[None], reference.center)


def test_the_centre_moves_once_for_all_batches_of_a_step() -> None:
    method = by_hand(build("DINO").double(), 1)
    batches = [logits(seed, 2) for seed in range(3)]
    for teacher in batches:
        method.loss((*teacher, *logits(9, 2)), images(3))
    assert not method.center.value.any()
    method.after_step(1.0)
    mean = torch.stack([torch.stack(teacher).mean((0, 1)) for teacher in batches]).mean(0)
    torch.testing.assert_close(method.center.value[0], 0.1 * mean)


@pytest.mark.parametrize(("epoch", "temperature"), [(0, 0.1), (4, 0.3), (8, 0.5), (20, 0.5)])
def test_the_temperature_of_the_teacher_changes_linearly(epoch: int, temperature: float) -> None:
    method = by_hand(build("DINO", teacher_temperature=(0.1, 0.5), warmup_teacher_epochs=8), 1)
    method.trainer.current_epoch = epoch  # type: ignore[misc]
    teacher, student = logits(0, 2), logits(1, 2)
    expected = DINOLoss(8)(list(teacher), list(student), teacher_temp=temperature)
    torch.testing.assert_close(method.loss((*teacher, *student), images(3)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"backbone": "test_vit", "width": 1.0, "patch_size": 4}])
def test_the_teacher_sees_global_views_and_gets_no_gradient(options: dict[str, Any]) -> None:
    method = by_hand(build("DINO", **options, views=CROPS), 1)
    seen: dict[str, list[tuple[int, int]]] = {"student": [], "teacher": []}
    for name, network in (("student", method.backbone), ("teacher", method.teacher.backbone)):  # type: ignore[union-attr]
        network.register_forward_hook(
            lambda module, x, output, name=name: seen[name].append((len(x[0]), x[0].shape[-1]))
        )
    method.training_step(images(4), 0).backward()
    assert seen == {"teacher": [(8, 16)], "student": [(8, 16), (8, 8)]}
    assert all(p.grad is None for p in method.teacher.parameters())  # type: ignore[union-attr]
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_prototypes_wait_an_epoch() -> None:
    method = by_hand(build("DINO", freeze_prototypes_epochs=1), 2)
    for epoch in range(2):
        method.trainer.current_epoch = epoch  # type: ignore[misc]
        method.training_step(images(4), 0).backward()
        method.on_after_backward()
        assert (method.head.get_parameter("last_layer.weight").grad is None) == (epoch == 0)
        assert method.head.get_parameter("layers.0.weight").grad is not None


def test_the_length_of_a_prototype_does_not_count() -> None:
    method = build("DINO")
    longer = copy.deepcopy(method)
    longer.head.get_parameter("last_layer.weight").data *= 3
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(method.eval()(x), longer.eval()(x))


def test_weight_decay_follows_a_cosine(tmp_path: Path) -> None:
    method = build("DINO", weight_decay=0.04, weight_decay_end=0.4)
    found: list[list[float]] = []
    step = method.optimizer_step

    def note(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        found.append([group["weight_decay"] for group in method.trainer.optimizers[0].param_groups])

    method.optimizer_step = note  # type: ignore[method-assign]
    train(method, tmp_path)
    expected = [0.4 - 0.36 * (math.cos(math.pi * done / 4) + 1) / 2 for done in range(1, 5)]
    assert [pair[0] for pair in found] == pytest.approx(expected)
    assert {pair[1] for pair in found} == {0.0}


def test_no_warning_of_the_layer_that_is_replaced() -> None:
    with warnings.catch_warnings(action="error"):
        assert isinstance(build("DINO"), Method)


def test_one_view_is_too_few() -> None:
    with pytest.raises(UserError, match=r"--model\.views: 1 of each image; DINO takes at least 2"):
        DINO(backbone="resnet10", width=0.1, views=[ViewSpec(augment="crop")])


class Memory(TorchDispatchMode):
    """The most bytes of tensors that operations made and that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            storage = out.untyped_storage()
            self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {key: kept for key, kept in self.made.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return out


def test_the_loss_keeps_one_tensor_of_prototypes_for_each_view() -> None:
    """65,536 prototypes, 64 images and 10 views are 168 MB in float32, each time."""
    method, views, number = by_hand(build("DINO", output_dim=4096), 1), 8, 4096
    teacher = logits(0, 2, number=number)
    student = [view.requires_grad_() for view in logits(1, views, number=number)]
    with Memory() as memory:
        method.loss((*teacher, *student), images(3))
    kept = views + len(teacher)  # log-probabilities and targets; then a view over its temperature, and small change
    assert kept < memory.peak / teacher[0].nbytes < kept + 2
