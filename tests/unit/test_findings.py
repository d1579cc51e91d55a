"""Verdicts on the findings of Grigg et al. 2021: all three kinds of each, on records whose truth is known."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssl_geometry.findings import GAIN, NO_LEVEL, findings, views_of
from ssl_geometry.geometry.contrast import SMALLEST, Contrast, deviations, interval, verdict
from ssl_geometry.records import record

LAYERS = ["stem", *(f"layer{s}.{b}{kind}" for s in (1, 2, 3, 4) for b in (0, 1) for kind in (".residual", ""))]
LAYERS += ["pooled", "head.0"]
IMAGES = 16
SIMILAR, MEANS, FITS, CLASSES, IMPLICIT, INVARIANT = range(6)
LABELS = {"SimCLR": False, "VICReg": False, "Supervised": True, "untrained": None, "timm": None}
PAIR = {"s": "SimCLR", "t": "Supervised"}
WITH_UNTRAINED = PAIR | {"u": "untrained"}
SEEDS = {f"{name}{seed}": method for name, method in PAIR.items() for seed in range(3)}

Groups = dict[str, str]


def stage(layer: str) -> int:
    """1 to 4; 5 for what comes after the blocks."""
    return int(layer[5]) if layer.startswith("layer") else 5


def records(
    groups: Groups,
    cka: Callable[[str, str, str], float] = lambda a, b, layer: 0.5,
    classes: Callable[[str, str], float] = lambda method, layer: 0.2,
    invariance: Callable[[str, str], float] = lambda method, layer: 0.3,
    layers: list[str] = LAYERS,
    error: float = 0.004,
) -> pd.DataFrame:
    """Records in which every number has its standard error over images, independent of the others."""
    rows: list[dict[str, Any]] = []
    names, depths = list(groups), np.linspace(0, 1, len(layers))
    for place, model in enumerate(names):
        for layer, after, depth in zip(layers, [*layers[1:], None], depths, strict=True):
            at = {"model": model, "layer": layer, "depth": depth}
            for other in names[place:]:
                value = cka(groups[model], groups[other], layer)
                there = {"model_other": other, "layer_other": layer, "depth_other": depth}
                rows.append(record(**at, **there, metric="cka", view="clean", value=value))
                if after:  # the most similar layer is another one
                    rows.append(rows[-1] | {"layer_other": after, "depth_other": depth + 0.01, "value": 0.99})
            rows.append(record(**at, metric="class_cka", view="clean", value=classes(groups[model], layer)))
            value = invariance(groups[model], layer)
            rows += [record(**at, metric="invariance", view=views_of(name), value=value) for name in names]
    blocks = np.random.default_rng(0).normal(size=(len(rows), IMAGES))
    blocks *= error / np.linalg.norm(blocks, axis=1, keepdims=True)
    return pd.DataFrame(rows).assign(deviations=list(blocks))


def judge(frame: pd.DataFrame, groups: Groups) -> pd.DataFrame:
    return findings(frame, groups, {name: LABELS[method] for name, method in groups.items()})


def of_claims(table: pd.DataFrame) -> list[str]:
    """The verdicts on the six claims, in their order."""
    return table.groupby("claim", sort=False)["verdict"].first().tolist()


def verdicts(groups: Groups, **made: Any) -> list[str]:
    return of_claims(judge(records(groups, **made), groups))


def published() -> dict[str, Any]:
    """Values with which every finding holds."""

    def cka(a: str, b: str, layer: str) -> float:
        if a == b or "untrained" in (a, b):
            return 0.9 if a == b else 0.3
        return {4: 0.3}.get(stage(layer), 0.8) - 0.2 * layer.endswith(".residual")

    by_stage = {"SimCLR": [0.1, 0.2, 0.2, 0.1, 0.1], "Supervised": [0.1, 0.2, 0.4, 0.9, 0.9], "untrained": [0.1] * 5}
    invariances = {"SimCLR": [0.2, 0.3, 0.4, 0.6, 0.9]}
    return {
        "cka": cka,
        "classes": lambda method, layer: by_stage[method][stage(layer) - 1],
        "invariance": lambda method, layer: invariances.get(method, [0.3] * 5)[stage(layer) - 1],
    }


def reverse() -> dict[str, Any]:
    """Values with which none does."""

    def cka(a: str, b: str, layer: str) -> float:
        level = 0.9 if "untrained" in (a, b) else 0.8 if stage(layer) == 4 else 0.2
        return level + 0.1 * layer.endswith(".residual")

    return {
        "cka": cka,
        "classes": lambda method, layer: 0.4 - 0.05 * stage(layer) if method == "SimCLR" else 0.1,
        "invariance": lambda method, layer: 0.1 if method == "SimCLR" else 0.1 + 0.1 * stage(layer),
    }


@pytest.mark.parametrize("groups", [WITH_UNTRAINED, SEEDS, SEEDS | {"u0": "untrained", "u1": "untrained"}])
class TestOfThreeKinds:
    def test_all_is_as_published(self, groups: Groups) -> None:
        assert verdicts(groups, **published()) == ["supports"] * 6

    def test_nothing_is(self, groups: Groups) -> None:
        assert verdicts(groups, **reverse()) == ["contradicts"] * 6

    def test_nothing_differs(self, groups: Groups) -> None:
        """The last claim is that something stays away: it is at its edge where just the margin comes."""

        def at_the_margin(method: str, layer: str) -> float:
            return 0.3 + GAIN * (stage(layer) > 3 and method != "untrained")

        def equal(method: str, layer: str) -> float:
            return 0.3

        found = [verdicts(groups, invariance=made) for made in (at_the_margin, equal)]
        assert found[0][INVARIANT] == "undecided"
        assert found[1] == ["undecided"] * 5 + ["supports"]
        assert found[0][:FITS] + found[0][CLASSES:] == ["undecided"] * 5

    def test_what_is_not_known_well_enough_is_undecided(self, groups: Groups) -> None:
        assert verdicts(groups, error=1.0, **published()) == ["undecided"] * 6

    def test_without_an_error_nothing_is_decided(self, groups: Groups) -> None:
        frame = records(groups, **published())
        table = judge(frame.drop(columns="deviations"), groups)
        assert set(table["verdict"]) == {"undecided"}
        assert table["effect"].notna().all()
        assert table[["low", "high"]].isna().all(axis=None)
        one_gram_matrix = judge(frame.assign(deviations=[np.zeros(1)] * len(frame)), groups)
        assert set(one_gram_matrix["verdict"]) == {"undecided"}
        measured = one_gram_matrix["effect"].notna()
        assert one_gram_matrix["over"][measured].str.contains("needs more images").all()


# -- what a verdict must not be helped by ------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), runs=st.sampled_from([1, 3]), spread=st.sampled_from([0.02, 0.3]))
def test_an_untrained_network_never_turns_a_contradiction_into_support(seed: int, runs: int, spread: float) -> None:
    generator = np.random.default_rng(seed)
    trained = {f"{name}{run}": method for name, method in PAIR.items() for run in range(runs)}
    frame = records(trained | {"u": "untrained"})
    frame["value"] += spread * generator.normal(size=len(frame))
    with_it = judge(frame, trained | {"u": "untrained"})
    without = judge(frame[(frame["model"] != "u") & (frame["model_other"] != "u")], trained)
    hard = {"contradicts": 0, "undecided": 1, "supports": 2}
    for before, after in zip(of_claims(without)[1:], of_claims(with_it)[1:], strict=True):
        assert hard[after] <= max(hard[before], 1)
        assert (before, after) != ("contradicts", "supports")


@pytest.mark.parametrize("groups", [PAIR, WITH_UNTRAINED])
def test_a_network_that_became_invariant_is_not_saved_by_an_untrained_one(groups: Groups) -> None:
    def invariance(method: str, layer: str) -> float:
        return {1: 0.2, 4: 0.8 if method == "untrained" else 0.75}.get(stage(layer), 0.4)

    assert verdicts(groups, invariance=invariance)[INVARIANT] == "contradicts"


@pytest.mark.parametrize("error", [1e-6, 0.004])
@pytest.mark.parametrize("groups", [PAIR, WITH_UNTRAINED])
def test_a_hair_decides_nothing(groups: Groups, error: float) -> None:
    """0.021 in the middle and 0.020 at the end, 2e-4 more of the classes: however exactly it is known."""

    def cka(a: str, b: str, layer: str) -> float:
        return 0.021 - 0.001 * (stage(layer) == 4) - 0.0002 * layer.endswith(".residual") - 0.02 * (b == "untrained")

    def classes(method: str, layer: str) -> float:
        return 0.1 + 2e-4 * (method == "Supervised") + 1e-3 * (stage(layer) in (2, 3))

    found = verdicts(groups, cka=cka, classes=classes, error=error)
    assert found[:INVARIANT] == ["undecided"] * 5


def test_intermediate_layers_are_not_the_last_ones() -> None:
    def classes(method: str, layer: str) -> float:
        return 0.4 if stage(layer) == 4 else 0.1

    assert verdicts(PAIR, classes=classes)[IMPLICIT] == "undecided"
    assert verdicts(PAIR, classes=lambda method, layer: 0.1 + 0.1 * (stage(layer) in (2, 3)))[IMPLICIT] == "supports"


def test_the_largest_of_many_noisy_layers_is_no_finding() -> None:
    generator = np.random.default_rng(3)
    frame = records(PAIR, error=0.0005)
    frame.loc[frame["metric"] == "class_cka", "value"] = 0.1 + 0.0005 * generator.normal(size=2 * len(LAYERS))
    assert of_claims(judge(frame, PAIR))[CLASSES : IMPLICIT + 1] == ["undecided"] * 2


def test_similar_needs_a_level() -> None:
    table = judge(records(PAIR, **published()), PAIR)
    of_claim = table[table["claim"].str.contains("similar, and diverge")]
    assert set(of_claim["verdict"]) == {"undecided"}
    assert NO_LEVEL in of_claim["contrast"].tolist()
    assert set(of_claim["baseline"]) == {""}
    assert of_claims(table)[1:] == ["supports"] * 5


def test_an_untrained_network_of_another_architecture_is_no_baseline() -> None:
    groups = WITH_UNTRAINED | {"v": "untrained"}
    labels = {name: LABELS[method] for name, method in groups.items()}
    frame = records(groups, **published())

    def table(**architectures: str) -> pd.DataFrame:
        return findings(frame, groups, labels, dict.fromkeys(groups, "resnet18") | architectures)

    without = frame[~frame["model"].isin(["u", "v"]) & ~frame["model_other"].isin(["u", "v"])]
    pd.testing.assert_frame_equal(table(u="vit", v="vit"), judge(without, PAIR))
    of_one = frame[(frame["model"] != "v") & (frame["model_other"] != "v")]
    pd.testing.assert_frame_equal(table(v="vit"), judge(of_one, WITH_UNTRAINED))
    mixed = table(t="vit", v="resnet18", u="resnet18").set_index("contrast")["effect"]
    assert mixed.index.str.contains("intermediate blocks: nearer to the classes than those of an untrained").any()
    assert not mixed.index.str.contains("last blocks: nearer to the classes than those of an untrained").any()
    assert NO_LEVEL in mixed.index, "of the supervised network's architecture none is untrained"


def test_runs_of_one_method_are_not_those_of_another() -> None:
    """Supervised networks of two methods, one run each short of three: their likeness is no level."""
    groups = {"s": "SimCLR", **{f"t{i}": "Supervised" for i in range(2)}, **{f"m{i}": "Mine" for i in range(2)}}
    table = findings(records(groups), groups, {name: name != "s" for name in groups})
    assert NO_LEVEL in table["contrast"].tolist()
    assert not table["baseline"].str.contains("one method").any()


def test_every_run_is_seen_under_its_own_views() -> None:
    """The second run's network is invariant to its own views alone, the supervised one to those of the first alone."""
    groups = {"s0": "SimCLR", "s1": "SimCLR", "t": "Supervised"}
    frame = records(groups)
    last = (frame["metric"] == "invariance") & (frame["layer"] == "head.0")
    for model, view, value in (("s0", "s0", 0.6), ("s1", "s0", 0.0), ("s1", "s1", 0.8), ("s0", "s1", 0.0)):
        frame.loc[last & (frame["model"] == model) & (frame["view"] == views_of(view)), "value"] = value
    frame.loc[last & (frame["model"] == "t") & (frame["view"] == "views of s0"), "value"] = 0.5
    table = judge(frame, groups)
    (row,) = table[table["contrast"].str.contains("than a supervised network's")].to_dict("records")
    assert row["effect"] == pytest.approx((0.6 + 0.8) / 2 - (0.5 + 0.3) / 2)


