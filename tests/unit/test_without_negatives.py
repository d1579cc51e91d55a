"""SimSiam, Barlow Twins, VICReg and LeJEPA: their formulas in float64 NumPy, lightly's losses, closed forms."""

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, VICRegLoss
from lightly.loss.lejepa_loss import LeJEPALoss
from torch import Tensor

from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.data.views import ViewSpec
from ssl_geometry.errors import UserError
from ssl_geometry.methods import LeJEPA
from ssl_geometry.methods.parts.sigreg import random_directions, sigreg
from tests.fake_cuda import FakeCuda
from tests.methods import RESNET, build, by_hand, images

NAMES = ["BarlowTwins", "LeJEPA", "SimSiam", "VICReg"]
Array = np.ndarray[Any, np.dtype[np.float64]]


def random_outputs(count: int, number: int = 12, width: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(number * width)
    z = torch.randn(count, number, width, dtype=torch.float64, generator=generator)
    return tuple(2 * z + z[:1] + 0.5)


# -- the definitions, written from the papers ------------------------------------------------------------------------


def simsiam(z1: Array, z2: Array, p1: Array, p2: Array) -> float:
    def distance(p: Array, z: Array) -> float:
        return -np.mean([a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for a, b in zip(p, z, strict=True)])

    return distance(p1, z2) / 2 + distance(p2, z1) / 2


def barlow_twins(z1: Array, z2: Array, redundancy: float = 5e-3) -> float:
    z1, z2 = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (z1, z2))
    c = z1.T @ z2 / len(z1)
    on = sum((1 - c[i, i]) ** 2 for i in range(len(c)))
    return on + redundancy * sum(c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j)


def vicreg(z1: Array, z2: Array) -> float:
    def spread(z: Array) -> float:
        return np.mean([max(0.0, 1 - np.sqrt(np.var(column, ddof=1) + 1e-4)) for column in z.T])

    def off(z: Array) -> float:
        c = np.cov(z.T)
        return sum(c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j) / len(c)

    return 25 * np.mean((z1 - z2) ** 2) + 25 * (spread(z1) + spread(z2)) / 2 + off(z1) + off(z2)


def epps_pulley(z: Array, directions: Array) -> float:
    """Over 17 frequencies from 0 to 3, by the trapezoidal rule, of one view."""
    t = np.linspace(0, 3, 17)
    found = []
    for direction in directions.T:
        characteristic = np.exp(1j * t[:, None] * (z @ direction)).mean(1)
        found.append(len(z) * np.trapezoid(np.abs(characteristic - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2), t))
    return 2 * float(np.mean(found))


DEFINITIONS: dict[str, Any] = {"SimSiam": simsiam, "BarlowTwins": barlow_twins, "VICReg": vicreg}


def test_losses_are_the_papers() -> None:
    @settings(max_examples=10, deadline=None)
    @given(st.sampled_from(sorted(DEFINITIONS)), st.integers(2, 20), st.integers(2, 9))
    def check(name: str, number: int, width: int) -> None:
        outputs = random_outputs(4 if name == "SimSiam" else 2, number, width)
        expected = DEFINITIONS[name](*(output.numpy() for output in outputs))
        assert float(methods[name].loss(outputs, images(2))) == pytest.approx(expected, rel=1e-9)

    methods = {name: build(name) for name in DEFINITIONS}
    check()


def lightly_lejepa(projections: Tensor, directions: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    theirs = LeJEPALoss(lambda_param=0.02).double()
    monkeypatch.setattr(theirs.sigreg, "_generate_unit_vectors", lambda *args: directions)
    return theirs(global_proj=projections[:2], local_proj=projections[2:])


def test_losses_are_lightlys_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = random_outputs(2)
    for name, theirs in (("BarlowTwins", BarlowTwinsLoss()), ("VICReg", VICRegLoss())):
        torch.testing.assert_close(build(name).loss(outputs, images(2)), theirs(*outputs))
    z1, z2, p1, p2 = random_outputs(4)
    theirs = NegativeCosineSimilarity()
    expected = (theirs(p1, z2) + theirs(p2, z1)) / 2
    torch.testing.assert_close(build("SimSiam").loss((z1, z2, p1, p2), images(2)), expected)
    views = [ViewSpec(augment="crop", count=2), ViewSpec(augment="crop", size=8, count=3)]
    method = by_hand(build("LeJEPA", views=views, seed=3), 4)
    method.trainer.global_step = 2  # type: ignore[misc]
    z = torch.stack(random_outputs(5))
    directions = random_directions(16, z, seed=3, step=2)
    torch.testing.assert_close(
        method.loss(tuple(z), images(2)), lightly_lejepa(z, directions, monkeypatch), rtol=1e-6, atol=0
    )  # their weights are made in float32


# -- closed forms and collapse ---------------------------------------------------------------------------------------


def test_sigreg_is_the_definition() -> None:
    z = torch.stack(random_outputs(3))
    directions = random_directions(5, z, seed=0, step=0)
    expected = np.mean([epps_pulley(view.numpy(), directions.numpy()) for view in z])
    assert float(sigreg(z, directions)) == pytest.approx(expected, rel=1e-9)


def test_sigreg_of_a_point_is_the_integral() -> None:
    """All characteristic functions are 1, and the integral from -3 to 3 of (1 - exp(-t²/2))² exp(-t²/2) is known."""
    from math import erf, pi, sqrt

    def integral(c: float) -> float:  # of exp(-c t²/2)
        return sqrt(2 * pi / c) * erf(3 * sqrt(c / 2))

    expected = 10 * (integral(1) - 2 * integral(2) + integral(3))
    assert float(sigreg(torch.zeros(1, 10, 4), torch.eye(4))) == pytest.approx(expected, rel=2e-3)  # 17 knots


def test_sigreg_prefers_a_gaussian() -> None:
    z = torch.randn(1, 2000, 8, generator=torch.Generator().manual_seed(0))
    directions = random_directions(64, z, seed=0, step=0)
    gaussian = sigreg(z, directions)
    for other in (0.8 * z, z + 0.2, z.sign(), z * torch.tensor([1.0] * 7 + [0.0])):
        assert sigreg(other, directions) > 3 * gaussian


def test_directions_are_a_function_of_seed_and_step() -> None:
    like = torch.zeros(2, 3, 64)
    directions = random_directions(500, like, seed=1, step=4)
    assert directions.isfinite().all()
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(500))
    torch.testing.assert_close(directions @ directions.T, torch.eye(64) * 500 / 64, atol=2.5, rtol=0)
    torch.manual_seed(5)
    assert torch.equal(directions, random_directions(500, like, seed=1, step=4))
    for other in ({"seed": 2, "step": 4}, {"seed": 1, "step": 5}):
        assert (directions * random_directions(500, like, **other)).sum(0).abs().mean() < 0.2


