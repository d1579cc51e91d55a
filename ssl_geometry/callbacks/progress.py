"""One line that shows how training is going: images/s, time left, and the share of time spent measuring."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import Progress, TextColumn

from ssl_geometry.callbacks.monitor import monitors
from ssl_geometry.progress import progress_bar


class FitProgress(ProgressBar):
    """A progress bar over the whole training; without a terminal, one line per epoch.

    Args:
        refresh_seconds: least time between two updates; reading the loss waits for the device, so it is not done in
            every step.
    """

    def __init__(self, refresh_seconds: float = 0.5) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.images_per_second: float | None = None
        self._enabled = True
        self._console = Console(stderr=True)
        self._progress: Progress | None = None

    def disable(self) -> None:
        """Lightning calls this on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite of :meth:`disable`."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; steps done before a resume are not counted into the rate."""
        self._started = self._refreshed = time.perf_counter()
        self._first_step = trainer.global_step
        self._done = 0
        if self._enabled and self._console.is_terminal:
            self._progress = progress_bar(TextColumn("{task.fields[figures]}"), console=self._console)
            steps = int(trainer.estimated_stepping_batches)
            self._task = self._progress.add_task("epoch 1", total=steps, completed=trainer.global_step, figures="")
            self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and show now and then."""
        self._done += len(batch["index"]) * trainer.world_size if isinstance(batch, dict) and "index" in batch else 0
        now = time.perf_counter()
        if self._progress is not None and now - self._refreshed > self.refresh_seconds:
            self._refreshed = now
            self._show(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the epoch's last state."""
        if self._progress is not None:
            self._show(trainer)
        elif self._enabled:
            elapsed = time.perf_counter() - self._started
            steps_done = max(trainer.global_step - self._first_step, 1)
            left = elapsed / steps_done * (trainer.estimated_stepping_batches - trainer.global_step)
            self._console.print(
                f"{_epoch(trainer)}  {self._figures(trainer)}  {_clock(left)} left",
                highlight=False,
                soft_wrap=True,
            )

    def _show(self, trainer: L.Trainer) -> None:
        assert self._progress is not None
        self._progress.update(
            self._task,
            completed=trainer.global_step,
            description=_epoch(trainer),
            figures=self._figures(trainer),
        )

    def _times(self, trainer: L.Trainer) -> tuple[float, float]:
        """Seconds since the start, and those of them that measurements took."""
        return time.perf_counter() - self._started, sum(monitor.seconds for monitor in monitors(trainer))

    def _rate(self, trainer: L.Trainer) -> float:
        elapsed, measuring = self._times(trainer)
        return self._done / max(elapsed - measuring, 1e-9)

    def _figures(self, trainer: L.Trainer) -> str:
        elapsed, measuring = self._times(trainer)
        shown = [f"{self._rate(trainer):,.0f} images/s"]
        if measuring:
            shown.append(f"measuring {measuring / elapsed:.0%}")
        for name, value in trainer.callback_metrics.items():
            validation = name.partition("_")[0] in ("val/knn", "val/acc")  # behind the _: --model.eval_precision
            if validation or name in ("train/loss", "train/acc"):
                shown.append(f"{name} {float(value):.3f}")
        return "  ".join(shown)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last state on the screen, and the rate for the summary."""
        if self._done:
            self.images_per_second = self._rate(trainer)
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Free the terminal before an error is printed."""
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _epoch(trainer: L.Trainer) -> str:
    total = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{total}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