def test_methods_are_evaluated_separately_and_unknown_ones_not_at_all() -> None:
    groups = {"s": "SimCLR", "v": "VICReg", "t": "Supervised", "x": "timm"}
    table = judge(records(groups), groups)
    assert len(table["claim"].unique()) == 12
    assert sum("VICReg" in claim for claim in table["claim"].unique()) == 6
    pair = {"t": "Supervised", "x": "timm"}
    assert judge(records(pair), pair).empty
    pair = {"v": "VICReg", "t": "Supervised"}
    table = judge(records(pair), pair)
    assert len(table)
    assert not table.map(str).apply(lambda column: column.str.contains("SimCLR")).any(axis=None)


# -- the layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "middle", "last"),
    [
        ([f"blocks.{i}" for i in range(12)], range(3, 9), range(9, 12)),
        ([f"blocks.{i}" for i in (2, 5, 8, 11)], (1, 2), (3,)),
        ([f"layer{s}.{b}" for s, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for b in range(n)], range(3, 13), range(13, 16)),
        (["layer1.2", "layer2.3", "layer3.5", "layer4.2"], (1, 2), (3,)),
    ],
)
def test_block_groups_are_stages_or_quarters(layers: list[str], middle: Any, last: Any) -> None:
    value = {layer: 2.0**-place for place, layer in enumerate(layers)}
    table = judge(records(WITH_UNTRAINED, cka=lambda a, b, layer: value[layer], layers=layers), WITH_UNTRAINED)
    (numbers,) = table.loc[table["contrast"] == "last blocks: less similar than intermediate ones", "numbers"]
    expected = (np.mean([2.0**-place for place in places]) for places in (middle, last))
    assert numbers == "intermediate {:.3f}, last {:.3f}".format(*expected)


