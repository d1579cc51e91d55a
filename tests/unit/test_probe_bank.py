"""Online probes: the optimiser that is written down, on the images that are meant, at any scale of the features."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ssl_geometry.geometry.classification import in_validation_split
from ssl_geometry.metrics import ProbeBank


def problem(n: int, width: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(classes, width, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return centers[labels] + torch.randn(n, width, generator=generator), labels


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.integers(2, 5), st.integers(0, 100))
def test_every_classifier_follows_sgd_with_momentum(width: int, classes: int, seed: int) -> None:
    """A second implementation: torch's autograd and optimiser, one classifier at a time."""
    rates, decays, steps, batch = (0.1, 1.0), (0.0, 0.01), 6, 40
    features, labels = problem(steps * batch, width, classes, seed)
    index = torch.arange(len(labels))
    bank = ProbeBank({"a": width}, classes, rates, decays)
    inputs, running = [], index[:0]
    for part in index.split(batch):
        # mean and variance of all images of earlier steps, each step counting 0.99 of the next; at first of its own
        some = running if len(running) else part
        counts = 0.99 ** torch.div(some.max() - some, batch, rounding_mode="floor").double().numpy()
        x = features.double().numpy()
        mean = np.average(x[some], axis=0, weights=counts)
        variance = np.average((x[some] - mean) ** 2, axis=0, weights=counts)
        learning = part[~in_validation_split(part)]
        inputs.append(torch.from_numpy((x[learning] - mean) / np.sqrt(variance * width)).float())
        bank.step({"a": features[part]}, labels[part], part)
        running = torch.cat([running, part])
    for head, (rate, decay) in enumerate((rate, decay) for rate in rates for decay in decays):
        weight = torch.zeros(width, classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias]}]
        sgd = torch.optim.SGD(groups, lr=rate, momentum=0.9)
        for part, x in zip(index.split(batch), inputs, strict=True):
            sgd.zero_grad()
            F.cross_entropy(x @ weight + bias, labels[part][~in_validation_split(part)]).backward()
            sgd.step()
        torch.testing.assert_close(bank.weight[0, :, head], weight.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(bank.bias[0, head], bias.detach(), rtol=1e-3, atol=1e-5)


def test_layers_of_different_widths_learn_as_if_alone() -> None:
    wide, labels = problem(400, 7, 3, 0)
    narrow = wide[:, :4].tanh()
    together, alone = ProbeBank({"wide": 7, "narrow": 4}, 3), ProbeBank({"narrow": 4}, 3)
    for part in torch.arange(400).split(50):
        together.step({"wide": wide[part], "narrow": narrow[part]}, labels[part], part)
        alone.step({"narrow": narrow[part]}, labels[part], part)
    torch.testing.assert_close(together.weight[1, :4], alone.weight[0])
    assert together.weight[1, 4:].abs().max() == 0


def test_held_out_images_train_no_classifier_and_select() -> None:
    """Their labels are turned round: whoever learnt from them could not be this right on the others."""
    features, labels = problem(2000, 6, 4, 1)
    index = torch.arange(2000)
    wrong = torch.where(in_validation_split(index), (labels + 1) % 4, labels)
    right, turned = ProbeBank({"a": 6}, 4), ProbeBank({"a": 6}, 4)
    for part in index.split(100):
        right.step({"a": features[part]}, labels[part], part)
        turned.step({"a": features[part]}, wrong[part], part)
    torch.testing.assert_close(right.weight, turned.weight, rtol=0, atol=0)
    assert int(right.validated) == int(in_validation_split(index).sum()) == int(turned.validated)
    assert right.correct.max() > 0.6 * right.validated
    assert turned.correct.max() < 0.3 * turned.validated
    right.forget()
    assert right.correct.max() == right.validated == 0


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_scale_of_features_changes_nothing(scale: float, offset: float) -> None:
    features, labels = problem(1000, 8, 3, 2)
    bank, moved = ProbeBank({"a": 8}, 3), ProbeBank({"a": 8}, 3)
    for part in torch.arange(1000).split(100):
        bank.step({"a": features[part]}, labels[part], part)
        moved.step({"a": scale * (features[part] + offset)}, labels[part], part)
    plain, other = bank.logits({"a": features}), moved.logits({"a": scale * (features + offset)})
    assert (plain.argmax(2) == other.argmax(2)).float().mean() > 0.99


def test_dead_features_and_unlabelled_images_do_no_harm() -> None:
    features, labels = problem(300, 6, 3, 3)
    features[:, 2] = 0.7
    labels[::5] = -1
    bank, known = ProbeBank({"a": 6}, 3), ProbeBank({"a": 6}, 3)
    for part in torch.arange(300).split(60):
        bank.step({"a": features[part]}, labels[part], part)
        rows = part[labels[part] >= 0]
        known.step({"a": features[rows]}, labels[rows], rows)
    assert bank.weight.isfinite().all()
    assert bank.weight[0, 2].abs().max() == 0
    assert int(bank.validated) == int(known.validated)


def test_two_views_are_two_images() -> None:
    features, labels = problem(120, 5, 3, 4)
    index = torch.arange(60)
    views = ProbeBank({"a": 5}, 3)
    views.step({"a": features}, labels[:60], index)
    twice = ProbeBank({"a": 5}, 3)
    twice.step({"a": features}, labels[:60].repeat(2), index.repeat(2))
    torch.testing.assert_close(views.bias, twice.bias)
    torch.testing.assert_close(views.mean, twice.mean)


def test_it_comes_near_the_converged_classifier() -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels = problem(4000, 16, 5, 5)
    features = features @ torch.diag(torch.logspace(-2, 2, 16))  # badly scaled
    bank = ProbeBank({"a": 16}, 5)
    for epoch in range(10):
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(epoch))
        bank.forget()
        for part in order.split(100):
            bank.step({"a": features[part]}, labels[part], part)
    reference = LogisticRegression(max_iter=1000).fit(np.asarray(features[:3000] / features.std(0)), labels[:3000])
    expected = reference.score(np.asarray(features[3000:] / features.std(0)), labels[3000:])
    got = float((bank.logits({"a": features[3000:]})[0].argmax(1) == labels[3000:]).float().mean())
    assert got > expected - 0.01
    assert expected > 0.8


