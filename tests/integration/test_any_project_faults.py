"""The monitor where something is wrong: its arguments, the network, the disk, what it measures."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchvision.transforms import v2

from ssl_geometry.callbacks import GeometryMonitor
from ssl_geometry.errors import UserError
from ssl_geometry.measure import CKA, Measured, Measurement, MeasurementImages, Occasion, Request, Spectrum, pooled
from ssl_geometry.records import record
from tests.integration.test_any_project import CLEAN, TinyImages, TwoViews, loader, rows, small_convnet, trainer

WHOLE = "expected a whole number of at least 0"


@pytest.fixture(scope="module")
def images() -> MeasurementImages:
    return MeasurementImages.from_dataset(TinyImages(), n=24, batch_size=12)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"measurements": 2 * [CKA()]}, "measurements: the same CKA is listed twice; create a second one"),
        ({"network": 3}, "network is int, expected an attribute path, such as 'student.backbone', or a function"),
        ({"network": nn.Linear(2, 2)}, "network is Linear, expected an attribute path"),
        ({"network": lambda module: None}, "network is NoneType, expected a torch module"),
        ({"heads": "projection_head"}, "heads projection_head: expected a list such as [a, b]"),
        ({"heads": ["backbone.0"]}, "heads 'backbone.0': what is called backbone is the network itself"),
        ({"clean": "imagenet"}, "clean 'imagenet': expected View("),
        ({"every_n_epochs": -1}, f"every_n_epochs -1: {WHOLE}"),
        ({"every_n_epochs": 1.5}, f"every_n_epochs 1.5: {WHOLE}"),
        ({"every_n_epochs": None}, f"every_n_epochs null: {WHOLE}"),
        ({"every_n_epochs": "1"}, f"every_n_epochs 1: {WHOLE}"),
        ({"name": "../../x"}, "name ../../x: expected the name of one folder"),
        ({"name": "x" * 300}, f"name {'x' * 60}…: 300 bytes; expected a name of at most 128"),
        ({"name": 3}, "name 3: expected text"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, images: MeasurementImages, given: dict[str, Any], words: str) -> None:
    options: dict[str, Any] = {"measurements": [CKA(gram_size=8)], "images": images, "clean": CLEAN, **given}
    with pytest.raises(UserError) as error:
        trainer(tmp_path, GeometryMonitor(**options)).fit(TwoViews(), loader())
    assert str(error.value).startswith(words)
    assert not (tmp_path / "geometry").exists()


class AnotherBackbone(TwoViews):
    """Its second epoch trains another network."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_the_network_is_that_of_the_module_now(tmp_path: Path, images: MeasurementImages) -> None:
    measurements = [CKA(gram_size=8), Spectrum("all", copies=0)]
    trainer(tmp_path, GeometryMonitor(measurements, images, clean=CLEAN)).fit(AnotherBackbone(), loader())
    layers = rows(tmp_path).groupby(["metric", "epoch"])["layer"].nunique()
    assert layers["cka"].tolist() == layers["rankme"].tolist() == [8, 8, 3]


class Always(nn.Module):
    """Dropout that is on in evaluation mode as well, and a count of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_convnet()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(nn.functional.dropout(images)) + 0.01 * self.calls


def test_random_networks_and_transforms_do_not_change_training(tmp_path: Path, images: MeasurementImages) -> None:
    flipped = v2.Compose([v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    monitors = ([], [GeometryMonitor([CKA("inner.0", gram_size=8)], images, clean=flipped)])
    losses = []
    for number, callbacks in enumerate(monitors):
        L.seed_everything(0)
        module = TwoViews(Always())
        trainer(tmp_path / str(number), *callbacks, max_epochs=1).fit(module, loader())
        losses.append(module.losses)
    assert losses[0] == losses[1]


class Failing(Measurement):
    """Measures the initialisation, and fails thereafter."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def requests(self, subject: Any) -> Sequence[Request]:
        return [Request(self.chosen(subject)[:1], pooled)]

    def update(self, *args: Any) -> None:
        if isinstance(self.found, Exception) and self.epoch:
            raise self.found

    def begin(self, occasion: Occasion) -> None:
        self.epoch = occasion.epoch

    def finish(self, occasion: Occasion) -> Any:
        return self.found if occasion.epoch else Measured()


