"""``python -m ssl_geometry.survey``: live numbers again, resumption, processes, known invariances, mistakes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_geometry import survey as command
from ssl_geometry import survey_options, survey_tables
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError
from ssl_geometry.measure import Neighborhoods, Spectrum
from ssl_geometry.measure.neighbors import SETTINGS
from ssl_geometry.methods import Method, Published
from ssl_geometry.probe import probe
from ssl_geometry.records import read_records
from ssl_geometry.report.survey import metric_table
from ssl_geometry.runs.networks import Loaded, load_networks
from ssl_geometry.survey import main, survey
from ssl_geometry.survey_prediction import PUBLISHED, predict, read_targets, recipes_of
from tests.processes import finish, start_ranks
from tests.unit.test_datasets import pixels, save

SMALL = ["--neighbors.k=20", "--neighbors.copies=4", "--spectrum.copies=4"]


@pytest.fixture(scope="module")
def runs(manifold_runs: Path) -> Path:
    return manifold_runs


def models(runs: Path) -> list[str]:
    trained = [f"{name}={runs / name}" for name in ("simclr", "supervised")]
    return ["--models", *trained, "untrained=random", "other=random:1"]


@pytest.fixture(scope="module")
def surveyed(runs: Path) -> Path:
    return survey([*models(runs), f"--out={runs.parent / 'survey'}", *SMALL])


def times(out: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (out / "records" / "models").iterdir()}


class TestASurvey:
    def test_gives_the_live_numbers_again(self, runs: Path, surveyed: Path) -> None:
        again = read_records(surveyed)
        for model in ("simclr", "supervised"):
            keys = ["metric", "view", "layer", "low"]
            live = read_records(runs / model).query("epoch == 2 and layer_other.isna()", engine="python")
            kinds = "neighbors|diameter|affinity|rankme|lidar|mean_cosine|purity|mutual_knn"
            left = live[live["metric"].str.match(kinds)]
            left = left[~left["layer"].str.startswith("head")].assign(low=left["low"].fillna(-1)).set_index(keys)
            right = again[(again["model"] == model) & again["layer_other"].isna()]
            right = right.assign(low=right["low"].fillna(-1)).set_index(keys)
            assert len(left) > 300
            np.testing.assert_array_equal(right.loc[left.index, "value"], left["value"])
            both = right.loc[left.index, "protocol"] == left["protocol"]
            assert both.all(), "the same protocol, by its hash"

    def test_leaves_tables_and_figures(self, surveyed: Path) -> None:
        figures = {path.name for path in (surveyed / "figures").iterdir()}
        names = ("profiles", "collapse", "collapse_training", "tree", "map")  # three recipes are not correlated
        assert figures == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
        table = pd.read_parquet(surveyed / "tables" / "mgm.parquet")
        assert table.shape == (4, 6 * 3 * 3)
        assert table.notna().all(axis=None)
        text = (surveyed / "tables" / "mgm.md").read_text()
        assert "# Diameter" in text
        assert (
            f"{table.loc['simclr', 'crop diameter mean']:.3f} ± {table.loc['simclr', 'crop diameter std']:.3f}" in text
        )
        assert r"\begin{tabular}" in (surveyed / "tables" / "mgm.tex").read_text()
        place = pd.read_parquet(surveyed / "tables" / "map.parquet")
        assert place["family"].tolist() == ["SimCLR", "Supervised", "untrained ResNet", "untrained ResNet"]

    def test_started_again_it_measures_what_is_missing_or_has_changed(
        self, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        few = [f"--out={tmp_path / 'out'}", "--neighbors.layers=pooled", "--neighbors.settings=[crop, color]"]
        arguments, surveyed = [*models(runs), *few], tmp_path / "out"  # k and copies are those of the runs
        survey(arguments)
        before = times(surveyed)
        (surveyed / "tables" / "correlation.md").write_text("of more models")
        survey(arguments)
        assert times(surveyed) == before
        assert "no correlations of metrics: 3 of the 4 recipes that they need (--recipes)" in capsys.readouterr().err
        assert not list(surveyed.glob("*/correlation.*")), "nothing of more recipes stands beside these"
        (surveyed / "records" / "models" / "supervised.parquet").unlink()
        survey(arguments)
        assert {name for name, time in times(surveyed).items() if time != before[name]} == {"supervised"}
        for key, value in (("weights", "of another initialisation"), ("protocols", ["of another version"])):
            facts = json.loads((surveyed / "models.json").read_text())
            facts["untrained"][key] = value
            (surveyed / "models.json").write_text(json.dumps(facts))
            between = times(surveyed)
            survey(arguments)
            assert {name for name, time in times(surveyed).items() if time != between[name]} == {"untrained"}
        more = [*models(runs), "third=random:2", *few]
        between = times(surveyed)
        survey(more)
        assert {name for name, time in times(surveyed).items() if time != between.get(name)} == {"third"}
        between = times(surveyed)
        survey([*arguments, "--overwrite"])
        assert between.keys() - times(surveyed).keys() == {"third"}
        assert all(time != between[name] for name, time in times(surveyed).items())

    def test_two_processes_give_the_numbers_of_one(self, runs: Path, tmp_path: Path) -> None:
        arguments = [
            "--models",
            f"simclr={runs / 'simclr'}",
            "untrained=random",
            *SMALL,
            "--device=cpu",
            "--data.eval_batch_size=50",
            "--neighbors.layers=pooled",
            "--neighbors.settings=[policy, crop]",
        ]
        several = [*arguments, f"--out={tmp_path / 'survey'}"]
        processes = start_ranks(2, several, tmp_path / "printed", command="ssl_geometry.survey")
        assert [finish(process) for process in processes] == [0, 0], (tmp_path / "printed").read_text()[-3000:]
        survey([*arguments, f"--out={tmp_path / 'one'}"])
        keys = ["model", "metric", "view", "layer", "low"]
        left, right = (
            read_records(path).assign(low=lambda rows: rows["low"].where(rows["metric"].str.endswith("quantile"), -1))
            for path in (tmp_path / "one", tmp_path / "survey")
        )
        left, right = (frame.fillna({"layer_other": ""}).sort_values([*keys, "layer_other"]) for frame in (left, right))
        assert len(left) == len(right) > 100
        np.testing.assert_allclose(right["value"], left["value"], rtol=1e-9, atol=1e-12)


# -- encoders whose invariances are known ------------------------------------------------------------------------------


class Known(Method):
    """A method whose features are a given function of the view."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"backbone": "resnet10", "width": 0.25, "image_size": 16, "channels_last": False, **kwargs})
        self.backbone = nn.Sequential()
        self.backbone.add_module("pooled", self.Features())


