"""Converged probes: the optimum of scikit-learn, closed forms in float64, and one line for what cannot be learnt."""

import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_geometry.geometry import classification, logistic
from ssl_geometry.geometry.classification import L2, accuracies, in_validation_split, one_hot, validation_folds
from ssl_geometry.geometry.logistic import (
    GROUP_BYTES,
    converged_probes,
    converged_probes_bytes,
    cross_entropy,
    logistic_regression,
)
from ssl_geometry.geometry.ridge import (
    merge_statistics,
    ridge,
    ridge_probe,
    ridge_probe_of_few,
    squared_error,
    sufficient_statistics,
)
from ssl_geometry.metrics import LogisticProbe, RidgeProbe


def problem(n: int, width: int, classes: int, seed: int, separation: float = 1.0) -> tuple[Tensor, Tensor]:
    """Correlated, badly scaled features with some class structure; every class is there."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (n - classes,), generator=generator)])
    x = separation * torch.randn(classes, width, generator=generator)[labels] + torch.randn(
        n, width, generator=generator
    )
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return x @ mix * torch.logspace(-2, 2, width) + 3, labels


def standardised(x: Tensor) -> np.ndarray:
    x = x.double()
    deviation = x.std(0, correction=0)
    return ((x - x.mean(0)) / torch.where(deviation > 2e-7 * x.abs().amax(0), deviation, torch.inf)).numpy()


def optimum(x: np.ndarray, labels: Tensor, l2: float) -> tuple[float, LogisticRegression]:
    """scikit-learn's objective, as a mean over images; its lbfgs stops early where the loss is flat.

    Of two classes it has one weight vector w: of ours, w / 2 and -w / 2, the penalty is half as large.
    """
    n = len(x)
    two = int(labels.max()) == 1
    strength = l2 / 2 if two else l2
    model = LogisticRegression(C=1 / (n * strength), tol=1e-10, max_iter=20_000, solver="newton-cg")
    z = torch.from_numpy(model.fit(x, labels.numpy()).decision_function(x))
    if two:
        z = torch.stack([torch.zeros_like(z), z], 1)
    loss = (z.logsumexp(1) - z[torch.arange(n), labels]).mean()
    return float(loss) + strength / 2 * float((model.coef_**2).sum()), model


@settings(max_examples=12, deadline=None)
@given(st.integers(40, 150), st.integers(1, 12), st.integers(2, 5), st.integers(0, 500))
def test_the_optimum_is_scikit_learns(n: int, width: int, classes: int, seed: int) -> None:
    layers = {name: problem(n, width + extra, classes, seed)[0] for name, extra in (("a", 0), ("b", 3))}
    labels = problem(n, width, classes, seed)[1]
    strengths = [1e-4, 1e-2, 1.0]
    found = logistic_regression(layers, labels, classes, strengths)
    for name, x in layers.items():
        for number, l2 in enumerate(strengths):
            expected, model = optimum(standardised(x), labels, l2)
            assert float(found[name].objective[number]) == pytest.approx(expected, rel=1e-6)
            mine = found[name].logits(x)[number].argmax(1).numpy()
            assert (mine != model.predict(standardised(x))).sum() <= 1, "an image on the border"


@pytest.mark.parametrize("shape", [(200, 500), (300, 40)], ids=["fewer images than features", "more"])
@pytest.mark.parametrize("noise", [1e-2, 3e-4, 1e-6])
def test_nearly_collapsed_features_have_scikit_learns_optimum(shape: tuple[int, int], noise: float) -> None:
    """One direction holds nearly all variance; what tells the classes apart lies in the others, and a weak penalty
    lets the classifier use it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(shape[0]) % 4
    apart = torch.randn(4, shape[1], generator=generator)[labels] + torch.randn(shape, generator=generator)
    x = torch.randn(shape[0], 1, generator=generator) + noise * apart
    probe = logistic_regression({"layer": x}, labels, 4, (1e-6, 1e-4))["layer"]
    for number, l2 in enumerate((1e-6, 1e-4)):
        expected, model = optimum(standardised(x), labels, l2)
        assert float(probe.objective[number]) == pytest.approx(expected, rel=1e-6)
        same = probe.logits(x)[number].argmax(1).numpy() == model.predict(standardised(x))
        assert same.mean() > 0.99
    assert noise < 1e-3 or float(probe.objective[0]) < 0.2, "there is something to learn"


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_features_around_a_large_mean_have_their_own_optimum(offset: float) -> None:
    """In raw features of float32, weights and means cancel: what is returned has to classify as what was found."""
    x, labels = problem(300, 6, 3, 1)
    x = (x - x.mean(0)) / x.std(0) + offset
    probe = logistic_regression({"layer": x}, labels, 3, [1e-4, 1e-2])["layer"]
    sums = merge_statistics(
        torch.stack([sufficient_statistics(*p) for p in zip(x.split(70), one_hot(labels, 3).split(70), strict=True)])
    )
    regression = ridge(sums, [1e-4, 1e-2])
    standard = standardised(x)
    for number, l2 in enumerate((1e-4, 1e-2)):
        expected, model = optimum(standard, labels, l2)
        logits = probe.logits(x)[number]
        penalty = l2 / 2 * float((probe.weight[number] * x.double().std(0, correction=0)[:, None]).square().sum())
        assert float(cross_entropy(logits, labels)) + penalty == pytest.approx(expected, rel=1e-6)
        assert np.array_equal(logits.argmax(1).numpy(), model.predict(standard))
        closed = Ridge(alpha=300 * l2, solver="svd").fit(standard, one_hot(labels, 3).double().numpy())
        np.testing.assert_allclose(regression.logits(x)[number], closed.predict(standard), atol=1e-7)


