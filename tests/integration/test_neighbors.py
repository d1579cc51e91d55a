"""Neighbourhoods and spectra live: what a moment leaves, what it must find, one line for a mistake."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_geometry.compare import compare
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.fit import main
from ssl_geometry.geometry.manifold import manifold_metrics, same_class_ids
from ssl_geometry.geometry.neighbors import nearest
from ssl_geometry.geometry.nnk import nnk
from ssl_geometry.geometry.spectrum import rankme
from ssl_geometry.measure.engine import measuring
from ssl_geometry.measure.neighbors import SETTINGS
from ssl_geometry.measure.subject import Subject
from ssl_geometry.metrics import InvarianceKNN
from ssl_geometry.records import read_records
from ssl_geometry.report.live import scalars
from ssl_geometry.runs.networks import load_method
from tests.integration.test_fit import options


@pytest.fixture(scope="module")
def runs(manifold_runs: Path) -> Path:
    return manifold_runs


def test_every_manifold_of_every_layer_is_recorded(runs: Path) -> None:
    frame = read_records(runs / "simclr")
    means = frame[frame["metric"] == "diameter"].pivot(index=["epoch", "layer"], columns="view", values="value")
    assert set(means.columns) == {"semantic", *SETTINGS}
    assert {epoch for epoch, _ in means.index} == {0, 1, 2}
    assert {"layer4.0", "pooled"} <= {layer for _, layer in means.index}
    assert means.notna().all(axis=None)
    assert (means >= 0).all(axis=None)
    assert (means <= 2).all(axis=None)
    levels = frame[(frame["metric"] == "neighbors_quantile") & (frame["view"] == "crop") & (frame["layer"] == "pooled")]
    assert len(levels) == 3 * 21
    assert levels[levels["epoch"] == 2].sort_values("low")["value"].is_monotonic_increasing


def test_live_numbers_equal_those_of_the_saved_checkpoint(runs: Path) -> None:
    method = load_method(runs / "simclr").method
    data = DataModule("digits", limit_train=256, limit_test=128, measure_size=128, batch_size=64)
    data.prepare_data()
    data.setup("fit")
    with measuring(method):
        batches = list(data.loader("measure"))
        features = torch.cat([method.features(batch["image"]) for batch in batches])
    labels = torch.cat([batch["label"] for batch in batches])
    order = torch.cat([batch["index"] for batch in batches]).argsort()
    features, labels = features[order], labels[order]
    live = read_records(runs / "simclr").query("epoch == 2 and layer == 'pooled'")
    value = live[live["layer_other"].isna()].set_index(["metric", "view"])["value"]
    ids = same_class_ids(features, labels, 20)
    found = manifold_metrics(features, ids, nnk(features, ids))
    for name in ("neighbors", "diameter", "affinity"):
        assert value[name, "semantic"] == pytest.approx(float(found[name].nanmean()), rel=1e-5)
    purity = (labels[nearest(features, k=20).ids] == labels[:, None]).double().mean()
    assert value["purity", "clean"] == pytest.approx(float(purity), abs=1e-9)
    assert value["rankme", "clean"] == pytest.approx(float(rankme(features)), rel=1e-5)


def test_two_copies_of_all_images_are_compared_by_their_nearest_images(runs: Path) -> None:
    frame = read_records(runs / "simclr").query("metric == 'mutual_knn'")
    values = frame.pivot(index=["epoch", "layer"], columns="view", values="value")
    assert set(values.columns) == set(SETTINGS)
    assert {epoch for epoch, _ in values.index} == {0, 1, 2}
    assert ((values > 0) & (values < 1)).all(axis=None)
    assert (values["rotate"] > 2 * 10 / 127).all(), "well above chance"
    assert set(frame["n"]) == {128}
    method = load_method(runs / "simclr").method
    data = DataModule("digits", limit_train=256, limit_test=128, measure_size=128, batch_size=64)
    data.prepare_data()
    data.setup("fit")
    overlap, view = InvarianceKNN(["pooled"], k=10), Subject.of(method).view("rotate")
    with measuring(method):
        for batch in data.loader("measure"):
            x, y = (
                {"pooled": method.backbone(view(batch["image"], batch["index"], seed=0, epoch=0, view=draw))}
                for draw in (0, 1)
            )
            overlap.update(x, y, index=batch["index"])
    assert values.loc[(2, "pooled"), "rotate"] == pytest.approx(float(overlap.compute()), abs=1e-9)
    shown = [name for name in scalars(frame.to_dict("records")) if "mutual_knn" in name]
    assert "neighbors/policy/mutual_knn/pooled" in shown
    assert all(name.startswith("neighbors/policy/mutual_knn/") for name in shown)


def test_graphs_are_compared_with_the_last_measurement_and_between_layers(runs: Path) -> None:
    frame = read_records(runs / "simclr")
    kept = frame[frame["metric"] == "kept_since_last"]
    assert set(kept["epoch"]) == {1, 2}
    assert kept["value"].between(0, 1).all()
    last = frame.query("metric == 'nnk_jaccard' and epoch == 2")
    overlap = last.pivot(index="layer", columns="layer_other", values="value").to_numpy()
    np.testing.assert_allclose(np.diag(overlap), 1)
    np.testing.assert_allclose(overlap, overlap.T)


def test_figures(runs: Path, tmp_path: Path) -> None:
    names = {path.name for path in (runs / "simclr" / "figures").iterdir()}
    assert {"neighbors_diameter.png", "neighbors_affinity_policy_epochs.png", "spectrum_rankme_depth.png"} <= names
    models = [f"simclr={runs / 'simclr'}", f"supervised={runs / 'supervised'}"]
    out = compare(["--models", *models, f"--out={tmp_path}", "--show_neighbors=[3, 14]", "--invariance.views=[own]"])
    names = {path.name for path in (out / "figures").iterdir()}
    assert {"neighbors_simclr.png", "neighbors_supervised.png", "manifolds_training.png"} <= names


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--neighbors.k=128"], ["--neighbors.k 128: each of 128 measurement images has 127 others"]),
        (["--neighbors.k=1"], ["--neighbors.k 1"]),
        (["--neighbors.copies=2"], ["--neighbors.copies 2"]),
        (["--neighbors.settings=[crops]"], ["crops", "crop"]),
        (["--spectrum.copies=1"], ["--spectrum.copies 1"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(options(tmp_path, "x", "--neighbors.every_n_epochs=1", *args))
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert all(word in line for word in words), line
