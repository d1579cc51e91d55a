"""Processes that watch each other: silent where all end well or alike, quick where one dies."""

import ctypes
import inspect
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from lightning.fabric.strategies.launchers import subprocess_script

from ssl_geometry.callbacks import Status, WatchProcesses, processes
from tests.processes import HANG_SECONDS, PROCESSES

REPORTED = 75


def _wait() -> None:
    """As for a kernel that never ends: outside of Python, deaf to signals."""
    while True:
        ctypes.CDLL(None).pause()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_and_leave_a_child() -> None:
    """A data worker holds what it has inherited."""
    if os.fork():
        _die()
    _wait()


ENDS: dict[str, Callable[[WatchProcesses], Any]] = {
    "over": lambda watch: watch.stop(Status.OVER),
    "fails": lambda watch: (watch.stop(Status.FAILED), sys.exit(2)),
    "waits": lambda watch: _wait(),
    "dies": lambda watch: _die(),
    "dies, a child is left": lambda watch: _die_and_leave_a_child(),
    "dies once it is over": lambda watch: (watch.stop(Status.OVER), _die()),
}


def _live(folder: Path, rank: int, world_size: int, end: str, grace: float, unreachable: bool) -> None:
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=5))

    def broadcast(value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def decide(decision: bool, all: bool) -> bool:
        decisions: list[Any] = [None] * world_size
        dist.all_gather_object(decisions, decision)
        return min(decisions)

    def report(words: str) -> int:
        (folder / f"reported.{rank}").write_text(words)
        return REPORTED

    if unreachable:
        processes.CONNECT_SECONDS = 1
        if rank == 1:
            socket.create_connection = _refuse  # type: ignore[assignment]
    logging.getLogger("ssl_geometry").addHandler(logging.FileHandler(folder / f"log.{rank}"))
    watch = WatchProcesses(report, grace)
    strategy = SimpleNamespace(broadcast=broadcast, reduce_boolean_decision=decide)
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)
    watch.setup(trainer, None, "fit")  # type: ignore[arg-type]
    watch.setup(trainer, None, "test")  # type: ignore[arg-type]
    for connection in watch._connections.values():
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, interval, count = (
            connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in processes.KEEP_ALIVE
        )
        assert idle + interval * count + processes.GRACE_SECONDS < 60
    (folder / f"ready.{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    ENDS[end](watch)


def _refuse(*args: Any) -> socket.socket:
    raise ConnectionRefusedError("no way through")


def live(
    folder: Path, ends: Sequence[str], grace: float, meanwhile: Callable[[list[Any]], None] | None = None, **more: Any
) -> tuple[list[int | None], dict[int, str]]:
    """Exit codes of all processes, and what those said that reported one."""
    more = {"unreachable": False} | more
    started = [
        PROCESSES.Process(target=_live, args=(folder, rank, len(ends), end, grace, more["unreachable"]))
        for rank, end in enumerate(ends)
    ]
    for process in started:
        process.start()
    try:
        until(lambda: len(list(folder.glob("ready.*"))) == len(ends))
        if meanwhile:
            meanwhile(started)
        (folder / "go").touch()
        if not more["unreachable"]:
            until(lambda: all(process.exitcode is not None for process in started))
        codes = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()
    return codes, {int(path.suffix[1:]): path.read_text() for path in folder.glob("reported.*")}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("ends", "codes"),
    [
        (["over", "over", "over"], [0, 0, 0]),
        (["over", "over", "dies once it is over"], [0, 0, -9]),
        (["dies once it is over", "over", "over"], [-9, 0, 0]),
        (["fails", "fails", "fails"], [2, 2, 2]),
    ],
    ids=lambda value: ", ".join(map(str, value)),
)
def test_what_all_know_is_not_reported(tmp_path: Path, ends: list[str], codes: list[int]) -> None:
    assert live(tmp_path, ends, grace=60) == (codes, {})


@pytest.mark.parametrize(
    ("ends", "lost"),
    [
        (["waits", "dies", "waits"], 1),
        (["dies", "waits", "waits"], 0),
        (["waits", "waits", "dies, a child is left"], 2),
        (["waits", "fails", "waits"], 1),
        (["fails", "waits", "waits"], 0),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else "",
)
def test_a_process_that_is_lost_ends_those_that_wait_for_it(tmp_path: Path, ends: list[str], lost: int) -> None:
    codes, reported = live(tmp_path, ends, grace=0.1)
    assert reported == {rank: f"process {lost} of 3 has ended" for rank in range(3) if rank != lost}
    assert codes == [(2 if ends[lost] == "fails" else -9) if rank == lost else REPORTED for rank in range(3)]


def test_a_process_that_is_stopped_for_a_while_is_not_dead(tmp_path: Path) -> None:
    """As by a debugger: the kernel holds its connection."""

    def stop_one(started: list[Any]) -> None:
        os.kill(started[1].pid, signal.SIGSTOP)
        until(lambda: "State:\tT" in Path(f"/proc/{started[1].pid}/status").read_text())
        (tmp_path / "go").touch()
        until(lambda: started[0].exitcode is not None and started[2].exitcode is not None)
        os.kill(started[1].pid, signal.SIGCONT)

    assert live(tmp_path, ["over", "over", "over"], 0.1, stop_one) == ([0, 0, 0], {})


def test_where_they_cannot_connect_they_run_unwatched(tmp_path: Path) -> None:
    live(tmp_path, ["over", "over"], 0.1, unreachable=True)
    assert not list(tmp_path.glob("reported.*"))
    for rank in range(2):
        assert "the processes do not watch each other" in (tmp_path / f"log.{rank}").read_text()


def test_what_is_replaced_in_lightning_is_there() -> None:
    """Its observer kills all processes within seconds, without a word; it is known by a private name."""
    source = inspect.getsource(subprocess_script._ChildProcessObserver)
    assert 'name="child-process-observer"' in source
    observer = subprocess_script._ChildProcessObserver(os.getpid(), [])
    assert observer._child_processes == []
    assert observer._run(), "without children it is done"


def test_strangers_that_say_nothing_keep_no_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    server, token = processes._server(), b"t" * processes.TOKEN_BYTES
    port = server.getsockname()[1]
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    strangers[0].sendall(b"t")
    strangers[1].sendall(b"x" * 100)
    members = [processes._connected(port, token, rank)[0] for rank in (3, 1, 2)]
    found = processes._accepted(server, token, 3)
    assert sorted(found) == [1, 2, 3]
    assert [found[rank].getpeername()[1] for rank in (3, 1, 2)] == [member.getsockname()[1] for member in members]
    for stranger in strangers:
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b"", "turned away"
    for connection in (*strangers, *members, *found.values()):
        connection.close()


def test_all_have_one_time_limit_to_connect_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "CONNECT_SECONDS", 0.05)
    server, token = processes._server(), b"t" * processes.TOKEN_BYTES
    silent = [socket.create_connection(("127.0.0.1", server.getsockname()[1])) for _ in range(2)]
    with pytest.raises(TimeoutError, match=r"0 of 2 have connected within 0.05 s"):
        processes._accepted(server, token, 2)
    for connection in silent:
        connection.close()
