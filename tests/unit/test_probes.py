"""Converged probes: the optimum of scikit-learn, closed forms in float64, and one line for what cannot be learnt."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from torch import Tensor

from ssl_geometry.geometry.probes import (
    GROUP_BYTES,
    L2,
    accuracies,
    converged_probes,
    held_out,
    logistic_regression,
    one_hot,
    ridge,
    ridge_probe,
    ridge_sums,
)


def problem(n: int, width: int, classes: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Correlated, badly scaled features with some class structure; every class is there."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (n - classes,), generator=generator)])
    x = spread * torch.randn(classes, width, generator=generator)[labels] + torch.randn(n, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return x @ mix * torch.logspace(-2, 2, width) + 3, labels


def standardised(x: Tensor) -> np.ndarray:
    x = x.double()
    deviation = x.std(0, correction=0)
    return ((x - x.mean(0)) / torch.where(deviation > 1e-6 * x.abs().amax(0), deviation, torch.inf)).numpy()


def optimum(x: np.ndarray, labels: Tensor, l2: float) -> tuple[float, LogisticRegression]:
    """scikit-learn's objective, as a mean over images; its lbfgs stops early where the loss is flat."""
    n = len(x)
    model = LogisticRegression(C=1 / (n * l2), tol=1e-9, max_iter=20_000, solver="newton-cg").fit(x, labels.numpy())
    weight = model.coef_ if len(model.classes_) > 2 else np.concatenate([-model.coef_, model.coef_]) / 2
    scores = model.decision_function(x)
    if scores.ndim == 1:  # two classes: scikit-learn has one row, the same minimum has two of half the size
        scores = np.stack([-scores, scores], 1) / 2
    z = torch.from_numpy(scores)
    loss = (z.logsumexp(1) - z[torch.arange(n), labels]).mean()
    return float(loss) + l2 / 2 * float((weight**2).sum()), model


@settings(max_examples=12, deadline=None)
@given(st.integers(40, 150), st.integers(1, 12), st.integers(3, 5), st.integers(0, 500))
def test_the_optimum_is_scikit_learns(n: int, width: int, classes: int, seed: int) -> None:
    layers = {name: problem(n, width + extra, classes, seed)[0] for name, extra in (("a", 0), ("b", 3))}
    labels = problem(n, width, classes, seed)[1]
    strengths = [1e-4, 1e-2, 1.0]
    found = logistic_regression(layers, labels, classes, strengths)
    for name, x in layers.items():
        for number, l2 in enumerate(strengths):
            expected, model = optimum(standardised(x), labels, l2)
            assert float(found[name].objective[number]) <= expected * (1 + 1e-6)
            assert float(found[name].objective[number]) >= expected * (1 - 1e-6)
            mine = found[name].scores(x)[number].argmax(1).numpy()
            assert (mine != model.predict(standardised(x))).sum() <= 1, "an image on the border"


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
    x, labels = problem(300, 20, 3, 3, spread=6.0)
    probe = logistic_regression({"layer": x}, labels, 3, [1e-6, 1e-5])["layer"]
    for number, l2 in enumerate((1e-6, 1e-5)):
        expected, _ = optimum(standardised(x), labels, l2)
        assert float(probe.objective[number]) <= expected * (1 + 1e-6)
    assert (probe.gradient_norm <= 1e-4 * probe.objective).all()


