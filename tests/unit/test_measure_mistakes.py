"""Wrong arguments of what measures in a script are one line, and what measures leaves all as it was."""

import errno
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from ssl_geometry.data.views import View
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.gram import gram_vector
from ssl_geometry.measure import (
    CKA,
    Invariance,
    Measurement,
    MeasurementImages,
    Neighborhoods,
    Probes,
    Spectrum,
    Subject,
    measure,
)
from ssl_geometry.records import read_records

SIDE = 8
CLEAN = View("none", size=SIDE, normalize="none")
PIXELS = torch.randint(0, 255, (24, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
LABELS = torch.arange(24) % 3


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(scope="module")
def images() -> MeasurementImages:
    return MeasurementImages(PIXELS, LABELS, PIXELS, LABELS, batch_size=12)


WHOLE, NAMES, LIST = "expected a whole number", "expected a name, or a list such as [a, b]", "a list such as [a, b]"


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (CKA, {"gram_size": "8"}, f"CKA.gram_size 8: {WHOLE} of at least 4"),
        (CKA, {"gram_size": 8.5}, f"CKA.gram_size 8.5: {WHOLE} of at least 4"),
        (CKA, {"gram_size": True}, f"CKA.gram_size True: {WHOLE} of at least 4"),
        (CKA, {"gram_size": [8]}, f"CKA.gram_size [8]: {WHOLE} of at least 4"),
        (CKA, {"layers": 3}, f"CKA.layers 3: {NAMES}"),
        (CKA, {"layers": ["0", 3]}, f"CKA.layers [0, 3]: {NAMES}"),
        (CKA, {"every_n_epochs": 1.5}, f"CKA.every_n_epochs 1.5: {WHOLE} of at least 0"),
        (Measurement, {"every_n_epochs": "x"}, f"Measurement.every_n_epochs x: {WHOLE} of at least 0"),
        (Invariance, {"views": "crop"}, f"Invariance.views crop: expected {LIST}"),
        (Invariance, {"views": None}, f"Invariance.views null: expected {LIST}"),
        (Invariance, {"views": [3]}, f"Invariance.views [3]: expected {LIST}"),
        (Neighborhoods, {"k": "5"}, f"Neighborhoods.k 5: {WHOLE} of at least 3"),
        (Neighborhoods, {"k": True}, f"Neighborhoods.k True: {WHOLE} of at least 3"),
        (Neighborhoods, {"settings": "crop"}, f"Neighborhoods.settings crop: expected {LIST}"),
        (Neighborhoods, {"settings": None}, f"Neighborhoods.settings null: expected {LIST}"),
        (Spectrum, {"copies": 2.5}, f"Spectrum.copies 2.5: {WHOLE} of at least 2, or 0"),
        (Probes, {"train_images": 2.5}, f"Probes.train_images 2.5: {WHOLE} of at least 1"),
        (Probes, {"learning_rates": 0.1}, "Probes.learning_rates 0.1: expected numbers above 0, at most 7"),
        (Probes, {"learning_rates": ["a"]}, "Probes.learning_rates [a]: expected numbers above 0, at most 7"),
        (Probes, {"logistic": "yes"}, "Probes.logistic yes: expected true or false"),
        (Probes, {"online": 3}, "Probes.online 3: expected true or false"),
    ],
)
def test_arguments_of_another_kind(kind: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        kind(**given)
    assert str(error.value) == words


def test_layers_come_first(images: MeasurementImages) -> None:
    assert set(measure(network(), images, [CKA("0", gram_size=8)], clean=CLEAN).rows["layer"]) == {"0"}


class Restless(nn.Module):
    """Draws random numbers and counts its calls, in evaluation mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.inner(nn.functional.dropout(images) + np.random.rand() + random.random())  # noqa: NPY002


def test_measuring_leaves_buffers_and_streams_of_random_numbers(images: MeasurementImages) -> None:
    net = Restless()

    def draw() -> tuple[float, ...]:
        return float(torch.rand(1)), random.random(), float(np.random.rand())  # noqa: NPY002

    flipped: Any = v2.Compose([v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    found = []
    for clean in (CLEAN, flipped, flipped):
        streams = []
        for look in (True, False):
            torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
            if look:
                found.append(measure(net, images, [CKA(gram_size=8)], clean=clean).rows)
            streams.append(draw())
        assert streams[0] == streams[1]
    assert (net.calls, net.replaced) == (0, 0)
    assert found[1]["value"].equals(found[2]["value"]), "the same numbers are drawn in every measurement"


class Twice(nn.Module):
    """One activation for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(images))))


@pytest.mark.parametrize("measurement", [Spectrum("all", copies=0), Probes("all"), CKA("all", gram_size=8)])
def test_a_module_that_runs_twice(images: MeasurementImages, measurement: Measurement) -> None:
    rows = measure(Twice(), images, [measurement], clean=CLEAN).rows
    assert set(rows["layer"]) == {"first", "second", "act"}


