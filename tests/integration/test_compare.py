"""``python -m ssl_geometry.compare`` gives the monitors' numbers again, draws them, and says what they say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ssl_geometry.compare import compare, groups_of, main, parse, show_neighbors
from ssl_geometry.data.images import Images
from ssl_geometry.errors import UserError
from ssl_geometry.geometry.neighbors import nearest
from ssl_geometry.geometry.nnk import nnk
from ssl_geometry.measure.similarity import Network
from ssl_geometry.methods import Method, Published, SimCLR, Supervised
from ssl_geometry.records import read_records
from ssl_geometry.report.style import BLOCK
from ssl_geometry.runs.networks import Loaded


@pytest.fixture(scope="module")
def compared(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = [f"simclr={runs / 'simclr'}", f"supervised={runs / 'supervised'}", "untrained=random:5"]
    return compare(["--models", *models, "--out", str(tmp_path_factory.mktemp("compared") / "out")])


def test_it_gives_the_numbers_that_the_monitors_gave(runs: Path, compared: Path) -> None:
    again, keys = read_records(compared), ["layer", "layer_other"]
    live = read_records(runs / "simclr").query("epoch == 2")
    for other in ("simclr", "supervised"):
        left = live[(live["metric"] == "cka") & (live["model_other"] == other)].set_index(keys)
        right = again[(again["metric"] == "cka") & (again["model"] == "simclr") & (again["model_other"] == other)]
        right = right.set_index(keys)
        assert len(left) == len(right) > 100
        assert set(left["protocol"]) == set(right["protocol"])
        np.testing.assert_allclose(left["value"], right["value"].loc[left.index], atol=1e-6)


def test_it_gives_the_invariance_that_the_monitors_gave(runs: Path, compared: Path) -> None:
    again, keys = read_records(compared), ["metric", "layer", "view"]
    for run in ("simclr", "supervised"):
        left = read_records(runs / run).query("metric in ('invariance', 'class_cka')")
        left = left[left["epoch"] == 2].set_index(keys)
        assert left["protocol"].nunique() == (3 if run == "simclr" else 4), "SimCLR's own views are those of simclr"
        right = again[(again["model"] == run) & again["model_other"].isna()].set_index(keys)
        assert len(left) > 30
        np.testing.assert_allclose(left["value"], right["value"].loc[left.index], atol=1e-6)
        np.testing.assert_allclose(left["low"], right["low"].loc[left.index], atol=1e-6)
        assert (left["protocol"] == right["protocol"].loc[left.index]).all()
        assert (left["low"] < left["value"]).any()


def test_invariance_has_the_values_that_it_must_have(compared: Path) -> None:
    rows = read_records(compared).query("metric == 'invariance'")
    assert set(rows["view"]) == {"own", "simclr", "color", "views of simclr", "views of supervised"}
    same = rows.pivot(index=["model", "layer"], columns="view", values="value")
    np.testing.assert_array_equal(same.loc["simclr", "own"], same.loc["simclr", "views of simclr"])
    np.testing.assert_array_equal(same.loc["supervised", "own"], same.loc["supervised", "views of supervised"])
    assert rows["value"].max() <= 1 + 1e-9


def test_the_most_similar_layer_stands_against_what_permuted_images_read(compared: Path) -> None:
    records = read_records(compared)
    key = ["model", "model_other", "layer"]
    found = records[records["metric"].str.startswith("max_cka")].pivot(index=key, columns="metric", values="value")
    assert len(found.reset_index()[["model", "model_other"]].drop_duplicates()) == 3, "every pair of two networks"
    cka = records[(records["metric"] == "cka") & (records["model"] != records["model_other"])]
    blocks = cka[cka["layer"].str.fullmatch(BLOCK) & cka["layer_other"].str.fullmatch(BLOCK)]
    best = blocks.groupby(key)["value"].max()
    np.testing.assert_allclose(found.loc[best.index, "max_cka"], best)
    steps = found["max_cka_p"] * 201
    np.testing.assert_allclose(steps, steps.round())
    assert ((found["max_cka"] > found["max_cka_null"]) == (found["max_cka_p"] <= 0.05)).mean() > 0.9
    assert found["max_cka_null"].between(0, 0.5).all()


def test_it_writes_every_figure_and_the_table(compared: Path) -> None:
    names = {path.name for path in (compared / "figures").iterdir()}
    for stem in ("layers_simclr_supervised", "layers_simclr_simclr", "invariance_and_classes", "invariance_untrained"):
        assert {f"{stem}.png", f"{stem}.pdf"} <= names
    assert "| claim | contrast (positive where the claim holds) |" in (compared / "findings.md").read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--models", "simclr"], ["--models simclr", "NAME=PATH"]),
        (["--models", "a=no/such/run"], ["--models", "no/such/run"]),
        (["--models", "a=random"], ["at least one run"]),
        ([], ["models"]),
        (
            ["--models", "a=random:resnet10", "--data.dataset=digits", "--permutations=-1"],
            ["--permutations -1", "10,000"],
        ),
        (["--models", "a=random:resnet10", "--data.dataset=digits", "--permutations=10001"], ["--permutations 10001"]),
        (["--models", "a=x", "--k", "many"], ["k", "many"]),
        (["--models", "a=x", "--datta.root", "x"], ["--datta.root", "--data.root"]),
        (["--models", "a=x", "--show-neighbors", "3"], ["unknown option '--show-neighbors'", "'--show_neighbors'"]),
        (["--models", "a=x", "--show-neighbors=3"], ["unknown option '--show-neighbors'", "'--show_neighbors'"]),
        (["--models", "a=x", "--overwrite", "true"], ["'true' belongs to no option", "takes no value"]),
        (["--models", "a=x", "--show_neighbors", "many"], ["--show_neighbors", "many"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("given", "numbers"), [([], []), (["3"], [3]), (["0"], [0]), (["[3]"], [3]), (["[3, 14, 3]"], [3, 14])]
)
def test_one_figure_or_several_are_shown_each_once(given: list[str], numbers: list[int]) -> None:
    chosen = ["--show_neighbors", *given] if given else []
    assert parse(["--models", "a=random:resnet10", "--data.dataset=digits", *chosen]).show_neighbors == numbers


@pytest.mark.parametrize(("width", "more"), [(64, True), (2, False)])
def test_a_figure_states_how_many_neighbours_it_leaves_out(width: int, more: bool) -> None:
    features = torch.randn(80, width, generator=torch.Generator().manual_seed(0))
    network = Network("net", False, 1, "resnet10", {}, [], torch.empty(0), torch.empty(0), features=features)
    images = Images(torch.zeros(80, dtype=torch.long), torch.zeros(80, 3, 4, 4, dtype=torch.uint8))
    measured = lambda numbers: images[torch.tensor(numbers)]  # noqa: E731
    data: Any = SimpleNamespace(measured=measured, image_shape=(3, 4, 4), class_names=["zero"])
    figure = show_neighbors(network, data, [5])
    chosen = int(nnk(features, nearest(features, k=50).ids).active[5].sum())
    assert (chosen > 10) == more
    texts = [axes.get_title() for axes in figure.axes]
    (says,) = [text for text in texts if text.startswith("NNK keeps")]
    assert says == f"NNK keeps {chosen}\nof 50" + ", here the 10\nof largest weight" * more
    assert sum("weight 0" in text for text in texts) == min(chosen, 10)


def test_results_are_not_overwritten(runs: Path, compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--models", f"simclr={runs / 'simclr'}", "--out", str(compared)])
    assert "--overwrite" in capsys.readouterr().err


def test_findings_are_contrasts_with_intervals(compared: Path) -> None:
    table = pd.read_parquet(compared / "findings.parquet")
    assert table["claim"].nunique() == 6
    assert set(table["verdict"]) <= {"supports", "contradicts", "undecided"}
    assert set(table["over"]) == {"images alone"}
    assert (table["low"] < table["effect"]).all()
    text = (compared / "findings.md").read_text()
    assert all(claim in text for claim in table["claim"])
    frame = read_records(compared)
    at = frame[(frame["metric"] == "class_cka") & frame["layer"].isin(["layer4.0", "layer4.1"])]
    means = at.groupby("model")["value"].mean()
    (row,) = table[table["contrast"] == "last blocks: nearer to the classes than those of simclr"].to_dict("records")
    assert row["effect"] == pytest.approx(means["supervised"] - means["simclr"])


@pytest.mark.parametrize("layers", ["[stem, pooled]", "layer2.0.residual"])
def test_layers_that_are_no_blocks(tmp_path: Path, layers: str, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--models", "a=random:resnet10@16,random:resnet10@16:1"]
    data = ["--data.dataset=digits", "--data.measure_size=64", "--data.limit_test=64"]
    out = compare(
        [*models, *data, f"--out={tmp_path}", f"--cka.layers={layers}", "--invariance.views=[]", "--permutations=9"]
    )
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert {"layers_a-1_a-1", "layers_a-1_a-2", "layers_a-2_a-2", "invariance_and_classes"} <= figures
    assert pd.read_parquet(out / "findings.parquet").empty, "nothing is claimed of untrained networks"
    assert "| claim | contrast" in (out / "findings.md").read_text()


class Mine(Supervised):
    """Somebody's variant."""


