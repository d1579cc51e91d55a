"""Sizes that nobody asked for shrink to the data, with one line each; others are refused in one line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from rich.console import Console

from ssl_geometry.compare import _check_against_images
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError, as_options
from ssl_geometry.geometry.gram import gram_vector
from ssl_geometry.measure import Neighborhoods, Probes, Subject
from ssl_geometry.methods import SimCLR
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.probe import summary
from ssl_geometry.probe_options import USUAL, _check_data
from ssl_geometry.survey_options import report_small_classes
from tests.training import quiet_trainer

SMALL: dict[str, Any] = {"backbone": "resnet10", "width": 1 / 16, "image_size": 8}


@pytest.fixture(autouse=True)
def _all_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ssl_geometry")


def images(train: int, test: int, **options: Any) -> DataModule:
    data = DataModule("digits", image_size=8, limit_train=train, limit_test=test, **options)
    data.setup()
    return data


def test_images_to_measure(caplog: pytest.LogCaptureFixture) -> None:
    assert images(60, 48).measure_size == 48
    assert caplog.messages == ["DataModule.measure_size 48 (by default 2048): the test split has 48 images"]
    assert images(60, 48, measure_size=48).measure_size == 48
    with pytest.raises(
        UserError, match=r"^DataModule.measure_size 49: the test split has 48 images; set at most 48, or None"
    ):
        images(60, 48, measure_size=49)


@as_options
def test_neighbours_while_training(caplog: pytest.LogCaptureFixture) -> None:
    data = images(60, 48)
    caplog.clear()
    subject = Subject.of(SimCLR(**SMALL))
    neighborhoods = Neighborhoods()
    neighborhoods.prepare(subject, data)
    assert neighborhoods.k == 47
    assert caplog.messages == ["--neighbors.k 47 (by default 50): each of 48 measurement images has 47 others"]
    with pytest.raises(
        UserError, match=r"^--neighbors.k 48: each of 48 measurement images has 47 others; set at most 47"
    ):
        Neighborhoods(k=48).prepare(subject, data)
    data.measure_size = 3
    with pytest.raises(UserError, match=r"^--neighbors.k: each of 3 .* 3 are needed; raise --data.measure_size"):
        neighborhoods.prepare(subject, data)


def test_compared_neighbours(caplog: pytest.LogCaptureFixture) -> None:
    options = SimpleNamespace(k=None, show_neighbors=[7])
    _check_against_images(options, 8)
    assert options.k == 7
    assert caplog.messages == ["--k 7 (by default 10): each of 8 measurement images has 7 others"]
    for wrong, words in {
        (8, ()): r"^--k 8: each of 8",
        (7, (3, 8)): r"^--show_neighbors 8: expected 0 to 7",
    }.items():
        with pytest.raises(UserError, match=words):
            _check_against_images(SimpleNamespace(k=wrong[0], show_neighbors=list(wrong[1])), 8)
    with pytest.raises(UserError, match=r"^--data.measure_size 3: CKA needs at least 4 images"):
        _check_against_images(SimpleNamespace(k=None, show_neighbors=[]), 3)


def test_a_gram_matrix_takes_the_images_that_there_are() -> None:
    """No size shrinks: of fewer images than it says, one Gram matrix holds all."""
    x, y = torch.randn(2, 15, 8, generator=torch.Generator().manual_seed(0))
    vectors = {size: [gram_vector(features, size) for features in (x, y)] for size in (15, 64)}
    assert all(map(torch.equal, vectors[15], vectors[64]))
    found = []
    for size, (a, b) in vectors.items():
        cka = LayerwiseCKA(["a"], ["b"], gram_size=size)
        cka.update({"a": a}, {"b": b})
        found.append(cka.compute())
    assert torch.equal(*found)
    assert found[0].isfinite()


def test_neighbours_that_vote(caplog: pytest.LogCaptureFixture) -> None:
    data = images(120, 20, val_fraction=0.0)
    caplog.clear()
    given: dict[str, Any] = {"evaluations": ["knn"], "train_images": None, "linear_epochs": 100}
    options = SimpleNamespace(k=None, **given)
    _check_data(options, data)
    assert options.k == [20, 120]
    assert caplog.messages == ["--k 120 (by default 200): there are 120 training images"]
    with pytest.raises(UserError, match=r"^--k \[20, 200\]: 200 neighbours cannot vote where there are 120"):
        _check_data(SimpleNamespace(k=[20, 200], **given), data)


@pytest.fixture
def no_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for 22 images out of 30, of which none has a number that chooses."""
    for module in ("measure.probes", "measure.frozen"):
        monkeypatch.setattr(
            f"ssl_geometry.{module}.in_validation_split", lambda index: torch.zeros_like(index, dtype=torch.bool)
        )


def test_online_probes_are_left_out_without_validation_images(
    caplog: pytest.LogCaptureFixture, no_validation_split: None
) -> None:
    data, subject, probes = images(40, 20, val_fraction=0.0), Subject.of(SimCLR(**SMALL)), Probes(layers="pooled")
    probes.prepare(subject, data)
    probes.create_online(subject, data, {})
    assert probes.bank is None
    assert caplog.messages[-1].startswith("online probes are off: no training image falls into")


def test_linear_evaluation_is_left_out_without_validation_images(
    caplog: pytest.LogCaptureFixture, no_validation_split: None
) -> None:
    data = images(40, 20, val_fraction=0.0)
    given: dict[str, Any] = {"k": [5], "train_images": None, "linear_epochs": 100}
    options = SimpleNamespace(evaluations=list(USUAL), **given)
    _check_data(options, data)
    assert options.evaluations == ["layers", "knn", "labels"]
    assert caplog.messages[-1].startswith("left out  linear, linear_augmented: none of 40 training images")
    assert "5-fold cross-validation" in summary(data, options)
    with pytest.raises(UserError, match=r"^--evaluations linear: none of 40 .*; leave out linear, or give more"):
        _check_data(SimpleNamespace(evaluations=["linear"], **given), data)


def test_semantic_manifolds_are_left_out_where_no_class_has_three_images() -> None:
    data, console = images(60, 20), Console(record=True)
    options = SimpleNamespace(manifolds=["semantic", "crop"], neighbors=SimpleNamespace(settings=["crop"]))
    report_small_classes(options, data, console)
    assert options.manifolds == ["crop"]
    assert console.export_text().startswith("left out  semantic manifolds: no class has 3 of the 20")
    options.neighbors.settings = []
    with pytest.raises(UserError, match=r"^--neighbors.settings \[\]: no class has 3 of the 20 measurement images"):
        report_small_classes(options, data, console)


def test_two_images_without_a_test_folder(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    with pytest.raises(UserError, match=r"^DataModule.dataset .*: 2 training and 0 test images; at least one of each"):
        DataModule(str(tmp_path), image_size=8).setup()


def test_a_run_on_fewer_images_than_vote(caplog: pytest.LogCaptureFixture) -> None:
    method, data = SimCLR(**SMALL), DataModule("digits", image_size=8, limit_train=12, limit_test=8, val_fraction=0.0)
    trainer = quiet_trainer()
    trainer.fit(method, data)
    for _ in range(2):
        (results,) = trainer.test(method, data, verbose=False)
    assert 0 <= results["test/knn"] <= 1
    assert method.knn.k == data.batch_size == 12
    assert "DataModule.batch_size 12 (by default 256): there are 12 training images" in caplog.messages
    said = "nearest neighbours that vote: 12 (by default 20): there are 12 labelled training images"
    assert caplog.messages.count(said) == 1
