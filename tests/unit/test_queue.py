"""The queue is a deque of the last rows, all of it in the checkpoint."""

from collections import deque

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geometry.methods.parts.queue import Queue
from tests.fake_cuda import FakeCuda


def in_order(queue: Queue) -> list[list[float]]:
    """Its rows from the oldest to the newest."""
    rows: list[list[float]] = queue.rows.roll(-int(queue.position), 0).tolist()
    return rows


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 7), batches=st.lists(st.integers(0, 17), max_size=6))
def test_it_holds_what_a_deque_holds(length: int, batches: list[int]) -> None:
    queue = Queue(length, width=2)
    assert queue.rows.shape == (length, 2)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(length))
    expected = deque(queue.rows.tolist(), maxlen=length)
    first = 0
    for batch in batches:
        rows = torch.arange(first, first + 2 * batch, dtype=torch.float32).view(batch, 2)
        first += 2 * batch
        queue.push(rows)
        expected.extend(rows.tolist())
        assert in_order(queue) == list(expected)
        assert 0 <= queue.position < length


def test_a_checkpoint_continues_it() -> None:
    queue, resumed = Queue(5, 1), Queue(5, 1)
    queue.push(torch.ones(3, 1))
    resumed.load_state_dict(queue.state_dict())
    for each in (queue, resumed):
        each.push(torch.arange(4.0).view(4, 1))
    assert in_order(resumed) == in_order(queue) == [[1], [0], [1], [2], [3]]
    assert queue.state_dict().keys() == {"rows", "position"}


def test_rows_come_without_their_gradient_and_in_its_precision() -> None:
    queue = Queue(4, 2)
    queue.push(torch.ones(2, 2, dtype=torch.float64, requires_grad=True))
    assert not queue.rows.requires_grad
    assert queue.rows.dtype == torch.float32


def test_it_waits_for_nothing() -> None:
    with FakeCuda() as gpu:
        queue = Queue(5, 2).to("cuda")
        with gpu.scope("push"):
            queue.push(torch.ones(3, 2, device="cuda"))
    assert not gpu.faults, gpu.report()
    assert not [note for note in gpu.waits if note.scope == "push"], gpu.report()