def test_layers_solved_together_have_the_optimum_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU solves layers of one width in one batch; an easy layer then waits for a hard one."""
    layers = {f"layer{number}": problem(200, 10, 3, number, spread=4.0 * number)[0] for number in range(3)}
    labels = problem(200, 10, 3, 0)[1]
    alone = logistic_regression(layers, labels, 3, [1e-5, 1e-1])
    monkeypatch.setitem(GROUP_BYTES, "cpu", 2**30)
    together = logistic_regression(layers, labels, 3, [1e-5, 1e-1])
    for name, probe in alone.items():
        torch.testing.assert_close(together[name].objective, probe.objective, rtol=1e-6, atol=0)


def test_what_is_reported_is_what_the_weights_give() -> None:
    x, labels = problem(100, 5, 3, 4)
    probe = logistic_regression({"layer": x}, labels, 3, [1e-2])["layer"]
    z = (x.double() @ probe.weight.double() + probe.bias.double())[0]
    scale = x.double().std(0, correction=0)
    loss = (z.logsumexp(1) - z[torch.arange(100), labels]).mean()
    penalty = 0.01 / 2 * (probe.weight[0].double() * scale[:, None]).square().sum()
    assert float(loss + penalty) == pytest.approx(float(probe.objective[0]), rel=1e-5)


def test_one_that_did_not_converge_is_named() -> None:
    x, labels = problem(100, 5, 3, 4)
    with pytest.warns(UserWarning, match="layer9.*l2 0.001"):
        logistic_regression({"layer9": x}, labels, 3, [1e-3], max_iterations=2)


def test_several_classes_an_image_are_binary_regressions() -> None:
    x, labels = problem(150, 6, 4, 5)
    several = torch.stack([labels == 0, labels < 2, labels == 3], 1).long()
    probe = logistic_regression({"layer": x}, several, 3, [1e-2])["layer"]
    total = 0.0
    for column in range(3):
        model = LogisticRegression(C=1 / (150 * 1e-2), tol=1e-9, max_iter=5000, solver="newton-cg")
        model.fit(standardised(x), several[:, column])
        z = torch.from_numpy(model.decision_function(standardised(x)))
        y = several[:, column].double()
        total += float((torch.nn.functional.softplus(z) - z * y).mean()) + 0.005 * float((model.coef_**2).sum())
    assert float(probe.objective[0]) == pytest.approx(total, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 80), st.integers(1, 12), st.integers(1, 4), st.integers(0, 500))
def test_ridge_is_the_closed_form(n: int, width: int, targets: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, width, generator=generator) * 5 + 2, torch.randn(n, targets, generator=generator)
    sums = sum(ridge_sums(*parts) for parts in zip(x.split(7), y.split(7), strict=True))
    assert isinstance(sums, Tensor)
    probe = ridge(sums, [1e-3, 1.0])
    for number, l2 in enumerate((1e-3, 1.0)):
        standard = standardised(x)
        model = Ridge(alpha=n * l2, solver="svd").fit(standard, y.double().numpy())
        np.testing.assert_allclose(
            probe.scores(x)[number], model.predict(standard).reshape(n, targets), rtol=1e-6, atol=1e-7
        )
        assert probe.gradient_norm[number] < 1e-9


def test_ridge_of_collinear_and_constant_features() -> None:
    x, labels = problem(60, 5, 3, 6)
    more = torch.cat([x, x, torch.full((60, 1), 0.3)], 1)
    probe = ridge(ridge_sums(more, one_hot(labels, 3)), [1e-6, 1e-1])
    assert probe.weight.isfinite().all()
    assert probe.weight[:, 10].abs().max() == 0
    single = ridge(ridge_sums(x, one_hot(labels, 3)), [1e-6 / 2, 1e-1 / 2])  # twice the same halves the penalty
    torch.testing.assert_close(probe.scores(more), single.scores(x), rtol=1e-6, atol=1e-6)


def test_strengths_are_chosen_on_held_out_images_alone() -> None:
    """Held-out labels are turned round: the worst classifier of the others is the one they choose."""
    x, labels = problem(600, 30, 3, 7, spread=0.5)
    held = held_out(torch.arange(600))
    turned = torch.where(held, (labels + 1) % 3, labels)
    tried = logistic_regression({"layer": x[~held]}, turned[~held], 3, L2)["layer"]
    rights = [float(accuracies(scores, turned[held])["top1"]) for scores in tried.scores(x[held])]
    best = max(range(len(L2)), key=lambda number: (rights[number], L2[number]))
    assert float(converged_probes({"layer": x}, turned, held, 3)["layer"].l2[0]) == pytest.approx(L2[best])
    y = one_hot(turned, 3)
    sums = [ridge_sums(x[part], y[part]) for part in (~held, held)]
    chosen = ridge_probe(*sums, x[held], turned[held])
    again = ridge(sums[0], L2)
    rights = [float(accuracies(scores, turned[held])["top1"]) for scores in again.scores(x[held])]
    assert float(chosen.l2[0]) == pytest.approx(L2[max(range(len(L2)), key=lambda i: (rights[i], L2[i]))])
    torch.testing.assert_close(chosen.weight, ridge(sums[0] + sums[1], [float(chosen.l2[0])]).weight)


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
    several = torch.randint(2, (n, classes), generator=generator)
    several[0] = 1
    expected = average_precision_score(several.numpy(), scores.numpy(), average="macro")
    assert float(accuracies(scores, several)["mAP"]) == pytest.approx(expected, rel=1e-5)


def test_confident_scores_keep_their_order() -> None:
    scores, labels = torch.tensor([[20.0], [25.0], [30.0], [-1.0]]), torch.tensor([[0], [0], [1], [0]])
    assert float(accuracies(scores, labels)["mAP"]) == pytest.approx(1.0)
    tied = torch.zeros(4, 1)
    assert float(accuracies(tied, labels)["mAP"]) == pytest.approx(0.25)


def test_a_tenth_is_held_out_whatever_the_order() -> None:
    index = torch.arange(20_000)
    held = held_out(index)
    assert float(held.float().mean()) == pytest.approx(0.1, abs=0.01)
    order = torch.randperm(20_000)
    assert torch.equal(held_out(index[order]), held[order])
    for period in (2, 5, 10):  # classes are often laid out in turn
        shares = [float(held[start::period].float().mean()) for start in range(period)]
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
def test_bad_input_is_told(x: Tensor, labels: Tensor, classes: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        logistic_regression({"l": x}, labels, classes)


def test_sums_that_are_not_finite_are_told() -> None:
    with pytest.raises(ValueError, match="not finite"):
        ridge(ridge_sums(torch.tensor([[torch.nan]]), torch.ones(1, 1)))
