"""W&B's server stops answering while a run goes on: the run does not wait for it, and sends what it lacks when resumed.

The server is one of our own (``wandb_server.py``): what W&B's does beyond taking rows and counting them is not shown.
"""

import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import lightning as L
import pytest

from ssl_geometry.callbacks import loggers
from tests.integration.test_interruption import SignalAt, assert_gone, assert_in_wandb, children, options
from tests.integration.wandb_server import Server
from tests.processes import finish, start

LEAN = ["--cka.every_n_epochs=0", "--probes.every_n_epochs=0", "--trainer.check_val_every_n_epoch=100"]
SECONDS = 3


class AwayAt(SignalAt):
    """In the middle of a step W&B's server stops answering, once it has so many rows; then perhaps a signal comes."""

    def __init__(self, step: int, number: int, rows: int) -> None:
        super().__init__(step, number)
        self.rows = rows

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            urlopen(f"{os.environ['WANDB_BASE_URL']}/away/{self.rows}", timeout=60).close()
            Path(trainer.default_root_dir, "started").write_text(" ".join(map(str, children(os.getpid()))))
            if self.number:
                os.kill(os.getpid(), self.number)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.back.set()
    server.shutdown()


def _prepare(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    loggers.FINISH_SECONDS = SECONDS


def at(step: int, number: int = 0, rows: int = 0) -> str:
    callback = {"class_path": f"{__name__}.AwayAt", "init_args": {"step": step, "number": number, "rows": rows}}
    return f"--trainer.callbacks={json.dumps([callback])}"


def test_a_job_is_back_in_the_queue_before_the_server_is_waited_for(tmp_path: Path, server: Server) -> None:
    scontrol, asked = tmp_path / "bin" / "scontrol", tmp_path / "asked"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {asked}\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "555", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    args = options(tmp_path, "away", *LEAN, "--loggers=[wandb]", epochs=2)
    process = start([*args, at(5, 10)], tmp_path / "out", partial(_prepare, server.environment | slurm))
    assert finish(process) == 0, (tmp_path / "out").read_text()
    assert time.time() - asked.stat().st_mtime > 0.9 * SECONDS, "then W&B's server was given its time"
    assert asked.read_text() == "requeue 555\n"
    said = (tmp_path / "out").read_text()
    assert "SLURM will run this job again" in said
    assert "W&B's server is away" in said
    assert "Traceback" not in said


def test_a_server_that_is_away_for_a_part_of_a_run(tmp_path: Path, server: Server) -> None:
    args = options(tmp_path, "away", *LEAN, "--loggers=[wandb]")
    prepare = partial(_prepare, server.environment)
    process = start([*args, "--trainer.max_epochs=2", at(3, rows=2)], tmp_path / "out", prepare)
    assert finish(process) == 0, (tmp_path / "out").read_text()
    run = tmp_path / "e" / "away"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert_gone(map(int, (run / "started").read_text().split()))
    said = (tmp_path / "out").read_text()
    assert f"W&B's server is away: `python -m ssl_geometry.report {run} --to_wandb` sends what it lacks" in said
    assert "Traceback" not in said
    assert 0 < len(server.lines) < 8
    server.back.set()
    assert finish(start([*args, "--trainer.max_epochs=3"], tmp_path / "out", prepare)) == 0
    assert len(server.lines) == 12
    assert_in_wandb(server, run)
