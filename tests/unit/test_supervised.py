"""The classifier of a supervised network has as many classes as the data set."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssl_geometry.errors import UserError
from ssl_geometry.methods import Supervised

SMALL: dict[str, Any] = {"backbone": "resnet10", "width": 1 / 16, "image_size": 8}


def on_data(classes: int, multi_label: bool = False, **options: Any) -> Supervised:
    """Set up by a trainer whose images have so many classes."""
    return set_up(Supervised(**SMALL, **options), classes, multi_label)


def set_up(method: Supervised, classes: int, multi_label: bool = False, unlabelled: int = 0) -> Supervised:
    data = SimpleNamespace(num_classes=classes, multi_label=multi_label, num_train=8, num_unlabelled=unlabelled)
    method.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    method.setup("fit")
    return method


@pytest.mark.parametrize("options", [{}, {"num_classes": 3}])
def test_the_number_of_classes_is_that_of_the_data_and_stands_in_the_checkpoint(options: dict[str, int]) -> None:
    method = on_data(3, **options)
    head = method.head
    method.setup("test")
    assert method.head is head, "a second stage keeps what was trained"
    checkpoint: dict[str, Any] = {}
    method.on_save_checkpoint(checkpoint)
    again = Supervised(**checkpoint["method"]["init_args"])
    again.load_state_dict(method.state_dict())
    assert again(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_another_number_than_the_data_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--model.num_classes 10: the data set has 3 classes; set 3, or null for"):
        on_data(3, num_classes=10)
    with pytest.raises(UserError, match="of one class"):
        on_data(1)
    with pytest.raises(UserError, match="it learns one class per image"):
        on_data(3, multi_label=True)
    with pytest.raises(UserError, match=r"5 of 8 training images have no label; leave them out"):
        set_up(Supervised(**SMALL), 3, unlabelled=5)


def test_the_classifier_is_the_same_whatever_random_numbers_processes_have_drawn() -> None:
    heads = []
    for drawn, seed in ((0, 0), (7, 0), (0, 1)):
        torch.manual_seed(drawn)
        before = torch.get_rng_state()
        method = Supervised(**SMALL, seed=seed)
        torch.set_rng_state(before)
        set_up(method, 3)
        assert torch.equal(torch.get_rng_state(), before), "what comes after draws what it would have drawn"
        heads.append(method.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_untrained_networks_have_classifiers_of_their_own() -> None:
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        heads.append(Supervised(**SMALL, num_classes=3).head.weight)
    assert not torch.equal(*heads)