def test_a_gram_matrix_of_more_images_than_there_are() -> None:
    """No matrix of that size is made for the groups that are not there."""
    features = torch.randn(6, 3)
    torch.testing.assert_close(gram_vector(features, 10**9), gram_vector(features, 6))
    assert gram_vector(features[:3], 10**9).shape == (0,)


def test_a_view_that_is_asked_for_twice_is_measured_once(images: MeasurementImages) -> None:
    rows = measure(network(), images, [Invariance("0", gram_size=8, views=["crop", "crop"])], clean=CLEAN).rows
    assert len(rows.query("metric == 'invariance'")) == 1


def test_a_name_that_reads_as_a_pattern(images: MeasurementImages) -> None:
    net = nn.Sequential()
    net.add_module("block[0]", nn.Conv2d(3, 4, 3))
    assert Subject(net, CLEAN).layers(["block[0]"]) == ("block[0]",)


@pytest.mark.filterwarnings("ignore:.*CKA is NaN")
def test_what_is_not_defined_is_drawn_and_kept(tmp_path: Path) -> None:
    few = MeasurementImages(PIXELS[:3], LABELS[:3])
    found = measure(network(), few, [CKA(), Invariance(views=["crop"])], clean=CLEAN)
    assert found.rows["value"].isna().all()
    assert {"cka/map_self", "invariance/views"} <= set(found.draw())
    found.save(tmp_path)
    kept = pq.read_table(tmp_path / "records" / "measure" / "network.parquet").column("value")
    assert kept.null_count == 0, "NaN, as a monitor writes them"


class Items:
    """Items of a data set, and what else it knows."""

    def __init__(self, items: Any, n: int | None = None, **known: Any) -> None:
        self.items, self.n = items, len(items) if n is None else n
        vars(self).update(known)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


PAIRS = list(zip(PIXELS, LABELS.tolist(), strict=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((PIXELS[:0], LABELS[:0]), "images is uint8 (0, 3, 8, 8), expected uint8 (N, 3, H, W)"),
        ((PIXELS, ["cat"] * 24), "labels of images: no tensor, array or list of numbers (too many dimensions 'str')"),
        ((PIXELS, LABELS, PIXELS), "train_images, train_labels: one is given without the other"),
        ((PIXELS, None, PIXELS, LABELS), "train_images: probes are tested on the measurement images, which have no"),
        ((PIXELS, LABELS, None, None, 0), f"num_classes 0: {WHOLE} of at least 1"),
        ((PIXELS, LABELS, None, None, 2.5), f"num_classes 2.5: {WHOLE} of at least 1"),
        ((PIXELS, LABELS, None, None, 3, 0), f"batch_size 0: {WHOLE} of at least 1"),
        ((PIXELS, LABELS, None, None, 3, "8"), f"batch_size 8: {WHOLE} of at least 1"),
    ],
)
def test_images_that_are_none(given: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        MeasurementImages(*given)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    ("dataset", "options", "words"),
    [
        ([], {}, "list has no images"),
        (PAIRS, {"train": []}, "list has no images"),
        ("data/test", {}, "str is no map-style data set"),
        (None, {}, "NoneType is no map-style data set"),
        (iter(PAIRS), {}, "list_iterator is no map-style data set"),
        (torch.utils.data.DataLoader(Items(PAIRS)), {}, "DataLoader is no map-style data set"),
        (PAIRS, {"n": 0}, f"n 0: {WHOLE} of at least 1"),
        (PAIRS, {"n": 2.5}, f"n 2.5: {WHOLE} of at least 1"),
        (PAIRS, {"n_train": -3}, f"n_train -3: {WHOLE} of at least 1"),
        (PAIRS, {"image_size": (8, 8)}, f"image_size [8, 8]: {WHOLE} of at least 1"),
        (Items([OSError("cannot identify\nx")]), {}, "image 0 of Items cannot be read (OSError: cannot identify)"),
        (Items(PAIRS[:1], 2), {}, "image 1 of Items cannot be read (IndexError: list index out of range)"),
        (Items([()]), {}, "image 0 of Items is NoneType, expected a PIL image"),
        (Items([np.zeros((3, 8, 9), np.uint8)]), {}, "image 0 of Items is a uint8 array (3, 8, 9), expected a PIL"),
        (Items([torch.zeros(5, 8, 8, dtype=torch.uint8)]), {}, "image 0 of Items is a torch.uint8 tensor (5, 8, 8)"),
    ],
)
def test_data_sets_that_are_none(dataset: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        MeasurementImages.from_dataset(dataset, **options)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "classes"),
    [
        (Items([(pixels, torch.tensor(label + 0.5)) for pixels, label in PAIRS]), 0),  # not rounded to classes
        (Items([(pixels, -1) for pixels, _ in PAIRS]), 0),  # as STL-10 marks what has no label
        (Items(PAIRS, targets=[{"box": 1}] * 24), 3),
        (Items(PAIRS, targets=["cat"] * 24), 3),
        (Items(PAIRS, targets=[0.5] * 24), 3),
        (Items(PAIRS, targets=[[0, 1]] * 24), 3),
    ],
)
def test_labels_that_are_no_classes(dataset: Any, classes: int) -> None:
    assert MeasurementImages.from_dataset(dataset).num_classes == classes