def test_an_image_that_overflowed_is_ignored() -> None:
    features, labels = problem(400, 6, 3, 6)
    bank, without = ProbeBank({"a": 6}, 3), ProbeBank({"a": 6}, 3)
    for part in torch.arange(400).split(50):
        broken = features[part].clone()
        broken[3] = torch.inf
        bank.step({"a": broken}, labels[part], part)
        rest = torch.cat([part[:3], part[4:]])
        without.step({"a": features[rest]}, labels[rest], rest)
    torch.testing.assert_close(bank.weight, without.weight, rtol=1e-4, atol=1e-5)


def test_the_first_step_trains_and_a_loaded_bank_continues() -> None:
    """Features far from 0, in float32."""
    features, labels = problem(1000, 6, 3, 7)
    features, index = features + 1e3, torch.arange(1000)
    bank = ProbeBank({"a": 6}, 3)
    bank.step({"a": features[:500]}, labels[:500], index[:500])
    torch.testing.assert_close(bank.mean[0, 0], features[:500].mean(0))
    torch.testing.assert_close(bank.variance[0, 0], features[:500].var(0, correction=0), rtol=1e-4, atol=0)
    right = (bank.logits({"a": features}, torch.tensor([4]))[0].argmax(1) == labels).float().mean()
    assert bank.weight.abs().max() > 0
    assert right > 0.6
    other = ProbeBank({"a": 6}, 3)
    other.step({"a": features[500:] * 5}, labels[500:], index[500:])
    other.load_state_dict(bank.state_dict())
    again = ProbeBank({"a": 6}, 3)
    again.load_state_dict(bank.state_dict())
    for one in (bank, other, again):
        one.step({"a": features[500:]}, labels[500:], index[500:])
        torch.testing.assert_close(one.weight, bank.weight, rtol=0, atol=0)
    other.load_state_dict(ProbeBank({"a": 6}, 3).state_dict())
    other.step({"a": features[:500]}, labels[:500], index[:500])
    torch.testing.assert_close(other.mean[0, 0], features[:500].mean(0))
    assert float(other.variance.max()) < 100


def test_the_best_classifier_is_that_of_best_validation_accuracy() -> None:
    """A learning rate of 0 and one that works: the second is chosen, and its logits are returned."""
    features, labels = problem(2000, 6, 4, 1)
    bank = ProbeBank({"a": 6}, 4, learning_rates=[0.0, 1.0], weight_decays=[0.0])
    for part in torch.arange(2000).split(100):
        bank.step({"a": features[part]}, labels[part], part)
    assert bank.correct[0, 1] > bank.correct[0, 0] + 20
    assert bank.best().tolist() == [1]
    logits = bank.logits({"a": features})
    torch.testing.assert_close(logits, bank.logits({"a": features}, torch.tensor([1])), rtol=0, atol=0)
    assert (logits[0].argmax(1) == labels).float().mean() > 0.6


def test_without_validation_images_no_classifier_is_selected() -> None:
    features, labels = problem(100, 6, 4, 1)
    bank = ProbeBank({"a": 6, "b": 6}, 4)
    bank.step({"a": features, "b": features}, labels)
    with pytest.raises(ValueError, match=r"no held-out image .* of a, b on: use more"):
        bank.best()
    bank.step({"a": features, "b": features * torch.nan}, labels, torch.arange(100))
    with pytest.raises(ValueError, match=r"no held-out image .* of b on: use more"):
        bank.logits({"a": features, "b": features})
    assert bank.logits({"a": features, "b": features}, torch.tensor([0, 0])).shape == (2, 100, 4)