def test_the_centre_of_lejepa_is_that_of_the_global_views() -> None:
    views = [ViewSpec(augment="crop", count=2), ViewSpec(augment="crop", size=8, count=1)]
    method = by_hand(LeJEPA(**RESNET, views=views, sigreg_weight=0.0), 1)
    outputs = (torch.tensor([[0.0]]), torch.tensor([[2.0]]), torch.tensor([[4.0]]))
    assert float(method.loss(outputs, images(1))) == pytest.approx((1 + 1 + 9) / 3)


def test_lejepa_takes_two_views_or_more() -> None:
    with pytest.raises(UserError, match=r"--model\.views: 1 of each image; LeJEPA takes at least 2"):
        build("LeJEPA", views=[ViewSpec(augment="crop")])


def test_what_the_losses_make_of_a_collapse() -> None:
    same = (torch.ones(8, 4), torch.ones(8, 4))
    assert float(build("VICReg").loss(same, images(2))) == pytest.approx(25 * 0.99)
    assert float(build("BarlowTwins").loss(same, images(2))) == pytest.approx(4)
    assert float(build("SimSiam").loss((*same, *same), images(2))) == pytest.approx(-1), "its minimum"
    signs = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])  # white
    assert float(build("VICReg").loss((signs, signs), images(2))) == 0
    assert float(build("BarlowTwins").loss((signs, signs), images(2))) == pytest.approx(0, abs=1e-6)


# -- SimSiam's predictor, and learning rates of groups ---------------------------------------------------------------


def test_no_gradient_flows_into_the_projection_that_is_predicted() -> None:
    outputs = [output.requires_grad_() for output in random_outputs(4)]
    build("SimSiam").loss(tuple(outputs), images(2)).backward()
    z1, z2, p1, p2 = outputs
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad is not None
    assert p2.grad is not None
    method = by_hand(build("SimSiam"), 1)
    method.training_step(images(), 0).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters()), "through the predictor"


class Rates(L.Callback):
    """Learning rates of all parameters in each step, by name."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.seen.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})


def rates(name: str, **options: Any) -> list[dict[str, float]]:
    data = DataModule(
        dataset="digits", image_size=16, limit_train=64, limit_test=16, measure_size=16, batch_size=16, val_fraction=0
    )
    callback = Rates()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[callback],
    )  # fmt: skip
    method = build(name, lr=1.6, **options)
    trainer.fit(method, datamodule=data)
    assert {name for seen in callback.seen for name in seen} == {name for name, _ in method.named_parameters()}
    return callback.seen


@pytest.mark.parametrize("constant", [True, False])
def test_the_predictor_has_a_constant_learning_rate(constant: bool) -> None:
    for step, seen in enumerate(rates("SimSiam", constant_predictor_lr=constant)):
        theirs = {rate for name, rate in seen.items() if name.startswith("predictor.")}
        (others,) = {rate for name, rate in seen.items() if not name.startswith("predictor.")}
        assert others == pytest.approx(0.1 * (1 + np.cos(np.pi * step / 4)) / 2, rel=0.3)
        assert theirs == {0.1 if constant else others}


def test_biases_of_barlow_twins_have_a_learning_rate_of_their_own() -> None:
    seen = rates("BarlowTwins", bias_lr_factor=0.25)
    assert seen[0] != seen[-1]
    for step in seen:
        fourth = pytest.approx(step["backbone.conv1.weight"] / 4)
        assert step["head.layers.1.weight"] == step["backbone.bn1.bias"] == fourth


# -- no waits --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits are counted on a pretended GPU")
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_does_not_wait_for_the_device(name: str) -> None:
    method = by_hand(build(name), 1)
    with FakeCuda() as gpu:
        outputs = [
            output.float().to("cuda").requires_grad_() for output in random_outputs(4 if name == "SimSiam" else 2)
        ]
        with gpu.scope("loss"):
            method.loss(tuple(outputs), images(2)).backward()
    assert not gpu.faults, gpu.report()
    assert not [note for note in gpu.waits if note.scope == "loss"], gpu.report()
