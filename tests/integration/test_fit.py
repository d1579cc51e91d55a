"""``python -m ssl_geometry.fit`` as a user runs it: what a run leaves, what it promises, what it says to mistakes."""

import json
import logging
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from ssl_geometry import compare, probe, survey
from ssl_geometry.callbacks import RecordsLogger
from ssl_geometry.config_files import expand_bases
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import Interrupted, UserError
from ssl_geometry.fit import fit, main
from ssl_geometry.geometry.gram import gram_vector
from ssl_geometry.measure.engine import measuring
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.models.taps import Taps
from ssl_geometry.records import RecordStore, read_records
from ssl_geometry.runs.checkpoints import read_checkpoint
from ssl_geometry.runs.networks import load_method
from tests.processes import finish, start, start_ranks

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.backbone=resnet10",
    "--model.width=0.25",
    "--model.image_size=16",
    "--data.dataset=digits",
    "--data.limit_train=256",
    "--data.limit_test=128",
    "--data.measure_size=128",
    "--data.batch_size=64",
    "--trainer.log_every_n_steps=1",
    "--loggers=[]",
    "--save_every_n_minutes=0",  # they are over before a clock would ask
]


def options(runs: Path, run_id: str, *more: str, method: str = "SimCLR", epochs: int = 2) -> list[str]:
    model = f"--model=ssl_geometry.methods.{method}"
    return [
        model,
        *SMALL,
        f"--runs={runs}",
        "--experiment=e",
        f"--run_id={run_id}",
        f"--trainer.max_epochs={epochs}",
        *more,
    ]


def losses(run: Path) -> pd.Series:
    records = read_records(run)
    return records[records["metric"] == "train/loss"].set_index("step")["value"]


class TestARunLeaves:
    def test_its_configuration_which_runs_again_as_it_is(self, runs: Path, tmp_path: Path) -> None:
        config = yaml.safe_load((runs / "simclr" / "config.yaml").read_text())
        assert config["model"]["class_path"] == "ssl_geometry.methods.SimCLR"
        assert config["cka"]["every_n_epochs"] == 1
        again = tmp_path
        off = ["--cka.every_n_epochs=0", "--invariance.every_n_epochs=0"]
        fit(["--config", str(runs / "simclr" / "config.yaml"), f"--runs={again}", *off])
        pd.testing.assert_series_equal(losses(again / "e" / "simclr"), losses(runs / "simclr"))

    def test_facts_about_itself(self, runs: Path) -> None:
        facts = json.loads((runs / "supervised" / "run.json").read_text())
        assert facts["status"] == "finished"
        assert facts["images_per_second"] > 0
        assert 0 <= facts["results"]["test/knn"] <= 1
        assert 0 <= facts["results"]["test/acc"] <= 1
        assert facts["versions"]["torch"] == torch.__version__

    def test_records_of_every_measurement(self, runs: Path) -> None:
        records = read_records(runs / "simclr")
        cka = records[records["metric"] == "cka"]
        assert sorted(cka["epoch"].unique()) == [0, 1, 2]
        assert set(cka["model_other"]) == {"simclr", "init", "supervised"}
        assert set(cka["n"]) == {128}
        itself = cka[(cka["model_other"] == "simclr") & (cka["layer"] == cka["layer_other"])]
        np.testing.assert_allclose(itself["value"], 1, atol=1e-12)
        assert not cka.duplicated(["model", "model_other", "layer", "layer_other", "epoch"]).any()
        at_start = cka[(cka["epoch"] == 0) & cka["model_other"].isin(["init", "simclr"])]
        wide = at_start.pivot(index=["layer", "layer_other"], columns="model_other", values="value")
        np.testing.assert_allclose(wide["init"], wide["simclr"], atol=1e-12)
        assert len(losses(runs / "simclr")) == 2 * 256 // 64

    def test_the_protocol_behind_each_number(self, runs: Path) -> None:
        (digest,) = read_records(runs / "simclr").query("metric == 'cka'")["protocol"].unique()
        text = json.loads((runs / "simclr" / "records" / "protocols" / f"{digest}.json").read_text())
        assert text["gram_size"] == 32
        assert text["n"] == 128

    def test_figures(self, runs: Path) -> None:
        names = {path.stem for path in (runs / "simclr" / "figures").glob("*.png")}
        assert {
            "cka_map_self",
            "cka_map_supervised",
            "cka_map_init",
            "cka_epochs_init",
            "cka_depth_supervised",
        } <= names

    def test_a_checkpoint_that_is_plain_data(self, runs: Path) -> None:
        checkpoint = read_checkpoint(runs / "simclr" / "checkpoints" / "last.ckpt", "")
        assert checkpoint["method"]["class_path"] == "ssl_geometry.methods.simclr.SimCLR"
        assert checkpoint["epoch"] == 1
        assert not any("knn" in key for key in checkpoint["state_dict"])


