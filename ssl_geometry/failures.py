"""What ends a run before its time: reported in one line, and whether the run is started again."""

import errno
import os
import re
import sys
import threading
import time
import traceback
from contextlib import suppress

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ssl_geometry.callbacks import LostProcess, data_worker_died
from ssl_geometry.devices import less_memory, out_of_memory
from ssl_geometry.errors import ExitCode, Interrupted, UserError
from ssl_geometry.runs.networks import shortened
from ssl_geometry.runs.run import PARENT_VARIABLE, Run, is_first_process
from ssl_geometry.runs.slurm import requeue, this_task

LOST = r"Connection (closed|reset)|Broken pipe|NCCL.*(remote process|closed)|Timed out waiting"
"""In torch's messages about lost processes."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Faults of the disk, whose error may name no file."""
GRACE_SECONDS = 20
NEWLINE = "\n"


def explain(error: BaseException, run: Run, trainer: L.Trainer, checkpoint_at_start: int | None) -> BaseException:
    """Turn an error of training into a message for the user, and an exit code for SLURM.

    Args:
        error: what stopped training.
        run: the run.
        trainer: its trainer.
        checkpoint_at_start: time of the last checkpoint when this process began, in nanoseconds; None for none.

    Returns:
        A :class:`UserError` or :class:`Interrupted` with one line; the error itself if it is unexpected.
    """
    words = str(error)
    if isinstance(error, Interrupted):
        return _interrupted(error, run)
    if isinstance(error, SystemExit | KeyboardInterrupt):  # Lightning makes the one of the other
        return Interrupted(_how_to_continue("interrupted", run) if is_first_process() else "", ExitCode.INTERRUPTED)
    if isinstance(error, LostProcess):
        return _lost(error.__cause__ or error, run, checkpoint_at_start)
    if isinstance(error, UserError):
        return error
    if isinstance(error, ValueError) and _is_of_numbers(error):
        return UserError(words)
    if isinstance(error, MisconfigurationException):  # what Lightning finds wrong with options and modules
        return UserError(" ".join(words.split()))
    if data_worker_died(error):
        reason = words.partition(NEWLINE)[0].rstrip(" .")
        message = f"a DataLoader worker died ({reason}): if memory ran out, lower --data.num_workers"
        return UserError(_how_to_continue(message, run))
    if full := out_of_memory(error):
        return UserError(
            f"out of memory ({full}) {less_memory(error, trainer, f'continue with --resume {run.directory}')}"
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        ours = error.errno in DISK or str(error.filename).startswith(str(run.directory))
        return UserError(_how_to_continue(f"{run.directory}: {error}" if ours else words, run))
    if "Error(s) in loading state_dict" in words:
        reason = shortened(words.splitlines()[1].strip())
        return UserError(f"--resume {run.resumed_from}: a checkpoint of another architecture ({reason})")
    if trainer.world_size > 1 and re.search(LOST, words):
        return _lost(error, run, checkpoint_at_start)
    return error


def _is_of_numbers(error: BaseException) -> bool:
    """Whether a metric raised it, such as one of an evaluation: of features that are not finite."""
    modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "".join(modules[-1:]).startswith(("ssl_geometry.geometry.", "ssl_geometry.metrics."))


def _lost(error: BaseException, run: Run, checkpoint_at_start: int | None) -> Exception:
    """Run the job again where a process ended, a dead node perhaps; not where it does so before any checkpoint."""
    reason = str(error).partition(NEWLINE)[0].rpartition("] ")[2]  # without torch's place in its source
    message = f"another process of this run has ended or cannot be reached (its own output may say why; {reason})"
    checkpoint = run.last_checkpoint
    if not checkpoint.exists() or checkpoint.stat().st_mtime_ns == checkpoint_at_start:
        return UserError(_how_to_continue(f"{message}; no checkpoint was written since the start", run))
    return _again(message, run)


def report_lost(process: str, run: Run, trainer: L.Trainer, checkpoint_at_start: int | None) -> int:
    """Report immediately, from a thread, that a process was lost: the main thread may be blocked.

    Returns:
        The exit code that follows.
    """
    explained = explain(LostProcess(process), run, trainer, checkpoint_at_start)
    with suppress(OSError):
        run.note(status="stopped")
    is_error = isinstance(explained, UserError)
    print(f"error: {explained}" if is_error else explained, file=sys.stderr, flush=True)
    return ExitCode.MISTAKE if is_error else getattr(explained, "code", ExitCode.FAULT)


def _interrupted(stop: Interrupted, run: Run) -> Interrupted:
    """The consequence of a signal; the first process reports and acts for all."""
    if not is_first_process():
        return Interrupted("", ExitCode.DONE)
    message = f"{stop}; the last checkpoint is {run.last_checkpoint}" if run.last_checkpoint.exists() else str(stop)
    return (
        _again(message, run)
        if stop.code == ExitCode.RESUMABLE
        else Interrupted(_how_to_continue(message, run), stop.code)
    )


def _again(message: str, run: Run) -> Interrupted:
    """Requeue the job in SLURM, once for all of its processes, or report how to continue."""
    task = this_task()
    if not task:
        return Interrupted(_how_to_continue(message, run), ExitCode.RESUMABLE)
    try:
        (run.directory / f".requeued-{task.job}-{task.restarts}").touch(exist_ok=False)
    except FileExistsError:
        return Interrupted(f"{message}; SLURM will run this job again", ExitCode.DONE)
    problem = requeue(task)
    if problem:
        return Interrupted(
            _how_to_continue(f"{message}; not put back into the queue ({problem})", run), ExitCode.RESUMABLE
        )
    return Interrupted(f"{message}; SLURM will run this job again", ExitCode.DONE)


def _how_to_continue(message: str, run: Run) -> str:
    return f"{message}; continue with --resume {run.directory}"


def end_with_parent() -> None:
    """End this process soon after its parent, even while it waits for processes that never start."""
    parent = int(os.environ.get(PARENT_VARIABLE, "0"))
    if not parent:  # srun and torchrun do this themselves
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(GRACE_SECONDS)  # training that has begun ends by itself, with more information
        print("error: the process that started this one has ended", file=sys.stderr)
        os._exit(ExitCode.MISTAKE)

    threading.Thread(target=watch, daemon=True).start()