@pytest.mark.parametrize("trouble", ["collinear", "constant", "rare", "more features than images"])
def test_awkward_problems_have_scikit_learns_optimum(trouble: str) -> None:
    x, labels = problem(120, 8, 4, 1)
    if trouble == "collinear":
        x = torch.cat([x, x[:, :3], x[:, :1] + x[:, 1:2]], 1)
    elif trouble == "constant":
        x = torch.cat([x, torch.full((120, 2), 0.1), torch.zeros(120, 1)], 1)
    elif trouble == "rare":
        labels = torch.where(torch.arange(120) == 7, 3, labels % 3)
    else:
        x, labels = problem(60, 200, 4, 2)
    for number, l2 in enumerate((1e-3, 1e-1)):
        probe = logistic_regression({"layer": x}, labels, 4, (1e-3, 1e-1))["layer"]
        expected, _ = optimum(standardised(x), labels, l2)
        assert float(probe.objective[number]) == pytest.approx(expected, rel=1e-6)
    if trouble == "constant":
        assert probe.weight[:, 8:].abs().max() == 0


def test_separable_classes_and_a_weak_penalty_converge() -> None:
    x, labels = problem(300, 20, 3, 3, separation=6.0)
    probe = logistic_regression({"layer": x}, labels, 3, [1e-6, 1e-5])["layer"]
    for number, l2 in enumerate((1e-6, 1e-5)):
        expected, _ = optimum(standardised(x), labels, l2)
        assert float(probe.objective[number]) <= expected * (1 + 1e-6)
    assert (probe.gradient_norm <= 1e-4 * probe.objective).all()


