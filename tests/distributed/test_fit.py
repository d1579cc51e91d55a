"""``fit`` on 1, 2 and 3 processes, in float64, where rounding hides no mistake: one loss curve, one set of records."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ssl_geometry.callbacks.checkpoints import SameStart
from ssl_geometry.errors import UserError
from ssl_geometry.records import read_records
from ssl_geometry.runs.checkpoints import read_checkpoint
from tests.distributed.conftest import Ranks
from tests.integration.test_fit import SMALL, losses
from tests.processes import finish, start_ranks

KEYS = ["metric", "split", "epoch", "step", "layer", "layer_other", "view"]


def train(runs: Path, processes: int, method: str, batch: int) -> Path:
    options = [
        f"--model=ssl_geometry.methods.{method}",
        *SMALL,
        "--model.width=0.0625",
        "--data.limit_train=285",  # 257 to train on: no multiple of the batch, nor of the processes
        "--data.limit_test=67",
        "--data.measure_size=67",
        "--data.batch_size=60",
        f"--data.eval_batch_size={batch}",
        "--trainer.precision=64-true",
        "--trainer.max_epochs=2",
        "--trainer.check_val_every_n_epoch=1",
        "--probes.train_images=200",  # of the 257; the others are evaluation's alone
        *(f"--{monitor}.layers=[layer1.0,layer4.0,pooled]" for monitor in ("cka", "invariance", "probes")),
        "--invariance.views=[own]",
        "--spectrum.every_n_epochs=1",
        "--invariance.every_n_epochs=2",
        "--neighbors.every_n_epochs=2",
        "--neighbors.settings=[]",
        "--neighbors.layers=pooled",
        "--neighbors.k=10",
        "--spectrum.layers=pooled",
        f"--runs={runs}",
        "--experiment=e",
        f"--run_id={processes}",
    ]
    codes = [finish(process) for process in start_ranks(processes, options, runs / "out")]
    assert codes == [0] * processes, (runs / "out").read_text()[-3000:]
    return runs / "e" / str(processes)


@pytest.mark.parametrize(
    ("method", "counts", "batch"),
    [("SimCLR", (1, 2, 3), 25), ("Supervised", (1, 3), 100)],  # one of three has no batch of training images
)
def test_some_processes_train_the_network_of_one(
    tmp_path: Path, method: str, counts: tuple[int, ...], batch: int
) -> None:
    one, *others = (train(tmp_path, processes, method, batch) for processes in counts)
    expected = read_checkpoint(one / "checkpoints" / "last.ckpt", "")["state_dict"]
    for run in others:
        assert losses(run).index.tolist() == losses(one).index.tolist() == list(range(8))
        np.testing.assert_allclose(losses(run), losses(one), rtol=1e-10)
        for name, value in read_checkpoint(run / "checkpoints" / "last.ckpt", "")["state_dict"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)
        frames = []
        for path in (one, run):
            frame = read_records(path)
            frame = frame.replace({"model_other": {path.name: "itself"}})
            frame = frame.sort_values([*KEYS, "model_other", "low"])  # of a quantile, which one stands in "low"
            frames.append(frame.set_index([*KEYS, "model_other"])[["value", "n"]])
        pd.testing.assert_index_equal(frames[0].index, frames[1].index)
        assert {"online_probe", "ridge_probe", "nnk_degree", "affinity_quantile", "val/knn", "test/knn"} <= set(
            frames[0].index.get_level_values("metric")
        )
        pd.testing.assert_frame_equal(frames[1], frames[0], rtol=1e-6, atol=1e-9)


def _start(rank: int, world_size: int, last_is_blind: bool, steps: int) -> str:
    blind = last_is_blind and rank == world_size - 1
    trainer: Any = SimpleNamespace(world_size=world_size)
    try:
        SameStart(resumes=not blind).setup(trainer, None, "fit")  # type: ignore[arg-type]
        SameStart(resumes=True).on_load_checkpoint(trainer, None, {"global_step": 8 + steps * rank})  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return "started"


def test_processes_that_see_other_checkpoints_all_stop(ranks: Ranks) -> None:
    assert set(ranks(_start, False, 0)) == {"started"}
    (said,) = set(ranks(_start, True, 0))
    assert f"process 0 sees one and process {len(ranks(_start, False, 0)) - 1} sees none" in said
    (said,) = set(ranks(_start, False, 4))
    assert "process 0 sees step 8 and process 1 sees step 12" in said
