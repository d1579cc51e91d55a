"""What is measured on images that somebody brings: in any order, with any labels, seen through any transform."""

import multiprocessing as mp
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_geometry.data.views import View
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.cka import feature_cka
from ssl_geometry.measure import CKA, Invariance, MeasurementImages, Neighborhoods, Subject, measure
from ssl_geometry.measure.cka import warn_of_few

CLEAN = View("none", size=4, normalize="none")


class Lookup(nn.Module):
    """A layer whose outputs are given: the image's first pixel says which row."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images[:, :2, 0, 0] * 255).round().long()
        return self.table[pixels[:, 0] * 256 + pixels[:, 1]]


class Two(nn.Module):
    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = Lookup(a), Lookup(b)

    def forward(self, images: Tensor) -> Tensor:
        self.a(images)
        return self.b(images)


def numbered(n: int) -> Tensor:
    """Images whose first two channels are their number."""
    number = torch.arange(n)
    pixels = torch.stack([number // 256, number % 256, torch.zeros_like(number)], 1).to(torch.uint8)
    return pixels[:, :, None, None].expand(-1, -1, 4, 4)


def numbers(images: MeasurementImages, split: Any = "measure", n: int | None = None) -> list[int]:
    pixels = torch.cat([batch["image"] for batch in images.loader(split, n)])[:, :2, 0, 0].long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


@pytest.mark.parametrize("classes", [2, 10, 64])
def test_images_sorted_by_class_have_the_cka_of_one_gram_matrix_of_all(classes: int) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(512) * classes // 512
    a = 2 * torch.randn(classes, 20, generator=random)[labels] + torch.randn(512, 20, generator=random)
    b = a @ torch.randn(20, 20, generator=random) + 3 * torch.randn(512, 20, generator=random)
    images = MeasurementImages(numbered(512), labels)
    rows = measure(Two(a, b), images, [CKA(gram_size=64), Invariance(gram_size=64, views=[])], clean=CLEAN).rows
    value = rows.set_index(["metric", "layer", "layer_other"])["value"].to_dict()
    assert value["cka", "a", "b"] == pytest.approx(float(feature_cka(a, b)), abs=0.02)
    one_hot = torch.eye(classes)[labels]
    assert rows.query("metric == 'class_cka' and layer == 'a'")["value"].item() == pytest.approx(
        float(feature_cka(a, one_hot)), abs=0.03
    )


def test_the_first_of_sorted_training_images_are_of_all_classes() -> None:
    labels = torch.arange(300) // 60
    images = MeasurementImages(numbered(10), torch.arange(10) % 5, numbered(300), labels)
    first = torch.tensor(numbers(images, "bank", 60))
    assert sorted(numbers(images, "bank")) == list(range(300))
    assert labels[first].bincount().min() > 4
    assert torch.cat([batch["label"] for batch in images.loader("bank", 60)]).equal(labels[first])


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        (torch.tensor([0, 1, -1]), None, "images: labels are from -1 on, expected whole numbers from 0"),
        (torch.rand(3), None, "images: labels are torch.float32, expected whole numbers from 0"),
        (torch.tensor([0, 7, 1]), 3, "num_classes 3: images have labels up to 7; set 8"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: Tensor, num_classes: int | None, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        MeasurementImages(numbered(3), labels, num_classes=num_classes)


class Items(list[Any]):
    """A map-style data set with attributes."""

    targets: Any
    labels: Any


@pytest.mark.parametrize(
    ("label", "attribute", "expected"),
    [
        (lambda i: i % 3, None, lambda i: i % 3),
        (lambda i: i % 3, lambda i: i % 6, lambda i: i % 3),  # a target_transform
        (lambda i: None, lambda i: i % 3, lambda i: i % 3),
        (lambda i: -1, lambda i: -1, None),  # STL10's unlabelled images
        (lambda i: i / 7, lambda i: i / 7, None),  # a regression
        (lambda i: {"boxes": []}, lambda i: {"boxes": []}, None),
        (lambda i: torch.eye(3)[i % 3], lambda i: [0, 1, 1], None),  # several classes
    ],
)
def test_labels_of_data_sets(
    label: Callable[[int], Any], attribute: Callable[[int], Any] | None, expected: Callable[[int], int] | None
) -> None:
    items = Items((image, label(number)) for number, image in enumerate(numbered(30)))
    if attribute is not None:
        items.targets = [attribute(number) for number in range(30)]
    images = MeasurementImages.from_dataset(items, n=12)
    assert images.num_classes == (3 if expected else 0)
    if expected:
        labels = torch.cat([batch["label"] for batch in images.loader("measure")]).tolist()
        assert labels == [expected(number) for number in numbers(images)]


class Scaled:
    """A transform whose text does not say what it does."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, image: Any) -> Tensor:
        return self.scale * torch.from_numpy(np.array(image)).movedim(-1, 0).float()