def test_whether_a_network_learned_from_labels_is_its_own_property() -> None:
    assert Mine.learns_from_labels
    assert SimCLR.learns_from_labels is False
    assert Method.learns_from_labels is None
    for family, learned in (("supervised", True), ("prototype", False), ("untrained", None), ("unknown", None)):
        assert Published("resnet10", family=family).learns_from_labels is learned


def test_runs_of_one_recipe_are_one_group() -> None:
    def made(method: type[Method], epoch: int | None = 3, **options: Any) -> tuple[Method, int | None]:
        return method(**{"backbone": "resnet10", "width": 0.25, "image_size": 16} | options), epoch

    def loaded(
        networks: dict[str, tuple[Method, int | None]], configs: dict[str, Any] | None = None
    ) -> dict[str, Loaded]:
        """All by their own names, but for those of several."""
        return {
            name: Loaded(name, *network, "mixed" if name.startswith("mixed") else name, (configs or {}).get(name))
            for name, network in networks.items()
        }

    def config(**trainer: Any) -> dict[str, Any]:
        return {"model": {"class_path": "SimCLR"}, "trainer": trainer}

    networks = {
        "s0": made(SimCLR, seed=0),
        "s1": made(SimCLR, seed=1),
        "early": made(SimCLR, epoch=1),
        "cold": made(SimCLR, temperature=0.1),
        "long": made(SimCLR, seed=2),
        "mine": made(Mine),
        "labels": made(Supervised),
        "mixed-1": made(SimCLR, lr=1.0),
        "mixed-2": made(SimCLR, lr=2.0),
        "twin": made(SimCLR, epoch=None),
        "fresh": (Published("resnet10", family="untrained"), None),
        "wide": made(SimCLR, epoch=None, backbone="resnet18"),
        "byol": (Published("resnet10", family="non-contrastive", source="byol"), 0),
        **{name: (Published("resnet10", family="contrastive", source=name), 200) for name in ("moco-v1", "moco-v2")},
        "timm": (Published("resnet10", source="timm:resnet10"), 0),
    }
    configs = {"s0": config(max_epochs=3), "s1": config(max_epochs=3), "long": config(max_epochs=9)}
    assert groups_of(loaded(networks, configs)) == {
        **dict.fromkeys(("s0", "s1"), "s0 + s1"),
        **{
            name: name
            for name in ("early", "cold", "long", "mine", "labels", "wide", "byol", "timm", "moco-v1", "moco-v2")
        },
        **dict.fromkeys(("mixed-1", "mixed-2"), "mixed"),
        **dict.fromkeys(("twin", "fresh"), "twin + fresh"),
    }
    many = {f"a-long-name-{seed}": made(SimCLR, seed=seed) for seed in range(4)}
    assert set(groups_of(loaded(many)).values()) == {"a-long-name-0 + 3 more"}
    for name in ("untrained", "supervised"):
        with pytest.raises(UserError, match=f"--models {name}=…: the findings call others so"):
            groups_of(loaded({name: made(SimCLR)}))
