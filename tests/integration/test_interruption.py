"""Killed, stopped by a signal, out of disk: the run goes on from whole files, and ends as one that was never disturbed.

Runs live in processes of their own (``tests/processes.py``).
"""

import atexit
import inspect
import json
import multiprocessing as mp
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from torch import nn

from ssl_geometry.callbacks import StopOnSignal
from ssl_geometry.data.images import Images
from ssl_geometry.data.loader import Loader
from ssl_geometry.data.plan import BatchPlan, every_nth
from ssl_geometry.methods import SimCLR
from ssl_geometry.records import RecordStore, read_records
from ssl_geometry.report.upload import logged_rows
from ssl_geometry.runs.checkpoints import read_checkpoint
from tests.integration.test_fit import ROOT, SMALL, clean_environment
from tests.integration.wandb_server import Server
from tests.processes import HANG_SECONDS, PROCESSES, finish, start, start_ranks

MONITORS = [
    "--cka.every_n_epochs=1",
    "--cka.layers=stages",
    "--probes.every_n_epochs=1",
    "--probes.layers=[layer4.0, pooled]",
    "--neighbors.every_n_epochs=2",
    "--neighbors.settings=[]",
    "--neighbors.layers=head",
    "--neighbors.k=10",
    "--invariance.every_n_epochs=2",
    "--invariance.layers=stages",
    "--invariance.views=[own]",
    "--trainer.check_val_every_n_epoch=1",
]
SMALLER = [
    *SMALL,
    "--model.width=0.0625",
    "--data.limit_train=128",
    "--data.limit_test=32",
    "--data.measure_size=32",
    "--data.batch_size=32",  # four steps an epoch
]


class WithDropout(SimCLR):
    """Draws from the global generator, as a user's own method may."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = nn.Sequential(nn.Dropout(0.2), self.head)


def options(runs: Path, run_id: str, *more: str, epochs: int = 4) -> list[str]:
    return [
        "--model=tests.integration.test_interruption.WithDropout",
        *SMALLER,
        f"--runs={runs}",
        "--experiment=e",
        f"--run_id={run_id}",
        f"--trainer.max_epochs={epochs}",
        "--resume=auto",
        *more,
    ]


def weights(run: Path) -> dict[str, Any]:
    """Weights, optimiser and schedule, and the online probes."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt", "")
    return {
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
        "probes": checkpoint["callbacks"]["GeometryMonitor"]["measurements"]["Probes 0"]["bank"],
    }


def assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)


def records(run: Path) -> pd.DataFrame:
    frame = read_records(run).drop(columns=["run", "model"])
    frame["model_other"] = frame["model_other"].replace(run.name, "itself")
    keys = ["metric", "epoch", "step", "split", "model_other", "layer", "layer_other", "view", "low", "value"]
    return frame.sort_values(keys, ignore_index=True)


def assert_in_wandb(server: Server, run: Path) -> None:
    """The server has the numbers of the records, each step once; figures may be lost with W&B's process."""
    steps = [row["step"] for row in server.rows()]
    assert steps == sorted(set(steps))
    rows = logged_rows(RecordStore(run / "records").rows())
    expected = {(name, row.step): value for row in rows for name, value in row.numbers.items()}
    assert len(expected) >= 12
    assert {key: value for key, value in server.points().items() if not isinstance(value, dict)} == expected


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(options(folder, "whole", *MONITORS), folder / "out")
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


DEATHS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("in a step", "ssl_geometry.methods.simclr.SimCLR.loss", 3, {}),
    ("before records get their name", "os.replace", 4, {"only": ".parquet"}),
    ("before a checkpoint gets its name", "os.replace", 1, {"only": ".ckpt"}),
    ("in the optimiser", "torch.optim.Optimizer.zero_grad", 6, {}),
    ("within a checkpoint", "torch.save", 1, {"halfway": True}),
    ("while it measures", "ssl_geometry.measure.engine.forward_pass", 1, {}),
    ("before records are written", "pyarrow.parquet.write_table", 2, {}),
    ("in a step of a later epoch", "ssl_geometry.methods.simclr.SimCLR.loss", 6, {}),
    ("within a later checkpoint", "torch.save", 2, {"halfway": True}),
]
"""When, the function in whose call it dies, at which call since it was started, and more."""


