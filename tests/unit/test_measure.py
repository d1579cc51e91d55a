"""Measuring is one pass for all measurements that are due, and changes nothing."""

import math
import multiprocessing as mp
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from ssl_geometry.callbacks import EvaluateAtStart, FlushRecords, GeometryMonitor, RecordsLogger
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError, as_options
from ssl_geometry.geometry.precision import FLOAT32_SWITCHES
from ssl_geometry.measure import (
    CKA,
    Invariance,
    Measured,
    Measurement,
    Neighborhoods,
    Occasion,
    Probes,
    Request,
    Spectrum,
    Subject,
    pooled,
)
from ssl_geometry.measure.cka import warn_of_few
from ssl_geometry.measure.engine import measuring
from ssl_geometry.measure.requests import Reduced
from ssl_geometry.methods import Method, SimCLR, Supervised
from ssl_geometry.metrics.probe_bank import ProbeBank
from ssl_geometry.records import Protocol, read_records, record
from tests.training import quiet_trainer

SMALL: dict[str, Any] = {"backbone": "resnet10", "width": 0.25, "image_size": 16}


class Mean(Measurement):
    """Another measurement: asks for other layers, reduced in another way."""

    def requests(self, subject: Subject) -> Sequence[Request]:
        return [Request(("stem", "layer2.0"), pooled)]

    def begin(self, occasion: Occasion) -> None:
        self.seen: list[int] = []

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        (layers,) = reduced.values()
        assert {name: value.ndim for name, value in layers.items()} == {"stem": 2, "layer2.0": 2}
        self.seen += batch["index"].tolist()

    def finish(self, occasion: Occasion) -> Measured:
        return Measured([], [Protocol()])


def run(
    tmp_path: Path,
    measurements: Sequence[Measurement],
    epochs: int = 1,
    method: Method | None = None,
    logger: RecordsLogger | None = None,
    callbacks: Sequence[L.Callback] = (),
    **options: Any,
) -> L.Trainer:
    data = DataModule("digits", limit_train=128, measure_size=100, eval_batch_size=40, batch_size=64)
    trainer = quiet_trainer(
        max_epochs=epochs,
        default_root_dir=tmp_path,
        callbacks=[*callbacks, GeometryMonitor(measurements)],
        logger=logger or False,
        log_every_n_steps=1,
        **{"limit_val_batches": 0, **options},
    )
    trainer.fit(method or SimCLR(**SMALL), data)
    return trainer


def test_measurements_due_together_share_one_pass(tmp_path: Path) -> None:
    method, calls = SimCLR(**SMALL), []
    method.backbone.register_forward_hook(lambda *_: calls.append(method.training))
    other = Mean(every_n_epochs=2)
    run(tmp_path, [CKA(), other], epochs=2, method=method)
    measured = [training for training in calls if not training]
    assert len(measured) == 3 * 3, "three batches of measurement images at each of three epochs, whoever asks"
    assert sorted(other.seen) == sorted(set(other.seen))
    assert len(other.seen) == 100


@pytest.mark.parametrize(
    ("measurement", "option"),
    [
        (CKA, "cka"),
        (Invariance, "invariance"),
        (Probes, "probes"),
        (Neighborhoods, "neighbors"),
        (Spectrum, "spectrum"),
    ],
)
@as_options
def test_layers_that_do_not_exist_are_reported_with_their_option(measurement: type[Measurement], option: str) -> None:
    with pytest.raises(UserError, match=f"^--{option}.layers='layer9' matches no layer of SimCLR; did you mean"):
        measurement(layers=["pooled", "layer9"]).requests(Subject.of(SimCLR(**SMALL)))  # type: ignore[call-arg]