def _noisy(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0) + torch.rand(3, 1, 1) + float(np.random.rand())  # noqa: NPY002


def _of_four_pixels(image: Any) -> Tensor:
    assert image.size == (4, 4)
    return Scaled(1)(image)


def test_transforms_without_a_text_of_their_own_have_protocols_of_what_they_do() -> None:
    def spec(transform: Any) -> Any:
        return Subject(nn.Identity(), transform).view("clean").spec

    assert spec(Scaled(1)) == spec(Scaled(1)) != spec(Scaled(2))
    assert spec(lambda image: Scaled(1)(image)) != spec(lambda image: Scaled(1)(image).flip(2))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert spec(_noisy) == spec(_noisy)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert Subject(nn.Identity(), _of_four_pixels, image_shape=(3, 4, 4)).view("clean").spec  # images of their size
    assert set(spec(nn.Identity())) == {"transform"}  # which says what it is


def test_default_views_leave_out_training_views_that_are_not_known() -> None:
    images = MeasurementImages(numbered(32))
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    rows = measure(network, images, [Invariance(gram_size=8)], clean=CLEAN).rows
    assert set(rows["view"]) == {
        "simclr", "supervised", "crop", "flip", "color", "gray", "blur", "rotate", "translate"
    }  # fmt: skip
    with pytest.raises(UserError, match=r"Invariance.views \[own\]: own: how the training views are made is not known"):
        measure(network, images, [Invariance(views=["own"])], clean=CLEAN)


def test_a_head_does_not_stand_for_a_network_without_stages() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    head = nn.Linear(3, 5)
    assert Subject(network, CLEAN, heads={"top": head}).layers(None, ("stages", "pooled", "head")) == ("0", "1", "top")
    assert Subject(network, CLEAN, heads={"top": head}).layers("head") == ("top",)


def test_intrinsic_dimension_states_how_many_neighbours_it_used() -> None:
    random = torch.Generator().manual_seed(0)
    table = torch.randn(40, 3, generator=random)
    for k, used in ((5, 5), (30, 20)):
        found = measure(
            Two(table, table), MeasurementImages(numbered(40)), [Neighborhoods(k=k, settings=[])], clean=CLEAN
        )
        distances = torch.cdist(table.double(), table.double()).sort(1).values[:, 1 : used + 1]
        expected = 1 / (distances[:, -1:] / distances[:, :-1]).log().mean()
        value = found.rows.query("metric == 'levina_bickel' and layer == 'a'")["value"].item()
        assert value == pytest.approx(float(expected), rel=1e-4)
        assert found.protocols[0].what["intrinsic dimension"].startswith(f"{used} neighbours")


def test_batches_that_cut_gram_matrices_are_named(caplog: pytest.LogCaptureFixture) -> None:
    for batch, held in ((64, None), (40, None), (20, "16, 4"), (10, "10")):
        caplog.clear()
        warn_of_few(MeasurementImages(numbered(40), batch_size=batch), 16, "CKA.gram_size")
        lines = [line for line in caplog.messages if "batch of" in line]
        assert lines == [
            f"CKA.gram_size 16: a batch of {batch} images holds Gram matrices of {held} images; set batch_size to a "
            "multiple of 16"
        ] * (held is not None)


def test_networks_of_one_name_are_refused() -> None:
    table = torch.randn(16, 3)
    reference = Subject(Two(table, table), CLEAN)
    with pytest.raises(UserError, match=r"^references: two networks are called 'network'; name them apart"):
        measure(
            Two(table, table), MeasurementImages(numbered(16)), [CKA(gram_size=4)], clean=CLEAN, references=[reference]
        )


def test_images_are_read_where_processes_are_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: of a script that starts at its first line, and of a data set that no other process can be sent."""
    monkeypatch.setattr(mp.context._default_context, "_actual_context", mp.get_context("spawn"))
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)

    class Many:
        def __len__(self) -> int:
            return 600

        def __getitem__(self, i: int) -> Tensor:
            return pixels + i % 256

    assert MeasurementImages.from_dataset(Many()).measure_size == 600
