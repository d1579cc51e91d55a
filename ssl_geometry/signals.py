"""SIGUSR1 and SIGTERM are for the processes that train; those that read images for them do not hear them."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process

from ssl_geometry.errors import ExitCode

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


@contextmanager
def block_signals() -> Iterator[None]:
    """Keep the signals waiting in the meantime; processes that are started here never get them.

    SLURM signals all processes of a job, but those that read images are needed until the step is finished.

    Example:
        >>> with block_signals():
        ...     signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        True
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_foreign_signals(worker: int) -> None:
    """For the start of a data worker: SIGTERM ends it if its parent sends it, as torch does to what is left at the end.

    torch's own handler lets any SIGTERM end the worker, and so the run before it has saved. A worker whose parent was
    killed ends within seconds.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = parent_process()
    assert parent is not None, "called in a worker"

    def listen() -> None:
        while parent.is_alive():  # torch looks after the process that forked the worker, which may be another
            received = signal.sigtimedwait(SIGNALS, 2)
            if received and received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
                break
        os._exit(ExitCode.DONE)

    threading.Thread(target=listen, daemon=True).start()
