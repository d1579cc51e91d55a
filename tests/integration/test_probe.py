"""``python -m ssl_geometry.probe`` gives the live numbers again, its tables and figure, and one line for a mistake."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_geometry import finetuning
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.fit import fit
from ssl_geometry.fit import main as fit_main
from ssl_geometry.geometry import logistic
from ssl_geometry.methods import Supervised
from ssl_geometry.methods.raw_pixels import RawPixels
from ssl_geometry.probe import UNTRAINED, main, probe
from ssl_geometry.records import read_records
from ssl_geometry.report.probes import PIXELS
from tests.integration.test_fit import options
from tests.processes import undrawn
from tests.unit.test_datasets import pixels, save

pytestmark = pytest.mark.filterwarnings("ignore:logistic regression of .* stopped before the optimum")
FEW = ["--linear_epochs=3", "--draws=2", "--label_fractions=[0.2, 1.0]", "--k=[5]"]
FEW += ["--data.eval_batch_size=64"]
OFF = [f"--{name}.every_n_epochs=0" for name in ("cka", "neighbors", "spectrum")]
ALL = "--evaluations=[layers, knn, linear, linear_augmented, labels]"


@pytest.fixture(autouse=True, scope="module")
def _few_steps_of_a_solver() -> Iterator[None]:
    """Its optimum is tested in tests/unit/test_probes.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logistic, "logistic_regression", partial(logistic.logistic_regression, max_iterations=25))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    probes = [*OFF, "--probes.every_n_epochs=2", "--probes.logistic=true", "--probes.layers=[layer2.0, pooled, head]"]
    with undrawn():
        for seed in (0, 1):
            fit(options(folder, f"simclr-{seed}", *probes, f"--seed_everything={seed}"))
        fit(options(folder, "supervised", *probes, method="Supervised"))
    return folder / "e"


@pytest.fixture(scope="module")
def probed(runs: Path) -> Path:
    seeds = ",".join(str(runs / f"simclr-{seed}") for seed in (0, 1))
    models = [f"simclr={seeds}", f"supervised={runs / 'supervised'}"]
    return probe(["--models", *models, "--out", str(runs.parent / "probed"), *FEW, ALL])


def test_converged_probes_give_the_live_numbers_again(runs: Path, probed: Path) -> None:
    again = read_records(probed)
    for run, model in (("simclr-0", "simclr-1"), ("supervised", "supervised")):
        live = read_records(runs / run).query("epoch == 2 and metric in ('ridge_probe', 'logistic_probe')")
        right = again[again["model"] == model].set_index(["metric", "layer"])["value"]
        left = live.set_index(["metric", "layer"])["value"]
        assert len(left) >= 6
        np.testing.assert_allclose(left, right.loc[left.index], atol=1e-9)


def test_every_evaluation_and_baseline_is_in_one_table(probed: Path) -> None:
    frame = read_records(probed)
    pooled = frame[frame["layer"] == "pooled"].pivot(index="model", columns="metric", values="value")
    bars = frame[frame["layer"] == "pooled"].pivot(index="model", columns="metric", values="low")
    assert set(pooled.index) == {"simclr-1", "simclr-2", "supervised", UNTRAINED, PIXELS}
    shown = ["linear_eval", "linear_eval_augmented", "logistic_probe", "ridge_probe", "knn5", "knn5_majority"]
    shown += ["labels_20%", "labels_100%"]
    assert pooled[shown].notna().all(axis=None)
    assert pooled[[f"{metric}_mean_per_class" for metric in shown]].notna().all(axis=None)
    chosen = [
        "linear_eval_learning_rate",
        "logistic_probe_l2",
        "ridge_probe_l2",
        "labels_20%_l2_draw2",
        "labels_20%_sd",
    ]
    assert pooled[chosen].notna().all(axis=None)
    assert bars[chosen].isna().all(axis=None), "an accuracy alone has an interval of images"
    assert pooled.loc["supervised", "logistic_probe"] > 0.5, "digits are easily read off"
    assert pooled.loc[PIXELS, "logistic_probe"] > 0.7
    text = (probed / "tables.md").read_text()
    assert "| simclr (2) |" in text
    assert "±" in text
    assert "selection" in text, "the protocol stands with the table"
    assert r"$\pm$" in (probed / "tables.tex").read_text()
    for name in ("linear_probes.png", "linear_probes.pdf"):
        assert (probed / "figures" / name).stat().st_size > 1000


