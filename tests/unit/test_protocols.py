"""The hash of a protocol changes with every constant in the code that changes the numbers behind it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest

from ssl_geometry import finetuning, probe
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.measure import Subject, cka, frozen, invariance, neighbors, spectrum
from ssl_geometry.methods import SimCLR
from ssl_geometry.methods.raw_pixels import RawPixels
from ssl_geometry.records import Protocol
from ssl_geometry.runs.networks import Loaded


@pytest.fixture(scope="module")
def data() -> DataModule:
    data = DataModule("digits", measure_size=64, limit_test=64, limit_train=64)
    data.setup()
    return data


@pytest.fixture(scope="module")
def method() -> SimCLR:
    return SimCLR(backbone="resnet10", width=0.25, image_size=16)


def of_neighbors(data: DataModule, method: SimCLR) -> list[Protocol]:
    neighborhoods = neighbors.Neighborhoods(k=5, copies=4, settings=("crop",))
    neighborhoods.k = 5
    return [neighborhoods.protocol(Subject.of(method), data)]


def of_spectra(data: DataModule, method: SimCLR) -> list[Protocol]:
    return [spectrum.Spectrum().protocol(Subject.of(method), data)]


def of_cka(data: DataModule, method: SimCLR) -> list[Protocol]:
    return [cka.cka_protocol(data, 64, Subject.of(method), {"clean": "clean"})]


def of_classes(data: DataModule, method: SimCLR) -> list[Protocol]:
    return [invariance.Invariance().protocol(Subject.of(method), data, "class_cka", "clean")]


def of_evaluations(*names: str) -> Callable[[DataModule, SimCLR], list[Protocol]]:
    def made(data: DataModule, method: SimCLR) -> list[Protocol]:
        options = SimpleNamespace(
            evaluations=names, k=[5], linear_epochs=3, linear_weight_decay=0.0, draws=2, label_fractions=[0.1],
            augment="supervised", finetune_epochs=1, finetune_lr=0.1, data=data, data_options={},
        )  # fmt: skip
        return [Protocol(evaluation.protocol()) for evaluation in probe.evaluations(options)]

    return made


def of_pixels(data: DataModule, method: SimCLR) -> list[Protocol]:
    pixels = RawPixels(image_size=16)
    features = SimpleNamespace(
        train_labels=[], occasion=SimpleNamespace(subject=Subject.of(pixels)), depths={"pooled": 1.0}
    )
    knn = SimpleNamespace(name="knn", on_every_process=False, protocol=dict, evaluate=lambda *args: {})
    options, nothing = SimpleNamespace(data=data, out=Path("probe")), Mock()
    with patch.object(probe, "extract", lambda *args: features), patch.object(probe, "evaluations", lambda _: [knn]):
        return list(probe.measure(Loaded("pixels", pixels, None), nothing, options, nothing, nothing).values())


@pytest.mark.parametrize(
    ("module", "name", "value", "protocols"),
    [
        *(
            (neighbors, name, value, of_neighbors)
            for name, value in {
                "DIMENSION_K": 3, "DISCARD": 0.2, "DIRECTIONS": 0.2, "SEED": 1, "ACTIVE": 1e-3, "OPTIMAL": 1e-9,
                "INDEPENDENT": 1e-9, "RESOLUTION": 4, "DEGENERATE": 4, "MIN_IMAGES": 9, "OVERLAP_K": 5, "EXACT_ROWS": 9,
                "PROBED": 9, "COARSE": 1e-2, "RANKING": "by hand",
            }.items()
        ),
        *(
            (spectrum, name, value, of_spectra)
            for name, value in {
                "RANKME_EPS": 0.0, "FIRST": 2, "LAST": 50, "RANK_SHARE": 1.0, "LIDAR_DELTA": 1.0, "LIDAR_EPS": 0.0,
                "POTENTIAL": 1.0, "CONSTANT": 4, "VIEW": "crop",
            }.items()
        ),
        (cka, "BLOCKS", 8, of_cka),
        (cka, "DUST", 4, of_cka),
        (cka, "LEAST_BLOCK", 0.5, of_cka),
        (invariance, "LONELY", 0.5, of_classes),
        (frozen, "TEMPERATURE", 0.1, of_evaluations("knn")),
        (frozen, "RATES", (1.0,), of_evaluations("linear", "linear_augmented")),
        (frozen, "MOMENTUM", 0.5, of_evaluations("linear", "linear_augmented")),
        (frozen, "STATISTICS", "none", of_evaluations("linear", "linear_augmented")),
        (frozen, "SOLVER", "by hand", of_evaluations("layers", "labels")),
        (frozen, "L2", (1.0,), of_evaluations("layers", "labels")),
        (frozen, "FEW_SELECTION", "", of_evaluations("labels")),
        (finetuning, "SEED", 1, of_evaluations("finetune")),
        (finetuning, "SETTINGS", {"optimizer": "adamw"}, of_evaluations("finetune")),
        (probe, "PIXEL_SIDE", 8, of_pixels),
    ],
)  # fmt: skip
def test_a_constant_that_changes_numbers_is_in_the_protocol(
    data: DataModule,
    method: SimCLR,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    value: Any,
    protocols: Callable[[DataModule, SimCLR], list[Protocol]],
) -> None:
    before = [protocol.hash for protocol in protocols(data, method)]
    monkeypatch.setattr(module, name, value)
    after = [protocol.hash for protocol in protocols(data, method)]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_the_choice_of_hyperparameters_is_reported_with_its_constants() -> None:
    assert all(word in frozen.SOLVER for word in ("3e-06", "2000"))
    assert "0.99" in frozen.STATISTICS
    assert "100 training images" in frozen.FEW_SELECTION