@pytest.mark.parametrize("layers", [["stem", "pooled"], ["features.0", "features.1"], ["layer4.0", "layer4.1"], []])
def test_claims_without_their_layers_are_left_out(layers: list[str]) -> None:
    table = judge(records(WITH_UNTRAINED, layers=layers) if layers else records(PAIR).iloc[:0], WITH_UNTRAINED)
    assert not table["claim"].str.contains("intermediate|similar").any()


def test_other_architectures_are_compared_at_the_nearest_depth() -> None:
    deep = [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in range(3)]
    rows = [
        record(
            model="s",
            model_other="t",
            metric="cka",
            view="clean",
            layer=f"blocks.{i}",
            layer_other=layer,
            depth=i / 7,
            depth_other=j / 11,
            value=1 - abs(i / 7 - j / 11),
        )
        for i in range(8)
        for j, layer in enumerate(deep)
    ]
    table = judge(pd.DataFrame(rows), PAIR)
    (numbers,) = table.loc[table["contrast"] == "last blocks: less similar than intermediate ones", "numbers"]
    away = [min(abs(i / 7 - j / 11) for j in range(12)) for i in range(8)]
    assert numbers == f"intermediate {1 - np.mean(away[2:6]):.3f}, last {1 - np.mean(away[6:]):.3f}"


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_intervals_are_the_jackknife_of_the_whole_contrast() -> None:
    """Numbers of blocks of images and of runs, contrasted first and left out then: written out."""
    generator = np.random.default_rng(1)
    frame = records(SEEDS)
    blocks = 0.3 + 0.1 * generator.normal(size=(len(frame), IMAGES)) + 0.2 * generator.normal(size=IMAGES)
    left_out = (blocks.sum(1, keepdims=True) - blocks) / (IMAGES - 1)
    frame["value"] = blocks.mean(1)
    frame["deviations"] = [deviations(row) for row in left_out]
    table = judge(frame, SEEDS)
    (row,) = table[table["contrast"] == "last blocks: nearer to the classes than those of SimCLR"].to_dict("records")
    classes = frame[(frame["metric"] == "class_cka") & frame["layer"].isin(["layer4.0", "layer4.1"])]

    def contrast(values: np.ndarray, runs: list[str]) -> float:
        of = {run: values[classes.index[classes["model"] == run]].mean() for run in runs}
        ours, theirs = ([value for run, value in of.items() if run[0] == kind] for kind in "st")
        return float(np.mean(theirs) - np.mean(ours))

    names = list(SEEDS)
    images = [contrast(left_out[:, j], names) for j in range(IMAGES)]
    width = (IMAGES - 1) * np.var(images) * stats.t.ppf(0.975, IMAGES - 1) ** 2
    of_run = [blocks.mean(1)[classes.index[classes["model"] == run]].mean() for run in names]
    welch = stats.ttest_ind(of_run[3:], of_run[:3], equal_var=False).confidence_interval()
    width += ((welch.high - welch.low) / 2) ** 2
    assert row["effect"] == pytest.approx(contrast(blocks.mean(1), names))
    assert (row["low"], row["high"]) == pytest.approx((row["effect"] - width**0.5, row["effect"] + width**0.5))
    assert row["over"] == "images, 3 runs of SimCLR, 3 runs of supervised"