def test_layers_solved_together_have_the_optimum_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU solves layers of one width in one batch; an easy layer then waits for a hard one."""
    layers = {f"layer{number}": problem(200, 10, 3, number, separation=4.0 * number)[0] for number in range(3)}
    labels = problem(200, 10, 3, 0)[1]
    alone = logistic_regression(layers, labels, 3, [1e-5, 1e-1])
    monkeypatch.setitem(GROUP_BYTES, "cpu", 2**30)
    together = logistic_regression(layers, labels, 3, [1e-5, 1e-1])
    for name, probe in alone.items():
        torch.testing.assert_close(together[name].objective, probe.objective, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(100, 5), (30, 50)])
def test_what_is_reported_is_what_the_weights_give(shape: tuple[int, int]) -> None:
    """Objective and gradient by autograd, from the returned classifier, for what scales the features to deviation 1."""
    x, labels = problem(*shape, 3, 4)
    for iterations in (3, 500):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe = logistic_regression({"layer": x}, labels, 3, [1e-2], max_iterations=iterations)["layer"]
        scale = x.double().std(0, correction=0)
        weight = (probe.weight[0] * scale[:, None]).requires_grad_()
        bias = (probe.bias[0] + x.double().mean(0) @ probe.weight[0]).requires_grad_()
        z = torch.from_numpy(standardised(x)) @ weight + bias
        objective = torch.nn.functional.cross_entropy(z, labels) + 0.01 / 2 * weight.square().sum()
        objective.backward()
        assert weight.grad is not None
        assert bias.grad is not None
        assert objective.item() == pytest.approx(float(probe.objective[0]), rel=1e-12)
        steepest = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
        assert steepest == pytest.approx(float(probe.gradient_norm[0]), rel=1e-4)


def test_one_that_did_not_converge_is_named() -> None:
    x, labels = problem(100, 5, 3, 4)
    with pytest.warns(UserWarning, match="layer9.*l2 0.001"):
        logistic_regression({"layer9": x}, labels, 3, [1e-3], max_iterations=2)


def test_several_classes_an_image_are_binary_regressions() -> None:
    """Each class has scikit-learn's optimum, a rare one among forty too; a class that no image shows spoils nothing."""
    x, _ = problem(200, 8, 4, 5)
    several = (x[:, :1] / 0.01 + 2 * torch.randn(200, 40, generator=torch.Generator().manual_seed(0)) > 300).long()
    several[:, 0] = 0
    several[:3, 0] = 1
    several[:, 1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = logistic_regression({"layer": x}, several, 40, [1e-6, 1e-2])["layer"]
    assert probe.objective.isfinite().all()
    assert probe.weight[..., 1].abs().max() == 0
    assert probe.bias[:, 1].max() < -10
    deviation = x.double().std(0, correction=0)
    for number, l2 in enumerate((1e-6, 1e-2)):
        total = 0.0
        for column in [0, *range(2, 40)]:
            truth = several[:, column]
            model = LogisticRegression(C=1 / (200 * l2), tol=1e-9, max_iter=5000, solver="newton-cg")
            model.fit(standardised(x), truth)
            z = torch.from_numpy(model.decision_function(standardised(x)))[:, None]
            expected = float(cross_entropy(z, truth[:, None])) + l2 / 2 * float((model.coef_**2).sum())
            size = (probe.weight[number, :, column] * deviation).square().sum()
            mine = cross_entropy(probe.logits(x)[number, :, column, None], truth[:, None]) + l2 / 2 * size
            assert float(mine) == pytest.approx(expected, rel=1e-6)
            total += expected
        assert float(probe.objective[number]) == pytest.approx(total, rel=1e-5)


def test_problems_solved_in_blocks_have_the_same_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = problem(120, 6, 4, 8)
    several = torch.stack([labels == 0, labels < 2, labels == 3], 1).long()
    for targets, classes in ((labels, 4), (several, 3)):
        whole = logistic_regression({"layer": x}, targets, classes, [1e-4, 1e-2, 1.0])["layer"]
        monkeypatch.setattr(logistic, "SOLVER_BYTES", 1)
        monkeypatch.setattr(classification, "BLOCK", 100)
        parts = logistic_regression({"layer": x}, targets, classes, [1e-4, 1e-2, 1.0])["layer"]
        monkeypatch.undo()
        torch.testing.assert_close(parts.objective, whole.objective, rtol=1e-7, atol=0)
        torch.testing.assert_close(parts.logits(x), whole.logits(x), rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 80), st.integers(1, 12), st.integers(1, 4), st.integers(0, 500))
def test_ridge_is_the_closed_form(n: int, width: int, targets: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, width, generator=generator) * 5 + 2, torch.randn(n, targets, generator=generator)
    sums = merge_statistics(
        torch.stack([sufficient_statistics(*parts) for parts in zip(x.split(7), y.split(7), strict=True)])
    )
    probe = ridge(sums, [1e-3, 1.0])
    for number, l2 in enumerate((1e-3, 1.0)):
        standard = standardised(x)
        model = Ridge(alpha=n * l2, solver="svd").fit(standard, y.double().numpy())
        np.testing.assert_allclose(
            probe.logits(x)[number], model.predict(standard).reshape(n, targets), rtol=1e-6, atol=1e-7
        )
        assert probe.gradient_norm[number] < 1e-9


