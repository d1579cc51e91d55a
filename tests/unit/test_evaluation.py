"""Validation from the initialisation on, in the precision that was chosen, by its name; tests in float32."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor, nn

from ssl_geometry.callbacks import EvaluateAtStart, FlushRecords, LogEveryEpoch, RecordsLogger
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.methods import Method, SimCLR, Supervised
from ssl_geometry.records import read_records
from tests.training import quiet_trainer


@pytest.mark.parametrize(
    ("precision", "chosen", "dtype", "suffix"),
    [
        ("32-true", "float32", torch.float32, ""),
        ("32-true", "training", torch.float32, ""),
        ("bf16-mixed", "float32", torch.float32, ""),
        ("bf16-mixed", "training", torch.bfloat16, "_bf16-mixed"),
        ("64-true", "training", torch.float64, ""),
    ],
)
@pytest.mark.parametrize("kind", [SimCLR, Supervised])
def test_validation_is_in_the_chosen_precision_and_named_after_it(
    kind: type[Method], precision: str, chosen: str, dtype: torch.dtype, suffix: str
) -> None:
    seen: dict[str, list[torch.dtype]] = {"val": [], "test": []}
    features: dict[str, list[Tensor]] = {"val": [], "test": []}

    class Watched(kind):  # type: ignore[misc,valid-type]
        def evaluate(self, x: Tensor, batch: dict, split: str) -> None:  # type: ignore[type-arg]
            features[split].append(x)
            super().evaluate(x, batch, split)

    torch.manual_seed(0)
    method = Watched(backbone="resnet10", width=0.25, image_size=16, eval_precision=chosen)
    data = DataModule("digits", limit_train=200, limit_test=50, measure_size=50, batch_size=50)
    trainer = quiet_trainer(precision=precision)

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen[split].append(output.dtype)

    method.backbone.conv1.register_forward_hook(note)
    names = {"knn", "acc"} if kind is Supervised else {"knn"}
    split = "val"
    logged = trainer.validate(method, data, verbose=False)[0]
    assert logged.keys() == {f"val/{name}{suffix}" for name in names}
    assert set(seen["val"]) == {dtype}, "the bank as well as the images that it votes on"
    split = "test"
    assert trainer.test(method, data, verbose=False)[0].keys() == {f"test/{name}" for name in names}
    assert set(seen["test"]) == {torch.float64 if precision == "64-true" else torch.float32}
    assert {x.dtype for x in features["val"] + features["test"]} == {torch.float32}

    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    method.eval()
    exact, chosen_features = method.features(images), method.features(images, chosen)
    assert torch.equal(exact, chosen_features) is not bool(suffix)
    torch.testing.assert_close(chosen_features, exact, rtol=0.05, atol=0.05)


def trained(
    folder: Path, every: int, *callbacks: L.Callback, resume: Path | None = None, log_every: int = 1
) -> tuple[L.Trainer, Method]:
    torch.manual_seed(0)
    method = Supervised(backbone="resnet10", width=0.125, image_size=8, warmup_epochs=0)
    data = DataModule("digits", image_size=8, limit_train=60, limit_test=20, measure_size=20, batch_size=27)
    trainer = quiet_trainer(
        max_epochs=2,
        check_val_every_n_epoch=every,
        num_sanity_val_steps=0,
        logger=RecordsLogger(folder),
        callbacks=[FlushRecords(), *callbacks],
        log_every_n_steps=log_every,
    )
    trainer.fit(method, data, ckpt_path=resume)
    return trainer, method


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [])])
def test_the_initialisation_is_evaluated_where_the_run_evaluates(tmp_path: Path, every: int, epochs: list[int]) -> None:
    with_it, method = trained(tmp_path / "with", every, EvaluateAtStart())
    _, alone = trained(tmp_path / "without", every)
    assert all(map(torch.equal, method.state_dict().values(), alone.state_dict().values())), "training is the same"
    records, others = (read_records(tmp_path / name) for name in ("with", "without"))
    assert records[records["metric"] == "val/acc"]["epoch"].tolist() == epochs
    assert records[records["metric"] == "train/loss"]["epoch"].tolist() == [1, 1, 2, 2]
    first = records["metric"].str.startswith("val/") & (records["epoch"] == 0)
    assert set(records[first]["step"]) <= {0}
    assert records[~first]["value"].tolist() == others["value"].tolist()
    if epochs:
        torch.manual_seed(0)
        start = Supervised(backbone="resnet10", width=0.125, image_size=8, warmup_epochs=0)
        known = with_it.validate(start, with_it.datamodule, verbose=False)[0]  # type: ignore[attr-defined]
        assert records[first].set_index("metric")["value"].to_dict() == pytest.approx(known)


def test_a_run_of_few_steps_has_curves_and_all_that_is_logged_is_of_its_epoch(tmp_path: Path) -> None:
    rates = [LearningRateMonitor(logging_interval=interval) for interval in ("epoch", "step")]
    trained(tmp_path, 3, LogEveryEpoch(), *rates, log_every=10)
    records = read_records(tmp_path)
    loss, rate = (records[records["metric"] == name] for name in ("train/loss", "lr-SGD/pg1"))
    assert list(zip(loss["epoch"], loss["step"], strict=True)) == [(1, 1), (2, 3)], "two steps per epoch"
    assert list(zip(rate["epoch"], rate["step"], strict=True)) == [(1, 0), (1, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize(
    ("batches", "accumulated", "steps", "every", "logged_every", "said"),
    [
        (100, 1, 1000, 10, 10, ""),
        (10, 1, 10, 10, 10, ""),
        (5, 1, 500, 10, 5, "--trainer.log_every_n_steps 5 (instead of 10): an epoch has no more steps"),
        (9, 2, 10, 50, 5, "--trainer.log_every_n_steps 5 (instead of 50): an epoch has no more steps"),
        (100, 1, 3, 10, 3, "--trainer.log_every_n_steps 3 (instead of 10): training has no more steps"),
        (float("inf"), 1, float("inf"), 10, 10, ""),
        (5, 1, 5, 0, 0, ""),
    ],
)
def test_training_is_logged_at_least_once_per_epoch(
    caplog: pytest.LogCaptureFixture,
    batches: float,
    accumulated: int,
    steps: float,
    every: int,
    logged_every: int,
    said: str,
) -> None:
    trainer: Any = SimpleNamespace(
        num_training_batches=batches,
        accumulate_grad_batches=accumulated,
        estimated_stepping_batches=steps,
        log_every_n_steps=every,
    )
    with caplog.at_level("INFO"):
        LogEveryEpoch().on_train_start(trainer, trainer)
    assert trainer.log_every_n_steps == logged_every
    assert caplog.messages == [said] * bool(said)


def test_a_resumed_run_is_not_evaluated_again_at_its_start(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path / "first", 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trained(tmp_path / "second", 1, EvaluateAtStart(), resume=tmp_path / "last.ckpt")
    assert not any((tmp_path / "second").glob("records/**/*.parquet")), "it was finished"