def test_errors_that_both_sides_share_cancel_and_opposite_ones_add_up() -> None:
    shared = np.random.default_rng(0).normal(size=IMAGES) * 0.05
    frame = records(PAIR, classes=lambda method, layer: 0.3 + 0.05 * (method == "Supervised"))
    for sign, expected in ((1, "supports"), (-1, "undecided")):
        frame["deviations"] = [shared * (sign if model == "t" else 1) for model in frame["model"]]
        assert of_claims(judge(frame, PAIR))[CLASSES] == expected


def test_one_run_speaks_of_itself() -> None:
    assert set(judge(records(WITH_UNTRAINED, **published()), WITH_UNTRAINED)["over"]) == {"images alone"}


def over(groups: Groups) -> dict[str, str]:
    """Of each contrast, what its interval is over, with runs that differ."""
    frame = records(groups, **published())
    frame["value"] += 1e-3 * np.random.default_rng(0).normal(size=len(frame))
    table = judge(frame, groups).dropna(subset="effect")
    assert table["low"].isna().equals(table["over"].str.contains("needs more runs"))
    return dict(zip(table["contrast"], table["over"], strict=True))


@pytest.mark.parametrize(
    ("groups", "contrast", "expected"),
    [
        (
            {"s0": "SimCLR", "s1": "SimCLR", "t": "Supervised"},
            "last blocks: nearer to the classes than those of SimCLR",
            "images, 2 runs of SimCLR; needs more runs of supervised",
        ),
        (
            {"s0": "SimCLR", "s1": "SimCLR", "t": "Supervised", "u": "untrained"},
            "last blocks: nearer to the classes than those of an untrained network",
            "images alone; needs more runs of supervised and of untrained",
        ),
        (
            {"s0": "SimCLR", "s1": "SimCLR", "t": "Supervised"},
            "intermediate blocks: nearer to the classes than the first ones",
            "images, 2 runs of SimCLR",
        ),
        (  # the claim is about supervised networks; the one of SimCLR lends its views
            {"s": "SimCLR", "t0": "Supervised", "t1": "Supervised"},
            f"from first to last blocks: invariance grows by less than {GAIN}",
            "images, 2 runs of supervised",
        ),
    ],
)
def test_a_single_run_next_to_several_stands_for_no_method(groups: Groups, contrast: str, expected: str) -> None:
    assert over(groups)[contrast] == expected