@pytest.mark.parametrize("constant", [0.1, 0.3, 7.7, 1234.567])
def test_ridge_of_collinear_and_constant_features(constant: float) -> None:
    x, labels = problem(997, 5, 3, 6)
    y = one_hot(labels, 3)
    more = torch.cat([x, x, torch.full((997, 1), constant)], 1)
    probe = ridge(
        merge_statistics(
            torch.stack([sufficient_statistics(*p) for p in zip(more.split(60), y.split(60), strict=True)])
        ),
        L2,
    )
    assert probe.weight.isfinite().all()
    assert probe.weight[:, 10].abs().max() == 0
    single = ridge(sufficient_statistics(x, y), [l2 / 2 for l2 in L2])  # twice the same halves the penalty
    torch.testing.assert_close(probe.logits(more), single.logits(x), rtol=1e-6, atol=1e-6)


HARD = {
    "mean of 1e4": lambda x: x + 1e4,
    "nearly collapsed": lambda x: 1 + 1e-5 * x,
    "duplicates and a constant": lambda x: torch.cat([x, x, torch.full((len(x), 1), 0.3)], 1),
    "inactive": lambda x: (x - 2).relu(),
    "rank 3": lambda x: x[:, :3] @ x[:3],
}


@pytest.mark.parametrize("n", [400, 25], ids=["N > D", "N < D"])
@pytest.mark.parametrize("kind", HARD)
def test_ridge_is_scikit_learns_on_hard_features(kind: str, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = HARD[kind](torch.randn(n + 50, 60, generator=generator))
    (seen, unseen), y = x.split([n, 50]), one_hot(torch.arange(n) % 3, 3)
    # A feature whose standard deviation is below the rounding of float32 counts as constant, as in `ridge`.
    center, deviation = seen.double().mean(0), seen.double().std(0, correction=0)
    scale = torch.where(deviation > 2e-7 * center.abs(), deviation, torch.inf)
    standard = [((part.double() - center) / scale).numpy() for part in (seen, unseen)]
    probe = ridge(sufficient_statistics(seen, y), L2)
    for number, l2 in enumerate(L2):
        model = Ridge(alpha=n * l2, solver="svd").fit(standard[0], y.double().numpy())
        np.testing.assert_allclose(probe.logits(seen)[number], model.predict(standard[0]), atol=1e-9)
        # Along directions that no image of the bank takes, weights are the rounding of X'X over the strength.
        np.testing.assert_allclose(
            probe.logits(unseen)[number], model.predict(standard[1]), atol=1e-15 * 60 / l2 + 1e-9
        )


class Operations(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_no_strength_of_ridge_costs_eigenvalues() -> None:
    x, labels = problem(300, 20, 3, 0)
    validation = in_validation_split(torch.arange(300))
    sums = [sufficient_statistics(x[part], one_hot(labels[part], 3)) for part in (~validation, validation)]
    for l2 in (L2[:1], L2):
        with Operations() as operations:
            ridge_probe(*sums, x[validation], labels[validation], l2)
        assert operations.count["_linalg_eigh"] == 0
        assert operations.count["linalg_cholesky_ex"] == len(l2) + 1


def test_strengths_too_weak_for_cholesky_are_solved_by_eigenvalues() -> None:
    x, labels = problem(90, 5, 3, 3)
    sums = sufficient_statistics(torch.cat([x, x[:, :1]], 1), one_hot(labels, 3))  # singular
    with Operations() as operations:
        weak = ridge(sums, [1e-16, 1e-3])
    assert operations.count["_linalg_eigh"] == 1
    assert operations.count["linalg_cholesky_ex"] == 1
    assert weak.weight.isfinite().all()
    assert weak.gradient_norm.max() < 1e-12
    torch.testing.assert_close(weak.weight[1:], ridge(sums, [1e-3]).weight)
    broken = sums.clone()
    broken[0, 1] = broken[1, 0] = 10 * broken.diagonal()[:2].max()  # X'X of no features: not positive
    assert ridge(broken, L2).weight.isfinite().all()


def test_sums_of_parts_merge_to_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = problem(50, 4, 3, 9)
    y = one_hot(labels, 3)
    whole = sufficient_statistics(x, y)
    parts = torch.stack(
        [sufficient_statistics(x[a:b], y[a:b]) for a, b in ((0, 0), (0, 1), (1, 30), (30, 30), (30, 50))]
    )
    torch.testing.assert_close(merge_statistics(parts), whole)
    torch.testing.assert_close(
        merge_statistics(merge_statistics(parts[:3])[None].repeat(1, 1, 1)), merge_statistics(parts[:3])
    )
    monkeypatch.setattr(classification, "BLOCK", 40)
    torch.testing.assert_close(sufficient_statistics(x, y), whole)
    assert sufficient_statistics(x[:0], y[:0]).abs().max() == 0 == merge_statistics(torch.zeros(2, 3, 4)).abs().max()


@pytest.mark.parametrize(
    ("features", "l2", "words"),
    [
        (torch.randn(80, 1).repeat(1, 3), 0.0, "l2 0: 3 features of 80 images are collinear; set it above 0"),
        (torch.randn(3, 5), 0.0, "l2 0: 5 features of 3 images are collinear"),
        (torch.randn(80, 3), -1.0, "l2 -1: expected a regularisation strength of at least 0"),
        (torch.randn(80, 3), float("nan"), "l2 nan"),
        (torch.randn(0, 3), 0.1, "at least one image"),
        (torch.full((2, 1), torch.nan), 0.1, "not finite"),
    ],
)
def test_ridge_reports_what_it_cannot_solve(features: Tensor, l2: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ridge(sufficient_statistics(features, torch.ones(len(features), 2)), [l2])
    with pytest.raises(ValueError, match="no regularisation strength"):
        ridge(sufficient_statistics(torch.randn(5, 1), torch.randn(5, 1)), [])


def test_no_penalty_is_least_squares() -> None:
    x, labels = problem(90, 5, 3, 3)
    x[:, 2] = 0.3
    y = one_hot(labels, 3)
    found = ridge(sufficient_statistics(x, y), [0.0]).logits(x)[0]
    with_ones = torch.cat([x, torch.ones(90, 1)], 1).double().numpy()
    expected = with_ones @ np.linalg.lstsq(with_ones, y.double().numpy())[0]
    np.testing.assert_allclose(found, expected, atol=1e-8)


def choice(logits: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The rule, written down again: most right, then the least loss, then the strongest."""
    right = [float((part.argmax(1) == labels).double().mean()) for part in logits]
    losses = [float(loss(part, labels)) for part in logits]
    return L2[max(range(len(L2)), key=lambda i: (right[i], -losses[i], L2[i]))]


@pytest.mark.parametrize("separation", [0.5, 20.0], ids=["hard", "every strength is correct"])
def test_regularisation_is_selected_on_the_validation_split_alone(separation: float) -> None:
    """Held-out labels are turned round: the worst classifier of the others is the one they choose."""
    x, labels = problem(600, 30, 3, 7, separation)
    validation = in_validation_split(torch.arange(600))
    turned = torch.where(validation, (labels + 1) % 3, labels) if separation == 0.5 else labels
    tried = logistic_regression({"layer": x[~validation]}, turned[~validation], 3, L2)["layer"]
    found = converged_probes({"layer": x}, turned, validation, 3)["layer"]
    assert float(found.l2[0]) == choice(tried.logits(x[validation]), turned[validation], cross_entropy)
    again = logistic_regression({"layer": x}, turned, 3, [float(found.l2[0])])["layer"]  # refitted on all images
    torch.testing.assert_close(found.weight, again.weight, rtol=0, atol=0)
    y = one_hot(turned, 3)
    sums = torch.stack([sufficient_statistics(x[part], y[part]) for part in (~validation, validation)])
    chosen = ridge_probe(*sums, x[validation], turned[validation])
    assert float(chosen.l2[0]) == choice(ridge(sums[0], L2).logits(x[validation]), turned[validation], squared_error)
    torch.testing.assert_close(chosen.weight, ridge(sufficient_statistics(x, y), [float(chosen.l2[0])]).weight)


@pytest.mark.parametrize("n", [12, 30, 99])
def test_few_images_select_by_cross_validation(n: int) -> None:
    """Written out: of each strength, every image is scored once, by the classifier of the other four folds."""
    x, labels = problem(n, 8, 3, n, separation=0.3)
    y, order = one_hot(labels, 3), labels.argsort(stable=True)
    fold = torch.empty(n, dtype=torch.long)
    fold[order] = torch.arange(n) % 5
    logits = {"ridge": torch.zeros(len(L2), n, 3).double(), "logistic": torch.zeros(len(L2), n, 3).double()}
    for number in range(5):
        rest, own = fold != number, fold == number
        logits["ridge"][:, own] = ridge(sufficient_statistics(x[rest], y[rest]), L2).logits(x[own])
        probe = logistic_regression({"layer": x[rest]}, labels[rest], 3, L2)["layer"]
        logits["logistic"][:, own] = probe.logits(x[own])
    nothing = torch.zeros(n, dtype=torch.bool)
    found = ridge_probe_of_few(x, labels, 3)
    # The folds' logits of an equally accurate strength differ in the last digits with the order of images.
    assert float(found.l2[0]) == choice(logits["ridge"][:, order], labels[order], squared_error)
    torch.testing.assert_close(found.weight, ridge(sufficient_statistics(x, y), [float(found.l2[0])]).weight)
    logistic = converged_probes({"layer": x}, labels, nothing, 3)["layer"]
    assert float(logistic.l2[0]) == choice(logits["logistic"][:, order], labels[order], cross_entropy)
    metric = RidgeProbe({"layer": 8}, 3)
    for rows in torch.arange(n).flip(0).split(7):  # in any order and batches
        metric.update_bank({"layer": x[rows]}, labels[rows], rows)
    metric.update({"layer": x}, labels)
    assert float(metric.compute()["l2"]) == float(found.l2[0])


def test_folds_that_leave_nothing_to_learn_from_do_not_choose() -> None:
    validation = torch.arange(12) < 2
    assert validation_folds(torch.arange(12) % 2, validation, 2).sum(0).tolist() == [1] * 12
    assert len(validation_folds(torch.arange(12) % 10, validation, 10)) == 3, (
        "9 of 12 images are too few for ten classes"
    )
    assert validation_folds(torch.arange(100) % 2, torch.arange(100) < 9, 2).sum(1).tolist() == [9]
    with pytest.raises(ValueError, match="no held-out image"):
        validation_folds(torch.arange(3), validation[:3], 3)


def test_of_equal_strengths_the_strongest_is_chosen() -> None:
    """Features that do not vary: all strengths give the same classifier."""
    labels = torch.arange(60) % 2
    x, validation = torch.ones(60, 2), torch.arange(60) < 6
    y = one_hot(labels, 2)
    assert float(converged_probes({"layer": x}, labels, validation, 2)["layer"].l2[0]) == max(L2)
    sums = [sufficient_statistics(x[part], y[part]) for part in (~validation, validation)]
    assert float(ridge_probe(*sums, x[validation], labels[validation]).l2[0]) == max(L2)


def test_classes_that_are_missing_in_the_validation_split_leave_the_selection_to_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x, validation = torch.randn(400, 4, generator=generator), torch.arange(400) < 40
    several = (x[:, :2] + 0.5 * torch.randn(400, 2, generator=generator) > 0.5).long()
    x[validation, :2] = torch.linspace(-3, 1.5, 40)[:, None]
    several[validation] = 0
    tried = logistic_regression({"layer": x[~validation]}, several[~validation], 2)["layer"]
    losses = [float(cross_entropy(logits, several[validation])) for logits in tried.logits(x[validation])]
    found = converged_probes({"layer": x}, several, validation, 2)["layer"]
    assert float(found.l2[0]) == L2[losses.index(min(losses))]
    assert 0 < losses.index(min(losses)) < len(L2) - 1, "a sort of what is not a number takes an end"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_within_what_was_said() -> None:
    """The growth of a process's memory, while all strengths of three layers are tried."""
    code = (
        "import torch, warnings\n"
        "from ssl_geometry.geometry import logistic\n"
        "warnings.simplefilter('ignore'); torch.set_num_threads(1)\n"
        "solve = logistic.logistic_regression\n"
        "logistic.logistic_regression = lambda *problem: solve(*problem, max_iterations=6)\n"
        "def grown(n, width, classes):\n"
        "    features = {name: torch.randn(n, width) for name in 'abc'}\n"
        "    labels, validation = torch.arange(n) % classes, torch.arange(n) % 10 == 0\n"
        "    before = peak()\n"
        "    logistic.converged_probes(features, labels, validation, classes)\n"
        "    return 1024 * (peak() - before)\n"
        "def peak():\n"
        "    return int(dict(line.split(':') for line in open('/proc/self/status'))['VmHWM'].split()[0])\n"
        "grown(200, 8, 3); print(grown(10_000, 64, 50))\n"
    )
    # A subprocess, for the peak of this process may lie behind it already; glibc gives freed tensors back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    said = converged_probes_bytes(10_000, 64, 50)
    assert 0.4 * said < int(done.stdout) < said


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 60), st.integers(2, 5), st.integers(0, 500))
def test_accuracies_are_scikit_learns(n: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    found = accuracies(scores, labels)
    assert float(found["top1"]) == pytest.approx(float((scores.argmax(1) == labels).double().mean()))
    recalls = [float((scores.argmax(1) == labels)[labels == c].double().mean()) for c in labels.unique()]
    assert float(found["mean_per_class"]) == pytest.approx(np.mean(recalls))
    if set(scores.argmax(1).tolist()) <= set(labels.tolist()):  # scikit-learn warns of others
        expected = balanced_accuracy_score(labels, scores.argmax(1))
        assert float(found["mean_per_class"]) == pytest.approx(expected)


def test_confident_scores_keep_their_order() -> None:
    scores, labels = torch.tensor([[20.0], [25.0], [30.0], [-1.0]]), torch.tensor([[0], [0], [1], [0]])
    assert float(accuracies(scores, labels)["mAP"]) == pytest.approx(1.0)
    tied = torch.zeros(4, 1)
    assert float(accuracies(tied, labels)["mAP"]) == pytest.approx(0.25)


def test_mean_average_precision_leaves_out_classes_that_no_image_shows() -> None:
    scores = torch.tensor([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0], [2.0, 3.0, torch.inf], [1.0, 4.0, 0.0]])
    labels = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])  # ranks 1 and 3; rank 4
    assert float(accuracies(scores, labels)["mAP"]) == pytest.approx(((1 / 1 + 2 / 3) / 2 + 1 / 4) / 2)
    assert accuracies(scores, torch.zeros_like(labels))["mAP"].isnan()
    assert accuracies(scores[:0], labels[:0])["mAP"].isnan()


