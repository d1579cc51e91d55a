"""The evaluations of ``probe`` against scikit-learn and plain torch on the same features, and what it checks first."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.data.images import Images, stratified
from ssl_geometry.devices import left_in_control_groups
from ssl_geometry.errors import UserError
from ssl_geometry.finetuning import LabelledImages
from ssl_geometry.launching import together
from ssl_geometry.measure import Occasion, Subject
from ssl_geometry.measure.frozen import (
    POOLED,
    RATES,
    FewLabels,
    FrozenFeatures,
    LinearEvaluation,
    NearestNeighbors,
    stratified_validation_split,
)
from ssl_geometry.measure.probes import Probes, check_images, highest_decay, probe_rows
from ssl_geometry.methods.raw_pixels import RawPixels
from ssl_geometry.metrics import ProbeBank
from ssl_geometry.models.layers import layer_names

CLASSES, N, WIDTH = 5, 600, 20


@pytest.fixture(scope="module")
def subject() -> FrozenFeatures:
    """Classes that lie along directions of little variance: small learning rates do not find them soon."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, WIDTH, generator=g)
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g)).Q * torch.logspace(0.5, -1.5, WIDTH)[:, None]

    def images(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % CLASSES
        return (means[labels] + torch.randn(n, WIDTH, generator=g)) @ mix + 3, labels

    (train, labels), (test, test_labels) = images(N), images(N)
    depths = {POOLED: 1.0}
    index = torch.arange(N)
    occasion = Occasion(Subject(torch.nn.Identity(), MagicMock(), name="a"), MagicMock(num_classes=CLASSES), "run")
    return FrozenFeatures(occasion, depths, {POOLED: train}, labels, index, {POOLED: test}, test_labels)


def right(predicted: Any, subject: FrozenFeatures) -> float:
    return float((torch.as_tensor(predicted) == subject.test_labels).double().mean())


def standard(subject: FrozenFeatures, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
    train = subject.train[POOLED][rows]
    mean, deviation = train.mean(0), train.std(0, correction=0)
    return (train - mean) / deviation, (subject.test[POOLED] - mean) / deviation


@pytest.mark.parametrize(("name", "temperature"), [("knn200", 0.07), ("knn200_majority", None)])
def test_neighbours_vote_as_in_scikit_learn(subject: FrozenFeatures, name: str, temperature: float | None) -> None:
    train, test = ({POOLED: part[POOLED] - 3} for part in (subject.train, subject.test))  # cosines of all sizes
    subject = replace(subject, train=train, test=test)
    found = NearestNeighbors([200]).evaluate(subject, MagicMock())
    weights: Any = "uniform" if temperature is None else lambda distance: np.exp((1 - distance) / temperature)
    theirs = KNeighborsClassifier(200, metric="cosine", weights=weights, algorithm="brute")
    theirs.fit(subject.train[POOLED].double(), subject.train_labels)
    predicted = theirs.predict(subject.test[POOLED].double())
    assert found[name]["top1"] == pytest.approx([right(predicted, subject)], abs=1.5 / N)
    other = found["knn200" if temperature is None else "knn200_majority"]["top1"]
    assert found[name]["top1"] != pytest.approx(other, abs=5 / N), "the weights matter here"
    by_class = [(predicted == c)[subject.test_labels == c].mean() for c in range(CLASSES)]
    assert found[name]["mean_per_class"] == pytest.approx([np.mean(by_class)], abs=1.5 / N)


def test_neighbours_of_features_that_point_one_way_give_no_accuracy(subject: FrozenFeatures) -> None:
    one_way = {POOLED: torch.rand(len(subject.train_labels), 1) + torch.zeros(WIDTH)}
    with pytest.warns(UserWarning, match="a: accuracy of nearest neighbours is NaN") as seen:
        found = NearestNeighbors([5, 9]).evaluate(replace(subject, train=one_way), MagicMock())
    assert len(seen) == 1
    assert all(math.isnan(value) for numbers in found.values() for (value,) in numbers.values())
    (row,) = probe_rows("knn5", {POOLED: 1.0}, {"top1": found["knn5"]["top1"]}, N)
    assert math.isnan(row["value"])
    assert row.get("low") is None


def test_an_image_of_zeros_is_not_classified(subject: FrozenFeatures) -> None:
    test = subject.test[POOLED].clone()
    test[subject.test_labels == 0] = 0
    dark = NearestNeighbors([5]).evaluate(replace(subject, test={POOLED: test}), MagicMock())["knn5"]
    assert 0 < dark["top1"][0] <= float((subject.test_labels != 0).double().mean())


def plain_sgd(subject: FrozenFeatures, rate: float, epochs: int) -> float:
    x, test = (part / math.sqrt(WIDTH) for part in standard(subject))
    linear = torch.nn.Linear(WIDTH, CLASSES)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(N / 64))
    for epoch in range(epochs):
        for rows in torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(linear(x[rows]), subject.train_labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return right(linear(test).argmax(1), subject)


def test_linear_evaluation_is_plain_sgd_with_the_recorded_learning_rate(subject: FrozenFeatures) -> None:
    found = LinearEvaluation(epochs=20, weight_decay=0.0, batch_size=64).evaluate(subject, MagicMock())["linear_eval"]
    (rate,) = found["learning_rate"]
    assert any(rate == pytest.approx(known) for known in RATES)
    plain = {known: plain_sgd(subject, known, 20) for known in RATES}
    assert found["top1"] == pytest.approx([plain[min(RATES, key=lambda known: abs(known - rate))]], abs=0.015)
    assert min(plain.values()) < found["top1"][0] - 0.05, "another classifier of the bank would be seen"
    assert found["top1"][0] >= max(plain.values()) - 0.03, "the chosen learning rate is a good one"


def test_few_labels_are_logistic_regression_of_each_draw(subject: FrozenFeatures) -> None:
    found = FewLabels([0.1, 1.0], draws=3).evaluate(subject, MagicMock())
    for name, images, draws in (("labels_10%", N // 10, 3), ("labels_100%", N, 1)):
        values = []
        for draw in range(draws):
            rows = stratified(subject.train_labels, draw)[:images]
            x, test = standard(subject, rows)
            (l2,) = found[name][f"l2_draw{draw + 1}"]
            theirs = LogisticRegression(C=1 / (images * l2), tol=1e-8, max_iter=5000)
            values.append(right(theirs.fit(x.double(), subject.train_labels[rows]).predict(test.double()), subject))
        assert found[name]["top1"] == pytest.approx([np.mean(values)], abs=2 / N)
        if draws > 1:
            assert found[name]["sd"] == pytest.approx([np.std(values, ddof=1)], abs=3 / N)
    assert "sd" not in found["labels_100%"], "there is one way to take all"


def test_every_class_is_held_out_and_trained_on() -> None:
    labels = torch.tensor([0] * 900 + [1] * 80 + [2] * 20)
    for draw in range(20):
        drawn = labels[stratified(labels, draw)[:100]]
        validation = stratified_validation_split(drawn)
        assert drawn[validation].unique().tolist() == drawn[~validation].unique().tolist() == [0, 1, 2]
        assert validation.sum() == 9 + 1 + 1 or validation.sum() == 8 + 1 + 1
    assert not stratified_validation_split(torch.tensor([0, 1, 1]))[0], "the only image of a class is used for training"
    assert stratified_validation_split(torch.zeros(40, 3, dtype=torch.long)).sum() == 4


def test_intervals_are_wilson_s() -> None:
    z = norm.ppf(0.975)
    for wrong, n in ((0, 100), (3, 100), (50, 128)):
        (row,) = probe_rows("knn20", {"pooled": 1.0}, {"top1": [1 - wrong / n]}, n)
        p, share = 1 - wrong / n, z**2 / n
        middle, half = (p + share / 2) / (1 + share), math.sqrt(p * (1 - p) * share + share**2 / 4) / (1 + share)
        assert row["low"] == pytest.approx(middle - half)
        assert row["high"] == pytest.approx(middle + half)
        assert row["low"] < row["high"] <= 1, "certainty is never claimed"


# -- what is checked beforehand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rates": []}, "Probes.learning_rates []"),
        ({"learning_rates": [0.1, -1.0]}, "Probes.learning_rates [0.1, -1]"),
        ({"learning_rates": [7.5]}, "at most 7"),
        ({"weight_decays": []}, "Probes.weight_decays []"),
        ({"weight_decays": [-1e-3]}, "Probes.weight_decays [-0.001]"),
        ({"weight_decays": [1.0]}, "0 to 0.77"),
        ({"train_images": 0}, "Probes.train_images 0"),
    ],
)
def test_options_of_the_monitor(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        Probes(**options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_called_stable_is_and_more_is_not() -> None:
    x = torch.tensor([1.0, -1.0]).repeat(32)[:, None]  # the largest curvature that there can be: one feature
    labels = torch.arange(64) // 2 % 2  # nothing to learn: the weights should vanish
    sizes = {}
    for factor in (0.98, 1.1):
        rate, decay = 7.0, highest_decay(7.0) + (factor - 1) * 7.6 / 7
        bank = ProbeBank({"a": 1}, 2, [rate], [decay])
        for _ in range(3):
            bank.step({"a": x}, labels, rate=0.0)  # mean and deviation alone
        bank.weight.add_(1e-3 * torch.randn(bank.weight.shape, generator=torch.Generator().manual_seed(0)))
        for _ in range(400):
            bank.step({"a": x}, labels)
        sizes[factor] = float(bank.weight.abs().max())
    assert sizes[0.98] < 1e-3 < 0.1 < sizes[1.1]


def digits(monkeypatch: pytest.MonkeyPatch, keep: Any) -> DataModule:
    """Digits of which some classes are kept, or lose their labels."""
    from ssl_geometry.data import datamodule

    load = datamodule.load

    def fewer(*args: Any, **kwargs: Any) -> tuple[Images, Images, list[str]]:
        train, test, names = load(*args, **kwargs)
        train.labels = keep(train.labels)
        return train, test, names

    monkeypatch.setattr(datamodule, "load", fewer)
    data = DataModule("digits", measure_size=100)
    data.setup()
    return data


def test_images_that_no_classifier_can_be_fitted_to_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits(monkeypatch, lambda labels: labels)
    check_images(data, 100, "--train_images 100")
    with pytest.raises(UserError, match="--train_images 9: 9 labelled training images to learn from for 10 classes"):
        check_images(data, 9, "--train_images 9", selects=False)
    data.num_classes = 100
    check_images(data, 100, "--train_images 100", selects=False)
    with pytest.raises(UserError, match="for 100 classes"):
        check_images(data, 100, "--train_images 100")
    data.num_classes = 2
    assert not check_images(data, 4, "--train_images 4"), "folds select; the validation split is empty"
    with pytest.raises(UserError, match=r"--train_images 2: 2 .* too few: no held-out image"):
        check_images(data, 2, "--train_images 2")
    check_images(data, 2, "--train_images 2", selects=False)


def test_one_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits(monkeypatch, torch.zeros_like)
    with pytest.raises(UserError, match=r"DataModule.dataset digits: all .* of one class.*, or so$"):
        check_images(data, 100, "--train_images 100", otherwise=", or so")


def test_fine_tuning_learns_from_labelled_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    digits(monkeypatch, lambda labels: torch.where(torch.arange(len(labels)) % 2 == 0, labels, -1))
    data = LabelledImages(100, dataset="digits", measure_size=100, batch_size=64)
    data.setup()
    labels = torch.cat([batch["label"] for batch in data.train_dataloader()])
    assert len(labels) == 64, "an incomplete batch is dropped"
    assert data.num_train == 100
    assert int(labels.min()) >= 0
    few = LabelledImages(30, dataset="digits", measure_size=100, batch_size=64)
    few.setup()
    assert [len(batch["label"]) for batch in few.train_dataloader()] == [30]


def test_memory_that_a_container_or_a_job_leaves(tmp_path: Path) -> None:
    own, mounted = tmp_path / "cgroup", tmp_path / "mounted"

    def write(folder: Path, files: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")

    step = mounted / "slurm" / "job_1" / "step_0"
    own.write_text("0::/slurm/job_1/step_0\n")
    assert left_in_control_groups(own, mounted) == math.inf
    write(step, {"memory.max": "max"})
    write(step.parent, {"memory.max": 1000, "memory.current": 700, "memory.stat": "anon 500\ninactive_file 150"})
    assert left_in_control_groups(own, mounted) == 450, "the limit of the job holds for its steps"
    write(step, {"memory.max": 600, "memory.current": 500, "memory.stat": "inactive_file 0"})
    assert left_in_control_groups(own, mounted) == 100
    own.write_text("5:cpu:/x\n4:memory:/docker/1\n")
    old = {"memory.limit_in_bytes": 900, "memory.usage_in_bytes": 800, "memory.stat": "total_inactive_file 30"}
    write(mounted / "memory", old)  # in a container, its own group is at the top
    assert left_in_control_groups(own, mounted) == 130
    assert left_in_control_groups(tmp_path / "none", mounted) == math.inf


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "out of memory while measuring a .*: lower --data.eval_",
        ),
        (
            RuntimeError("… can't allocate memory: you tried"),
            ".* 256 or --train_images 90, or name fewer --probes.",
        ),
        (ValueError("all 9 images are of class 0"), "--models a: all 9 images are of class 0"),
        (UserError("--layers x"), "--layers x"),
        (OSError(28, "No space left on device", "x"), "x: No space left on device"),
    ],
)
def test_why_a_network_was_not_measured(error: Exception, line: str) -> None:
    data = SimpleNamespace(eval_batch_size=256)
    options = SimpleNamespace(device="cuda:0", data=data, layers_option="--probes.layers", train_images=90)
    with pytest.raises(UserError, match=f"^{line}"), together(options, "a"):
        raise error


def test_a_fault_of_the_program_is_no_reason() -> None:
    with pytest.raises(RuntimeError, match="else"), together(SimpleNamespace(), "a"):
        raise RuntimeError("something else")


def test_a_network_without_weights_has_layers() -> None:
    assert layer_names(RawPixels(image_size=16), ["pooled"]) == ["pooled"]