def test_live_numbers_equal_those_of_the_saved_checkpoint(runs: Path) -> None:
    method = load_method(runs / "simclr").method
    data = DataModule("digits", limit_train=256, limit_test=128, measure_size=128, batch_size=64)
    data.prepare_data()
    data.setup("fit")
    with Taps(method, "all", lambda layer, x: gram_vector(x, 32)) as taps, measuring(method):
        metric = LayerwiseCKA(taps.names, gram_size=32)
        for batch in data.loader("measure"):
            metric.update(taps(method.clean_view(batch["image"], batch["index"], seed=0, epoch=0, view=0)))
    records = read_records(runs / "simclr").query("metric == 'cka' and epoch == 2 and model_other == 'simclr'")
    live = records.pivot(index="layer", columns="layer_other", values="value").loc[taps.names, taps.names]
    np.testing.assert_allclose(live, metric.compute(), atol=1e-6)


@pytest.mark.parametrize("method", ["SimCLR", "Supervised"])
def test_training_is_bit_identical_with_and_without_monitors(tmp_path: Path, method: str) -> None:
    monitors = ("cka", "invariance", "probes", "neighbors", "spectrum")
    small = [
        "--invariance.views=[own, color]",
        "--neighbors.copies=3",
        "--neighbors.settings=[crop]",
        "--neighbors.layers=[layer2.0, pooled]",
        "--spectrum.copies=2",
        "--spectrum.layers=[pooled]",
    ]
    on = fit(options(tmp_path, "on", *(f"--{name}.every_n_epochs=1" for name in monitors), *small, method=method))
    off = fit(options(tmp_path, "off", *(f"--{name}.every_n_epochs=0" for name in monitors), method=method))
    found = set(read_records(on.directory)["metric"])
    assert {"cka", "invariance", "ridge_probe", "online_probe", "diameter", "kept_since_last", "rankme"} <= found
    pd.testing.assert_series_equal(losses(on.directory), losses(off.directory), check_exact=True)
    weights = [read_checkpoint(run.last_checkpoint, "")["state_dict"] for run in (on, off)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


class Interrupt(L.Callback):
    """Stops training as Ctrl-C does, at the start of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    probes = ["--probes.every_n_epochs=1", "--probes.logistic=true", "--neighbors.every_n_epochs=1"]
    probes += [
        "--probes.layers=[layer4.0, pooled]",
        "--cka.layers=stages",
        "--neighbors.layers=stages",
        "--spectrum.layers=stages",
        "--neighbors.copies=3",
        "--neighbors.settings=[crop]",
        "--spectrum.every_n_epochs=1",
        "--spectrum.copies=2",
    ]
    whole = fit(options(tmp_path, "whole", *probes))
    callback = '--trainer.callbacks=[{"class_path":"tests.integration.test_fit.Interrupt","init_args":{"epoch":1}}]'
    with pytest.raises(Interrupted, match="--resume"):
        fit(options(tmp_path, "part", *probes, callback))
    resumed = fit(options(tmp_path, "part", *probes, "--resume=auto"))
    assert resumed.resumed_from is not None
    states = [read_checkpoint(run.last_checkpoint, "") for run in (whole, resumed)]
    assert all(torch.equal(value, states[1]["state_dict"][key]) for key, value in states[0]["state_dict"].items())
    frames = []
    for run in (whole, resumed):
        frame = read_records(run.directory).drop(columns=["run", "model"])
        frame["model_other"] = frame["model_other"].replace(run.directory.name, "itself")
        keys = ["metric", "epoch", "step", "model_other", "layer", "layer_other", "view", "low"]
        frames.append(frame.sort_values(keys, ignore_index=True))
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)


def test_a_resumed_run_may_look_at_other_images(tmp_path: Path) -> None:
    """What was kept of the initialisation then ends; all else goes on."""
    fit(options(tmp_path, "part", epochs=1))
    run = fit(options(tmp_path, "part", "--resume=auto", "--data.measure_size=64", epochs=2))
    last = read_records(run.directory).query("metric == 'cka' and epoch == 2")
    assert set(last["model_other"]) == {"part"}
    assert set(last["n"]) == {64}


def test_resume_alone_continues_with_the_runs_own_configuration(tmp_path: Path) -> None:
    run = fit(options(tmp_path, "a", epochs=1))
    again = fit([f"--resume={run.directory}", "--trainer.max_epochs=2", f"--runs={tmp_path / 'elsewhere'}"])
    assert again.directory == run.directory
    assert read_checkpoint(again.last_checkpoint, "")["epoch"] == 1


def test_a_longer_run_has_the_schedule_of_its_new_length(tmp_path: Path) -> None:
    fit(options(tmp_path, "a", "--model.warmup_epochs=0", epochs=1))
    run = fit(options(tmp_path, "a", "--model.warmup_epochs=0", "--resume=auto", epochs=2))
    state = read_checkpoint(run.last_checkpoint, "")
    assert state["lr_schedulers"][0]["_last_lr"][0] == pytest.approx(0, abs=1e-12)
    shorter = fit(options(tmp_path, "b", "--model.warmup_epochs=0", epochs=1))
    longer, first = (read_checkpoint(r.last_checkpoint, "")["state_dict"] for r in (run, shorter))
    key = "head.layers.0.weight"
    assert not torch.equal(longer[key], first[key]), "at the old schedule's end the rate is 0 and nothing moves"


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that says why, after exit code 2."""
    capsys.readouterr()
    logging.getLogger("ssl_geometry").handlers.clear()  # what an earlier test captured is closed
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert said.strip().endswith(line)
    return line


def test_a_resume_that_would_train_on_otherwise_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The optimiser's state holds the old rate, the configuration would show the new one."""
    run = fit(options(tmp_path, "a", epochs=1))
    before = {path: path.read_bytes() for path in (run.directory / "config.yaml", run.last_checkpoint)}
    for resume in (run.directory, run.last_checkpoint):
        said = refused(capsys, f"--resume={resume}", "--model.lr=3", "--trainer.max_epochs=2")
        assert "--model.lr 0.3 (now 3.0)" in said
    assert "--model.width 0.25 (now 0.5)" in refused(
        capsys, *options(tmp_path, "a", "--resume=auto", "--model.width=0.5", epochs=2)
    )
    assert {path: path.read_bytes() for path in before} == before
    assert fit([f"--resume={run.directory}", "--trainer.max_epochs=2", "--data.eval_batch_size=50"]).resumed_from


def test_a_file_that_is_no_checkpoint_of_ours_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(options(tmp_path, "a", epochs=1))
    last, content = run.last_checkpoint, read_checkpoint(run.last_checkpoint, "")
    whole = last.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    foreign: list[bytes | dict[str, Any]] = [b"", whole[: len(whole) // 2], bytes(flipped), {}]
    foreign += [{"state_dict": content["state_dict"]}]
    foreign += [content | {"state_dict": 3}, content | {"pytorch-lightning_version": 7}, content | {"loops": {}}]
    for file in foreign:
        if isinstance(file, bytes):
            last.write_bytes(file)
        else:
            torch.save(file, last)
        assert f"--resume {last}" in refused(capsys, f"--resume={run.directory}", "--trainer.max_epochs=2")
    last.write_bytes(whole)
    assert fit([f"--resume={run.directory}", "--trainer.max_epochs=2"]).resumed_from == last


def test_processes_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(abs, -1).result() == 1
        fit(options(tmp_path, "a", "--data.storage=workers", "--data.num_workers=1", epochs=1))
        assert pool.submit(abs, -2).result() == 2


def test_a_run_wound_back_has_one_past(tmp_path: Path) -> None:
    """Nothing of the training that was given up is left in the records, and it can be found aside."""
    more = ["--keep_every_n_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    run = fit(options(tmp_path, "a", *more, epochs=3))
    before = read_records(run.directory)
    assert before[before["metric"] == "val/knn"]["epoch"].tolist() == [0, 1, 2, 3]
    back = run.directory / "checkpoints" / "epoch=00001.ckpt"
    fit([f"--resume={back}", "--trainer.max_epochs=2"])
    after = read_records(run.directory)
    assert set(after["epoch"]) == {0, 1, 2}
    assert not after.duplicated(["metric", "epoch", "step", "layer", "layer_other", "model_other"]).any()
    assert losses(run.directory).index.tolist() == list(range(8))
    aside = run.directory / "superseded" / "1"
    assert read_checkpoint(aside / "last.ckpt", "")["global_step"] == 12
    assert len(RecordStore(aside).read()) == (before["epoch"] > 1).sum()


def test_kept_checkpoints_are_named_by_completed_epochs(tmp_path: Path) -> None:
    run = fit(options(tmp_path, "kept", "--keep_every_n_epochs=1"))
    names = {path.name for path in (run.directory / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "epoch=00001.ckpt", "epoch=00002.ckpt"}
    assert load_method(run.directory / "checkpoints" / "epoch=00001.ckpt").epochs == 1


def test_a_run_that_ends_by_steps_is_measured_and_drawn_at_its_end(tmp_path: Path) -> None:
    rates = '{"class_path": "LearningRateMonitor", "init_args": {"logging_interval": "epoch"}}'
    more = ["--trainer.max_steps=6", "--cka.every_n_epochs=5", f"--trainer.callbacks=[{rates}]"]
    run = fit(options(tmp_path, "steps", *more, "--trainer.log_every_n_steps=50", epochs=-1))
    assert sorted(read_records(run.directory).query("metric == 'cka'")["step"].unique()) == [0, 6]
    assert list((run.directory / "figures").glob("*.png"))
    assert losses(run.directory).index.tolist() == [3], "once per epoch, whatever the interval"
    assert read_records(run.directory).query("metric == 'lr-LARS/pg1'")["epoch"].tolist() == [1, 2]


def test_a_mistake_leaves_the_run_id_free(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(options(tmp_path, "x", "--model.backbone=resnt10"))
    assert fit(options(tmp_path, "x", epochs=1)).resumed_from is None


def test_a_reference_may_bear_the_runs_own_name(tmp_path: Path, runs: Path) -> None:
    args = [arg for arg in options(tmp_path, "simclr", epochs=1) if "experiment" not in arg]
    run = fit([*args, "--experiment=other", f"--cka.reference={runs / 'simclr'}"])
    start = read_records(run.directory).query("metric == 'cka' and epoch == 0 and layer == layer_other")
    assert set(start["model_other"]) == {"simclr", "init", "simclr-reference"}
    np.testing.assert_allclose(start[start["model_other"] == "init"]["value"], 1, atol=1e-12)


def test_metrics_that_are_logged_after_the_checkpoint_are_kept(tmp_path: Path) -> None:
    logger = RecordsLogger(tmp_path / "e" / "r")
    logger.log_metrics({"train/loss": 1.0, "epoch": 0}, step=3)
    logger.flush()
    logger.log_metrics({"train/acc": 0.5, "epoch": 0}, step=3)
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, step=3)
    logger.finalize("success")
    rows = logger.store.read().set_index("metric")["value"]
    assert rows.to_dict() == {"train/loss": 2.0, "train/acc": 0.5}


def test_a_base_that_two_configs_share_undoes_neither(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {batch_size: 4}")
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("base: base.yaml")
    args = expand_bases([f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b.yaml")])
    assert [Path(arg).stem for arg in args if arg != "--config"] == ["base", "a", "b"]
    (tmp_path / "base.yaml").write_text(f"base: ../{tmp_path.name}/a.yaml")
    with pytest.raises(UserError, match="starts from itself"):
        expand_bases(["--config", str(tmp_path / "a.yaml")])


def test_resume_auto_finds_the_newest_unfinished_run_of_the_same_configuration(tmp_path: Path) -> None:
    same = [*options(tmp_path, "x")[:-3], "--trainer.max_epochs=2", "--experiment=e", f"--runs={tmp_path}"]
    first = fit([option for option in same if not option.startswith("--run_id")])
    assert first.directory.name.startswith("simclr-resnet10-s0-")
    second = fit([option for option in [*same, "--resume=auto"] if not option.startswith("--run_id")])
    assert second.directory != first.directory, "a finished run is not continued"


METHOD = '''
from torch import nn
from ssl_geometry.methods import Method


class Pull(Method):
    """Two views attract.

    Args:
        strength: of the pull.
    """

    num_views = 2

    def __init__(self, strength: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.head = nn.Linear(self.num_features, 8)

    def loss(self, outputs, batch):
        return self.hparams["strength"] * (outputs[0] - outputs[1]).square().mean()
'''


TEACHER = (
    METHOD
    + """

from ssl_geometry.methods import Teacher


class Follow(Pull):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.teacher = Teacher(self)

    def outputs(self, views, batch):
        first, second = super().outputs(views, batch)
        return first, self.encode(views, self.teacher)[1]

    def after_step(self, progress):
        self.teacher.follow(self, 0.5)
"""
)


def test_student_and_teacher_are_measured_and_either_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_teacher.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    args = options(tmp_path, "both", "--model.measured=both", "--spectrum.every_n_epochs=2", "--model.lr=0.5")
    run = fit([arg.replace("ssl_geometry.methods.SimCLR", "my_teacher.Follow") for arg in args])
    last = read_records(run.directory).query("metric in ('cka', 'online_probe', 'rankme') and epoch == 2")
    assert set(last["model"]) == {"both", "teacher"}
    assert set(last[last["metric"] == "online_probe"]["model"]) == {"both", "teacher"}
    rankme = last[last["metric"] == "rankme"].pivot_table(index="layer", columns="model", values="value")
    assert (rankme["both"] != rankme["teacher"]).any()
    out = tmp_path / "compared"
    compare.compare(["--models", f"a={run.directory}", "b=random", f"--out={out}", "--data.measure_size=64"])


def test_a_method_is_one_file_anywhere_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_method.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    args = options(tmp_path, "mine", "--model.strength=2", "--model.views=[{augment: [crop, flip]}]")
    run = fit([arg.replace("ssl_geometry.methods.SimCLR", "my_method.Pull") for arg in args])
    method = load_method(run.directory).method
    assert method.hparams["strength"] == 2
    records = read_records(run.directory)
    assert "head" in set(records["layer"])


class RunOutOfMemory(L.Callback):
    """As a GPU whose memory is full, in the backward of a step."""

    def on_before_backward(self, *args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\nSee documentation")


def _full(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_memory_that_is_full_while_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = f"--trainer.callbacks={__name__}.RunOutOfMemory"
    said = refused(capsys, *options(tmp_path, "full", "--trainer.accumulate_grad_batches=2", callback))
    assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …) in training" in said
    for option in ("--data.batch_size 64", "--trainer.accumulate_grad_batches 4", "--trainer.precision bf16-mixed"):
        assert option in said


@pytest.mark.parametrize(
    ("owner", "function", "words"),
    [
        ("ssl_geometry.measure.engine", "forward_pass", ["while measuring", "--data.eval_batch_size 100"]),
        ("ssl_geometry.methods.base.Method", "evaluate", ["while measuring", "--data.eval_batch_size 100"]),
        ("ssl_geometry.data.images.Images", "decode", ["--data.storage workers"]),
    ],
)
def test_memory_that_is_full_at_other_times(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    owner: str,
    function: str,
    words: list[str],
) -> None:
    monkeypatch.setattr(f"{owner}.{function}", _full)
    args = [*options(tmp_path, "full", epochs=1), "--data.eval_batch_size=100", "--trainer.check_val_every_n_epoch=1"]
    said = refused(capsys, *args)
    assert all(word in said for word in [*words, "DefaultCPUAllocator", f"--resume {tmp_path / 'e' / 'full'}"]), said
    assert "--data.batch_size" not in said


@pytest.mark.parametrize("command", [compare, survey, probe], ids=lambda module: module.__name__)
def test_memory_that_is_full_in_commands_that_measure(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    capsys.readouterr()
    monkeypatch.setattr("ssl_geometry.models.taps.Taps.__call__", _full)
    with pytest.raises(SystemExit) as stop:
        command.main(["--models", f"a={runs / 'simclr'}", f"--out={tmp_path / 'out'}", "--device=cpu"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "--data.eval_batch_size 64" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.datset=cifar10"], ["data.datset", "data.dataset"]),
        (["--model.temprature=1"], ["temprature"]),
        (["--model=ssl_geometry.methods.SimCRL"], ["SimCRL"]),
        (["--model.backbone=resnet17"], ["resnet17", "resnet18"]),
        (["--model.views=[{augment: simcrl}]"], ["simcrl", "simclr"]),
        (["--data.batch_size=many"], ["data.batch_size", "many"]),
        (["--data.batch_size=1"], ["batch_size"]),
        (["--save_every_n_minutes=-1"], ["save_every_n_minutes", "-1"]),
        (["--data.dataset=no/such/folder"], ["no/such/folder"]),
        (["--data.dataset=cifra10"], ["cifra10", "cifar10"]),
        (["--data.measure_size=129"], ["measure_size", "129", "128"]),
        (["--cka.layers=layer9"], ["layer9", "layer"]),
        (["--cka.gram_size=2"], ["gram_size"]),
        (["--cka.reference=no/such/run"], ["--cka.reference", "no/such/run"]),
        (["--config=no.yaml"], ["no.yaml"]),
        (["--resume=no/such/run"], ["--resume", "no/such/run"]),
        (["--runs=/proc/nowhere"], ["--runs", "/proc/nowhere"]),
        (["--loggers=[wandbb]"], ["wandbb"]),
        (["--invariance.views=[sepia]", "--invariance.every_n_epochs=1"], ["--invariance.views [sepia]"]),
        (["--trainer.max_time=soon"], ["--trainer: ", "'soon'"]),
        (["--model.no_such=1"], ["unknown option '--model.no_such'"]),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(options(tmp_path, "bad", *more))
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert all(word in line for word in words), line
    assert len(line) < 600


def test_an_existing_run_is_not_overwritten(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (runs / "simclr" / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit) as exit_:
        main(options(runs.parent, "simclr"))
    assert exit_.value.code == 2
    assert "--resume" in capsys.readouterr().err
    assert (runs / "simclr" / "checkpoints" / "last.ckpt").read_bytes() == before


class ExplodeIn(L.Callback):
    """Makes the weights NaN at the start of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            next(pl_module.parameters()).data.fill_(torch.nan)


def test_a_nan_loss_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = '--trainer.callbacks=[{"class_path":"tests.integration.test_fit.ExplodeIn","init_args":{"epoch":1}}]'
    with pytest.raises(SystemExit) as exit_:
        main(options(tmp_path, "nan", callback))
    assert exit_.value.code == 2
    assert "NaN" in capsys.readouterr().err
    checkpoint = read_checkpoint(tmp_path / "e" / "nan" / "checkpoints" / "last.ckpt", "")
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert checkpoint["epoch"] == 0


def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, []

    def save_until_full(checkpoint: Any, file: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            file.write(b"half of a checkpoint")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr("ssl_geometry.runs.checkpoints.torch.save", save_until_full)
    with pytest.raises(SystemExit) as exit_:
        main(options(tmp_path, "full"))
    assert exit_.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    folder = tmp_path / "e" / "full" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert read_checkpoint(folder / "last.ckpt", "")["epoch"] == 0


def test_a_reference_of_another_architecture_is_compared_by_depth(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = options(tmp_path, "deep", f"--cka.reference={runs / 'supervised'}", "--model.backbone=resnet18", epochs=1)
    records = read_records(fit(args).directory).query("metric == 'cka' and model_other == 'supervised'")
    assert set(records["layer"]) > set(records["layer_other"]) - {"head"}


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_other_loggers(tmp_path: Path, logger: str) -> None:
    run = fit(options(tmp_path, logger, f"--loggers=[{logger}]", epochs=1))
    assert list((run.directory / logger).iterdir())


@pytest.mark.parametrize("args", [["--help"], ["--config=configs/quickstart/simclr.yaml", "--print_config"]])
def test_help_and_print_config(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 0
    assert "every_n_epochs" in capsys.readouterr().out


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(config), "--print_config"])
    assert exit_.value.code == 0


def clean_environment(**variables: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **variables}


def _away(environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ |= environment


@pytest.mark.parametrize(
    "environment",
    [{}, {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}],
    ids=["without a key", "server away"],
)
def test_wandb_never_asks_and_never_stops_training(tmp_path: Path, environment: dict[str, str]) -> None:
    args = options(tmp_path, "w", "--loggers=[wandb]", "--cka.every_n_epochs=0", epochs=1)
    process = start(args, tmp_path / "out", partial(_away, {"HOME": str(tmp_path), **environment}))
    assert finish(process) == 0, (tmp_path / "out").read_text()
    assert list((tmp_path / "e" / "w" / "wandb").glob("offline-run-*/*.wandb"))


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Same global batches and views, same weights after training (LayerNorm: batch statistics play no part)."""
    more = [
        "--model.backbone=vit_tiny_patch16_224",
        "--model.image_size=32",
        "--model.width=1",
        "--model.lr=0.05",
        "--data.limit_train=128",
        "--cka.layers=stages",
        "--trainer.accelerator=cpu",
    ]
    processes = start_ranks(2, options(tmp_path, "two", *more, method="Supervised"), tmp_path / "out")
    assert [finish(process) for process in processes] == [0, 0], (tmp_path / "out").read_text()[-3000:]
    one = fit(options(tmp_path, "one", *more, method="Supervised")).directory
    two = tmp_path / "e" / "two"
    first, second = (read_checkpoint(run / "checkpoints" / "last.ckpt", "")["state_dict"] for run in (one, two))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=2e-6)
    frames = [read_records(run).query("metric == 'cka'") for run in (one, two)]
    keys = ["epoch", "layer", "layer_other"]
    left, right = (frame[frame["model_other"] == "init"].set_index(keys)["value"].sort_index() for frame in frames)
    pd.testing.assert_series_equal(left, right, check_exact=False, rtol=0, atol=1e-5)
    for metric in ("ridge_probe", "online_probe"):
        frames = [
            read_records(run).query(f"metric == '{metric}' and epoch == 2").set_index("layer") for run in (one, two)
        ]
        assert len(frames[0]) == len(frames[1]) > 10
        np.testing.assert_allclose(frames[0]["value"], frames[1]["value"].loc[frames[0].index], atol=1.5 / 128)
    banks = [
        read_checkpoint(run / "checkpoints" / "last.ckpt", "")["callbacks"]["GeometryMonitor"]["measurements"][
            "Probes 0"
        ]["bank"]
        for run in (one, two)
    ]
    torch.testing.assert_close(banks[0]["weight"], banks[1]["weight"], rtol=1e-3, atol=1e-3)
    assert banks[0]["weight"].abs().max() > 0.1
    assert torch.equal(banks[0]["validated"], banks[1]["validated"])
    results = [json.loads((run / "run.json").read_text())["results"] for run in (one, two)]
    assert results[0] == pytest.approx(results[1], abs=1 / 128 + 1e-9)
