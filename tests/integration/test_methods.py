"""Each method learns, and a run that was interrupted ends as one that was not, queues and teachers included."""

from pathlib import Path

import pytest
import torch

from ssl_geometry.errors import Interrupted
from ssl_geometry.fit import fit
from ssl_geometry.records import read_records
from ssl_geometry.runs.checkpoints import read_checkpoint
from tests.methods import METHODS, TRAINED, TRAININGS, as_options

QUIET = [f"--{monitor}.every_n_epochs=0" for monitor in ("cka", "invariance", "probes", "neighbors", "spectrum")]
INTERRUPT = '--trainer.callbacks=[{"class_path":"tests.integration.test_fit.Interrupt","init_args":{"epoch":3}}]'


def options(folder: Path, run_id: str, name: str) -> list[str]:
    training = TRAININGS.get(name, {})
    return [
        f"--model=ssl_geometry.methods.{name}",
        *as_options("model", METHODS[name] | TRAINED | training.get("model", {})),
        *("--data.dataset=colored_digits", "--data.limit_test=32", "--data.measure_size=32"),
        *as_options("data", {"batch_size": 128, "eval_batch_size": 256, **training.get("data", {})}),
        *as_options("trainer", {"max_epochs": 6, "check_val_every_n_epoch": 6, **training.get("trainer", {})}),
        *("--loggers=[]", "--save_every_n_minutes=0", f"--runs={folder}", "--experiment=e", f"--run_id={run_id}"),
        *QUIET,
    ]


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole = fit(options(tmp_path, "whole", name))
    accuracy = read_records(whole.directory).query("metric == 'val/knn'").set_index("epoch")["value"]
    start, end = accuracy.loc[0], accuracy.iloc[-1]
    assert end > start, f"nearest neighbours: {start:.3f} -> {end:.3f}"
    with pytest.raises(Interrupted, match="--resume"):
        fit([*options(tmp_path, "part", name), INTERRUPT])
    resumed = fit([*options(tmp_path, "part", name), "--resume=auto"])
    states = [read_checkpoint(run.last_checkpoint, "")["state_dict"] for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
