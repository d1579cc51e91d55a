"""SupCon's loss and gradients by its definition; without classes it is SimCLR's."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_geometry.errors import UserError
from ssl_geometry.methods.parts.nt_xent import nt_xent
from ssl_geometry.methods.supcon import sup_con
from tests.methods import build
from tests.unit.test_nt_xent import random_views, with_gradients


def definition(first: Tensor, second: Tensor, label: list[int], temperature: float) -> Tensor:
    """Equation 2 of the paper, view by view and positive by positive."""
    z = torch.cat([first, second])
    z = z / z.norm(dim=1, keepdim=True)
    images = len(label)
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if p % images == i % images or label[p % images] == label[i % images] != -1]
        normaliser = torch.stack([z[i] @ z[a] / temperature for a in others]).logsumexp(0)
        losses.append(-sum(z[i] @ z[p] / temperature - normaliser for p in positives) / len(positives))  # type: ignore
    return torch.stack(losses).mean()


@settings(deadline=None, max_examples=25)
@given(label=st.lists(st.integers(-1, 3), min_size=1, max_size=7), temperature=st.sampled_from([0.05, 0.1, 1.0]))
def test_the_definition_in_float64(label: list[int], temperature: float) -> None:
    """Classes of one image, and images of unknown class, included."""
    views = random_views(len(label), 5, torch.float64)
    got = with_gradients(lambda *x: sup_con(*x, torch.tensor(label), temperature), *views)
    expected = with_gradients(lambda *x: definition(*x, label, temperature), *views)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("label", [[0, 1, 2, 3], [-1, -1, -1, -1], [-1, 5, -1, 3]])
def test_without_two_images_of_a_class_it_is_simclrs(label: list[int]) -> None:
    views = random_views(4, 5)
    got = with_gradients(lambda *x: sup_con(*x, torch.tensor(label), 0.2), *views)
    torch.testing.assert_close(got, with_gradients(lambda *x: nt_xent(*x, 0.2), *views))


def test_classes_that_are_points_far_apart_have_the_least_loss() -> None:
    """Then all other views of a class are equally likely: log 3 for two images of two views each."""
    views = torch.eye(2).repeat_interleave(2, 0)
    loss = sup_con(views, views, torch.tensor([0, 0, 1, 1]), temperature=0.01)
    assert float(loss) == pytest.approx(float(torch.tensor(3.0).log()))


def test_images_with_several_classes_are_refused() -> None:
    method = build("SupCon")
    method.trainer = SimpleNamespace(datamodule=SimpleNamespace(multi_label=True))  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"^--model SupCon: it learns one class per image"):
        method.setup("fit")