@pytest.mark.parametrize(
    ("found", "words", "kept"),
    [
        (RuntimeError("a layer\nfailed"), "nothing is measured, training goes on: RuntimeError: a layer", False),
        (torch.OutOfMemoryError("CUDA out of memory"), "nothing is measured, training goes on: OutOfMemory", False),
        (ValueError("of no class"), "nothing is measured, training goes on: UserError: measured after 1 epo", False),
        (None, "Failing is not kept whole, training goes on: AttributeError: 'NoneType' object has no", True),
        (Measured([{"a": 1}]), "Failing is not kept whole, training goes on: KeyError: 'metric'", True),
        (Measured([record(metric="cka", value="x")]), "Failing is not kept whole, training goes on: ArrowInv", True),
    ],
)
def test_training_goes_on_where_only_measuring_failed(
    tmp_path: Path,
    images: MeasurementImages,
    caplog: pytest.LogCaptureFixture,
    found: Any,
    words: str,
    kept: bool,
) -> None:
    module = TwoViews()
    monitor = GeometryMonitor([Failing(found), CKA("0", gram_size=8)], images, clean=CLEAN)
    trainer(tmp_path, monitor).fit(module, loader())
    assert len(module.losses) == 6, "two epochs"
    said = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert any(line.startswith(f"after epoch 1 {words}") for line in said)
    assert not any("\n" in line for line in said)
    assert set(rows(tmp_path)["epoch"]) == ({0, 1, 2} if kept else {0}), "of the other measurement"


def test_what_fails_at_the_start_ends_it_there(tmp_path: Path, images: MeasurementImages) -> None:
    (tmp_path / "geometry").touch()
    with pytest.raises(NotADirectoryError, match="geometry"):
        trainer(tmp_path, GeometryMonitor([CKA("0", gram_size=8)], images, clean=CLEAN)).fit(TwoViews(), loader())


def test_a_disk_that_is_full_does_not_end_training(
    tmp_path: Path, images: MeasurementImages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = TwoViews()
    monitor = GeometryMonitor([CKA("0", gram_size=8)], images, clean=CLEAN)

    def no_room(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def save_figures(self: Any, figures: Any) -> None:  # in the last epoch
        no_room()

    monkeypatch.setattr("ssl_geometry.callbacks.records.RecordsLogger.save_figures", save_figures)
    trainer(tmp_path, monitor).fit(module, loader())
    assert "after epoch 2 cka is not kept whole, training goes on: OSError: [Errno 28] No space" in caplog.text
    assert set(rows(tmp_path)["epoch"]) == {0, 1, 2}


def test_a_trial_writes_nothing(tmp_path: Path, images: MeasurementImages) -> None:
    module = TwoViews()
    monitor = GeometryMonitor([CKA("0", gram_size=8)], images, clean=CLEAN)
    trainer(tmp_path, monitor, fast_dev_run=True, logger=CSVLogger(tmp_path)).fit(module, loader())
    assert monitor.seconds, "but measures"
    assert not (tmp_path / "geometry").exists()


def test_states_are_found_whatever_stands_beside(caplog: pytest.LogCaptureFixture, images: MeasurementImages) -> None:
    """A measurement that is added before another takes nothing from it; one line where there is no initialisation."""
    before, after = CKA(), CKA()
    before.frozen["init"] = object()  # type: ignore[assignment]
    before.state_dict = lambda: {"x": 1}  # type: ignore[method-assign]
    state = GeometryMonitor([before]).state_dict()
    taken: list[Any] = []
    after.load_state_dict = taken.append  # type: ignore[method-assign]
    GeometryMonitor([Spectrum(), after]).load_state_dict(state)
    assert taken == [{"x": 1}]


def test_a_resumed_training_without_its_initialisation_has_one_line(
    tmp_path: Path, images: MeasurementImages, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    module, checkpoint = TwoViews(), tmp_path / "x.ckpt"
    first = trainer(tmp_path, max_epochs=1)
    first.fit(module, loader())
    first.save_checkpoint(checkpoint)
    monitor = GeometryMonitor([CKA("0", gram_size=8)], images, clean=CLEAN)
    trainer(tmp_path, monitor, max_epochs=3).fit(module, loader(), ckpt_path=checkpoint, weights_only=True)
    assert caplog.text.count("CKA with the initialisation is left out: training went on from a checkpoint") == 1
