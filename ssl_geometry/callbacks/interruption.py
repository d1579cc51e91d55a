"""Training is saved and stops on SIGUSR1 and SIGTERM, after the same step in all processes."""

import os
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from ssl_geometry.callbacks.checkpoints import LastCheckpoint
from ssl_geometry.callbacks.finite import StopOnNaN
from ssl_geometry.data.loader import Loader
from ssl_geometry.errors import ExitCode, Interrupted, UserError, first_line
from ssl_geometry.signals import SIGNALS


class LostProcess(Exception):
    """Another process of the run has ended or cannot be reached."""


class StopOnSignal(L.Callback):
    """Watches for SIGUSR1 (SLURM's warning before the time limit) and SIGTERM (a preemption, a cancelled job).

    The handler only stores the signal. After each step the processes exchange their state (a signal, a non-finite loss;
    on the first, an overdue checkpoint) in one reduction of a few numbers over a separate CPU group, which is read one
    step later: neither the host nor the device waits, and all processes save or stop after the same step. The reduction
    also fails within seconds if a process has died, so that the others do not hang. Lightning's own exchange, a
    broadcast that the host waits for in every step, is switched off.

    Checkpoints are saved before the next step begins, when the values of the last step are logged, so that no
    checkpoint is ahead of the records.

    Args:
        last: the checkpoint to save after a signal, or when it is overdue.
        losses: detects non-finite losses; its result is shared, so that all processes stop.
    """

    def __init__(self, last: LastCheckpoint, losses: StopOnNaN | None = None) -> None:
        self.last = last
        self.losses = losses
        self.signal = 0
        self.stopped: Interrupted | None = None
        """The reason to report if the run ended with another error after a signal."""
        self._process = os.getpid()
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self._group: Any = None
        self._pending: tuple[Any, Tensor] | None = None
        self._signalled = self._stopping = 0
        self._overdue = False
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            for number in SIGNALS:
                signal.signal(number, self._remember)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what came while the command started comes now

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # data workers inherit the handler: SLURM signals them too, and they go on
            self.signal = number

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep Lightning from handling the signals: its handler waits for the other processes within a step."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.world_size > 1 and self._group is None:
            try:
                self._group = dist.new_group(backend="gloo")
            except RuntimeError as error:
                raise UserError(
                    f"the processes cannot reach each other over gloo ({first_line(error)}): name the network "
                    "interface of the nodes in the variable GLOO_SOCKET_IFNAME"
                ) from error

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check whether to stop or save after this step; accumulated gradients do not count as a step."""
        signalled, bad, save = self._agreed()
        if bad and self.losses is not None:
            self.losses.stop(trainer)
        self._signalled = self._signalled or signalled
        self._overdue = self._overdue or save == self.last.saves + 1  # else it was asked for before the last save
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stopping = self._signalled
            self.last.wanted, self._overdue = self._overdue or self._signalled > 0, False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save, then stop or go on; where the step was an epoch's last, that was saved when it had been measured."""
        if self.last.wanted and batch_idx:
            with _without_the_batch(trainer):
                self.last.save(trainer)
        self._stop_if_signalled()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Treat a DataLoader worker that died after a signal like the signal; save if this is between two steps."""
        signalled = self._stopping or self.signal
        if not signalled:
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, lambda *_: None)  # torch's raises wherever it finds a dead worker, here too
        if not data_worker_died(exception):
            return
        self.stopped = _stop(signalled)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        waiting = any(frame.name == Loader._batches.__name__ for frame in traceback.extract_tb(exception.__traceback__))
        between = trainer.training and progress.current.completed == progress.current.ready > 0
        stepped = progress.current.ready % trainer.accumulate_grad_batches == 0 and not progress.is_last_batch
        if waiting and between and stepped and (self._stopping or trainer.world_size == 1):
            self.last.save(trainer)

    def on_test_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop; training is over and its last checkpoint is saved."""
        self._stopping = self._stopping or self._agreed()[0]
        self._stop_if_signalled()

    def _agreed(self) -> list[int]:
        """What some process knew before the last step: a signal, a bad loss (1), which save is overdue; 0 for none."""
        overdue = (self._group is None or dist.get_rank(self._group) == 0) and self.last.overdue()
        known = [self.signal, int(self.losses is not None and self.losses.seen), overdue * (self.last.saves + 1)]
        if self._group is None:
            return known
        earlier, mine = self._pending, torch.tensor(known)
        try:
            self._pending = dist.all_reduce(mine, dist.ReduceOp.MAX, self._group, async_op=True), mine
            if earlier is None:
                return [0] * len(known)
            earlier[0].wait()
        except RuntimeError as error:
            raise LostProcess from error
        return earlier[1].tolist()

    def _stop_if_signalled(self) -> None:
        if self._stopping:
            raise _stop(self._stopping)


@contextmanager
def _without_the_batch(trainer: L.Trainer) -> Iterator[None]:
    """Everything is counted as before the batch that is there was fetched: it has not been trained on."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    is_last_batch, progress.is_last_batch = progress.is_last_batch, False
    for counted in (progress.total, progress.current):
        counted.ready -= 1
    with trainer.train_dataloader.without_the_last():  # type: ignore[union-attr]
        yield
    progress.is_last_batch = is_last_batch
    for counted in (progress.total, progress.current):
        counted.ready += 1


def _stop(number: int) -> Interrupted:
    name = signal.Signals(number).name
    return Interrupted(f"stopped by {name}", ExitCode.RESUMABLE if number == signal.SIGUSR1 else ExitCode.TERMINATED)


def data_worker_died(error: BaseException) -> bool:
    """Whether an error reports that a DataLoader worker died."""
    frames = traceback.extract_tb(error.__traceback__)
    reading = isinstance(error, ConnectionError) and any("torch/utils/data" in frame.filename for frame in frames)
    return reading or bool(re.search("DataLoader worker|Pin memory thread", str(error)))
