"""What goes wrong around a run: one line says what, nothing is lost, and the run goes on from where it was."""

import ctypes
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from PIL import Image

from ssl_geometry import fit, fit_cli
from ssl_geometry.callbacks import WatchProcesses
from tests.integration.test_fit import ROOT, SMALL
from tests.integration.test_interruption import assert_same, options, weights
from tests.processes import finish, start, start_ranks

LEAN = ["--cka.every_n_epochs=0", "--probes.every_n_epochs=1", "--trainer.check_val_every_n_epoch=100"]


def at_step(name: str, step: int, **more: Any) -> str:
    callback = {"class_path": f"{__name__}.{name}", "init_args": {"step": step, **more}}
    return f"--trainer.callbacks={json.dumps([callback], default=str)}"


class AtStep(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            self.strike(trainer)

    def strike(self, trainer: L.Trainer) -> None:
        raise NotImplementedError


class KillWorker(AtStep):
    def strike(self, trainer: L.Trainer) -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)


class KillSecondRank(AtStep):
    def strike(self, trainer: L.Trainer) -> None:
        if trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class RemoveImages(AtStep):
    def __init__(self, step: int, folder: str) -> None:
        super().__init__(step)
        self.folder = Path(folder)

    def strike(self, trainer: L.Trainer) -> None:
        for path in self.folder.rglob("*.png"):
            path.unlink()


def one_line(output: Path) -> str:
    """The error, which is one line, the last."""
    said = output.read_text()
    assert "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: "), said
    return last


def _small_files() -> None:
    """As a disk with no space left for more: the kernel refuses to let a file grow."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_no_room_for_a_checkpoint(tmp_path: Path) -> None:
    args = options(tmp_path, "a", *LEAN, epochs=2)
    assert finish(start(args, tmp_path / "out", _small_files)) == 2
    said = one_line(tmp_path / "out")
    assert os.strerror(errno.EFBIG) in said
    assert f"--resume {tmp_path / 'e' / 'a'}" in said
    assert not list((tmp_path / "e" / "a").rglob("*.partial"))
    assert finish(start(args, tmp_path / "out2")) == 0
    assert finish(start(options(tmp_path, "b", *LEAN, epochs=2), tmp_path / "out3")) == 0
    assert_same(weights(tmp_path / "e" / "b"), weights(tmp_path / "e" / "a"))


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a folder that even root cannot write to")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    assert finish(start(options(Path("/sys/kernel"), "a"), tmp_path / "out")) == 2
    assert "cannot write to --runs /sys/kernel/e/a" in one_line(tmp_path / "out")


def test_a_data_worker_that_dies(tmp_path: Path) -> None:
    workers = ["--data.storage=workers", "--data.num_workers=1"]
    args = options(tmp_path, "a", *LEAN, *workers, epochs=2)
    assert finish(start([*args, at_step("KillWorker", 5)], tmp_path / "out")) == 2
    assert "lower --data.num_workers" in one_line(tmp_path / "out")
    assert finish(start(args, tmp_path / "out")) == 0


def images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 16)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(256, size=(16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def test_images_that_vanish(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    images(folder)
    shutil.copytree(folder, tmp_path / "copy")
    data = ["--data.storage=workers", "--data.num_workers=0", f"--data.dataset={folder}", "--data.limit_train=64"]
    data += ["--data.limit_test=32", "--data.measure_size=32", "--data.batch_size=16"]
    args = options(tmp_path, "a", *LEAN, *data, epochs=3)
    code = finish(start([*args, at_step("RemoveImages", 5, folder=folder)], tmp_path / "out"))
    assert code == 2
    assert str(folder) in one_line(tmp_path / "out")
    shutil.copytree(tmp_path / "copy", folder, dirs_exist_ok=True)
    assert finish(start(args, tmp_path / "out")) == 0


def test_a_clock_that_is_wrong(tmp_path: Path) -> None:
    """Which checkpoint is the last is a matter of names, not of times."""
    assert finish(start(options(tmp_path, "a", *LEAN, epochs=1), tmp_path / "out")) == 0
    for path in (tmp_path / "e" / "a").rglob("*"):
        os.utime(path, (2**32, 2**32) if path.suffix == ".ckpt" else (0, 0))
    assert finish(start(options(tmp_path, "a", *LEAN, epochs=2), tmp_path / "out")) == 0
    assert f"continuing from {tmp_path / 'e' / 'a'}" in (tmp_path / "out").read_text()


class BlockOneKillOther(AtStep):
    """One process waits outside of Python, as for a collective that never ends, while the other is killed."""

    def __init__(self, step: int, killed: int) -> None:
        super().__init__(step)
        self.killed = killed

    def strike(self, trainer: L.Trainer) -> None:
        blocked = Path(trainer.default_root_dir, "blocked")
        if trainer.global_rank != self.killed:
            blocked.touch()
            while True:
                ctypes.CDLL(None).pause()  # returns after a signal that was handled
        while not blocked.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("step", "killed", "code"),
    [(2, 1, 2), (6, 1, 75), (6, 0, 75)],
    ids=["second, before a checkpoint", "second", "first"],
)
def test_one_process_dies_while_the_other_waits_for_it_in_a_kernel(
    tmp_path: Path, step: int, killed: int, code: int
) -> None:
    args = ["--model=ssl_geometry.methods.SimCLR", *LEAN, *SMALL, f"--runs={tmp_path}", "--experiment=e", "--run_id=a"]
    args += ["--trainer.max_epochs=3"]
    args_of_both = [*args, at_step("BlockOneKillOther", step, killed=killed)]
    both = start_ranks(2, args_of_both, tmp_path / "out", _little_grace)
    codes = [finish(process) for process in both]
    said = (tmp_path / "out").read_text()
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == code, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "another process of this run has ended" in line]
    assert f"process {killed} of 2 has ended" in line
    assert f"--resume {tmp_path / 'e' / 'a'}" in line
    assert ("no checkpoint was written since the start" in line) == (step == 2)
    if step == 6:  # the directory is free again
        assert finish(start([*args, "--resume=auto"], tmp_path / "out2")) == 0


def _little_grace() -> None:
    """The main thread waits for ever: more time to end by itself is only waited for."""
    fit_cli.WatchProcesses = partial(WatchProcesses, grace_seconds=1)  # type: ignore[assignment,misc]


def test_one_process_of_two_dies_before_a_checkpoint(tmp_path: Path) -> None:
    args = options(tmp_path, "a", *LEAN, at_step("KillSecondRank", 2), epochs=3)
    assert [finish(process) for process in start_ranks(2, args, tmp_path / "out")] == [2, -signal.SIGKILL]
    assert "another process of this run has ended" in one_line(tmp_path / "out")


def test_one_process_of_two_that_the_command_started_dies_after_a_checkpoint(tmp_path: Path) -> None:
    two = ["--trainer.devices=2", "--trainer.accelerator=cpu", *LEAN]
    args = [*options(tmp_path, "a", *two, epochs=3), at_step("KillSecondRank", 6)]
    code = finish(start(args, tmp_path / "out", partial(_as_from_a_shell, args)))
    said = (tmp_path / "out").read_text()
    assert "Traceback" not in said
    assert "another process of this run has ended" in said.strip().splitlines()[-1]
    assert code == 75


def _as_from_a_shell(args: list[str]) -> None:
    """Lightning starts the other process by the command line of this one."""
    os.chdir(ROOT)
    sys.argv = ["fit", *args]
    sys.modules["__main__"] = fit