def protocols(folder: Path, metric: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (folder / "records" / "protocols").glob("*.json")]
    return [protocol for protocol in found if protocol["metric"] == metric]


def test_a_protocol_states_what_was_classified_and_what_was_trained_on(runs: Path, tmp_path: Path) -> None:
    models = [f"small={runs / 'supervised'}", "large=random:resnet10@32"]
    more = ["--data.measure_size=64", "--evaluations=knn", "--k=[5]", "--device=cpu"]
    out = probe(["--models", *models, f"--out={tmp_path / 'o'}", *more])
    assert set(read_records(out)["n"]) == {128}
    afterwards = protocols(out, "knn")
    assert [(p["test images"]["split"], p["test images"]["n"]) for p in afterwards] == [("test", 128)] * 3
    text = (out / "tables.md").read_text()
    assert "(small)" in text, "each protocol stands with its networks"
    assert "(raw pixels)" in text, "whose protocol says how far they are averaged down"
    assert "(large)" in text
    latex = (out / "tables.tex").read_text()
    assert '%  "temperature": 0.07' in latex
    assert "the whole test split, 128 images" in latex
    (ridge,) = protocols(runs / "supervised", "ridge_probe")
    (online,) = protocols(runs / "supervised", "online_probe")
    assert (ridge["test images"]["split"], ridge["test images"]["n"]) == ("measure", 128)
    assert ridge["network"] == "evaluation mode, torch.float32"
    assert online["network"].startswith("trained on: training mode, batch norm with the statistics of each batch")
    assert "precision 32-true" in online["network"]
    assert online["selection"].endswith("summed since the last measurement")