@pytest.mark.slow
def test_training_images_are_one_pass_too(tmp_path: Path) -> None:
    method, calls = SimCLR(**SMALL), []
    method.backbone.register_forward_hook(lambda *_: calls.append(method.training))
    probes = Probes(layers=["stages"], train_images=100, logistic=True)
    run(tmp_path, [CKA(every_n_epochs=1), probes], epochs=1, method=method)
    assert calls.count(False) == 2 * (3 + 3) + 1, "at two epochs three batches of either split; one dummy image"
    assert calls.count(True) == 2, "online probes listen to the steps"
    assert not any(module._forward_hooks for module in method.backbone.layer1.modules())


class Elsewhere(L.Callback):
    """While it is validated, the network has other weights, as with Lightning's averaging of weights."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.kept = [weight.data.clone() for weight in pl_module.parameters()]
        for number, weight in enumerate(pl_module.parameters()):
            weight.data.mul_(1 + 0.1 * math.sin(number))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for weight, kept in zip(pl_module.parameters(), self.kept, strict=True):
            weight.data.copy_(kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train_images", "precision", "options", "callbacks", "validations", "shared"),
    [
        (90, "32-true", {}, [], 2, True),
        (10_000, "64-true", {"val_check_interval": 1}, [], 3, True),
        (90, "bf16-mixed", {}, [], 2, False),
        (90, "32-true", {}, [Elsewhere()], 2, False),
    ],
    ids=["some of the bank", "all of it, and in mid-epoch", "in another precision", "of other weights"],
)
def test_nearest_neighbours_and_probes_share_a_pass_over_training_images(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_images: int,
    precision: str,
    options: dict[str, Any],
    callbacks: list[L.Callback],
    validations: int,
    shared: bool,
) -> None:
    """128 images are in the bank, 144 validated, 100 measured. Each has the numbers that it has without the other."""
    monkeypatch.setattr(RecordsLogger, "save_figures", lambda *_: None)

    def trained(name: str, measurements: list[Measurement], validates: bool) -> tuple[pd.DataFrame, int, Method]:
        torch.manual_seed(0)
        method, seen = SimCLR(**SMALL, eval_precision="float32" if precision != "bf16-mixed" else "training"), []
        method.backbone.register_forward_pre_hook(lambda net, args: None if net.training else seen.append(len(args[0])))
        logger = RecordsLogger(tmp_path / "e" / name)
        evaluation = [*callbacks, EvaluateAtStart()] if validates else []
        more = {"precision": precision, "limit_val_batches": float(validates), "num_sanity_val_steps": 0, **options}
        run(tmp_path, measurements, 1, method, logger, [FlushRecords(), *evaluation], **more)
        records = read_records(tmp_path / "e" / name)
        records = records[records["metric"].str.contains("ridge_probe|val/knn")]
        return records[["metric", "layer", "epoch", "value", "protocol"]].reset_index(drop=True), sum(seen), method

    learned = min(train_images, 128)
    probes = [Probes(layers=["stages"], train_images=train_images) for _ in range(2)]
    both, images, method = trained("both", [probes[0]], True)
    measured, for_probes, other = trained("measured", [probes[1]], False)
    evaluated, for_neighbours, _ = trained("evaluated", [], True)
    assert for_probes == 1 + 2 * (learned + 100), "one dummy image; at two epochs"
    assert for_neighbours == validations * (128 + 144)
    assert images == for_probes + for_neighbours - shared * 2 * learned
    assert len(evaluated) == validations
    expected = pd.concat([measured, evaluated]).sort_values(["metric", "layer", "epoch"], ignore_index=True)
    both = both.sort_values(["metric", "layer", "epoch"], ignore_index=True)
    pd.testing.assert_frame_equal(both, expected, check_exact=True)
    assert all(map(torch.equal, method.state_dict().values(), other.state_dict().values()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager"])
def test_online_probes_hear_a_compiled_network(tmp_path: Path, backend: str) -> None:
    banks = []
    for compiled in (False, True):
        torch.manual_seed(0)
        method = Supervised(**SMALL)
        if compiled:
            method.backbone.compile(backend=backend)
        probes = Probes(layers=["stages", "pooled"], train_images=100)
        run(tmp_path, [probes], epochs=2, method=method)
        assert probes.bank is not None
        banks.append(probes.bank.weight)
    assert banks[0].abs().max() > 0.01
    torch.testing.assert_close(banks[0], banks[1], rtol=1e-3, atol=1e-5)


class Replacing(L.Callback):
    """Replaces the backbone after an epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.before, pl_module.backbone = pl_module.backbone, SimCLR(**SMALL).backbone


