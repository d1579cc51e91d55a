"""What a user sees in W&B, read from its offline files: the documented keys, live and later, each once."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssl_geometry.records import wandb_files
from ssl_geometry.report.__main__ import main
from tests.integration.test_fit import SMALL

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--model=ssl_geometry.methods.Supervised",
    *SMALL[:-1],
    "--loggers=[wandb]",
    "--experiment=e",
    "--run_id=live",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
    "--cka.every_n_epochs=2",
    "--cka.layers=stages",
    "--invariance.every_n_epochs=2",
    "--invariance.views=[own,crop]",
    "--invariance.layers=stages",
    "--probes.every_n_epochs=2",
    "--probes.layers=stages",
    "--neighbors.every_n_epochs=2",
    "--neighbors.layers=stages",
    "--neighbors.k=10",
    "--neighbors.copies=3",
    "--neighbors.settings=[policy]",
    "--spectrum.every_n_epochs=2",
    "--spectrum.layers=stages",
    "--spectrum.copies=2",
]


def documented() -> dict[str, tuple[re.Pattern[str], str]]:
    """Key to its pattern and its axis, from the table of docs/wandb.md."""
    found = {}
    for line in (ROOT / "docs" / "wandb.md").read_text().splitlines():
        if row := re.fullmatch(r"\| `([^`]+)` \| (.*) \| (step|epoch) \|", line):
            pattern = "".join(
                "[^/]+" if part[0] == "<" else re.escape(part) for part in re.split("(<[^>]+>)", row[1]) if part
            )
            found[row[1]] = re.compile(pattern), row[3]
    return found


class Seen:
    """The offline files of a run directory."""

    def __init__(self, run: Path) -> None:
        self.values: dict[tuple[str, int], list[str]] = {}
        self.epochs: dict[tuple[str, int], float] = {}
        self.axes: dict[str, str] = {}
        self.pictures: set[str] = set()
        for file in run.glob("wandb/offline-run-*/*.wandb"):
            for part in wandb_files.read(file):
                if part.HasField("run"):
                    self.run = part.run
                elif part.HasField("metric") and part.metric.name:
                    self.axes[part.metric.name] = part.metric.step_metric
                elif part.HasField("history"):
                    row = {"/".join(item.nested_key) or item.key: item.value_json for item in part.history.item}
                    self._history(row)

    def _history(self, row: dict[str, str]) -> None:
        step = int(float(row.pop(wandb_files.STEP)))
        epoch = float(row.pop("epoch"))
        for name, value in row.items():
            if name[0] == "_":
                continue
            if picture := re.fullmatch(r"(.*)/(_type|sha256|size|path|format|width|height)", name):
                self.pictures.add(picture[1])
                if picture[2] != "_type":
                    continue
                name, value = picture[1], "picture"
            self.values.setdefault((name, step), []).append(value)
            self.epochs[name, step] = epoch

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run.config.update}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ssl_geometry.fit", *OPTIONS, f"--runs={folder}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "e" / "live"


def test_live_keys_are_the_documented_ones_over_epochs(run: Path) -> None:
    seen, schema = Seen(run), documented()
    names = {name for name, _ in seen.values}
    used = set()
    for name in names:
        fits = [key for key, (pattern, _) in schema.items() if pattern.fullmatch(name)]
        assert fits, f"{name} is not documented"
        used.update(fits)
        assert seen.axes[name] == {"step": wandb_files.STEP, "epoch": "epoch"}[schema[fits[0]][1]], name
        picture = any(line.startswith("picture") for line in map(_meaning, fits))
        assert (name in seen.pictures) == picture, name
    logistic = {f"probes/logistic{part}/<layer>" for part in ("", "_l2", "_mean_per_class")}
    assert set(schema) - used == logistic, "what this run was not asked for"
    assert {name.partition("/")[0] for name in names} == {
        "train", "val", "test", "cka", "invariance", "probes", "neighbors", "spectrum",
    }  # fmt: skip
    epochs = {name: sorted({seen.epochs[key] for key in seen.epochs if key[0] == name}) for name in names}
    assert epochs["cka/map_self"] == epochs["spectrum/rankme/layer1.0"] == [0, 2]
    assert epochs["val/knn"] == epochs["train/loss"] == [1, 2], "the epoch under way, as in the records"


def _meaning(key: str) -> str:
    (line,) = [
        line for line in (ROOT / "docs" / "wandb.md").read_text().splitlines() if line.startswith(f"| `{key}` |")
    ]
    return line.split("|")[2].strip()


def test_runs_are_grouped_and_searched_by_what_they_are(run: Path) -> None:
    seen = Seen(run)
    assert seen.run.run_group == "e"
    assert seen.run.job_type == "Supervised"
    assert list(seen.run.tags) == ["Supervised", "resnet10", "digits"]
    config = seen.config
    assert (config["method"], config["backbone"], config["seed"]) == ("Supervised", "resnet10", 0)
    assert config["model"]["init_args"]["width"] == 0.25
    assert {"ssl_geometry", "torch"} <= set(config["versions"])


def test_what_is_uploaded_later_is_what_was_logged_live_and_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    later = tmp_path / "e" / "live"
    shutil.copytree(run, later, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    main([str(later), "--to-wandb"])
    assert "numbers and pictures sent" in capsys.readouterr().out
    first, second = Seen(run), Seen(later)
    assert second.values == first.values
    assert second.epochs == first.epochs
    assert second.axes.items() >= {name: first.axes[name] for name, _ in first.values}.items()
    assert second.run.run_id == first.run.run_id
    assert second.run.run_group == first.run.run_group
    assert second.config.items() >= {name: first.config[name] for name in ("method", "model", "git", "data")}.items()
    assert all(len(values) == 1 for values in second.values.values())
    main([str(later), "--to-wandb"])
    assert "W&B has everything already" in capsys.readouterr().out
    assert Seen(later).values == first.values
    main([str(run), "--to-wandb"])
    assert "W&B has everything already" in capsys.readouterr().out


def test_without_a_key_it_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--to-wandb"])
    assert stop.value.code == 2
    assert "no W&B key here; run `wandb login`" in capsys.readouterr().err
