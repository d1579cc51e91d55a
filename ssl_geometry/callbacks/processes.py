"""A process that has died ends the others, even where they wait for it inside a CUDA kernel.

Under NCCL the host waits for a collective that will never end, and no Python of the main thread runs any more; torch's
watchdog looks at the collective's time limit alone (30 minutes from Lightning). So every process holds a connection to
the first one, over which nothing is sent, and a thread that reads it. The kernel closes the connection when the process
ends, however it does; where the whole node is gone, keep-alive packets find out. The kernel also answers those, and not
the process: one that measures for an hour, is stopped by a debugger or sleeps with its laptop is not taken for dead.
"""

import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import Any, cast

import lightning as L

logger = logging.getLogger(__name__)

GRACE_SECONDS = 15
"""How long the main thread has to end by itself, which leaves less half done."""
CONNECT_SECONDS = 60
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A node that does not answer is given up after 10 + 4 x 5 seconds."""
TOKEN_BYTES = 16
MESSAGE = struct.Struct("!BI")


class Status(IntEnum):
    """How a process ended, and which."""

    OVER = 0
    """Finished, or stopped as agreed."""
    FAILED = 1
    """Ended with an error, which it prints itself; the other processes may have the same."""
    DIED = 2
    """Ended silently: killed, crashed, or its node is gone."""


class WatchProcesses(L.Callback):
    """Ends this process soon after another one of the run has died.

    Args:
        report: called in a thread when a process was lost, with a message such as "process 3 of 8 has ended"; reports
            it to the user and to SLURM, and returns this process's exit code.
        grace_seconds: time for the main thread to end by itself.
    """

    def __init__(self, report: Callable[[str], int], grace_seconds: float = GRACE_SECONDS) -> None:
        self.report = report
        self.grace_seconds = grace_seconds
        self._rank, self._processes = 0, 1
        self._connections: dict[int, socket.socket] = {}
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._code: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Connect the processes, once; this replaces Lightning's own observer, which kills without a message."""
        if trainer.world_size == 1 or self._connections:
            return
        problem = "another one could not connect"
        self._rank, self._processes = trainer.global_rank, trainer.world_size
        server = _server() if self._rank == 0 else None
        offer: Any = (server.getsockname()[1], secrets.token_bytes(TOKEN_BYTES)) if server else None
        port, token = trainer.strategy.broadcast(offer)
        try:
            connections = (
                _accepted(server, token, trainer.world_size - 1) if server else _connected(port, token, self._rank)
            )
        except OSError as error:
            problem, connections = str(error), {}
        if not trainer.strategy.reduce_boolean_decision(bool(connections), all=True):
            logger.warning(f"the processes do not watch each other ({problem}): where one dies, others may hang")
            return
        self._connections = connections
        for connection in connections.values():
            _keep_alive(connection)
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":
                thread._child_processes = []  # type: ignore[attr-defined]
        threading.Thread(target=self._watch, name="watch-processes", daemon=True).start()

    def stop(self, status: Status) -> int | None:
        """The main thread ends: the others learn how, and no process is missed any more.

        Returns:
            The exit code, where the loss of a process has been reported already.
        """
        with self._lock:
            self._ending.set()
            self._send(status, self._rank)
            return self._code

    def _send(self, status: Status, rank: int) -> None:
        """To the first process, or from it to all, how a process has ended."""
        for connection in self._connections.values():
            with suppress(OSError):  # of the one that has ended
                connection.sendall(MESSAGE.pack(status, rank))

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    status, rank = _received(key.fileobj) or (Status.DIED, key.data)
                    if status != Status.OVER:
                        self._lost(status, rank)
                        return

    def _lost(self, status: Status, rank: int) -> None:
        if self._rank == 0:
            self._send(status, rank)
        if status == Status.FAILED and self._ending.wait(self.grace_seconds):
            return
        with self._lock:
            if self._ending.is_set():
                return
            self._code = self.report(f"process {rank} of {self._processes} has ended")
        if not self._ending.wait(self.grace_seconds):  # the main thread waits for what will not come
            os._exit(self._code)


def _server() -> socket.socket:
    """A socket that listens on a free port, on all addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accepted(server: socket.socket, token: bytes, count: int) -> dict[int, socket.socket]:
    """The connections of the other processes, all within one time limit; foreign connections are refused."""
    found: dict[int, socket.socket] = {}
    received: dict[socket.socket, bytes] = {}
    end, size = time.monotonic() + CONNECT_SECONDS, len(token) + MESSAGE.size
    with server, selectors.DefaultSelector() as selector:
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        while len(found) < count:
            ready = selector.select(max(end - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"{len(found)} of {count} have connected within {CONNECT_SECONDS} s")
            for key, _ in ready:
                if key.fileobj is server:
                    with suppress(OSError):  # of one that has gone again
                        connection, _ = server.accept()
                        selector.register(connection, selectors.EVENT_READ)
                        received[connection] = b""
                    continue
                connection, more = cast(socket.socket, key.fileobj), b""
                with suppress(OSError):
                    more = connection.recv(size - len(received[connection]))
                received[connection] += more
                if more and len(received[connection]) < size:
                    continue
                selector.unregister(connection)
                words = received.pop(connection)
                if len(words) == size and words.startswith(token):
                    found[MESSAGE.unpack(words[len(token) :])[1]] = connection
                else:
                    connection.close()
    for foreign in received:
        foreign.close()
    return found


def _connected(port: int, token: bytes, rank: int) -> dict[int, socket.socket]:
    """The connection to the first process, at the address where all have met."""
    connection = socket.create_connection((os.environ.get("MASTER_ADDR", "localhost"), port), CONNECT_SECONDS)
    connection.sendall(token + MESSAGE.pack(Status.OVER, rank))
    return {0: connection}


def _received(connection: Any) -> tuple[Status, int] | None:
    """A message; None where the connection is closed."""
    try:
        status, rank = MESSAGE.unpack(_exactly(connection, MESSAGE.size))
    except (OSError, struct.error):
        return None
    return Status(status), rank


def _exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size and (more := connection.recv(size - len(received))):
        received += more
    return received


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # macOS names them otherwise
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _OPEN.add(connection)


def _close_in_child() -> None:
    """Data workers are forked, and would hold the connections open after their parent's death."""
    for connection in list(_OPEN):
        connection.close()


_OPEN: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_close_in_child)
