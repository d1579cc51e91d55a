"""A bad loss stops training, and the host never waits for the device to learn of it; before a save it does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_geometry.callbacks import StopOnNaN
from ssl_geometry.errors import UserError
from tests.fake_cuda import FakeCuda


def trainer(world_size: int = 1) -> Any:
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    return SimpleNamespace(
        world_size=world_size,
        strategy=strategy,
        log_every_n_steps=2,
        checkpoint_callback=None,
        current_epoch=0,
        global_step=7,
    )


class Module(nn.Module):
    """What a LightningModule is to the callback."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        layers = [nn.Linear(3, 3, bias=number % 2 == 0) for number in range(30)]
        self.layers = nn.ModuleList([*layers, nn.Linear(2, 2).double(), nn.Linear(2, 2).half()])


def train(callback: StopOnNaN, losses: list[Tensor]) -> int:
    """Take steps until it stops; how many there were."""
    module = Module(str(losses[0].device))
    callback.on_train_start(trainer(), module)  # type: ignore[arg-type]
    for number, loss in enumerate(losses):
        try:
            callback.on_train_batch_end(trainer(), module, {"loss": loss}, None, number)  # type: ignore[arg-type]
        except UserError:
            return number + 1
    return 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_it_stops_at_a_logging_step(bad: float) -> None:
    assert train(StopOnNaN(), list(torch.tensor([1.0, 2.0, bad, 1.0, 1.0]))) == 4
    assert train(StopOnNaN(), list(torch.tensor([1.0, bad]))) == 2
    assert train(StopOnNaN(), list(torch.tensor([1.0, 2.0, bad]))) == 0


def test_on_a_device_it_reads_what_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked at any step; the device is two steps behind here, and never waited for."""
    asked: list[int] = []
    event = SimpleNamespace(record=lambda: asked.append(0), query=lambda: asked.append(1) or sum(asked) > 5)
    with FakeCuda() as gpu:
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)
        losses = [torch.full((), value, device="cuda") for value in (1.0, torch.nan, *[1.0] * 8)]
        assert train(StopOnNaN(), losses) == 6
        assert asked.count(0) == 3, "sent off at logging steps alone"
        assert not gpu.waits, gpu.report()
        assert not gpu.faults, gpu.report()


def test_of_several_processes_none_stops_by_itself() -> None:
    callback = StopOnNaN()
    callback.on_train_start(trainer(), Module("cpu"))  # type: ignore[arg-type]
    for number in range(2):
        callback.on_train_batch_end(trainer(2), None, torch.tensor(torch.nan), None, number)  # type: ignore[arg-type]
    assert callback.seen


@pytest.mark.parametrize("layer", [0, 17, 30, 31])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_weight_that_is_no_number_is_saved(bad: float, layer: int) -> None:
    callback, module = StopOnNaN(), Module("cpu")
    callback.on_train_start(trainer(), module)  # type: ignore[arg-type]
    callback.on_save_checkpoint(trainer(), module, {})  # type: ignore[arg-type]
    with torch.no_grad():
        module.layers[layer].weight[1, 0] = bad  # type: ignore[union-attr,operator]
    with pytest.raises(UserError, match="NaN or infinite"):
        callback.on_save_checkpoint(trainer(), module, {})  # type: ignore[arg-type]


def test_a_bad_loss_is_known_before_a_save_whatever_has_arrived() -> None:
    callback, module = StopOnNaN(), Module("cpu")
    callback.on_train_start(trainer(), module)  # type: ignore[arg-type]
    callback.on_train_batch_end(trainer(), None, torch.tensor(torch.nan), None, 0)  # type: ignore[arg-type]
    assert not callback.seen
    with pytest.raises(UserError, match="NaN or infinite"):
        callback.on_save_checkpoint(trainer(), module, {})  # type: ignore[arg-type]


def test_before_a_save_the_host_waits_once() -> None:
    with FakeCuda() as gpu:
        callback, module = StopOnNaN(), Module("cuda").to("cuda")
        callback.on_train_start(trainer(), module)  # type: ignore[arg-type]
        gpu.waits.clear()
        callback.on_save_checkpoint(trainer(), module, {})  # type: ignore[arg-type]
        assert [note.what for note in gpu.waits] == ["_local_scalar_dense"], gpu.report()
