"""``python -m ssl_geometry.probe`` gives the live numbers again, its tables and picture, and one line for a mistake."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_geometry.fit import fit
from ssl_geometry.probe import PIXELS, UNTRAINED, RawPixels, main, probe
from ssl_geometry.records import read_records
from tests.integration.test_fit import options
from tests.unit.test_datasets import pixels, save

FEW = ["--linear_epochs=3", "--finetune_epochs=1", "--draws=2", "--label_fractions=[0.2, 1.0]", "--k=[5]"]
FEW += ["--data.eval_batch_size=64"]
ALL = "--evaluations=[layers, knn, linear, linear_augmented, labels, finetune]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    probes = ["--cka.every_n_epochs=0", "--probes.every_n_epochs=2", "--probes.logistic=true"]
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
        assert len(left) >= 10
        np.testing.assert_allclose(left, right.loc[left.index], atol=1e-9)


def test_every_evaluation_and_baseline_is_in_one_table(probed: Path) -> None:
    frame = read_records(probed)
    pooled = frame[frame["layer"] == "pooled"].pivot(index="model", columns="metric", values="value")
    assert set(pooled.index) == {"simclr-1", "simclr-2", "supervised", UNTRAINED, PIXELS}
    shown = ["linear_eval", "linear_eval_augmented", "logistic_probe", "ridge_probe", "knn5", "knn5_majority"]
    shown += ["labels_20%", "labels_100%"]
    assert pooled[shown].notna().all(axis=None)
    assert pooled["finetune_100%"].drop(PIXELS).notna().all()
    assert pooled.loc["supervised", "logistic_probe"] > 0.5, "digits are easily read off"
    assert pooled.loc[PIXELS, "logistic_probe"] > 0.7
    text = (probed / "tables.md").read_text()
    assert "| simclr (2) |" in text
    assert "±" in text
    assert "selection" in text, "the protocol stands with the table"
    assert r"$\pm$" in (probed / "tables.tex").read_text()
    for name in ("linear_probes.png", "linear_probes.pdf"):
        assert (probed / "figures" / name).stat().st_size > 1000


def test_raw_pixels_are_the_clean_pictures() -> None:
    method = RawPixels(backbone="resnet50", image_size=16, augment="simclr")
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(method.features(images), images.flatten(1) / 255)


def test_pictures_of_several_classes_are_judged_by_map(runs: Path, tmp_path: Path) -> None:
    for split, n in (("train", 60), ("test", 30)):
        rows = []
        for i in range(n):
            bright, red = i % 2, i % 3 == 0
            picture = pixels(1, 16, 16, seed=i + n)[0] // 2 + 120 * bright
            picture[..., 0] = np.where(red, 255, picture[..., 0])
            save(tmp_path / "d" / split / f"{i}.png", picture.astype(np.uint8))
            rows.append(f"{i}.png,{bright},{int(red)}")
        (tmp_path / "d" / split / "labels.csv").write_text("file,bright,red\n" + "\n".join(rows) + "\n")
    data = [
        f"--data.dataset={tmp_path / 'd'}",
        "--data.measure_size=30",
        "--data.limit_test=30",
        "--data.limit_train=60",
    ]
    out = probe(
        ["--models", f"simclr={runs / 'simclr-0'}", f"--out={tmp_path / 'o'}", *FEW, "--data.val_fraction=0", *data]
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
        (["--k=[0]"], ["--k"]),
        (["--layers=layer9"], ["layer9"]),
        (["--augment=simclrr"], ["simclrr", "simclr"]),
        (["--train_images=0"], ["--train_images 0"]),
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


def test_features_that_do_not_fit_into_memory(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_geometry.probe._free_memory", lambda device: 1000)
    with pytest.raises(SystemExit):
        main(["--models", f"a={runs / 'supervised'}", f"--out={tmp_path / 'o'}"])
    assert "set fewer images" in capsys.readouterr().err


def test_a_network_that_is_not_finite_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "supervised" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["backbone.layer3.0.conv1.weight"][0] = torch.nan
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    with pytest.raises(SystemExit):
        main(
            [
                "--models",
                f"a={tmp_path / 'broken.ckpt'}",
                f"--out={tmp_path / 'o'}",
                "--data.dataset=digits",
                "--data.measure_size=64",
            ]
        )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "layer3.0" in line