class Silhouette(Known):
    """Sees where images of two colours are bright, whatever the colours: 1 + the mask."""

    class Features(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gray = x.mean(1)
            ends = gray.flatten(1).aminmax(dim=1)
            middle = (ends.min + ends.max) / 2
            return 1 + (gray > middle[:, None, None]).float().flatten(1)


class Rings(Known):
    """Sees how bright an image is at each distance from its middle, whatever the angle."""

    class Features(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            axis = torch.arange(16) - 7.5
            ring = (axis[:, None] ** 2 + axis**2).sqrt().long()
            inside = torch.nn.functional.one_hot(ring.flatten()).float()[:, :8]  # the corners leave the image
            return 0.05 + x.mean(1).flatten(1) @ inside / inside.sum(0)


class Pixels(Known):
    """Sees everything."""

    class Features(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.05 + x.flatten(1)


class Constant(Known):
    """Sees nothing."""

    class Features(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), 6)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Images of two greys, off-centre blobs of four classes, seen by each encoder."""
    folder, generator = tmp_path_factory.mktemp("known"), np.random.default_rng(0)
    for split, each in (("train", 4), ("test", 16)):
        for name in range(4):
            (folder / "data" / split / str(name)).mkdir(parents=True)
            for number in range(each):
                image = np.full((16, 16), 60, np.uint8)
                top, left = generator.integers(2, 7, 2)
                image[top : top + 4 + name, left : left + 8 - name] = 190
                Image.fromarray(image).convert("RGB").save(folder / "data" / split / str(name) / f"{number}.png")
    made = (Silhouette, Rings, Pixels, Constant)
    networks = {cls.__name__: Loaded(cls.__name__, cls(), 0, cls.__name__) for cls in made}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load_networks", lambda specs: dict(networks))
        data = [
            f"--data.dataset={folder / 'data'}",
            "--data.measure_size=64",
            "--neighbors.k=10",
            "--neighbors.copies=8",
        ]
        names = [f"{name}=x" for name in networks]
        out = survey(["--models", *names, f"--out={folder / 'out'}", "--neighbors.layers=pooled", *data])
    return read_records(out)


def diameter(frame: pd.DataFrame, model: str, view: str) -> float:
    rows = frame[(frame["model"] == model) & (frame["view"] == view) & (frame["metric"] == "diameter")]
    return float(rows["value"].iloc[0])


class TestKnownInvariances:
    def test_an_encoder_that_ignores_colour_has_points_for_colour_manifolds(self, known: pd.DataFrame) -> None:
        assert diameter(known, "Silhouette", "color") == 0
        assert diameter(known, "Pixels", "color") > 0.045
        assert min(diameter(known, "Silhouette", view) for view in ("crop", "rotate", "translate")) > 0.1

    def test_an_encoder_that_ignores_rotation_has_narrow_rotation_manifolds(self, known: pd.DataFrame) -> None:
        narrow = diameter(known, "Rings", "rotate") / diameter(known, "Rings", "translate")
        wide = diameter(known, "Pixels", "rotate") / diameter(known, "Pixels", "translate")
        assert narrow < 0.35 * wide

    def test_a_constant_encoder_is_a_point_everywhere(self, known: pd.DataFrame) -> None:
        for view in SETTINGS:
            assert diameter(known, "Constant", view) == 0
        assert np.isnan(diameter(known, "Constant", "semantic")), "copies of an image are no neighbours of it"
        of = known[known["model"] == "Constant"].set_index("metric")["value"]
        assert of["mean_cosine"] == pytest.approx(1)
        assert of["rankme"] == pytest.approx(1, abs=1e-4)


# -- prediction --------------------------------------------------------------------------------------------------------


def table_of(values: np.ndarray, names: list[str]) -> pd.DataFrame:
    columns = pd.MultiIndex.from_tuples([("crop", f"m{i}", "mean") for i in range(values.shape[1])])
    return pd.DataFrame(values, index=names, columns=columns)


def test_what_predicts_is_found_and_what_does_not_is_not() -> None:
    generator = np.random.default_rng(0)
    names = [f"model{i}" for i in range(14)]
    values = generator.normal(size=(14, 6))
    truth = 60 + 5 * values[:, 2]
    rows = [
        {"task": "linear", "dataset": dataset, "model": name, "value": value + shift}
        for dataset, shift in (("cars", 0), ("pets", 3))
        for name, value in zip(names, truth, strict=True)
    ]
    rows += [{"task": "noise", "dataset": "d", "model": name, "value": generator.normal()} for name in names]
    rows += [{"task": "few", "dataset": "d", "model": name, "value": 1.0 * i} for i, name in enumerate(names[:3])]
    baseline = {name: 70 - value / 10 for name, value in zip(names, truth, strict=True)}
    alone = {name: name for name in names}
    tasks, predicted = predict(table_of(values, names), pd.DataFrame(rows), baseline, alone)
    tasks = tasks.set_index("task")
    assert list(tasks.index) == ["linear: cars", "linear: pets", "noise: d", "linear: mean of 2"]
    for task in ("linear: cars", "linear: mean of 2"):
        assert tasks.loc[task, "best metric"] == "crop m2 mean"
        assert tasks.loc[task, "p (Holm)"] < 0.01
        assert tasks.loc[task, "ridge Q2"] > 0.8
        assert tasks.loc[task, "ImageNet rho"] == pytest.approx(-1)
        assert tasks.loc[task, "ImageNet Q2"] > 0.95
        assert tasks.loc[task, "recipes"] == tasks.loc[task, "models"] == 14
        assert tasks.loc[task, "p (Holm)"] <= tasks.loc[task, "q (BH over tasks)"] < 0.01
    assert tasks.loc["noise: d", "p (Holm)"] > 0.05
    assert tasks.loc["noise: d", "ridge Q2"] < 0.3
    assert len(predicted) == 4 * 14


def test_published_targets_name_models_and_say_where_they_come_from() -> None:
    names = {"mine": "byol", "swav": "swav", "m": "moco-v2", "s": "supervised", "p": "pcl-v1", "pirl": ""}
    alone = {name: name for name in names}
    found = read_targets(["published"], names, alone)
    assert {"mine", "swav", "m", "p"} <= set(found["model"]), "checkpoints, whatever they are called here"
    assert "pirl" not in set(found["model"]), "a run of that name is not that checkpoint"
    assert {"segmentation (mIoU)", "segmentation (pixel accuracy)"} <= set(found["task"])
    columns = table_of(np.random.default_rng(0).normal(size=(len(names), 3)), list(names))
    tasks, _ = predict(columns, found, {}, alone)
    assert not any("segmentation" in task and "mean of" in task for task in tasks["task"]), "no mean of two metrics"
    assert "many-shot fine-tune: mean of 11" in set(tasks["task"])
    assert tasks["ImageNet Q2"].isna().all()
    assert pd.read_csv(PUBLISHED)["provenance"].notna().all()


def test_own_probes_are_targets(runs: Path, surveyed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = [f"{name}={runs / name}" for name in ("simclr", "supervised")]
    arguments = ["--models", *spec, "untrained=random", "other=random:1"]
    out = probe([*arguments, f"--out={tmp_path / 'digits'}", "--evaluations=[knn]", "--k=[5]"])
    arguments, before = [*models(runs), f"--out={surveyed}", *SMALL, f"--targets=[{out}]"], times(surveyed)
    with pytest.raises(UserError, match=r"no task has results of 4 recipes.*: 3 at most"):
        survey(arguments)  # two untrained networks of one architecture
    survey([*arguments, "--recipes={other: another}"])
    assert "over 4 recipes (4 models)" in (surveyed / "tables" / "correlation.md").read_text()
    assert (surveyed / "figures" / "correlation.png").exists()
    text = (surveyed / "tables" / "prediction.md").read_text()
    assert "knn5: digits | 4 | 4 |" in text
    assert "With 4 recipes no p can be below 0.083, nor below 1 after Holm." in text
    assert (surveyed / "figures" / "prediction.png").exists()
    assert times(surveyed) == before, "a recipe is no reason to measure again"


def test_seeds_of_a_recipe_are_one_unit() -> None:
    """Seven recipes of two seeds are the seven means: the twin of a model says nothing of it."""
    generator = np.random.default_rng(0)
    names = [f"recipe{i}-{seed}" for i in range(7) for seed in (1, 2)]
    recipes = {name: f"{name[:-1]}1" for name in names}
    values = np.repeat(generator.normal(size=(7, 54)), 2, 0) + 0.1 * generator.normal(size=(14, 54))
    truth = np.repeat(generator.normal(size=7), 2) + 0.1 * generator.normal(size=14)
    tasks, predicted = predict(table_of(values, names), rows_of(names, truth), {}, recipes)
    means = table_of(values.reshape(7, 2, 54).mean(1), names[::2])
    expected, alone = predict(means, rows_of(names[::2], truth.reshape(7, 2).mean(1)), {}, recipes)
    pd.testing.assert_frame_equal(tasks, expected.assign(models=14))
    pd.testing.assert_frame_equal(predicted, alone)
    assert predicted["model"].tolist() == names[::2]
    assert tasks["ridge Q2"].item() < 0.3
    apart, _ = predict(table_of(values, names), rows_of(names, truth), {}, {name: name for name in names})
    assert apart["ridge Q2"].item() > 0.8, "which is what taking them apart would show"


def rows_of(names: list[str], values: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"task": "t", "dataset": "d", "model": names, "value": values})


def test_metrics_are_correlated_over_four_recipes_at_least(tmp_path: Path) -> None:
    columns = pd.MultiIndex.from_product([["crop"], ["a", "b"], ["mean"]], names=["manifold", "metric", "statistic"])
    table = pd.DataFrame([[1, 1], [2, 3], [3, 2], [4, 4], [5, 5]], list("vwxyz"), columns, dtype=float)
    for missing, expected in ((1, 0.8), (2, np.nan)):
        table.iloc[:missing, 1] = np.nan
        _, figures = survey_tables._together(table, dict(zip("vwxyz", "vwxyz", strict=True)), tmp_path)
        (image,) = figures["correlation"].axes[0].images
        assert image.get_array().filled(np.nan)[0, 1] == pytest.approx(expected, nan_ok=True)


def test_what_is_one_recipe() -> None:
    def untrained(spec: str) -> tuple[Method, None]:
        return load_networks([f"x={spec}"])["x"].method, None

    networks = {
        "seed0": (Pixels(seed=0), 3),
        "seed1": (Pixels(seed=1, channels_last=True), 9),
        "other": (Rings(), 3),
        "options": (Pixels(lr=0.3), 3),
        "u1": untrained("random:resnet10@32:1"),
        "u2": untrained("random:resnet10@16:2"),
        "wide-1": (Pixels(lr=7.0), 1),
        "wide-2": (Pixels(lr=8.0), 1),
        **{name: (Published("resnet10", source=name), 1) for name in ("moco-v1", "moco-v2", "byol", "timm:x-v1")},
    }
    models = {
        name: Loaded(name, *network, "wide" if name.startswith("wide") else name) for name, network in networks.items()
    }
    assert recipes_of(models, {"other": "mine", "options": "mine"}) == {
        **dict.fromkeys(("seed0", "seed1"), "seed0"),
        **dict.fromkeys(("other", "options"), "other"),
        **dict.fromkeys(("u1", "u2"), "u1"),
        **dict.fromkeys(("wide-1", "wide-2"), "wide-1"),
        **dict.fromkeys(("moco-v1", "moco-v2"), "moco-v1"),
        "byol": "byol",
        "timm:x-v1": "timm:x-v1",
    }
    with pytest.raises(UserError, match=r"--recipes.sed0: no such model; did you mean 'seed0'"):
        recipes_of(models, {"sed0": "x"})


def test_the_median_and_the_order_of_models() -> None:
    rows = [
        {"model": name, "layer": "pooled", "view": "crop", "metric": metric, "value": value, "low": low}
        for name in "ab"
        for metric, value, low in (("affinity", 1, 0), ("affinity_std", 2, None), ("affinity_quantile", 3, 0.5))
    ]
    table = metric_table(pd.DataFrame(rows), {"b": "pooled", "a": "pooled"}, ["crop", "color"])
    assert table.index.tolist() == ["b", "a"]
    assert table.loc["a"].dropna().tolist() == [1, 2, 3]
    assert table.shape == (2, 18), "what was not measured has its place"


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_classes_without_enough_images_are_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split, classes in (("train", "abc"), ("test", "ab")):
        for name in classes:
            for number in range(8):
                save(tmp_path / split / name / f"{number}.png", pixels(1, 16, 16, seed=number)[0])
    data = [f"--data.dataset={tmp_path}", "--data.measure_size=16", "--data.image_size=16"]
    model = [
        "--models",
        f"simclr={runs / 'simclr'}",
        "--neighbors.layers=all",
        "--neighbors.k=5",
        "--neighbors.copies=4",
        "--neighbors.settings=[crop]",
    ]
    out = survey([*model, *data, f"--out={tmp_path / 'out'}"])
    assert "1 of 3 classes have fewer than 3 measurement images and no manifold, the first is c" in " ".join(
        capsys.readouterr().out.split()
    )
    layers = read_records(out)["layer"].unique()
    assert {"stem", "layer4.0.residual", "pooled"} <= set(layers)
    assert not any(layer.startswith("head") for layer in layers), "the encoder's alone"


def test_an_image_that_cannot_be_read(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ("train", "test"):
        for number in range(8):
            save(tmp_path / split / "a" / f"{number}.png", pixels(1, 16, 16, seed=number)[0])
    data = [f"--data.dataset={tmp_path}", "--data.measure_size=8", "--data.image_size=16"]
    (tmp_path / "test" / "a" / "3.png").write_bytes(b"<html>no image</html>")
    with pytest.raises(SystemExit, match="2"):
        main(["--models", f"simclr={runs / 'simclr'}", *data, "--neighbors.k=3", f"--out={tmp_path / 'out'}"])
    assert "3.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--neighbors.settings=[crop, colour]"], "--neighbors.settings colour: did you mean 'color'"),
        (["--neighbors.k=128"], "--neighbors.k 128: each of 128 measurement images has 127 others; set at most 127"),
        (["--device=gpu"], "--device gpu: expected cpu, cuda, or cuda:NUMBER"),
        (["--neighbors.copies=2"], "--neighbors.copies 2: expected a whole number of at least 3"),
        (["--targets=[nowhere.csv]"], "--targets nowhere.csv: cannot be read as a table (No such file"),
        (["--targets=[{tmp}/t.csv]"], "no column 'dataset'"),
        (["--targets=[{tmp}/others.csv]"], "results of none of these models; they have byol"),
        (["--targets=[{tmp}/few.csv]"], "no task has results of 4 recipes"),
        (["--recipes.simcrl=x"], "--recipes.simcrl: no such model; did you mean 'simclr'"),
        (
            ["--recipes", "simclr=x"],
            "--recipes simclr=x: expected models with the names of their recipes, such as '{a:",
        ),
        (["--recipes=[simclr]"], "--recipes ['simclr']: expected models with"),
        (["--recipes={{simclr: [x]}}"], "--recipes {'simclr': ['x']}: expected models with"),
        (["--neighbors.layers=layer9"], "--neighbors.layers='layer9' matches no layer"),
    ],
)
def test_a_mistake_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], words: str
) -> None:
    (tmp_path / "t.csv").write_text("task,data,model,value\nlinear,cars,simclr,1\n")
    (tmp_path / "others.csv").write_text("task,dataset,model,value\nlinear,cars,byol,1\n")
    (tmp_path / "few.csv").write_text("task,dataset,model,value\nlinear,cars,simclr,1\n")
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        main(["--models", f"simclr={runs / 'simclr'}", f"--out={tmp_path / 'out'}", *SMALL, *filled])
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_features_that_are_not_finite_name_the_model(runs: Path, tmp_path: Path) -> None:
    broken = load_networks([f"broken={runs / 'simclr'}"])
    broken["broken"].method.backbone.conv1.weight.data.fill_(torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load_networks", lambda specs: broken)
        with pytest.raises(UserError, match=r"--models broken: layer .* finite"):
            survey(["--models", f"broken={runs / 'simclr'}", f"--out={tmp_path}", *SMALL])


def test_memory_is_announced_and_is_what_metrics_keep(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kept: list[int] = []

    def keeping(cls: type[Neighborhoods | Spectrum], *names: str) -> None:
        finish = cls.finish

        def counted(self: Any, occasion: Any) -> Any:
            metrics = [part for name in names for part in _metrics(getattr(self, name))]
            states = [getattr(m, key) for m in metrics for key in m._defaults if key.startswith(("features", "means"))]
            kept.append(sum(part.nbytes for state in states for part in state))
            return finish(self, occasion)

        monkeypatch.setattr(cls, "finish", counted)

    keeping(Neighborhoods, "_neighborhoods", "_overlaps")
    keeping(Spectrum, "_spectrum")
    args = ["--models", f"simclr={runs / 'simclr'}", *SMALL, "--neighbors.layers=stages", "--device=cpu"]
    survey([*args, f"--out={tmp_path / 'out'}", "--neighbors.settings=[policy, crop]"])
    assert f"at most {sum(kept) / 2**20:,.1f} MiB of features of simclr" in capsys.readouterr().out
    whole = read_records(tmp_path / "out")
    monkeypatch.setattr(command, "free_memory", lambda device: 1.2 * sum(kept))  # of which a share may be taken
    survey([*args, f"--out={tmp_path / 'passes'}", "--neighbors.settings=[policy, crop]"])
    assert "of memory may be taken, so its layers are measured in 2 passes" in capsys.readouterr().out
    assert sum(kept) == 2 * sum(kept[:2])
    assert max(sum(kept[2:4]), sum(kept[4:])) <= 0.7 * sum(kept[:2])
    keys = ["metric", "view", "layer", "layer_other", "low"]
    frames = [frame.sort_values(keys, ignore_index=True) for frame in (whole, read_records(tmp_path / "passes"))]
    pd.testing.assert_frame_equal(frames[1].drop(columns="run"), frames[0].drop(columns="run"), check_exact=True)
    monkeypatch.setattr(command, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"--data.measure_size 128: layer layer4.0 of simclr keeps .* measure fewer"):
        survey([*args, f"--out={tmp_path / 'none'}", "--neighbors.settings=[policy, crop]"])
    assert not (tmp_path / "none").exists()


def _metrics(found: Any) -> list[Any]:
    return list(found.values()) if isinstance(found, dict) else [found]


def test_a_collapsed_network_alone_is_surveyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        command, "load_networks", lambda specs: {"constant": Loaded("constant", Constant(), 0, "constant")}
    )
    data = ["--data.dataset=digits", "--data.measure_size=64", "--data.limit_test=64", "--neighbors.layers=pooled"]
    out = survey(["--models", "constant=x", f"--out={tmp_path}", "--neighbors.k=10", "--neighbors.copies=3", *data])
    assert "| constant | – | 0.000 ± 0.000 (0.000) |" in (out / "tables" / "mgm.md").read_text()


def test_many_models_have_a_folder_of_a_name_that_a_disk_takes() -> None:
    names = [f"simclr-resnet50-s{number}-1121-032425=random:resnet10@16:{number}" for number in range(12)]
    out = survey_options.parse(["--models", *names, "--data.dataset=digits"]).out
    assert len(out.name) < 100
    assert out != survey_options.parse(["--models", *names[:-1], "--data.dataset=digits"]).out


def test_a_damaged_part_is_reported(runs: Path, tmp_path: Path) -> None:
    arguments = ["--models", f"simclr={runs / 'simclr'}", f"--out={tmp_path}", *SMALL, "--neighbors.layers=pooled"]
    survey([*arguments, "--neighbors.settings=[]"])
    (tmp_path / "records" / "models" / "simclr.parquet").write_bytes(b"PAR1, then nothing")
    with pytest.raises(UserError, match=r"simclr.parquet: damaged .* remove it"):
        survey([*arguments, "--neighbors.settings=[]"])


def test_labels_of_the_measurement_images() -> None:
    data = DataModule("digits", measure_size=100)
    data.setup()
    seen = torch.cat([batch["label"] for batch in data.loader("measure")])
    torch.testing.assert_close(data.measure_labels, seen)
