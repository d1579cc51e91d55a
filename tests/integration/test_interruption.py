"""Killed, stopped by a signal, out of disk: the run goes on from whole files, and ends as one that was never disturbed.

Runs live in processes forked from a server that has imported everything, so that twenty starts take a minute.
"""

import atexit
import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
import wandb
from torch import nn

from ssl_geometry.fit import main
from ssl_geometry.methods import SimCLR
from ssl_geometry.records import read_records, wandb_files
from ssl_geometry.runs import read_checkpoint
from tests.integration.test_fit import ROOT, SMALL, clean_environment

PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ssl_geometry.fit", "tests.integration.test_interruption"])
MONITORS = [
    "--cka.every_n_epochs=1",
    "--probes.every_n_epochs=1",
    "--neighbors.every_n_epochs=1",
    "--neighbors.settings=[]",
    "--neighbors.layers=head",
    "--invariance.every_n_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
]


class WithDropout(SimCLR):
    """Draws from the global generator, as a user's own method may."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = nn.Sequential(nn.Dropout(0.2), self.head)


def options(runs: Path, run_id: str, *more: str, epochs: int = 6) -> list[str]:
    return [
        "--model=tests.integration.test_interruption.WithDropout",
        *SMALL,
        f"--runs={runs}",
        "--experiment=e",
        f"--run_id={run_id}",
        f"--trainer.max_epochs={epochs}",
        "--resume=auto",
        *more,
    ]


def _run(args: list[str], output: str, prepare: Callable[[], None] | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    try:
        main(args)
    finally:
        wandb.finish()  # a forked process does not run what is left for the end


def start(args: list[str], output: Path, prepare: Callable[[], None] | None = None) -> Any:
    process = PROCESSES.Process(target=_run, args=(args, str(output), prepare))
    process.start()
    return process


def finish(process: Any, timeout: float = 400) -> int:
    """Exit code; negative for the signal that ended it."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the process hangs")
    return process.exitcode


