"""Neighbourhoods of layers as a metric: what is refused, what has none, and who is whose neighbour then."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_geometry.geometry.neighbors import nearest
from ssl_geometry.measure import neighbors
from ssl_geometry.metrics import AugmentationManifolds, Neighborhoods
from ssl_geometry.metrics.neighborhoods import LayerNeighbors

LABELS = torch.arange(60) % 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measured(features: Tensor, labels: Tensor = LABELS, k: int = 10) -> LayerNeighbors:
    metric = Neighborhoods(["layer"], k)
    metric.update({"layer": features}, labels, index=torch.arange(len(features)))
    return metric.compute()["layer"]


MISFITS = [
    ({"b": normal(5, 3)}, torch.zeros(4, dtype=torch.long), "layer b has 5 images, the index 4"),
    ({"b": normal(3, 3)}, torch.zeros(4, dtype=torch.long), "layer b has 3 images, the index 4"),
    ({"b": normal(4, 5)}, torch.zeros(4, dtype=torch.long), "layer b has 5 features, 3 in the batches before"),
    ({}, torch.zeros(5, dtype=torch.long), r"labels of shape \(5,\) for 4 images"),
    ({}, torch.zeros(4, 3, dtype=torch.long), r"labels of shape \(4, 3\) for 4 images"),
]


@pytest.mark.parametrize(("change", "labels", "message"), MISFITS)
def test_a_batch_that_does_not_fit_is_refused_whole(change: dict[str, Tensor], labels: Tensor, message: str) -> None:
    features = {"a": normal(60, 4), "b": normal(60, 3)}
    metric = Neighborhoods(["a", "b"], k=5)
    metric.update(features, LABELS, index=torch.arange(60))
    with pytest.raises(ValueError, match=message):
        metric.update({"a": normal(4, 4), "b": normal(4, 3), **change}, labels, index=torch.arange(60, 64))
    assert torch.equal(metric.compute()["b"].ids, measured(features["b"], k=5).ids)


def test_after_a_reset_layers_may_have_other_widths() -> None:
    metric = Neighborhoods(["a"], k=5)
    for width in (4, 6):
        metric.update({"a": normal(60, width)}, LABELS, index=torch.arange(60))
        assert torch.equal(metric.compute()["a"].ids, nearest(normal(60, width), k=5).ids)
        metric.reset()


def test_an_image_fed_twice_is_reported() -> None:
    metric = Neighborhoods(["a"], k=5)
    metric.update({"a": normal(60, 4)}, LABELS, index=torch.arange(60))
    metric.update({"a": normal(1, 4)}, LABELS[:1], index=torch.tensor([7]))
    with pytest.raises(ValueError, match="Neighborhoods: image 7 was fed twice"):
        metric.compute()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_reported_with_their_layer(bad: float) -> None:
    features = normal(60, 4)
    features[3, 1] = bad
    with pytest.raises(ValueError, match=r"^layer layer: .*1 of 60 vectors are not finite"):
        measured(features)
    with pytest.raises(ValueError, match=r"^layer layer: .*60 of 60 vectors are not finite"):
        measured(torch.full((60, 4), bad))


def test_a_class_of_one_has_no_manifold_and_its_image_has_neighbours() -> None:
    labels = torch.arange(60).clamp_max(1)  # image 0 is alone
    found = measured(normal(60, 4), labels)
    assert all(bool(values[0].isnan()) for values in found.semantic.values())
    assert all(bool(found.semantic[name][1:].isfinite().all()) for name in ("neighbors", "diameter"))
    assert bool((found.ids[0] >= 0).all())
    assert all(np.isfinite(value) for value in found.statistics.values())


def test_a_class_with_fewer_images_than_k_has_fewer_candidates() -> None:
    labels = torch.arange(60) // 4  # three others
    found = measured(normal(60, 8), labels, k=20)
    assert 1 <= float(found.semantic["neighbors"].min()) <= float(found.semantic["neighbors"].max()) <= 3
    assert bool((found.ids >= 0).all()), "the graph is of all classes"


def test_zero_vectors_are_left_out_of_everything_and_the_others_keep_their_numbers() -> None:
    features = normal(60, 4)
    zero = torch.tensor([0, 7, 59])
    features[zero] = 0
    rest = torch.tensor([i for i in range(60) if i not in zero.tolist()])
    with pytest.warns(UserWarning, match="layer layer: 3 of 60 images are all zero"):
        found = measured(features)
    alone = measured(features[rest], LABELS[rest])
    for ids, expected in ((found.ids, alone.ids), (found.nnk_ids, alone.nnk_ids)):
        assert torch.equal(ids[rest], rest[expected].where(expected >= 0, -1))
        assert bool((ids[zero] == -1).all())
    for name, values in found.semantic.items():
        torch.testing.assert_close(values[rest], alone.semantic[name], equal_nan=True)
        assert bool(values[zero].isnan().all())
    assert found.statistics == pytest.approx(alone.statistics, nan_ok=True)


def equal() -> Tensor:
    return torch.full((60, 8), 0.3)


def equal_but_for_rounding() -> Tensor:
    return (1 + normal(8).abs()) * (1 + 6e-8 * normal(60, 8).sign())


def equal_but_for_length() -> Tensor:
    return (1 + normal(8).abs()) * (1 + normal(60, 1).abs())


def three_images() -> Tensor:
    features = torch.zeros(60, 8)
    features[:3] = normal(3, 8)
    return features


@pytest.mark.filterwarnings("ignore:.* are all zero")
@pytest.mark.parametrize("make", [equal, equal_but_for_rounding, equal_but_for_length, three_images])
def test_a_layer_that_does_not_vary_has_no_neighbourhoods_and_is_named(make: Callable[[], Tensor]) -> None:
    metric = Neighborhoods(["fine", "flat"], k=10)
    metric.update({"fine": normal(60, 4), "flat": make()}, LABELS, index=torch.arange(60))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = metric.compute()
    if make is not three_images:
        (warning,) = caught
        assert str(warning.message) == "Neighbourhoods are NaN for layers whose direction does not vary: flat"
    assert bool((found["flat"].ids == -1).all())
    assert bool((found["flat"].nnk_ids == -1).all())
    assert all(bool(values.isnan().all()) for values in found["flat"].semantic.values())
    assert all(np.isnan(value) for value in found["flat"].statistics.values())
    assert found["flat"].statistics.keys() == found["fine"].statistics.keys()
    assert torch.equal(found["fine"].ids, measured(normal(60, 4)).ids)


def test_of_no_graph_nothing_can_be_kept() -> None:
    monitor, common = neighbors.Neighborhoods(), {"run": "a", "model": "a"}
    monitor._depths = {"layer": 1.0}
    with pytest.warns(UserWarning, match="Neighbourhoods are NaN"):
        collapsed = measured(equal())
    assert monitor._kept_since_last({"layer": collapsed}, common) == []
    (row,) = monitor._kept_since_last({"layer": collapsed}, common)
    assert np.isnan(row["value"])
    monitor._kept_since_last({"layer": measured(normal(60, 4))}, common)
    (row,) = monitor._kept_since_last({"layer": measured(normal(60, 4))}, common)
    assert row["value"] == 1


def test_nearly_collapsed_layers_are_measured() -> None:
    features = 1 + 1e-4 * normal(60, 8)
    found = measured(features)
    assert all(np.isfinite(value) for value in found.statistics.values())
    assert torch.equal(found.ids, nearest(features.double(), k=10).ids)


def test_four_images_are_enough() -> None:
    found = measured(normal(4, 3), torch.zeros(4, dtype=torch.long), k=10)
    assert bool((found.ids[:, :3] >= 0).all())
    assert np.isfinite(found.statistics["levina_bickel"])


def test_manifolds_say_once_how_many_images_have_a_copy_without_direction() -> None:
    metric = AugmentationManifolds(["a", "b"], ["crop", "color"])
    views = normal(20, 5, 8)
    broken = views.clone()
    broken[3, 1], broken[5], broken[9, 2, 4] = 0, 0, torch.nan
    for rows in torch.arange(20).split(8):
        crop, color = {"a": views[rows], "b": broken[rows]}, {"a": views[rows], "b": views[rows]}
        metric.update({"crop": crop, "color": color})
    with pytest.warns(UserWarning, match="all zero or not finite: crop b 3 of 20$") as caught:
        found = metric.compute()
    assert len(caught) == 1
    assert found["crop", "b"]["diameter"].isnan().nonzero().flatten().tolist() == [3, 5, 9]
    assert bool(found["crop", "a"]["diameter"].isfinite().all())


def test_dimensions_count_equal_images_once() -> None:
    features = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    statistics = []
    for x in (features, torch.cat([features, features[:40], features[:20]])):
        metric = Neighborhoods(["layer"], k=20)
        metric.update({"layer": x}, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)))
        statistics.append(metric.compute()["layer"].statistics)
    for name in ("two_nn", "levina_bickel"):
        assert statistics[1][name] == pytest.approx(statistics[0][name], rel=1e-6)
