"""Each method trains on several processes as on one: losses, gradients, and all that a step leaves behind."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ssl_geometry.methods.parts.queue import Queue
from tests.distributed.conftest import Ranks
from tests.methods import METHODS, build, by_hand, images, synchronised

STEPS = 3


def trained(rank: int, world_size: int, name: str) -> dict[str, Tensor]:
    """Losses, gradients of the first step, and the state after some steps of gradient descent, as DDP takes them."""
    method = synchronised(by_hand(build(name).double(), STEPS), world_size)
    batch = images(12)
    mine = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    share = {key: value[mine] for key, value in batch.items()}
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        loss = method.training_step(share, step)  # type: ignore[arg-type]
        loss.backward()
        method.on_after_backward()
        value = loss.detach().clone()
        parameters = {name: p for name, p in method.named_parameters() if p.requires_grad}
        for tensor in (value, *(p.grad for p in parameters.values() if p.grad is not None)):
            if world_size > 1:
                dist.all_reduce(tensor)
                tensor /= world_size
        found[f"loss {step}"] = value
        if step == 0:
            found |= {f"gradient {name}": p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        with torch.no_grad():
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        method.zero_grad()
        method.trainer.global_step = step + 1  # type: ignore[misc]
        method.after_step((step + 1) / STEPS)
    return found | {f"state {name}": value.double() for name, value in method.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
def test_processes_train_as_one(ranks: Ranks, name: str) -> None:
    alone = trained(0, 1, name)
    assert all(value.isfinite().all() for value in alone.values())
    assert any(key.startswith("gradient") and value.abs().max() > 1e-6 for key, value in alone.items())
    for found in ranks(trained, name):
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}"
            )


def queue_under_ddp(rank: int, world_size: int) -> dict[str, Tensor]:
    """A queue, which each process draws on its own, and how many bytes DDP sends before each forward."""
    method = by_hand(build("MoCoV2"), STEPS)
    torch.manual_seed(rank)
    method.queue = Queue(1000, 8)
    method.configure_model()
    ddp = DistributedDataParallel(synchronised(method, world_size))
    method.on_fit_start()
    return {"rows": method.queue.rows, "sent": torch.tensor(sum(buffer.nbytes for buffer in ddp.modules_buffers))}


def test_processes_begin_with_one_queue_and_send_it_no_more(ranks: Ranks) -> None:
    first, *others = ranks(queue_under_ddp)
    for each in (first, *others):
        assert each["sent"] == 0
        assert torch.equal(each["rows"], first["rows"])
