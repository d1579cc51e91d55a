"""Several processes give the numbers of one: losses and their gradients, metrics."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ssl_geometry.callbacks import LastCheckpoint, StopOnNaN, StopOnSignal
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.gram import gram_vector
from ssl_geometry.geometry.neighbors import merge, nearest
from ssl_geometry.methods import SimCLR, Supervised
from ssl_geometry.metrics import (
    AugmentationManifolds,
    ClassCKA,
    InvarianceCKA,
    InvarianceKNN,
    KNNAccuracy,
    LayerwiseCKA,
    LogisticProbe,
    MutualKNN,
    Neighborhoods,
    ProbeBank,
    RidgeProbe,
    Spectrum,
)
from tests.distributed.conftest import Ranks

LAYERS = ["a", "b", "c"]


def _answer(rank: int, world_size: int, first_fails: bool) -> str:
    if first_fails and rank == 0:
        raise ValueError("this one")
    if first_fails:
        time.sleep(0.3)
    return "first" if first_fails else "second"


def test_answers_of_a_failed_call_are_not_those_of_the_next(ranks: Ranks) -> None:
    with pytest.raises(pytest.fail.Exception, match="this one"):
        ranks(_answer, True)
    assert set(ranks(_answer, False)) == {"second"}


def activations() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64 * 5 + 17, 12, generator=generator)  # five batches and a short one: no multiple of the ranks
    return {"a": x, "b": x.tanh() + 0.2 * torch.randn(x.shape, generator=generator), "c": x[:, :3] ** 2}


def cka(rank: int, world_size: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The standard error, the metric, and the error once more: synchronising must leave the sums as they were."""
    metric = {
        "layers": LayerwiseCKA(LAYERS, ["c", "a"], blocks=4),
        "views": InvarianceCKA(LAYERS, blocks=4),
        "classes": ClassCKA(LAYERS, num_classes=3, blocks=4),
    }[kind]
    x = activations()
    others: dict[str, Any] = {
        "layers": x,
        "views": {name: value.relu() for name, value in x.items()},
        "classes": x["a"][:, :3].argmax(1),
    }
    for number, part in list(enumerate(torch.arange(337).split(64)))[rank::world_size]:
        vectors = {name: gram_vector(value[part]) for name, value in x.items()}
        other = others[kind]
        if isinstance(other, dict):
            metric.update(vectors, {name: gram_vector(value[part]) for name, value in other.items()}, first_gram=number)
        else:
            metric.update(vectors, other[part], first_gram=number)
    return metric.standard_error(), metric.compute(), metric.standard_error()


@pytest.mark.parametrize("kind", ["layers", "views", "classes"])
def test_cka(ranks: Ranks, kind: str) -> None:
    expected = cka(0, 1, kind)
    assert expected[0].isfinite().all()
    assert expected[0].max() > 1e-3
    for got in ranks(cka, kind):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def mutual_knn(rank: int, world_size: int, images: int) -> Tensor:
    x = activations()
    metric, views = MutualKNN(LAYERS, ["b", "c"], k=5), InvarianceKNN(LAYERS, k=5)
    for part in list(torch.randperm(images, generator=torch.Generator().manual_seed(3)).split(64))[rank::world_size]:
        batch = {name: value[part] for name, value in x.items()}
        metric.update(batch, index=part)
        views.update(batch, {name: value.relu() for name, value in batch.items()}, index=part)
    return torch.cat([metric.compute().flatten(), views.compute()])


@pytest.mark.parametrize("images", [337, 64], ids=["uneven", "one rank has all"])
def test_mutual_knn(ranks: Ranks, images: int) -> None:
    expected = mutual_knn(0, 1, images)
    for got in ranks(mutual_knn, images):
        assert torch.equal(got, expected)


def knn(rank: int, world_size: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    # Of few values: many are equally near, and the ranks hold them in another order than one process.
    bank, queries = (torch.randn(n, 3, generator=generator).round() + 5 for n in (101, 53))
    labels, truth = torch.randint(4, (101,), generator=generator), torch.randint(4, (53,), generator=generator)
    metric = KNNAccuracy(k=5)
    for part in list(torch.arange(101).split(batch))[rank::world_size] or [torch.arange(0)]:
        metric.update_bank(bank[part], labels[part])
    for part in list(torch.arange(53).split(10))[rank::world_size]:
        metric.update(queries[part], truth[part])
    return metric.compute()


@pytest.mark.parametrize("batch", [10, 101], ids=["uneven", "one rank has all"])
def test_knn(ranks: Ranks, batch: int) -> None:
    expected = knn(0, 1, batch)
    assert {float(value) for value in ranks(knn, batch)} == {float(expected)}


def converged_probe(rank: int, world_size: int, kind: str, batch: int) -> dict[str, Tensor]:
    """A probe of three classes that the features tell apart only in part."""
    x = activations()
    index = torch.arange(337)
    labels = (x["a"][:, :3] + 0.5 * torch.randn(337, 3, generator=torch.Generator().manual_seed(4))).argmax(1)
    widths = {name: value.shape[1] for name, value in x.items()}
    probe = {"ridge": RidgeProbe, "logistic": LogisticProbe}[kind](widths, num_classes=3)
    for part in list(index[:250].split(batch))[rank::world_size]:
        probe.update_bank({name: value[part] for name, value in x.items()}, labels[part], part)
    for part in list(index[250:].split(batch))[rank::world_size]:
        probe.update({name: value[part] for name, value in x.items()}, labels[part])
    return probe.compute()


@pytest.mark.parametrize("batch", [20, 250], ids=["uneven", "one rank has all"])
@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_converged_probes(ranks: Ranks, kind: str, batch: int) -> None:
    expected = converged_probe(0, 1, kind, batch)
    assert 0.5 < expected["top1"].max() < 1
    for got in ranks(converged_probe, kind, batch):
        for name in ("top1", "mean_per_class", "l2"):
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-12)


