"""Commands in processes of their own, forked from a server that has imported everything: a start costs no import.

The server itself is forked from pytest once the tests are collected, which imported nearly all of it. What is forked is
a command like any other: it has its signals, its exit code and its children. Only its figures are blank; that they are
drawn is tested where a run is read.
"""

import faulthandler
import gc
import importlib
import logging
import multiprocessing as mp
import os
import select
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from ssl_geometry.callbacks import publishing

PROCESSES = mp.get_context("forkserver")
LOADED_LATE = [
    *["faiss.contrib.torch_utils", "lightly.models.modules.heads", "omegaconf", "pyarrow.dataset", "scipy.stats"],
    *["sklearn.datasets", "wandb.apis.public", "opentelemetry.exporter.otlp.proto.http.metric_exporter"],
]
HANG_SECONDS = 600
"""No process takes nearly as long: it hangs, and the test ends."""


def serve() -> None:
    """Fork the server from this process as it is now, in which no test has run yet and no thread of torch."""
    resource_tracker.ensure_running()  # is started as usual

    def fork(executable: str, args: Sequence[str], kept: Sequence[int]) -> int:
        process = os.fork()
        if process:
            return process
        try:
            _serve(*kept)
        finally:
            os._exit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multiprocessing.util.spawnv_passfds", fork)
        forkserver.ensure_running()


def _serve(listener: int, alive: int) -> None:
    """What is pytest's goes: its files and pipes, what it captures, its handlers."""
    faulthandler.disable()
    sys.stdin, sys.stdout, sys.stderr = (open(file, "rw"[file > 0], closefd=False) for file in range(3))  # noqa: SIM115
    for logger in (logging.root, *map(logging.getLogger, [*logging.root.manager.loggerDict])):
        logger.handlers = [kept for kept in logger.handlers if not type(kept).__module__.startswith("_pytest")]
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)  # Lightning's was made while pytest captured
    for file in (int(name) for name in os.listdir("/dev/fd")):
        if file > 2 and file not in (listener, alive):
            with suppress(OSError):
                os.close(file)
    select.select([listener, alive], [], [])  # many a session starts no process
    forkserver.main(listener, alive, LOADED_LATE)


@contextmanager
def undrawn() -> Iterator[None]:
    """Figures are blank: to draw them takes longer than to train a small network."""
    live_figures, savefig = publishing.live_figures, Figure.savefig
    blank = partial(Figure, figsize=(0.1, 0.1))

    def names_alone(*rows: Any) -> Any:
        return dict.fromkeys(live_figures(*rows), blank)

    def save_blank(figure: Figure, file: Any, **options: Any) -> None:
        savefig(blank(), file, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "live_figures", names_alone)
        patch.setattr(Figure, "savefig", save_blank)
        yield


def _run(
    args: Sequence[str],
    output: str,
    prepare: Callable[[], None] | None,
    environment: Mapping[str, str],
    command: str,
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    gc.freeze()  # to look for garbage among all that is imported takes a quarter of a short run, and copies it
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **environment}
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of data workers: as in a command, which is not forked from a server
    rank_zero_only.rank = _get_rank() or 0  # else as it was where Lightning was imported
    with undrawn():
        if prepare is not None:
            prepare()
        importlib.import_module(command).main(args)


def start(
    args: Sequence[str],
    output: Path,
    prepare: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
    command: str = "ssl_geometry.fit",
) -> Any:
    """Start a command.

    Args:
        args: its command line.
        output: file that takes what it prints.
        prepare: called in the process before the command.
        environment: variables of its own.
        command: module.

    Returns:
        The process.
    """
    process = PROCESSES.Process(target=_run, args=(args, str(output), prepare, environment or {}, command))
    process.start()
    return process


def start_ranks(
    count: int,
    args: Sequence[str],
    output: Path,
    prepare: Callable[[], None] | None = None,
    command: str = "ssl_geometry.fit",
) -> list[Any]:
    """Start all processes of a command on the CPU, as a cluster does, which launches them itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"NODE_RANK": "0", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    devices = ["--trainer.accelerator=cpu", f"--trainer.devices={count}"]
    if command != "ssl_geometry.fit":
        devices = ["--device=cpu", f"--devices={count}"]
    every = [{**common, "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [start([*args, *devices], output, prepare, environment, command) for environment in every]


def finish(process: Any) -> int:
    """Exit code; negative for the signal that ended it."""
    process.join(HANG_SECONDS)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the process hangs")
    return process.exitcode
