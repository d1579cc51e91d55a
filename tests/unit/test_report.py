"""Figures show the rows that they are given, and nothing else; records keep what they are given."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from ssl_geometry.records import RecordStore, read_records, record
from ssl_geometry.report.curves import cka_curves, compare_curves, layer_curves
from ssl_geometry.report.heatmaps import cka_heatmap, view_heatmap
from ssl_geometry.report.live import curve_rows, live_figures
from ssl_geometry.report.models import collapse_over_training, correlation_map
from ssl_geometry.report.pairs import LARGEST, SAME, pair_panels


def rows(other: str = "b", epoch: int = 3) -> list[dict[str, Any]]:
    values = np.array([[0.1, 0.9, np.nan], [0.4, -0.05, 0.2]])
    return [
        record(
            model="a", model_other=other, metric="cka", layer=f"l{i}", layer_other=f"k{j}", depth=float(i),
            depth_other=j / 2, epoch=epoch, step=7, n=64, value=float(values[i, j]),
        )
        for i in range(2)
        for j in range(3)
    ]  # fmt: skip


def test_a_map_shows_every_value_first_layer_below(tmp_path: Path) -> None:
    figure = cka_heatmap(list(reversed(rows())))
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), [[0.1, 0.9, np.nan], [0.4, -0.05, 0.2]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["l0", "l1"]
    assert axes.get_ylim() == (-0.5, 1.5)
    assert axes.images[0].get_clim() == (-0.05, 1), "an unbiased estimate below 0 is shown, not cut off"
    dots = axes.collections[0].get_offsets()
    np.testing.assert_array_equal(dots, [[1, 0], [0, 1]])
    figure.savefig(tmp_path / "map.png")


def test_a_map_of_nothing_but_nan_is_still_drawn(tmp_path: Path) -> None:
    frame = pd.DataFrame(rows()).assign(value=np.nan)
    cka_heatmap(frame).savefig(tmp_path / "map.png")


def test_a_map_needs_one_pair_and_one_epoch() -> None:
    with pytest.raises(ValueError, match="select one"):
        cka_heatmap(rows() + rows(epoch=4))
    with pytest.raises(ValueError, match="select one"):
        cka_heatmap([])


@pytest.mark.parametrize("against", ["depth", "epoch"])
def test_curves_show_every_row_once(against: Any) -> None:
    frame = pd.DataFrame([row for epoch in (1, 2, 5) for row in rows(epoch=epoch) if row["layer_other"] == "k0"])
    figure: Figure = cka_curves(frame, against=against)
    points = sorted((x, y) for line in figure.axes[0].lines for x, y in zip(*line.get_data(), strict=True))
    assert points == sorted(zip(frame[against], frame["value"], strict=True))
    assert len(figure.axes[0].lines) == (3 if against == "depth" else 2)


@pytest.mark.parametrize(
    ("metric", "view", "says"),
    [
        ("diameter", "semantic", "Diameter of the NNK polytope, semantic manifolds"),
        ("affinity", "policy", "Affinity of neighbouring polytopes, policy manifolds"),
        ("invariance", "own", "CKA of two augmented views, own views"),
        ("ridge_probe", "clean", "Accuracy of ridge regression"),
    ],
)
@pytest.mark.parametrize("model", ["simclr", "resnet18-cifar10-simclr-2026-11-21-temperature-0.1-batch-1024-seed-3"])
def test_titles_state_what_is_shown_of_how_many_images_and_fit(metric: str, view: str, says: str, model: str) -> None:
    known = [
        record(model=model, metric=metric, view=view, layer=f"l{i}", depth=i, epoch=epoch, n=100 + i + epoch, value=0.5)
        for epoch in range(2)
        for i in range(3)
    ]
    figure = layer_curves(known, "epoch")
    title = figure.axes[0].title
    first, rest = title.get_text().split("\n", 1)
    assert first == says
    assert rest.replace("\n", "").replace(" ", "") == f"{model},103images", (
        "the images that had a value are fewest in l0"
    )
    figure.canvas.draw()
    left, right = title.get_window_extent().intervalx
    assert 0 <= left < right <= figure.bbox.width


def rankme(*epochs: int, layers: int = 3, value: float = 0.5) -> list[dict[str, Any]]:
    return [
        record(
            run="a", model="a", metric="rankme", view="clean", layer=f"l{i}", depth=i, epoch=epoch, n=64, value=value
        )
        for epoch in epochs
        for i in range(layers)
    ]


@pytest.mark.parametrize(
    ("measured", "names"),
    [
        (rankme(0), ["spectrum/rankme_depth"]),
        (rankme(0, 1), ["spectrum/rankme_depth", "spectrum/rankme_epochs"]),
        (rankme(0, 1, layers=1), ["spectrum/rankme_epochs"]),
        (rankme(0, value=float("nan")), []),
        ([{**row, "model": "teacher"} for row in rankme(0)], ["spectrum/teacher/rankme_depth"]),
    ],
    ids=["one epoch", "two epochs", "one layer", "no number", "another network"],
)
def test_lines_are_drawn_where_there_is_more_than_a_point(measured: list[dict[str, Any]], names: list[str]) -> None:
    assert list(live_figures(measured, curve_rows(measured))) == names


@pytest.mark.parametrize(("epoch", "step", "says"), [(0, 0, "epoch 0, 64"), (0, None, "64"), (3, None, "epoch 3, 64")])
def test_a_network_of_somewhere_else_has_no_epoch(epoch: int, step: int | None, says: str) -> None:
    found = [{**row, "step": step} for row in rows(epoch=epoch)]
    assert cka_heatmap(found).axes[0].get_title() == f"CKA of a with b\n{says} images"


def test_collapse_over_training_shows_what_was_measured_each_network_in_its_colour() -> None:
    known = pd.DataFrame(rankme(0, 1, layers=1))
    frame = pd.concat([known, known.assign(metric="mean_cosine"), known.assign(metric="mean_cosine", model="b")])
    frame = pd.concat([frame, known.assign(model="c")])
    figure = collapse_over_training(frame, "l0", "")
    panels = {axes.get_title(): [line.get_color() for line in axes.lines] for axes in figure.axes}
    assert list(panels) == ["Mean cosine of two images", "RankMe (dimensions)"], "no panel of the diameter"
    (a, b), (also_a, c) = panels.values()
    assert a == also_a
    assert len({a, b, c}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]


def test_a_colour_bar_stands_next_to_several_lines_alone() -> None:
    assert [len(layer_curves(rankme(*epochs), "depth").axes) for epochs in ((4,), (4, 5))] == [1, 2]


@pytest.mark.parametrize("layers", [1, 12])
def test_what_the_dots_of_a_map_are_stands_inside_of_it(layers: int) -> None:
    figure = cka_heatmap(pair([f"l{i}" for i in range(layers)], ["k0"] * 1))
    figure.canvas.draw()
    left, right = figure._supxlabel.get_window_extent().intervalx  # type: ignore[attr-defined]
    assert 0 <= left < right <= figure.bbox.width


def pair(layers: list[str], others: list[str]) -> pd.DataFrame:
    """CKA of all pairs of layers of two networks."""
    return pd.DataFrame(
        [
            record(model="a", model_other="b", metric="cka", layer=x, layer_other=y, depth=i, depth_other=j, n=64,
                   value=0.9 - 0.1 * abs(i - j))
            for i, x in enumerate(layers)
            for j, y in enumerate(others)
        ]
    )  # fmt: skip


RESNET = ["stem", "layer1.0.residual", "layer1.0", "layer2.0.residual", "layer2.0", "pooled", "head.0"]


@pytest.mark.parametrize(
    ("layers", "others", "drawn"),
    [
        (RESNET, RESNET, [2, 4]),
        (["stem", "pooled"], ["stem", "pooled"], [0, 1]),
        (["features.0", "features.1", "head"], RESNET, [0, 1]),
        (["stem", "blocks.0", "blocks.1"], ["stem", "pooled"], [1, 2]),
        (["head.0"], ["head.0"], []),
    ],
)
def test_curves_of_a_pair_show_blocks_or_where_there_are_none_all_layers(
    tmp_path: Path, layers: list[str], others: list[str], drawn: list[int]
) -> None:
    figure = pair_panels(pair(layers, others), pair(layers, others))
    panel = figure.axes[3]
    lines = {line.get_label(): line for line in panel.lines}
    for name in (SAME, LARGEST):
        assert list(lines[name].get_xdata()) == drawn
    order = [line.get_label() for line in panel.lines]
    assert order.index(LARGEST) < order.index(SAME), "the same layer is often the most similar one: it is drawn above"
    assert lines[SAME].get_linewidth() < lines[LARGEST].get_linewidth() / 2
    figure.savefig(tmp_path / "pair.png")


@pytest.mark.parametrize(
    ("layers", "drawn"),
    [
        (RESNET, 3),
        (["stem", "pooled"], 2),
        (["features.0", "features.1", "head"], 3),
        (["stem", "layer1.0.residual"], 2),
    ],
)
def test_curves_over_depth_are_of_blocks_and_heads_or_of_all_layers(layers: list[str], drawn: int) -> None:
    rows = [record(model="a", layer=x, depth=i / 10, n=64, value=0.5) for i, x in enumerate(layers)]
    figure = compare_curves({"A title": rows}, {"a": "a"})
    assert len(figure.axes[0].lines[0].get_xdata()) == drawn
    assert not figure.get_suptitle()
    with pytest.raises(ValueError, match="no rows"):
        compare_curves({"A title": []}, {})


@pytest.mark.parametrize(
    ("metric", "values", "bar", "ends"),
    [
        ("invariance", (0.4, 0.6), (3.0, 4.0), (-0.1, 1.1)),
        ("class_cka", (0.9, 0.95), (0.01, 0.02), (0.89, 0.97)),
        ("class_cka", (0.02, 0.06), (0.01, 0.02), (0.0, 0.08)),
        ("class_cka", (-0.2, 0.4), (3.0, 0.1), (-0.2, 0.5)),
        ("logistic_probe", (0.5, 0.7), (0.1, 0.6), (0.0, 1.3)),
        ("class_cka", (0.5, np.nan), (np.nan, np.nan), (0.5, 0.5)),
        ("class_cka", (np.nan, np.nan), (np.nan, np.nan), (0.0, 1.0)),
    ],
)
def test_vertical_axes_follow_what_is_drawn(metric: str, values: Any, bar: Any, ends: Any) -> None:
    rows = [
        record(model="a", metric=metric, layer=f"layer{i}.0", depth=i, value=value, low=value + low, high=value + high)
        for i, (value, low, high) in enumerate(zip(values, (-bar[0], -bar[0]), (bar[1], bar[1]), strict=True))
    ]
    bottom, top = compare_curves({"A title": rows}, {"a": "a"}).axes[0].get_ylim()
    room = (ends[1] - ends[0]) or ends[1]
    assert (bottom, top) == pytest.approx((ends[0] - 0.03 * room, ends[1] + 0.1 * room))


def test_figures_of_a_comparison_say_what_their_marks_are() -> None:
    assert pair_panels(pair(RESNET, RESNET), pair(RESNET, RESNET)).get_supxlabel().startswith("white dots: ")
    expected = {
        ("stem", "pooled"): "",
        ("stem", "head"): "hollow",
        ("layer1.0", "head.0"): "hollow points: layers of the ",
    }
    for layers, note in expected.items():
        rows = [record(model="a", layer=x, depth=i, n=64, value=0.5) for i, x in enumerate(layers)]
        below = compare_curves({"A title": rows}, {"a": "a"}).get_supxlabel()
        assert below.startswith(note)
        assert bool(below) == bool(note)
        assert ("BG: block group" in below) == ("layer1.0" in layers)


def test_views_under_several_names_are_one_column() -> None:
    views = {"own": "p1", "flip": "p2", "views of a": "p1", "unknown": None, "other": None}
    rows = [
        record(model="a", epoch=0, metric="invariance", layer=x, depth=i, n=9, value=0.5, view=view, protocol=protocol)
        for i, x in enumerate(("stem", "pooled"))
        for view, protocol in views.items()
    ]
    columns = [tick.get_text() for tick in view_heatmap(rows).axes[0].get_xticklabels()]
    assert columns == ["own\n= views of a", "flip", "unknown", "other"]


@pytest.mark.parametrize("metrics", [3, 18])
def test_the_label_of_a_colour_bar_is_whole(metrics: int) -> None:
    names = [f"translate neighbors {i}" for i in range(metrics)]
    figure = correlation_map(pd.DataFrame(np.eye(metrics), names, names), 12, "Manifold graph metrics (means)")
    figure.canvas.draw()
    below, above = figure.axes[1].yaxis.label.get_window_extent().intervaly
    assert 0 <= below < above <= figure.bbox.height


def test_records_are_replaced_by_part_and_survive_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RecordStore(tmp_path / "records")
    store.write("cka/epoch=00001", rows())
    store.write("cka/epoch=00001", rows())
    store.write("cka/epoch=00002", rows(epoch=2))
    assert len(read_records(tmp_path)) == 12

    def half(table: Any, path: Path) -> None:
        path.write_bytes(b"PAR1 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssl_geometry.records.store.pq.write_table", half)
    with pytest.raises(OSError, match="No space"):
        store.write("cka/epoch=00002", rows(epoch=2))
    assert len(read_records(tmp_path)) == 12
    assert not list(tmp_path.glob("**/*.partial"))


def test_a_run_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no records here"):
        read_records(tmp_path)