def test_killed_nine_times(tmp_path: Path, undisturbed: Path) -> None:
    """Wherever it was killed, the end is bit-identical, and no number is missing or there twice, in W&B as well."""
    args, server = options(tmp_path, "killed", *MONITORS, "--loggers=[wandb]"), Server()
    last = tmp_path / "e" / "killed" / "checkpoints" / "last.ckpt"
    reached = []
    for when, target, call, more in DEATHS:
        prepare = partial(_signal_at, target, call, signal.SIGKILL, **more)
        code = finish(start(args, tmp_path / "out", prepare, server.environment))
        assert code == -signal.SIGKILL, f"{when}: {code}\n" + (tmp_path / "out").read_text()
        reached.append(read_checkpoint(last, "")["global_step"] if last.exists() else 0)  # whole
    assert reached[0] == 0
    assert len(set(reached)) >= 4, reached
    assert finish(start(args, tmp_path / "out", environment=server.environment)) == 0, (tmp_path / "out").read_text()
    run = last.parents[1]
    assert_same(weights(undisturbed), weights(run))
    pd.testing.assert_frame_equal(records(undisturbed), records(run), check_exact=True)
    assert_in_wandb(server, run)
    assert not list(run.glob("checkpoints/*.partial"))


class SignalAt(L.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def at(name: str, step: int, number: int) -> str:
    callback = {"class_path": f"{__name__}.{name}", "init_args": {"step": step, "number": int(number)}}
    return f"--trainer.callbacks={json.dumps([callback])}"


@pytest.mark.parametrize(
    ("step", "number"),
    [(0, signal.SIGUSR1), (5, signal.SIGTERM), (7, signal.SIGUSR1), (7, signal.SIGTERM)],
    ids=["first step", "mid epoch", "last step of an epoch", "last step of an epoch, SIGTERM"],
)
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
    target = "ssl_geometry.measure.engine.forward_pass"
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


class SignalAtExit(L.Callback):
    """Sends this process a signal when all is done."""

    def __init__(self) -> None:
        atexit.register(os.kill, os.getpid(), signal.SIGUSR1)


def test_a_signal_before_the_command_listens_is_not_lost_and_one_after_its_end_changes_nothing(tmp_path: Path) -> None:
    more = ["--cka.every_n_epochs=0", "--probes.every_n_epochs=0", f"--trainer.callbacks={__name__}.SignalAtExit"]
    command = [sys.executable, "-m", "ssl_geometry.fit", *options(tmp_path, "early", *more)]
    environment = clean_environment(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not _withheld(process.pid) & {signal.SIGUSR1}:  # from then on it imports for some seconds
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert "stopped by SIGUSR1" in process.communicate()[1]
    assert process.returncode == 75
    assert read_checkpoint(tmp_path / "e" / "early" / "checkpoints" / "last.ckpt", "")["global_step"] == 1


def _withheld(pid: int) -> set[int]:
    """The signals that a process keeps waiting."""
    (mask,) = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return {number for number in signal.valid_signals() if int(mask, 16) >> (number - 1) & 1}


def test_what_is_replaced_in_lightning_is_there() -> None:
    """Its own handling of signals is switched off by private names, which a new version may change unseen."""
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    assert callable(trainer._signal_connector.register_signal_handlers)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    assert "register_signal_handlers()" in inspect.getsource(L.Trainer._run)
    assert "_broadcast_sigterm_tensor()" in inspect.getsource(type(trainer.fit_loop.epoch_loop).advance)
    assert {"is_last_batch", "total", "current"} <= set(vars(trainer.fit_loop.epoch_loop.batch_progress))


class NaNAndSignal(SignalAt):
    """A step spoils the weights; the signal comes before anyone has seen it."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step + 1:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(torch.nan)


def test_a_signal_does_not_save_weights_that_are_spoilt(tmp_path: Path) -> None:
    args = options(tmp_path, "nan", "--cka.every_n_epochs=0", "--trainer.log_every_n_steps=100")
    assert finish(start([*args, at("NaNAndSignal", 5, signal.SIGUSR1)], tmp_path / "out")) == 2
    said = (tmp_path / "out").read_text()
    last = tmp_path / "e" / "nan" / "checkpoints" / "last.ckpt"
    assert "the loss became NaN or infinite in epoch 2 (by step 6)" in said
    assert f"the last good checkpoint is kept ({last})" in said
    checkpoint = read_checkpoint(last, "")
    assert checkpoint["global_step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_killed_once_it_has_saved_after_a_signal(tmp_path: Path, undisturbed: Path) -> None:
    """The checkpoint is not ahead of the records: the figures of its last step are there."""
    args = options(tmp_path, "told", *MONITORS)
    prepare = partial(_signal_at, "ssl_geometry.errors.Interrupted.__init__", 1, signal.SIGKILL)
    assert finish(start([*args, at("SignalAt", 5, signal.SIGUSR1)], tmp_path / "out", prepare)) == -signal.SIGKILL
    run = tmp_path / "e" / "told"
    assert read_checkpoint(run / "checkpoints" / "last.ckpt", "")["global_step"] == 6
    assert finish(start(args, tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    assert_same(weights(undisturbed), weights(run))
    pd.testing.assert_frame_equal(records(undisturbed), records(run), check_exact=True)


class StepsAsMinutes(L.Callback):
    """A clock: a step takes a minute on the first process, and no time on others. Notes at which steps it was saved."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        last: Any = trainer.checkpoint_callback
        last.clock = lambda: 60.0 * trainer.global_step * trainer.is_global_zero

    def on_save_checkpoint(self, trainer: L.Trainer, *args: Any) -> None:
        with Path(trainer.default_root_dir, f"saved.{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} ")


def saved_at(run: Path, rank: int = 0) -> list[int]:
    return [int(step) for step in (run / f"saved.{rank}").read_text().split()]


def timed(minutes: float, *more: dict[str, Any]) -> list[str]:
    """By the clock of steps, and further callbacks."""
    callbacks = [{"class_path": f"{__name__}.StepsAsMinutes"}, *more]
    return [f"--save_every_n_minutes={minutes}", f"--trainer.callbacks={json.dumps(callbacks)}"]


def strike(step: int, number: int, name: str = "SignalAt") -> dict[str, Any]:
    return {"class_path": f"{__name__}.{name}", "init_args": {"step": step, "number": int(number)}}


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [
        (0, [4, 8, 12, 16]),
        (3, [1, 4, 7, 8, 11, 12, 15, 16]),  # early once; an epoch of four minutes is too long
        (6, [1, 4, 8, 12, 16]),
        (9, [1, 8, 16]),  # the end of an epoch after which the next would end too late
        (1000, [16]),
    ],
)
def test_saved_every_so_many_minutes(tmp_path: Path, undisturbed: Path, minutes: float, expected: list[int]) -> None:
    """In mid-epoch where it must be; and what is trained and measured does not change."""
    assert finish(start(options(tmp_path, "timed", *MONITORS, *timed(minutes)), tmp_path / "out")) == 0
    run = tmp_path / "e" / "timed"
    assert saved_at(run) == expected
    assert_same(weights(undisturbed), weights(run))
    pd.testing.assert_frame_equal(records(undisturbed), records(run), check_exact=True)


@pytest.mark.parametrize(
    ("minutes", "step", "left"),
    [(3, 7, 7), (3, 6, 4), (2, 2, 1), (9, 15, 8)],
    ids=["just saved in mid-epoch", "between", "in the first epoch", "epochs later"],
)
def test_killed_between_saves(tmp_path: Path, undisturbed: Path, minutes: float, step: int, left: int) -> None:
    """What came after the last save is run again, and nothing else; the interval may then be another."""
    args = options(tmp_path, "killed", *MONITORS)
    run = tmp_path / "e" / "killed"
    assert finish(start([*args, *timed(minutes, strike(step, signal.SIGKILL))], tmp_path / "out")) == -signal.SIGKILL
    assert read_checkpoint(run / "checkpoints" / "last.ckpt", "")["global_step"] == left
    assert finish(start([*args, *timed(minutes + 1)], tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    assert_same(weights(undisturbed), weights(run))
    pd.testing.assert_frame_equal(records(undisturbed), records(run), check_exact=True)


def test_killed_within_a_save_in_mid_epoch(tmp_path: Path, undisturbed: Path) -> None:
    args = [*options(tmp_path, "killed", *MONITORS), *timed(3)]
    prepare = partial(_signal_at, "torch.save", 3, signal.SIGKILL, halfway=True)
    assert finish(start(args, tmp_path / "out", prepare)) == -signal.SIGKILL
    run = tmp_path / "e" / "killed"
    assert saved_at(run) == [1, 4, 7]
    assert read_checkpoint(run / "checkpoints" / "last.ckpt", "")["global_step"] == 4
    assert finish(start(args, tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    assert_same(weights(undisturbed), weights(run))
    pd.testing.assert_frame_equal(records(undisturbed), records(run), check_exact=True)


@pytest.mark.parametrize("step", [5, 7], ids=["mid epoch", "last step of an epoch"])
def test_a_signal_saves_whatever_the_clock_says(tmp_path: Path, undisturbed: Path, step: int) -> None:
    args = options(tmp_path, "told", *MONITORS)
    assert finish(start([*args, *timed(1000, strike(step, signal.SIGTERM))], tmp_path / "out")) == 143
    run = tmp_path / "e" / "told"
    assert read_checkpoint(run / "checkpoints" / "last.ckpt", "")["global_step"] == step + 1
    assert finish(start(args, tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    assert_same(weights(undisturbed), weights(run))
    pd.testing.assert_frame_equal(records(undisturbed), records(run), check_exact=True)


def test_a_save_waits_for_summed_gradients(tmp_path: Path) -> None:
    more = ["--trainer.accumulate_grad_batches=2", "--cka.every_n_epochs=0", "--data.batch_size=32"]
    args = options(tmp_path, "killed", *more, epochs=2)
    assert finish(start([*args, *timed(1, strike(2, signal.SIGKILL))], tmp_path / "out")) == -signal.SIGKILL
    run = tmp_path / "e" / "killed"
    assert saved_at(run) == [1, 2]
    for run_id in ("killed", "whole"):
        assert finish(start(options(tmp_path, run_id, *more, epochs=2), tmp_path / "out")) == 0
    assert_same(weights(tmp_path / "e" / "whole"), weights(run))


def test_the_clock_saves_no_weights_that_are_spoilt(tmp_path: Path) -> None:
    args = options(tmp_path, "nan", "--cka.every_n_epochs=0", "--trainer.log_every_n_steps=100")
    assert finish(start([*args, *timed(3, strike(5, 0, "NaNAndSignal"))], tmp_path / "out")) == 2
    said, last = (tmp_path / "out").read_text(), tmp_path / "e" / "nan" / "checkpoints" / "last.ckpt"
    assert "the loss became NaN or infinite in epoch 2 (by step 7)" in said
    assert read_checkpoint(last, "")["global_step"] == 4
    assert all(value.isfinite().all() for value in read_checkpoint(last, "")["state_dict"].values())


def test_two_processes_save_after_the_same_step_and_go_on_from_it(tmp_path: Path) -> None:
    """The first one's clock decides, one step later; the other's stands still."""
    more = ["--cka.every_n_epochs=0", "--data.batch_size=16"]

    def run(run_id: str, *callbacks: dict[str, Any]) -> list[int]:
        args = options(tmp_path, run_id, *more, *timed(3, *callbacks), epochs=2)
        return [finish(process) for process in start_ranks(2, args, tmp_path / "out")]

    whole, killed = tmp_path / "e" / "whole", tmp_path / "e" / "killed"
    assert run("whole") == [0, 0]
    assert saved_at(whole) == saved_at(whole, 1) == [2, 6, 8, 12, 16]
    assert run("killed", strike(5, signal.SIGKILL)) == [-signal.SIGKILL, -signal.SIGKILL]
    assert read_checkpoint(killed / "checkpoints" / "last.ckpt", "")["global_step"] == 2
    assert run("killed") == [0, 0]
    assert_same(weights(whole), weights(killed))


WORKERS = ["--data.storage=workers", "--data.num_workers=1"]


def children(pid: int) -> list[int]:
    """Processes that a process has started, and these theirs."""
    found = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [*found, *(grandchild for child in found for grandchild in children(child))]


class SignalToAllAt(SignalAt):
    """As SLURM does it: every process of the job gets the signal."""

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            started = children(os.getpid())
            commands = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in started]
            assert {"pt_data_worker", "wandb-core"} <= set(commands), commands
            Path(trainer.default_root_dir, "started").write_text(" ".join(map(str, started)))
            subprocess.run(["kill", f"-{self.number}", *map(str, started), str(os.getpid())], check=True)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_all_processes(tmp_path: Path, undisturbed: Path, number: int) -> None:
    """Data workers and W&B's process go on until the run has saved, and end with it."""
    args, server = options(tmp_path, "told", *MONITORS, *WORKERS, "--loggers=[wandb]"), Server()
    strike = at("SignalToAllAt", 5, number)
    code = finish(start([*args, strike], tmp_path / "out", environment=server.environment))
    said, run = (tmp_path / "out").read_text(), tmp_path / "e" / "told"
    assert code == {signal.SIGUSR1: 75, signal.SIGTERM: 143}[number], said  # type: ignore[index]
    assert "Traceback" not in said
    assert read_checkpoint(run / "checkpoints" / "last.ckpt", "")["global_step"] == 6
    assert_gone(map(int, (run / "started").read_text().split()))
    assert finish(start(args, tmp_path / "out", environment=server.environment)) == 0, (tmp_path / "out").read_text()
    assert_same(weights(undisturbed), weights(run))
    pd.testing.assert_frame_equal(records(undisturbed), records(run), check_exact=True)
    assert_in_wandb(server, run)


def assert_gone(processes: Iterable[int]) -> None:
    end = time.monotonic() + HANG_SECONDS
    for pid in processes:
        while is_alive(pid):
            assert time.monotonic() < end, f"process {pid} is left"
            time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Whether there is such a process, that has not ended unnoticed by its parent."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class LoseWorkerAt(SignalAt):
    """A data worker hangs; the signal comes, and then the worker is killed while it is waited for."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            worker = trainer.train_dataloader._reader._iterator._workers[0]  # type: ignore[union-attr]
            (stop,) = (callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal))  # type: ignore[attr-defined]
            os.kill(worker.pid or 0, signal.SIGSTOP)

            def strike() -> None:
                os.kill(os.getpid(), self.number)
                while not stop.signal:
                    time.sleep(0.01)
                worker.kill()

            threading.Timer(1, strike).start()

    def on_before_backward(self, *args: Any) -> None:
        pass


def test_a_worker_that_is_killed_after_a_signal(tmp_path: Path, undisturbed: Path) -> None:
    args = options(tmp_path, "told", *MONITORS, *WORKERS)
    assert finish(start([*args, at("LoseWorkerAt", 5, signal.SIGTERM)], tmp_path / "out")) == 143
    assert "stopped by SIGTERM" in (tmp_path / "out").read_text()
    run = tmp_path / "e" / "told"
    assert read_checkpoint(run / "checkpoints" / "last.ckpt", "")["global_step"] >= 5, "beyond the first epoch"
    assert finish(start(args, tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    assert_same(weights(undisturbed), weights(run))
    pd.testing.assert_frame_equal(records(undisturbed), records(run), check_exact=True)


@pytest.mark.parametrize("killed", [True, False])
def test_a_worker_obeys_and_survives_nobody_but_its_parent(killed: bool) -> None:
    here, there = PROCESSES.Pipe()
    parent = PROCESSES.Process(target=_with_a_worker, args=(there, killed))
    parent.start()
    worker = here.recv()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker, number)
    here.send("go on")
    assert here.recv() == [2, 3]
    assert finish(parent) == (-signal.SIGKILL if killed else 0)
    assert_gone([worker])


LEFT: list[Any] = []


def _with_a_worker(pipe: Any, killed: bool) -> None:
    mp.set_start_method("fork", force=True)
    images = Images(torch.arange(8), torch.zeros(8, 3, 4, 4, dtype=torch.uint8))
    batches = iter(Loader(images, BatchPlan(torch.arange(8), every_nth(8, 2)), num_workers=1, keep_workers=True))
    next(batches)
    pipe.send(mp.active_children()[0].pid)
    pipe.recv()
    time.sleep(1)
    pipe.send(next(batches)["label"].tolist())
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    LEFT.append(batches)  # an iterator that nobody closes


def test_a_signal_in_the_evaluation_leaves_it_to_the_next_time(tmp_path: Path, undisturbed: Path) -> None:
    args = options(tmp_path, "told", *MONITORS)
    prepare = partial(_signal_at, "ssl_geometry.methods.base.Method.on_test_epoch_start", 1, signal.SIGUSR1)
    assert finish(start(args, tmp_path / "out", prepare)) == 75, (tmp_path / "out").read_text()
    assert json.loads((tmp_path / "e" / "told" / "run.json").read_text())["status"] != "finished"
    assert finish(start(args, tmp_path / "out")) == 0, (tmp_path / "out").read_text()
    facts = [json.loads((run / "run.json").read_text()) for run in (undisturbed, tmp_path / "e" / "told")]
    assert facts[0]["results"] == facts[1]["results"]
    pd.testing.assert_frame_equal(records(undisturbed), records(tmp_path / "e" / "told"), check_exact=True)
