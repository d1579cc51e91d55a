"""Every metric has one name and one unit, and what is measured is in that unit."""

import math
from pathlib import Path

import pytest
import torch

from ssl_geometry.geometry.manifold import manifold_metrics
from ssl_geometry.geometry.nnk import nnk
from ssl_geometry.records.catalogue import METRICS, described

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["angle", "angle_std", "angle_quantile", "angle_random", "angle_random_std"])
def test_angles_are_measured_in_the_unit_that_the_catalogue_states(name: str) -> None:
    twelfth = torch.arange(12, dtype=torch.float64) * math.pi / 6
    circle = torch.stack([twelfth.cos(), twelfth.sin()], 1)
    ids = (torch.arange(12).unsqueeze(1) + torch.tensor([1, -1, 2, -2])) % 12
    measured = float(manifold_metrics(circle, ids, nnk(circle, ids))["angle"][0])
    assert measured == pytest.approx({"degrees": 30, "radians": math.pi / 6}[described(name).unit], rel=1e-5)
    assert described(name).axis.endswith(f"({described(name).unit})")


@pytest.mark.parametrize(
    ("name", "axis", "section"),
    [
        ("val/knn_bf16-mixed", "Validation accuracy, 20-NN, mixed precision (share)", "training"),
        ("train/my_loss", "train/my_loss", "training"),
        ("ridge_probe_mean_per_class", "Accuracy of ridge regression, mean over classes (share)", "probes"),
        ("online_probe_learning_rate", "Accuracy of online probes: learning rate", "probes"),
        ("knn200_majority", "knn200_majority", "probes"),
        ("labels_1%_sd", "labels_1%_sd", "probes"),
        ("nnk_degree", "Neighbours, NNK graph (count)", "neighbors"),
        ("nnk_jaccard", "Jaccard overlap of NNK neighbours (share)", "neighbors"),
        ("neighbors_quantile", "NNK neighbours, quantiles over images (count)", "neighbors"),
        ("transfer/dtd", "transfer/dtd", "other"),
    ],
)
def test_names_made_from_others(name: str, axis: str, section: str) -> None:
    assert (described(name).axis, described(name).section) == (axis, section)


def test_no_two_metrics_share_a_label() -> None:
    assert len({metric.label for metric in METRICS.values()}) == len(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_the_docs_define_every_metric(name: str) -> None:
    assert f"`{name}`" in (DOCS / "metrics.md").read_text()


def test_the_docs_have_every_live_curve() -> None:
    text = (DOCS / "wandb.md").read_text()
    live = {described(name).live for name in [*METRICS, "ridge_probe_l2", "online_probe_learning_rate"]} - {""}
    for curve in live:
        section = curve.partition("/")[0]
        known = (f"`{curve}/<layer>`", f"`{section}/<measure>/<layer>`", f"`{section}/<kind>/<measure>/<layer>`")
        assert any(key in text for key in known[: 1 if section in ("probes", "invariance") else 3]), curve
