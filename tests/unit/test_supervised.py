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
    method = Supervised(**SMALL, **options)
    method.trainer = SimpleNamespace(  # type: ignore[assignment]
        datamodule=SimpleNamespace(num_classes=classes, multi_label=multi_label)
    )
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
    with pytest.raises(UserError, match=r"^--model.num_classes 10: the data set has 3 classes; .* or set 3$"):
        on_data(3, num_classes=10)
    with pytest.raises(UserError, match="of one class"):
        on_data(1)
    with pytest.raises(UserError, match="it learns one class a picture"):
        on_data(3, multi_label=True)