@pytest.mark.parametrize("every", [1, 3], ids=["measured at once", "in a later epoch"])
def test_online_probes_hear_the_network_that_takes_the_place_of_another(tmp_path: Path, every: int) -> None:
    probes, replacing, method = Probes(every_n_epochs=every, layers="pooled"), Replacing(), SimCLR(**SMALL)
    learned: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        step = ProbeBank.step
        patch.setattr(ProbeBank, "step", lambda *args: learned.append(step(*args) is None))
        run(tmp_path, [probes], epochs=3, method=method, callbacks=[replacing])
    assert len(learned) == 6 - (every == 3), "one that is replaced unnoticed costs the probes a step"
    assert probes.bank is not None
    assert probes.bank.weight.abs().max() > 0
    for network in (method.backbone, replacing.before):
        assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("every", "epochs", "expected"), [(1, 3, [0, 1, 2, 3]), (2, 3, [0, 2, 3]), (5, 3, [0, 3]), (0, 3, [])]
)
def test_measured_epochs(tmp_path: Path, every: int, epochs: int, expected: list[int]) -> None:
    epochs_seen = []

    class Noting(Mean):
        def finish(self, occasion: Occasion) -> Measured:
            epochs_seen.append(occasion.epoch)
            return super().finish(occasion)

    run(tmp_path, [Noting(every_n_epochs=every)], epochs=epochs)
    assert epochs_seen == expected


def test_measurements_of_the_same_metric_keep_their_own_records(tmp_path: Path) -> None:
    """Each writes the metric ``mean`` first, two have a name for their options, one the name of another's."""

    class Named(Mean):
        def __init__(self, layer: str, options: str) -> None:
            super().__init__(every_n_epochs=1)
            self.layer, self.group = layer, options  # type: ignore[misc]

        def finish(self, occasion: Occasion) -> Measured:
            return Measured([record(**occasion.columns, metric="mean", layer=self.layer, value=1.0)], [Protocol()])

    named = {"a": "cka", "b": "cka", "c": "cka-2", "d": "", "e": "scalars"}
    run(tmp_path, [Named(*pair) for pair in named.items()], logger=RecordsLogger(tmp_path / "e" / "r"))
    frame = read_records(tmp_path / "e" / "r").query("metric == 'mean'")
    assert sorted(zip(frame["epoch"], frame["layer"], strict=True)) == [(epoch, x) for epoch in (0, 1) for x in "abcde"]
    parts = {path.name for path in (tmp_path / "e" / "r" / "records").iterdir()}
    assert parts == {"cka", "cka-2", "cka-2-2", "Named", "scalars-2", "scalars", "protocols"}