def test_runs_that_differ_more_than_the_effect_leave_it_undecided() -> None:
    frame = records(SEEDS, **published())
    frame.loc[(frame["metric"] == "class_cka") & (frame["model"] == "s0"), "value"] += 0.6
    assert of_claims(judge(frame, SEEDS))[CLASSES : IMPLICIT + 1] == ["undecided", "supports"]


def test_an_interval_is_students() -> None:
    x = np.random.default_rng(0).normal(1, 2, 12)
    contrast = Contrast(x.mean(), deviations((x.sum() - x) / 11))
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.9)
    assert interval(contrast, 0.9) == pytest.approx(expected)


def test_no_contrast_is_no_verdict() -> None:
    assert verdict([]) == "undecided"
    unknown, clear = Contrast(np.nan, np.zeros(4)), np.array([1e-4, -1e-4])
    assert verdict([Contrast(1.0, clear), unknown]) == "undecided"
    assert verdict([Contrast(-1.0, clear), unknown]) == "contradicts", "what is not known excuses nothing"
    assert verdict([Contrast(SMALLEST, clear)]) == "undecided"


# -- how often it is wrong, and right ----------------------------------------------------------------------------------

simulate = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "verdicts.py"))["simulate"]


ALONE, ONE_EACH, THREE_EACH = {"s": 1, "t": 1}, {"s": 1, "t": 1, "u": 1}, {"s": 3, "t": 3, "u": 3}
UNEQUAL = [{"s": 5, "t": 1}, {"s": 5, "t": 1, "u": 1}, {"s": 1, "t": 3, "u": 1}, {"s": 5, "t": 5, "u": 1}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "images", "seeds", "baseline"),
    [
        (ALONE, 0.2, 0.0, 0.0),
        *((ONE_EACH, 0.2, 0.0, baseline) for baseline in (0.0, 2.0)),
        *((THREE_EACH, 0.1, 0.5, baseline) for baseline in (0.0, 2.0)),
        *((runs, 0.1, 0.5, 0.0) for runs in UNEQUAL),
    ],
)
def test_where_there_is_nothing_a_verdict_is_rare(
    runs: dict[str, int], images: float, seeds: float, baseline: float
) -> None:
    found = simulate(200, runs, 0.0, baseline, images, seeds).sum(1)
    assert found.max() < 0.05 + 2.5 * (0.05 * 0.95 / 200) ** 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_where_there_is_something_it_is_found(sign: int) -> None:
    found = simulate(20, THREE_EACH, sign * 0.15, sign * 0.15, 0.004, 0.02)
    assert found["supports" if sign > 0 else "contradicts"].min() > 0.8