def weights(run: Path) -> dict[str, Any]:
    """Weights, optimiser and schedule, and the online probes."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt", "")
    return {
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
        "probes": checkpoint["callbacks"]["ProbeMonitor"]["bank"],
    }


def assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)


def records(run: Path) -> pd.DataFrame:
    frame = read_records(run).drop(columns=["run", "model"])
    frame["model_other"] = frame["model_other"].replace(run.name, "itself")
    keys = ["metric", "epoch", "step", "split", "model_other", "layer", "layer_other", "view", "low", "value"]
    return frame.sort_values(keys, ignore_index=True)


def numbers(run: Path) -> list[tuple[str, int, str]]:
    """What W&B wrote, without pictures."""
    points = wandb_files.points(run)
    pictures = {key.removesuffix("/_type") for key, _, _ in points if key.endswith("/_type")}
    return [point for point in points if point[0].rpartition("/")[0] not in pictures]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(options(folder, "whole", *MONITORS, "--loggers=[wandb]"), folder / "out")
    assert finish(process) == 0, (folder / "out").read_text()
    return folder / "e" / "whole"


def _signal_at(target: str, call: int, number: int, only: str = "", halfway: bool = False) -> None:
    """Send this process a signal at a call of a function.

    ``only`` counts calls whose last argument ends so; ``halfway`` writes half a file first.
    """
    path, _, name = target.rpartition(".")
    owner: Any = sys.modules.get(path) or getattr(sys.modules[path.rpartition(".")[0]], path.rpartition(".")[2])
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += str(args[-1]).endswith(only)
        if calls[0] == call:
            if halfway:
                args[1].write(b"half a checkpoint")
                args[1].flush()
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


MOMENTS: dict[str, tuple[str, tuple[int, int, int], dict[str, Any]]] = {
    "in a step": ("ssl_geometry.methods.simclr.SimCLR.loss", (3, 7, 2), {}),
    "in the optimiser": ("torch.optim.Optimizer.zero_grad", (1, 6, 3), {}),
    "in a measuring moment": ("ssl_geometry.callbacks.measure.forward_pass", (2, 1, 2), {}),
    "before records are written": ("pyarrow.parquet.write_table", (3, 2, 1), {}),
    "before records get their name": ("os.replace", (2, 3, 1), {"only": ".parquet"}),
    "before a checkpoint gets its name": ("os.replace", (1, 2, 1), {"only": ".ckpt"}),
    "within a checkpoint": ("torch.save", (1, 2, 1), {"halfway": True}),
}
"""Function, at which of its calls in the first, second and third death there, and more."""


def test_killed_twenty_times(tmp_path: Path, undisturbed: Path) -> None:
    """Wherever it was killed, the end is bit-identical, and no number is missing or there twice."""
    args = options(tmp_path, "killed", *MONITORS, "--loggers=[wandb]")
    last = tmp_path / "e" / "killed" / "checkpoints" / "last.ckpt"
    reached = []
    for death in range(20):
        target, calls, more = list(MOMENTS.values())[death % len(MOMENTS)]
        prepare = partial(_signal_at, target, calls[death // len(MOMENTS)], signal.SIGKILL, **more)
        code = finish(start(args, tmp_path / "out", prepare))
        assert code == -signal.SIGKILL, f"death {death}: {code}\n" + (tmp_path / "out").read_text()
        reached.append(read_checkpoint(last, "")["global_step"] if last.exists() else 0)  # whole
    assert reached[0] == 0
    assert len(set(reached)) >= 4, reached
    assert finish(start(args, tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    run = last.parents[1]
    assert_same(weights(undisturbed), weights(run))
    pd.testing.assert_frame_equal(records(undisturbed), records(run), check_exact=True)
    # W&B loses pictures that it had not written when it was killed; numbers never.
    points = numbers(run)
    assert len(points) == len({point[:2] for point in points}) > 100
    assert sorted(points) == sorted(numbers(undisturbed))
    assert not list(run.glob("checkpoints/*.partial"))


class SignalAt(L.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("step", [0, 5, 7], ids=["first step", "mid epoch", "last step of an epoch"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(tmp_path: Path, undisturbed: Path, step: int, number: int) -> None:
    callback = json.dumps({"class_path": f"{__name__}.SignalAt", "init_args": {"step": step, "number": int(number)}})
    args = options(tmp_path, "told", *MONITORS)
    code = finish(start([*args, f"--trainer.callbacks=[{callback}]"], tmp_path / "out"))
    said = (tmp_path / "out").read_text()
    assert code == {signal.SIGUSR1: 75, signal.SIGTERM: 143}[number], said  # type: ignore[index]
    assert f"stopped by {signal.Signals(number).name}" in said
    assert f"continue with --resume {tmp_path / 'e' / 'told'}" in said
    assert "Traceback" not in said
    saved = read_checkpoint(tmp_path / "e" / "told" / "checkpoints" / "last.ckpt", "")
    assert saved["global_step"] == step + 1
    assert finish(start(args, tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    assert_same(weights(undisturbed), weights(tmp_path / "e" / "told"))
    pd.testing.assert_frame_equal(records(undisturbed), records(tmp_path / "e" / "told"), check_exact=True)


def test_killed_while_it_measures_after_a_signal_in_the_epochs_last_step(tmp_path: Path, undisturbed: Path) -> None:
    callback = json.dumps([{"class_path": f"{__name__}.SignalAt", "init_args": {"step": 7, "number": 10}}])
    args = options(tmp_path, "told", *MONITORS)
    target = "ssl_geometry.callbacks.measure.forward_pass"
    passes = 4  # of the initialisation and of the first epoch
    prepare = partial(_signal_at, target, passes + 1, signal.SIGKILL)
    assert finish(start([*args, f"--trainer.callbacks={callback}"], tmp_path / "out", prepare)) == -signal.SIGKILL
    assert read_checkpoint(tmp_path / "e" / "told" / "checkpoints" / "last.ckpt", "")["global_step"] == 4
    assert finish(start(args, tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    pd.testing.assert_frame_equal(records(undisturbed), records(tmp_path / "e" / "told"), check_exact=True)


def test_a_signal_between_summed_gradients_waits_for_the_step(tmp_path: Path) -> None:
    more = ["--trainer.accumulate_grad_batches=2", "--cka.every_n_epochs=0"]
    callback = json.dumps(
        {"class_path": f"{__name__}.SignalAt", "init_args": {"step": 1, "number": int(signal.SIGUSR1)}}
    )
    args = options(tmp_path, "told", *more, epochs=2)
    assert finish(start([*args, f"--trainer.callbacks=[{callback}]"], tmp_path / "out")) == 75
    last = tmp_path / "e" / "told" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last, "")["global_step"] == 2
    for run_id in ("told", "whole"):
        assert finish(start(options(tmp_path, run_id, *more, epochs=2), tmp_path / "out")) == 0
    assert_same(weights(tmp_path / "e" / "whole"), weights(tmp_path / "e" / "told"))


def test_a_signal_before_the_command_listens_is_not_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ssl_geometry.fit", *options(tmp_path, "early", "--cka.every_n_epochs=0")]
    environment = clean_environment(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    time.sleep(1)  # it imports for some seconds
    process.send_signal(signal.SIGUSR1)
    assert "stopped by SIGUSR1" in process.communicate(timeout=120)[1]
    assert process.returncode == 75
    assert read_checkpoint(tmp_path / "e" / "early" / "checkpoints" / "last.ckpt", "")["global_step"] == 1


class SignalAtExit(L.Callback):
    """Sends this process a signal when all is done."""

    def __init__(self) -> None:
        atexit.register(os.kill, os.getpid(), signal.SIGUSR1)


def test_a_signal_after_the_end_fails_nothing(tmp_path: Path) -> None:
    more = ["--cka.every_n_epochs=0", "--probes.every_n_epochs=0", f"--trainer.callbacks={__name__}.SignalAtExit"]
    command = [sys.executable, "-m", "ssl_geometry.fit", *options(tmp_path, "late", *more, epochs=1)]
    environment = clean_environment(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "e" / "late" / "run.json").read_text())["status"] == "finished"


def test_a_signal_in_the_evaluation_leaves_it_to_the_next_time(tmp_path: Path, undisturbed: Path) -> None:
    args = options(tmp_path, "told", *MONITORS)
    prepare = partial(_signal_at, "ssl_geometry.methods.base.Method.on_test_epoch_start", 1, signal.SIGUSR1)
    assert finish(start(args, tmp_path / "out", prepare)) == 75, (tmp_path / "out").read_text()
    assert json.loads((tmp_path / "e" / "told" / "run.json").read_text())["status"] != "finished"
    assert finish(start(args, tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    facts = [json.loads((run / "run.json").read_text()) for run in (undisturbed, tmp_path / "e" / "told")]
    assert facts[0]["results"] == facts[1]["results"]
    pd.testing.assert_frame_equal(records(undisturbed), records(tmp_path / "e" / "told"), check_exact=True)
