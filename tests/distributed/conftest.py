"""Process groups that live as long as the test session: starting them once keeps the tests fast."""

import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.processes import PROCESSES

Ranks = Callable[..., list[Any]]


def _serve(rank: int, world_size: int, store: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while (task := inbox.get()) is not None:
        call, function, args = task
        try:
            outbox.put((call, rank, function(rank, world_size, *args), None))
        except Exception:
            outbox.put((call, rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """``world_size`` processes joined by gloo on the CPU."""

    def __init__(self, world_size: int) -> None:
        self.calls = 0
        store = str(Path(tempfile.mkdtemp()) / "store")
        self.outbox = PROCESSES.Queue()
        self.inboxes = [PROCESSES.Queue() for _ in range(world_size)]
        self.processes = [
            PROCESSES.Process(target=_serve, args=(rank, world_size, store, inbox, self.outbox), daemon=True)
            for rank, inbox in enumerate(self.inboxes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``function(rank, world_size, *args)`` on every rank; the results in the order of ranks."""
        self.calls += 1
        for inbox in self.inboxes:
            inbox.put((self.calls, function, args))
        results: dict[int, Any] = {}
        while len(results) < len(self.processes):
            call, rank, result, error = self.outbox.get(timeout=600)  # a guard against hangs alone
            if call != self.calls:
                continue  # of a call that failed on another rank
            if error:
                pytest.fail(f"rank {rank}:\n{error}")
            results[rank] = result
        return [results[rank] for rank in range(len(self.processes))]

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(timeout=10)
            process.kill()


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
    started: dict[int, Pool] = {}
    yield started
    for pool in started.values():
        pool.close()


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest, pools: dict[int, Pool]) -> Ranks:
    """Run a function on 2 and on 3 processes."""
    if request.param not in pools:
        pools[request.param] = Pool(request.param)
    return pools[request.param]
