"""What loggers keep when a run goes on, and when it is saved early."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_geometry.callbacks import (
    FlushRecords,
    LastCheckpoint,
    RecordsLogger,
    ResumableWandbLogger,
    make_loggers,
    publishing,
)
from ssl_geometry.measure import Measured
from ssl_geometry.runs.run import Run


def logged(logger: Any) -> None:
    """Two epochs of two steps as Lightning logs them, measured in between, and killed in the third."""
    logger.log_metrics({"cka/to_init/pooled": 1.0, "epoch": 0.0}, 0)
    for step in range(5):
        logger.log_metrics({"train/loss": 0.1 * step, "epoch": step // 2}, step)
        if step % 2:
            logger.log_metrics({"val/knn": 0.5, "epoch": step // 2}, step)
            logger.log_metrics({"cka/to_init/pooled": 0.9, "epoch": step // 2 + 1.0}, step + 1)


def table(run: Run) -> list[dict[str, str]]:
    with (run.directory / "csv" / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.filterwarnings("error")
def test_the_csv_file_of_a_resumed_run_is_the_whole_curve(tmp_path: Path) -> None:
    _, whole = make_loggers(["csv"], Run(tmp_path), {}, "p")
    logged(whole)
    whole.save()
    before = table(Run(tmp_path))
    assert len(before) == 10
    with (tmp_path / "csv" / "metrics.csv").open("a") as file:
        file.write("0.9,1,3")  # killed while it wrote
    _, resumed = make_loggers(["csv"], Run(tmp_path, tmp_path / "last.ckpt", resumed_step=4), {}, "p")
    assert table(Run(tmp_path)) == before[:9], "up to the measurement after four steps, as they were"
    resumed.log_metrics({"train/loss": 0.4, "train/acc": 1.0, "epoch": 2}, 4)
    resumed.save()
    rows = table(Run(tmp_path))
    assert rows[:9] == before[:9]
    assert rows[9:] == [{"step": "4", "epoch": "2", "train/loss": "0.4", "train/acc": "1.0"}]


def test_wandb_that_is_switched_off_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert len(make_loggers(["wandb", "csv"], Run(tmp_path), {}, "p")) == 2, "records and CSV"
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_no_step_twice(tmp_path: Path) -> None:
    for resumed_step in (None, 2):
        _, logger = make_loggers(["tensorboard"], Run(tmp_path, None, resumed_step), {}, "p")
        for step in range(resumed_step or 0, 5):
            logger.log_metrics({"train/loss": float(step)}, step + 1)
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_what_is_logged_is_on_the_disk_before_a_checkpoint_and_the_next_epoch(tmp_path: Path) -> None:
    loggers = [RecordsLogger(tmp_path), CSVLogger(tmp_path, name="csv", version="")]
    trainer: Any = SimpleNamespace(loggers=loggers, current_epoch=0)
    for call in (
        lambda: FlushRecords().on_save_checkpoint(trainer, trainer, {}),
        lambda: FlushRecords().on_train_epoch_start(trainer, trainer),
    ):
        before = len(loggers[0].store.read())
        for logger in loggers:
            logger.log_metrics({"train/loss_mean": 0.1, "epoch": before}, before)
        call()
        assert len(loggers[0].store.read()) == before + 1
        assert len(table(Run(tmp_path))) == before + 1


@pytest.mark.parametrize(("steps", "first"), [(0, 30), (7, 300)], ids=["new", "resumed"])
def test_a_new_run_is_saved_early_once(tmp_path: Path, steps: int, first: int) -> None:
    now = [1000.0]
    last = LastCheckpoint(tmp_path, every_n_minutes=5, clock=lambda: now[0])
    trainer: Any = SimpleNamespace(global_step=steps, save_checkpoint=lambda path: None)
    last.on_train_start(trainer, trainer)
    for wait in (first, 300):
        now[0] += wait - 1
        assert not last.overdue()
        now[0] += 1
        assert last.overdue()
        last.save(trainer)


def test_a_wandb_that_cannot_be_started_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As for a user whom the machine does not know, without a home."""

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("wandb.login", fails)
    monkeypatch.setattr("wandb.init", fails)
    with caplog.at_level("INFO"):
        _, logger = make_loggers(["wandb"], Run(tmp_path), {}, "p")
    assert caplog.messages[-1] == "W&B: nothing is logged (Could not determine home directory.)"
    trainer = L.Trainer(logger=logger, max_epochs=0, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(BoringModel())
    logger.log_metrics({"train/loss": 1.0}, 0)


def test_a_figure_that_wandb_cannot_take_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its temporary folder may be cleaned away, and its process killed."""

    def gone(figure: Figure) -> None:
        raise FileNotFoundError(2, "No such file or directory", "media")

    monkeypatch.setattr("wandb.Image", gone)
    monkeypatch.setattr(ResumableWandbLogger, "_begin", lambda self: None)
    drawn: list[Figure] = []

    def draw() -> Figure:
        drawn.append(Figure())
        return drawn[-1]

    logger = ResumableWandbLogger(tmp_path, SimpleNamespace(offline=True))
    assert logger.alive
    trainer: Any = SimpleNamespace(loggers=[logger], max_epochs=9, max_steps=-1, global_step=1, should_stop=False)
    occasion: Any = SimpleNamespace(epoch=1, step=1)
    monkeypatch.setattr(publishing, "live_figures", lambda rows, curves: {"cka/map": draw})
    with caplog.at_level("WARNING"):
        for _ in range(3):
            publishing.log(trainer, RecordsLogger(tmp_path), Measured(), [], occasion, "cka")
    assert len(drawn) == 1
    assert not logger.alive
    assert caplog.text.count("W&B takes no more numbers ([Errno 2] No such file") == 1