def probe_bank(rank: int, world_size: int, dtype: torch.dtype, resumed: bool = False) -> tuple[dict[str, Tensor], int]:
    """The classifiers after eleven steps, and how many bytes of gradients a process sent in the last of them."""
    x = activations()
    labels = x["a"][:, :3].argmax(1)
    sent: list[Tensor] = []

    def bank() -> ProbeBank:
        return ProbeBank({name: value.shape[1] for name, value in x.items()}, num_classes=3, sent_in=dtype)

    def noted(tensor: Tensor) -> None:
        sent.append(tensor)
        dist.all_reduce(tensor)

    probes = bank()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("ssl_geometry.metrics.probe_bank.all_reduce", noted)
        for step, part in enumerate(torch.arange(330).split(30)):
            if resumed and step == 5:
                state = {name: value.clone() for name, value in probes.state_dict().items()}
                probes = bank()
                probes.load_state_dict(state)
            sent.clear()
            mine = part[rank * 30 // world_size : (rank + 1) * 30 // world_size]
            probes.step({name: value[mine] for name, value in x.items()}, labels[mine], mine)
    return dict(probes.state_dict()), sent[0].nbytes if sent else 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_online_probes(ranks: Ranks, dtype: torch.dtype) -> None:
    """And they send what the layers have, not what fills them up to the widest: (12 + 12 + 3) x 8 x 3 numbers."""
    expected, _ = probe_bank(0, 1, dtype)
    assert expected["correct"].max() > 0.5 * expected["validated"].max()
    first, *_ = found = ranks(probe_bank, dtype)
    for got, sent in found:
        assert sent == 27 * 8 * 3 * dtype.itemsize
        for name, value in expected.items():
            if dtype == torch.float32 or name in ("mean", "variance", "steps", "seen", "validated"):
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
            elif name != "correct":
                assert (got[name] - value).norm() < 0.02 * value.norm(), name
            assert torch.equal(got[name], first[0][name]), "the same in all processes"
    again = ranks(probe_bank, dtype, True)
    assert all(torch.equal(value, first[0][name]) for name, value in again[0][0].items())


def loss_and_gradient(rank: int, world_size: int, method: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss averaged over ranks, and the gradient of the images' outputs as DDP would give it to shared weights."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 12, 6, generator=generator, dtype=dtype)
    weights = torch.randn(6, 10, generator=generator, dtype=dtype)
    labels = torch.randint(10, (12,), generator=generator)
    share = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    weights.requires_grad_(True)
    outputs = images[:, share] @ weights
    if method == "simclr":
        simclr = SimCLR(backbone="resnet10", width=0.25, temperature=0.1)
        loss = simclr.loss(tuple(outputs), {})  # type: ignore[typeddict-item]
    else:
        supervised = Supervised(num_classes=10, backbone="resnet10", width=0.25)
        supervised.log_mean = lambda *args: None  # type: ignore[method-assign,assignment]
        loss = supervised.loss((outputs[0],), {"label": labels[share]})  # type: ignore[typeddict-item]
    loss.backward()
    assert weights.grad is not None
    value, gradient = loss.detach().clone(), weights.grad.clone()
    if world_size > 1:
        for tensor in (value, gradient):
            dist.all_reduce(tensor)
            tensor /= world_size
    return value, gradient


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("method", ["simclr", "supervised"])
def test_losses_and_gradients(ranks: Ranks, method: str, dtype: torch.dtype, tolerance: float) -> None:
    loss, gradient = loss_and_gradient(0, 1, method, dtype)
    assert gradient.abs().max() > 1e-3
    for got_loss, got_gradient in ranks(loss_and_gradient, method, dtype):
        torch.testing.assert_close(got_loss, loss, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got_gradient, gradient, rtol=10 * tolerance, atol=tolerance)


def last_step(rank: int, world_size: int, bad_rank: int) -> tuple[int, str]:
    """How many steps a process took whose loss, or that of another, was NaN from the third on; and what it said."""
    trainer: Any = SimpleNamespace(
        world_size=world_size,
        log_every_n_steps=2,
        checkpoint_callback=None,
        current_epoch=0,
        global_step=0,
        is_last_batch=False,
        accumulate_grad_batches=1,
    )
    losses = StopOnNaN()
    stop = StopOnSignal(LastCheckpoint(Path("unused")), losses)
    stop._group = dist.new_group(backend="gloo")
    losses.on_train_start(trainer, SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]
    try:
        for step in range(20):
            trainer.global_step = step + 1
            loss = torch.tensor(torch.nan if rank == bad_rank and step >= 2 else 1.0)
            for callback in (losses, stop):
                callback.on_train_batch_end(trainer, None, loss, None, step)  # type: ignore[arg-type]
    except UserError as error:
        return step, str(error)
    finally:
        stop.restore()
    return step, "went on"


def test_a_bad_loss_of_one_process_stops_all_after_the_same_step(ranks: Ranks) -> None:
    """NaN at step 3 on one process alone; at step 4, a logging step, it knows, and at step 5 all do."""
    (found,) = set(ranks(last_step, 1))
    assert found[0] == 4
    assert "the loss became NaN or infinite in epoch 1 (by step 5)" in found[1]
    assert set(ranks(last_step, -1)) == {(19, "went on")}


def shards(rank: int, world_size: int, metric: str) -> tuple[Tensor, Tensor]:
    """Each rank holds a part of the bank, finds the nearest there, and all lists are merged."""
    generator = torch.Generator().manual_seed(5)
    queries, bank = torch.randn(40, 6, generator=generator), torch.randn(101, 6, generator=generator)
    start, stop = rank * 101 // world_size, (rank + 1) * 101 // world_size
    mine = nearest(queries, bank[start:stop], k=7, metric=metric)  # type: ignore[arg-type]
    parts = [mine._replace(ids=mine.ids + start)]
    if world_size > 1:
        parts = [mine] * world_size
        dist.all_gather_object(parts, mine._replace(ids=mine.ids + start))
    merged = merge(parts, k=7, largest=metric == "inner")
    return merged.ids, merged.values


@pytest.mark.parametrize("metric", ["cosine", "l2", "inner"])
def test_neighbours_of_a_sharded_bank(ranks: Ranks, metric: str) -> None:
    ids, values = shards(0, 1, metric)
    for got_ids, got_values in ranks(shards, metric):
        assert torch.equal(got_ids, ids)
        torch.testing.assert_close(got_values, values, rtol=1e-5, atol=1e-6)


def neighborhoods(rank: int, world_size: int, batch: int) -> dict[str, Any]:
    x = activations()
    labels = x["a"][:, :3].argmax(1)
    metric = Neighborhoods(LAYERS, k=20)
    manifolds = AugmentationManifolds(LAYERS, ["crop"])
    for part in list(torch.arange(337).split(batch))[rank::world_size]:
        metric.update({name: value[part] for name, value in x.items()}, labels[part], part)
        generator = torch.Generator().manual_seed(int(part[0]))
        copies = {
            name: value[part][:, None] + torch.randn(len(part), 5, value.shape[1], generator=generator)
            for name, value in x.items()
        }
        manifolds.update({"crop": copies})
    found = {
        f"{layer} {name}": torch.tensor(value)
        for layer, rows in metric.compute().items()
        for name, value in rows.statistics.items()
    }
    found |= {f"{layer} ids": rows.ids for layer, rows in metric.compute().items()}
    found |= {
        f"{layer} {name}": value for layer, rows in metric.compute().items() for name, value in rows.semantic.items()
    }
    found |= {
        f"{kind} {name}": value.sort().values
        for kind, rows in manifolds.compute().items()
        for name, value in rows.items()
    }
    return found


@pytest.mark.parametrize("batch", [64, 337], ids=["uneven", "one rank has all"])
def test_neighborhoods(ranks: Ranks, batch: int) -> None:
    expected = neighborhoods(0, 1, batch)
    for got in ranks(neighborhoods, batch):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, equal_nan=True)


def spectrum(rank: int, world_size: int, batch: int) -> dict[str, Tensor]:
    x = activations()
    metric = Spectrum({name: value.shape[1] for name, value in x.items()}, views=4)
    for part in list(torch.arange(337).split(batch))[rank::world_size]:
        generator = torch.Generator().manual_seed(int(part[0]))
        copies = {
            name: value[part][:, None] + torch.randn(len(part), 4, value.shape[1], generator=generator)
            for name, value in x.items()
        }
        metric.update({name: value[part] for name, value in x.items()}, copies, part)
    return metric.compute()


@pytest.mark.parametrize("batch", [64, 337], ids=["uneven", "one rank has all"])
def test_spectra(ranks: Ranks, batch: int) -> None:
    expected = spectrum(0, 1, batch)
    assert expected["lidar"].isfinite().all()
    for got in ranks(spectrum, batch):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