def test_fine_tuning_is_evaluated_with_the_network_that_learned(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[Supervised] = []

    class Kept(Supervised):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            tuned.append(self)

    monkeypatch.setattr(finetuning, "Supervised", Kept)
    for name, value in {"JOB_ID": "7", "JOB_NAME": "x.sbatch", "NTASKS": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    few = ["--evaluations=finetune", "--finetune_epochs=8", "--augment=none", "--label_fractions=[1.0]"]
    out = probe(["--models", f"a={runs / 'supervised'}", "b=random", f"--out={tmp_path / 'o'}", *few, "--device=cpu"])
    found = read_records(out).query("metric == 'finetune_100%'").set_index("model")["value"]
    data = DataModule("digits", limit_train=256, limit_test=128, measure_size=128)
    data.setup()
    for name, network in zip("ab", tuned, strict=True):
        network.eval()
        with torch.no_grad():
            right = [
                network.head(network.features(batch["image"])).argmax(1) == batch["label"]
                for batch in data.loader("test")
            ]
        assert found[name] == pytest.approx(float(torch.cat(right).double().mean()), abs=1e-9)
    assert found["a"] > 0.5, "digits are easily learnt"
    assert set(found.index) == {"a", "b"}, "there is nothing to tune about pixels"


def test_online_probes_come_near_to_ridge(tmp_path: Path) -> None:
    more = ["--probes.every_n_epochs=8", "--probes.layers=[pooled]", "--data.limit_train=768"]
    easy = ["--model.views=[{augment: none}]", "--model.lr=0.05", "--model.warmup_epochs=1"]
    fit(options(tmp_path, "a", *OFF, *more, *easy, method="Supervised", epochs=8))
    frame = read_records(tmp_path / "e" / "a").query("epoch == 8").set_index("metric")["value"]
    assert frame["online_probe"] > 0.85
    assert frame["online_probe"] > frame["ridge_probe"] - 0.1
    assert abs(frame["online_probe_mean_per_class"] - frame["online_probe"]) < 0.05


def test_classes_of_unequal_size_have_a_table_of_their_means(runs: Path, tmp_path: Path) -> None:
    for split, n in (("train", 60), ("test", 40)):
        for i in range(n):
            kind = "rare" if i % 10 == 0 else "often"
            save(tmp_path / "d" / split / kind / f"{i}.png", pixels(1, 16, 16, seed=i + n)[0])
    few = ["--evaluations=knn", "--k=[1]", "--data.measure_size=20", "--data.limit_test=40", "--data.limit_train=60"]
    data = [f"--data.dataset={tmp_path / 'd'}", "--data.val_fraction=0", "--device=cpu"]
    out = probe(["--models", f"a={runs / 'simclr-0'}", f"--out={tmp_path / 'o'}", *few, *data])
    values = read_records(out).query("model == 'a'").set_index("metric")["value"]
    assert values["knn1"] > values["knn1_mean_per_class"] + 0.1, "the rare class is guessed"
    text = (out / "tables.md").read_text()
    assert "Pooled features: mean per-class accuracy" in text
    assert f"| a (1) | {100 * values['knn1_mean_per_class']:.1f} |" in text


def test_raw_pixels_are_the_clean_images() -> None:
    method = RawPixels(backbone="resnet50", image_size=16, views=[{"augment": "simclr"}])
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(method.features(images), images.flatten(1) / 255)


def test_images_of_several_classes_are_evaluated_by_map(runs: Path, tmp_path: Path) -> None:
    for split, n in (("train", 60), ("test", 30)):
        rows = []
        for i in range(n):
            bright, red = i % 2, i % 3 == 0
            image = pixels(1, 16, 16, seed=i + n)[0] // 2 + 120 * bright
            image[..., 0] = np.where(red, 255, image[..., 0])
            save(tmp_path / "d" / split / f"{i}.png", image.astype(np.uint8))
            rows.append(f"{i}.png,{bright},{int(red)}")
        (tmp_path / "d" / split / "labels.csv").write_text("file,bright,red\n" + "\n".join(rows) + "\n")
    data = [
        f"--data.dataset={tmp_path / 'd'}",
        "--data.measure_size=30",
        "--data.limit_test=30",
        "--data.limit_train=60",
    ]
    out = probe(
        [
            "--models",
            f"simclr={runs / 'simclr-0'}",
            f"--out={tmp_path / 'o'}",
            *FEW,
            "--data.val_fraction=0",
            *data,
            "--probes.layers=[pooled]",
        ]
    )
    frame = read_records(out)
    pooled = frame[(frame["layer"] == "pooled") & (frame["model"] == PIXELS)].set_index("metric")["value"]
    assert pooled["logistic_probe"] > 0.9
    assert not any(metric.startswith("knn") for metric in pooled.index)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--evaluations=[layers, finetuning]"], ["--evaluations", "finetuning", "finetune"]),
        (["--label_fractions=[0.0]"], ["--label_fractions"]),
        (["--evaluations=[labels]", "--label_fractions=[0.001]"], ["--label_fractions 0.001", "classes"]),
        (["--evaluations=labels", "--train_images=15"], ["--label_fractions 0.01", "of 15 images for 10 classes"]),
        (["--k=[0]"], ["--k"]),
        (["--probes.layers=layer9"], ["layer9"]),
        (["--augment=simclrr"], ["simclrr", "simclr"]),
        (["--train_images=0"], ["--train_images 0"]),
        (["--train_images=30", "--k=[20, 200]"], ["--k [20, 200]", "200 neighbours", "30 training images"]),
        (["--train_images=9"], ["--train_images 9", "10 classes"]),
        (["--evaluations=[]"], ["--evaluations []", "layers"]),
        (["--evaluations=layer"], ["--evaluations layer", "layers"]),
        (["--label_fractions=[]"], ["--label_fractions []"]),
        (["--k=[]"], ["--k []"]),
        (["--linear_weight_decay=-1"], ["--linear_weight_decay -1"]),
        (["--linear_weight_decay=1e9"], ["--linear_weight_decay 1000000000.0", "0.77"]),
        (["--finetune_lr=-1"], ["--finetune_lr -1"]),
        (["--evaluations=linear", "--linear_epochs=2"], ["--linear_epochs 2", "8 steps"]),
        (["--evaluations=finetune", "--finetune_lr=1e30", "--finetune_epochs=1"], ["--finetune_lr 1e+30", "NaN"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--models", f"a={runs / 'supervised'}", f"--out={tmp_path / 'o'}", *args])
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert all(word in line for word in words), line


@pytest.mark.parametrize("name", [UNTRAINED, PIXELS])
def test_the_names_of_baselines_are_taken(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit):
        main(["--models", f"{name}={runs / 'supervised'}", f"--out={tmp_path / 'o'}"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"--models {name}=" in line
    assert "another" in line


@pytest.mark.parametrize("option", ["learning_rates=[]", "learning_rates=[8]", "weight_decays=[-1]", "train_images=5"])
def test_a_mistake_in_live_probes_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        fit_main(options(tmp_path, "a", f"--probes.{option}"))
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    name, _, value = option.partition("=")
    assert f"--probes.{name} {value}" in line


def test_one_class_is_no_accuracy_of_one(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, n in (("train", 60), ("test", 20)):
        for i in range(n):
            save(tmp_path / "d" / split / "one" / f"{i}.png", pixels(1, 16, 16, seed=i + n)[0])
    data = [f"--data.dataset={tmp_path / 'd'}", "--data.val_fraction=0", "--data.measure_size=20"]
    data += ["--data.limit_test=20", "--data.limit_train=60"]
    with pytest.raises(SystemExit) as exit_:
        main(["--models", f"a={runs / 'simclr-0'}", f"--out={tmp_path / 'o'}", "--evaluations=[knn, linear]", *data])
    assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_:
        fit_main(options(tmp_path, "a", *data, "--data.batch_size=20"))
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 2
    assert all("all 60 labelled training images are of one class" in line for line in lines)
    assert "--probes.every_n_epochs 0" in lines[1]


def test_features_that_do_not_fit_into_memory(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_geometry.probe_features.free_memory", lambda device: 1000)
    with pytest.raises(SystemExit):
        main(["--models", f"a={runs / 'supervised'}", f"--out={tmp_path / 'o'}"])
    assert "set fewer images" in capsys.readouterr().err


def test_a_network_that_fails_leaves_the_others(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "supervised" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["backbone.layer3.0.conv1.weight"][0] = torch.nan
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    out = tmp_path / "o"
    (out / "figures").mkdir(parents=True)
    for name in (
        "tables.md",
        "tables.tex",
        "figures/linear_probes.png",
        "figures/linear_probes.pdf",
        "figures/mine.png",
    ):
        (out / name).write_text("old")
    models = [f"a={tmp_path / 'broken.ckpt'}", f"b={runs / 'supervised'}"]
    few = ["--evaluations=layers", "--probes.layers=[stem, layer3.0.conv1]", "--overwrite", "--device=cpu"]
    images = ["--data.dataset=digits", "--data.measure_size=64", "--data.limit_test=64", "--data.limit_train=128"]
    with pytest.raises(SystemExit) as exit_:
        main(["--models", *models, f"--out={out}", *few, *images])
    assert exit_.value.code == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: a: not measured")
    assert "--models a: layer layer3.0.conv1" in line
    assert set(read_records(out)["model"]) == {"b", UNTRAINED, PIXELS}
    text = (out / "tables.md").read_text()
    assert "| b (1) |" in text
    assert "a (1)" not in text
    assert (out / "figures" / "linear_probes.png").read_bytes()[:4] == b"\x89PNG", "of all its layers: none is a block"
    assert (out / "figures" / "mine.png").read_text() == "old", "what others put there stays"
    assert "Protocol:" in said.out