def test_the_validation_split_is_a_tenth_in_any_order() -> None:
    index = torch.arange(20_000)
    validation = in_validation_split(index)
    assert float(validation.float().mean()) == pytest.approx(0.1, abs=0.01)
    order = torch.randperm(20_000)
    assert torch.equal(in_validation_split(index[order]), validation[order])
    for period in (2, 5, 10):  # classes are often laid out in turn
        shares = [float(validation[start::period].float().mean()) for start in range(period)]
        assert shares == pytest.approx([0.1] * period, abs=0.02)


@pytest.mark.parametrize(
    ("x", "labels", "classes", "words"),
    [
        (torch.randn(9, 2), torch.zeros(9, dtype=torch.long), 3, "all 9 images are of class 0"),
        (torch.randn(9, 2), torch.arange(9), 5, "labels from 0 to 8: expected 0 to 4"),
        (torch.randn(9, 2), torch.arange(9) - 1, 9, "labels from -1 to 7"),
        (torch.randn(3, 2), torch.arange(3), 5, "3 images for 5 classes"),
        (torch.tensor([[0.0], [torch.nan], [torch.inf]]), torch.arange(3), 3, "layer l: features of 2 of 3 images"),
        (torch.randn(4, 2), torch.arange(3), 3, "features of 4 images, labels of 3"),
    ],
)
def test_bad_input_is_reported(x: Tensor, labels: Tensor, classes: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        logistic_regression({"l": x}, labels, classes)


@pytest.mark.parametrize(
    ("x", "labels", "validation", "words"),
    [
        (torch.randn(120, 2), torch.arange(120) % 4, 0, "no held-out image"),
        (
            torch.randn(40, 2).index_fill(0, torch.tensor([3]), torch.inf),
            torch.arange(40) % 4,
            8,
            "layer l: .* 1 of 40",
        ),
        (torch.randn(40, 2), torch.arange(40), 8, "labels from 0 to 39"),
        (torch.randn(40, 2), torch.zeros(40, 3, dtype=torch.long), 8, "labels of 3 classes: expected 4"),
        (torch.randn(40, 2), torch.zeros(40, 4, dtype=torch.long), 8, "all 40 images have the same labels"),
        (torch.randn(40, 2), 2 * torch.ones(40, 4, dtype=torch.long), 8, "labels from 2 to 2: expected 0 and 1"),
    ],
)
def test_what_cannot_be_selected_is_reported(x: Tensor, labels: Tensor, validation: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        converged_probes({"l": x}, labels, torch.arange(len(x)) < validation, 4)


def test_accuracies_and_targets_refuse_what_is_no_label_or_score() -> None:
    with pytest.raises(ValueError, match="scores of 1 of 3 images are NaN"):
        accuracies(torch.eye(3).index_fill(0, torch.tensor([1]), torch.nan), torch.arange(3))
    for labels in (torch.tensor([0, 1, -1]), torch.tensor([0, 1, 3])):
        with pytest.raises(ValueError, match="labels from"):
            accuracies(torch.eye(3), labels)
        with pytest.raises(ValueError, match="labels from"):
            one_hot(labels, 3)


@pytest.mark.parametrize("l2", [0.0, -1.0])
def test_logistic_regression_needs_a_penalty(l2: float) -> None:
    with pytest.raises(ValueError, match=f"l2 {l2:g}: expected a regularisation strength above 0"):
        logistic_regression({"l": torch.randn(9, 2)}, torch.arange(9) % 3, 3, [l2])


# -- over batches ------------------------------------------------------------------------------------------------------


def live(kind: type[RidgeProbe | LogisticProbe], images: int = 80, **changed: Any) -> dict[str, Tensor]:
    given = {
        "x": torch.eye(4)[torch.arange(80) % 4],
        "y": torch.arange(80) % 4,
        "q": torch.eye(4),
        "t": torch.arange(4),
    }
    given |= changed
    probe = kind({"layer9": 4}, num_classes=4)
    for part in torch.arange(images).split(30):
        probe.update_bank({"layer9": given["x"][part]}, given["y"][part], part)
    probe.update({"layer9": given["q"]}, given["t"])
    return probe.compute()


@pytest.mark.parametrize("kind", [RidgeProbe, LogisticProbe])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"x": torch.randn(80, 4).index_fill(0, torch.tensor([3, 70]), torch.nan)},
            "layer layer9: .* of 2 of 80 images",
        ),
        ({"x": torch.randn(80, 4).index_fill(0, torch.tensor([9]), torch.inf)}, "layer layer9: .* of 1 of 80 images"),
        ({"q": torch.full((4, 4), torch.nan)}, "layer layer9, test images: features of 4 of 4 images"),
        ({"y": torch.arange(80) % 4 + 1}, "labels from 1 to 4: expected 0 to 3"),
        ({"y": torch.arange(80) % 4 - 1}, "labels from -1 to 2: expected 0 to 3"),
        ({"t": torch.tensor([0, 1, 2, -1])}, "labels from -1 to 2"),
        ({"t": torch.tensor([0, 1, 2, 4])}, "labels from 0 to 4"),
        ({"y": torch.zeros(80, dtype=torch.long)}, "all 80 images are of class 0"),
        ({"images": 3}, "3 images for 4 classes"),
        ({"q": torch.empty(0, 4), "t": torch.empty(0, dtype=torch.long)}, "no test image"),
    ],
)
def test_live_probes_report_what_cannot_be_learned(
    kind: type[RidgeProbe | LogisticProbe], changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        live(kind, **changed)
    assert float(live(kind)["top1"]) == 1


@pytest.mark.parametrize("kind", [RidgeProbe, LogisticProbe])
def test_live_probes_refuse_a_bank_without_held_out_images(kind: type[RidgeProbe | LogisticProbe]) -> None:
    index = torch.arange(300)
    index = index[~in_validation_split(index)][:120]
    probe = kind({"layer": 4}, num_classes=4)
    probe.update_bank({"layer": torch.eye(4)[torch.arange(120) % 4]}, torch.arange(120) % 4, index)
    probe.update({"layer": torch.eye(4)}, torch.arange(4))
    with pytest.raises(ValueError, match="no held-out image"):
        probe.compute()


def test_a_live_ridge_probe_is_that_of_all_images_at_once() -> None:
    x, labels = problem(500, 5, 3, 11)
    x = (x - x.mean(0)) / x.std(0) + 1e6
    probe, index = RidgeProbe({"layer": 5}, num_classes=3), torch.arange(400)
    for part in index.split(64):
        probe.update_bank({"layer": x[part]}, labels[part], part)
    probe.update({"layer": x[400:]}, labels[400:])
    validation, y = in_validation_split(index), one_hot(labels, 3)[:400]
    sums = [sufficient_statistics(x[:400][part], y[part]) for part in (~validation, validation)]
    expected = ridge_probe(*sums, x[:400][validation], labels[:400][validation])
    found = probe.compute()
    assert float(found["l2"]) == float(expected.l2)
    assert float(found["top1"]) == float(accuracies(expected.logits(x[400:])[0], labels[400:])["top1"]) > 0.4