def test_measuring_puts_every_mode_back(tmp_path: Path) -> None:
    net = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Dropout(), nn.BatchNorm1d(3))
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    state, rng = [v.clone() for v in net.state_dict().values()], torch.get_rng_state()
    try:
        with pytest.raises(RuntimeError), measuring(net):
            _measure_and_fail(net)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision("highest")
    assert [part.training for part in net] == [False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(state, net.state_dict().values(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())


def _measure_and_fail(net: nn.Module) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.benchmark
    net(torch.randn(5, 3, generator=torch.Generator()))
    raise RuntimeError


def _switches() -> dict[str, str]:
    """All that can be read, in the present state and in those that torch would be in if the top were set."""
    found, top = {}, torch.backends.fp32_precision  # type: ignore[attr-defined]
    for above in (top, "ieee", "tf32"):
        torch.backends.fp32_precision = above  # type: ignore[attr-defined]
        found |= {f"{above} {number}": switch.fp32_precision for number, switch in enumerate(FLOAT32_SWITCHES)}
    torch.backends.fp32_precision = top  # type: ignore[attr-defined]
    older: dict[str, Callable[[], object]] = {
        "matmul": torch.get_float32_matmul_precision,
        "cudnn": lambda: torch.backends.cudnn.allow_tf32,
    }
    for name, read in older.items():
        try:
            found[name] = str(read())
        except RuntimeError:  # torch does not say where its two interfaces disagree
            found[name] = "unreadable"
    return found


def _measure_with(settings: Sequence[tuple[Any, str, Any]]) -> None:
    for owner, name, value in settings:
        setattr(owner, name, value) if name else owner(value)
    before = _switches()
    with measuring(nn.Linear(2, 2)):
        inside = [switch.fp32_precision for switch in FLOAT32_SWITCHES]
        readable = before["matmul"] != "unreadable"
        products = torch.get_float32_matmul_precision() if readable else "highest"
    assert inside == ["ieee"] * len(FLOAT32_SWITCHES), inside
    assert products == "highest"
    assert _switches() == before


@pytest.mark.parametrize(
    "settings",
    [
        [],
        [(torch.backends, "fp32_precision", "tf32")],
        [(torch.backends.cudnn, "fp32_precision", "tf32")],
        [(torch.backends.cudnn.conv, "fp32_precision", "tf32"), (torch.backends.cudnn, "fp32_precision", "ieee")],
        [(torch.backends.cuda.matmul, "fp32_precision", "tf32")],
        [(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")],
        [(torch.set_float32_matmul_precision, "", "high")],
        [(torch.set_float32_matmul_precision, "", "medium"), (torch.backends, "fp32_precision", "tf32")],
        [(torch.backends.cudnn, "allow_tf32", False)],
    ],
    ids=lambda settings: ", ".join(f"{name} {value}" for _, name, value in settings) or "as torch starts",
)
def test_measuring_is_in_full_float32_whichever_switch_was_set(settings: Sequence[tuple[Any, str, Any]]) -> None:
    process = mp.get_context("fork").Process(target=_measure_with, args=(settings,))  # torch's first state is lost else
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("images", "test", "gram_size", "said"),
    [
        (
            100,
            500,
            64,
            "64: 2 Gram matrices of 100 images: intervals rest on 1 degree of freedom; {smaller} 5, or {more}",
        ),
        (
            192,
            500,
            64,
            "64: 3 Gram matrices of 192 images: intervals rest on 2 degrees of freedom; {smaller} 11, or {more}",
        ),
        (40, 40, 64, "64: 1 Gram matrix of 40 images: intervals rest on no degree of freedom; {smaller} 1"),
        (40, 500, 16, "16: 3 Gram matrices of 40 images: intervals rest on 1 degree of freedom; {more}"),
        (15, 15, 64, "64: 1 Gram matrix of 15 images: intervals rest on no degree of freedom"),
        (200, 200, 64, "64: 4 Gram matrices of 200 images: intervals rest on 2 degrees of freedom; {smaller} 11"),
        (
            3,
            3,
            8,
            "8: 3 images in batches of 256 hold no Gram matrix, which needs 4 at least, and every CKA is NaN; measure "
            "more of them, in larger batches",
        ),
        (236, 500, 64, ""),
        (2048, 2048, 64, ""),
    ],
)
def test_intervals_of_few_gram_matrices_are_warned_of(
    images: int, test: int, gram_size: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is advised can be done: all images of the test split may be measured already."""
    data: Any = SimpleNamespace(
        measure_size=images, num_test=test, eval_batch_size=256, size_option="--data.measure_size"
    )
    warn_of_few(data, gram_size, "--gram_size")
    ways = {"smaller": "--gram_size 16 gives", "more": "measure more images (--data.measure_size)"}
    assert caplog.messages == [f"--gram_size {said.format(**ways)}"] * bool(said)
