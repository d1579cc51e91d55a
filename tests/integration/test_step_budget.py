"""A training step waits for nothing, and launches no more than its budget: the whole command, on a pretended GPU.

A GPU is faster than the host that feeds it: where the host waits the GPU idles, and each launch costs the host some
microseconds. Counted eagerly; compiled, views and network take fewer launches.
"""

import json
import os
import socket
from collections.abc import Callable
from functools import wraps
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only

from ssl_geometry.data.views import View
from ssl_geometry.fit import fit
from ssl_geometry.methods import Method, SimCLR, Supervised
from ssl_geometry.methods.parts.lars import LARS
from ssl_geometry.metrics import ProbeBank
from tests.fake_cuda import FakeCuda
from tests.processes import PROCESSES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="waits and launches are counted on a pretended GPU")

STEPS, BEFORE = 4, 2
"""In the first the state of optimiser and probes is made, in the second DDP orders its buckets; the others count."""
OPTIONS = [
    *("--model.backbone=resnet10", "--model.width=0.25", "--model.image_size=16", "--model.optimizer=lars"),
    *("--data.dataset=digits", "--data.batch_size=32", f"--data.limit_train={36 * STEPS}", "--data.limit_test=32"),
    *("--data.measure_size=32", "--data.eval_batch_size=32", "--probes.layers=[stages,pooled]", "--loggers=[csv]"),
    *("--cka.every_n_epochs=0", "--probes.every_n_epochs=1", "--trainer.max_epochs=1"),
    *("--trainer.accelerator=cuda", "--trainer.precision=bf16-mixed"),
    "--trainer.log_every_n_steps=0",  # a step that is logged reads the loss
]
PARTS: dict[str, list[tuple[type, str]]] = {
    "step": [(Method, "training_step")],  # and all that is in none of the others
    "views": [(View, "__call__")],
    "forward": [(SimCLR, "forward"), (Supervised, "forward")],
    "loss": [(SimCLR, "loss"), (Supervised, "loss")],
    "backward": [(Strategy, "backward")],
    "optimizer": [(LARS, "step")],
    "probes": [(ProbeBank, "step")],
}

LAUNCHES = {"views": 290, "forward": 80, "loss": 13, "backward": 90, "optimizer": 24, "probes": 92, "step": 16}
"""Per step of SimCLR with a ResNet-10 of 14 normalisation layers, and online probes of five layers."""
LAUNCHES_OF_TWO = LAUNCHES | {"forward": 390, "loss": 15, "backward": 250, "probes": 96, "step": 18}
COLLECTIVES_OF_TWO = {"forward": 14, "loss": 1, "backward": 14 + 3, "probes": 2, "step": 1}
"""One per normalisation layer and direction, the projections, three buckets of gradients, the logged loss."""


def counted(folder: Path, method: str, *options: str, devices: int = 1) -> dict[str, Any]:
    """One epoch of ``fit``: waits, launches and collectives of each part of a step, over the last steps."""
    with pytest.MonkeyPatch.context() as patch, FakeCuda(devices) as gpu:
        advance, steps, inside = _TrainingEpochLoop.advance, 0, False

        def step(*args: Any) -> None:
            nonlocal steps, inside
            inside = steps >= BEFORE
            with gpu.scope("step" if inside else ""):
                advance(*args)
            steps, inside = steps + 1, False

        def scoped(function: Callable[..., Any], part: str) -> Callable[..., Any]:
            @wraps(function)
            def inner(*args: Any, **kwargs: Any) -> Any:
                with gpu.scope(part if inside else ""):
                    return function(*args, **kwargs)

            return inner

        patch.setattr(_TrainingEpochLoop, "advance", step)
        for part, functions in PARTS.items():
            for owner, name in functions:
                patch.setattr(owner, name, scoped(getattr(owner, name), part))
        run = [f"--trainer.devices={devices}", f"--runs={folder}", "--experiment=e", "--run_id=r"]
        fit([f"--model=ssl_geometry.methods.{method}", *OPTIONS, *run, *options])
    assert steps == STEPS
    return {
        "faults": gpu.report(gpu.faults),
        "waits": gpu.report([wait for wait in gpu.waits if wait.scope]),
        "launches": {part: gpu.launches[part] / (STEPS - BEFORE) for part in PARTS},
        "collectives": {part: gpu.collectives[part] / (STEPS - BEFORE) for part in PARTS},
    }


def _rank(rank: int, port: int, folder: Path, options: list[str]) -> None:
    """One of two processes, as a cluster starts them: gloo stands in for NCCL, and nothing else differs."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank_zero_only.rank = rank  # else that of the environment in which Lightning was imported
    (folder / f"{rank}.json").write_text(json.dumps(counted(folder, "SimCLR", *options, devices=2)))


def in_two_processes(folder: Path, *options: str) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [PROCESSES.Process(target=_rank, args=(rank, port, folder, [*options])) for rank in range(2)]
    for rank in ranks:
        rank.start()
    while alive := [rank.sentinel for rank in ranks if rank.is_alive()]:
        wait(alive)
        if any(rank.exitcode for rank in ranks):  # the other one would wait for it
            for rank in ranks:
                rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def simclr(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return counted(tmp_path_factory.mktemp("simclr"), "SimCLR")


def test_a_step_waits_for_nothing(simclr: dict[str, Any]) -> None:
    assert simclr["waits"] == simclr["faults"] == ""


def test_a_supervised_step_neither(tmp_path: Path) -> None:
    found = counted(tmp_path, "Supervised")
    assert found["waits"] == found["faults"] == ""


def over_budget(found: dict[str, float], budget: dict[str, int]) -> dict[str, float]:
    return {part: n for part, n in found.items() if n > budget.get(part, 0)}


def test_launches_stay_within_the_budget(simclr: dict[str, Any]) -> None:
    assert all(simclr["launches"].values()), "every part was counted"
    assert over_budget(simclr["launches"], LAUNCHES) == {}
    assert not any(simclr["collectives"].values())


def test_two_processes_wait_for_nothing_either(tmp_path: Path) -> None:
    for found in in_two_processes(tmp_path):
        assert found["waits"] == found["faults"] == ""
        assert over_budget(found["launches"], LAUNCHES_OF_TWO) == {}
        assert over_budget(found["collectives"], COLLECTIVES_OF_TWO) == {}