REFERENCE = Subject(network(), CLEAN, name="other")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"network": None}, "network is NoneType, expected a torch module"),
        ({"network": torch.relu}, "network is builtin_function_or_method, expected a torch module"),
        (
            {"measurements": [Measurement()]},
            "measurements: Measurement requests nothing; implement its method requests()",
        ),
        ({"measurements": ["cka"]}, "measurements: 'cka' is no measurement, such as CKA()"),
        ({"measurements": 2 * [CKA()]}, "measurements: the same CKA is listed twice; create a second one"),
        ({"measurements": [CKA(reference="x")]}, "CKA.reference: monitors of training read it; give measure(…, ref"),
        ({"clean": "imagenet"}, "clean 'imagenet': expected View('none', size=…, normalize=…), or the evaluation"),
        ({"references": [network()]}, "references: expected a list of networks, such as [Subject("),
        ({"references": [REFERENCE], "name": "other"}, "references: two networks are called 'other'"),
        ({"references": 2 * [REFERENCE]}, "references: two networks are called 'other'"),
        ({"references": [Subject(network(), CLEAN, name="init")]}, "references: two networks are called 'init'"),
        ({"references": [REFERENCE], "measurements": [Spectrum()]}, "references: CKA compares with them; add CKA()"),
        ({"name": 3}, "name 3: expected text"),
        ({"heads": ["h"]}, "heads is list, expected {name: module}"),
        ({"heads": {"h": 3}}, "heads 'h': int is not a Module subclass"),
        ({"heads": {"": nn.Linear(4, 2)}}, "heads '': module name can't be empty string"),
        ({"heads": {"backbone.h": nn.Linear(4, 2)}}, "heads 'backbone.h': what is called backbone is the network"),
        ({"heads": {"forward": nn.Linear(4, 2)}}, "heads 'forward': attribute 'forward' already exists"),
        ({"heads": {"h": nn.Linear(9, 2)}}, "heads 'h': does not take the network's features, 2 x 4 ("),
        ({"heads": {"h": nn.Linear(4, 2), "h.x": nn.ReLU()}}, "heads 'h.x': h is a head itself, without this part"),
    ],
)
def test_what_is_given_to_measure(images: MeasurementImages, given: dict[str, Any], words: str) -> None:
    options: dict[str, Any] = {"network": network(), "images": images, "measurements": [CKA(gram_size=8)], **given}
    with pytest.raises(UserError) as error:
        measure(**{"clean": CLEAN, **options})
    assert str(error.value).startswith(words)


def test_heads_by_any_name(images: MeasurementImages) -> None:
    """Also those of a module that has a backbone, and ``heads`` of its own."""
    rows = measure(network(), images, [CKA(gram_size=8)], clean=CLEAN, heads={"heads.a": nn.Linear(4, 2)}).rows
    assert "heads.a" in set(rows["layer"])

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.heads = network(), nn.ModuleDict({"a": nn.Linear(4, 2)})

        def forward(self, images: Tensor) -> Tensor:
            return self.heads["a"](self.backbone(images))

    assert "1" in set(measure(Whole(), images, [CKA(gram_size=8)], clean=CLEAN).rows["layer"])


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "Detail: [errno 28] No space left on device")  # as pyarrow and Pillow raise it


def test_a_full_disk_is_named_with_the_file(
    tmp_path: Path, images: MeasurementImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure(network(), images, [CKA("0", gram_size=8)], clean=CLEAN)
    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    for act, name in ((found.save, "records/measure/network.parquet"), (found.draw, "cka_map_self.pdf")):
        with pytest.raises(OSError, match="No space left") as error:
            act(tmp_path)
        assert error.value.filename == str(tmp_path / name)


def test_networks_share_a_folder(tmp_path: Path, images: MeasurementImages) -> None:
    """What is saved later replaces what is there of the same name alone, whatever the names hold."""
    names = ["a", "b", "../a", "x" * 300, "</script>\n"]
    for name in [*names, "a"]:
        measure(network(), images, [CKA("0", gram_size=8)], clean=CLEAN, name=name).save(tmp_path)
    assert sorted(read_records(tmp_path)["model"]) == sorted(names)
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


@pytest.mark.parametrize("measurement", [CKA(), Invariance(), Neighborhoods(), Probes(), Spectrum()])
def test_a_gpu_without_float64(images: MeasurementImages, measurement: Measurement) -> None:
    """That of an Apple computer, which Lightning takes of itself."""
    net: Any = nn.Flatten()
    net.device = torch.device("mps")
    with pytest.raises(UserError, match=r"^the network is on mps, which has no float64; .* use network\.cpu\(\), or"):
        measure(net, images, [measurement], clean=CLEAN)
