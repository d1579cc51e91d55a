"""An hour or more of short trainings that are killed at random times: does each end as one that was left alone?

    python benchmarks/soak.py --hours 1

Each training is started as a user starts it, struck at a random time by SIGKILL, SIGUSR1 or SIGTERM (the first
process alone, or all, with data workers and W&B's), started again with --resume auto, and so on until it ends. Its
weights must then be bit-identical to those of an undisturbed run, and its records the same rows. Prints a table, and
stops at the first difference, an exit code that the strike does not explain, or a process that is left.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import torch

from ssl_geometry.records import read_records
from ssl_geometry.runs.checkpoints import read_checkpoint

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
    "--trainer.max_epochs=6",
    "--cka.every_n_epochs=2",
    "--probes.every_n_epochs=3",
    "--trainer.accelerator=cpu",
    "--loggers=[]",
]
CASES = {
    "SimCLR, 1 process": ["--model=ssl_geometry.methods.SimCLR", "--save_every_n_minutes=0"],
    "supervised, 1 process, workers, W&B": [
        "--model=ssl_geometry.methods.Supervised",
        "--save_every_n_minutes=0.01",  # in mid-epoch too
        "--data.storage=workers",
        "--data.num_workers=1",
        "--loggers=[wandb]",
    ],
    "SimCLR, 2 processes": [
        "--model=ssl_geometry.methods.SimCLR",
        "--trainer.devices=2",
        "--save_every_n_minutes=0.01",
    ],
}
STRIKES = [signal.SIGKILL, signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM]
FINE = {0, 75, 143, *(-number for number in STRIKES)}
"""Exit codes that a strike explains: negative where it came before the command had begun to listen."""
NO_CHECKPOINT = "no checkpoint was written since the start"
"""What the survivor of two processes says, with exit code 2, where it has nothing to go on from."""


def start(runs: Path, run_id: str, case: str) -> subprocess.Popen:
    model, *more = CASES[case]
    options = [model, *SMALL, *more, f"--runs={runs}", "--experiment=soak", f"--run_id={run_id}", "--resume=auto"]
    output = open(runs / f"{run_id}.log", "a")  # noqa: SIM115
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "ssl_geometry.fit", *options]
    return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def end(process: subprocess.Popen, strike: int, alone: bool) -> int:
    """Strike the process alone, or all that it has started too, and wait for all of them to end."""
    everyone = [process.pid, *descendants(process.pid)]
    for pid in everyone[:1] if alone else everyone:
        with suppress(ProcessLookupError):
            os.kill(pid, strike)
    code = process.wait(timeout=120)
    for _ in range(240):  # children end by themselves within a minute
        left = [pid for pid in everyone[1:] if is_alive(pid)]
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            left.append(process.pid)
        if not left:
            return code
        time.sleep(0.25)
    raise SystemExit(f"processes {left} are left a minute after the first of them ended")


def is_alive(pid: int) -> bool:
    """Whether there is such a process, that has not ended unnoticed by its parent."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and these theirs."""
    try:
        lists = [(thread / "children").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    found = [int(child) for child in " ".join(lists).split()]
    return [*found, *(grandchild for child in found for grandchild in descendants(child))]


def state(run: Path) -> tuple[dict, pd.DataFrame]:
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt", "")
    frame = read_records(run)[["metric", "epoch", "step", "split", "layer", "layer_other", "view", "value"]]
    kept = {name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    return kept, frame.sort_values(list(frame.columns), ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--runs", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shutil.rmtree(args.runs, ignore_errors=True)
    args.runs.mkdir(parents=True)
    chance, began = random.Random(args.seed), time.monotonic()
    references, durations = {}, {}
    for number, case in enumerate(CASES):
        started = time.monotonic()
        assert start(args.runs, f"reference-{number}", case).wait(timeout=300) == 0, case
        durations[case] = time.monotonic() - started
        reference = args.runs / "soak" / f"reference-{number}"
        references[case] = state(reference)
    struck: collections.Counter[str] = collections.Counter()
    finished: collections.Counter[str] = collections.Counter()
    number = 0
    while time.monotonic() - began < 3600 * args.hours:
        case, run_id = chance.choice(list(CASES)), f"run-{number}"
        number += 1
        for attempt in range(1000):  # noqa: B007
            process = start(args.runs, run_id, case)
            try:
                code = process.wait(timeout=chance.uniform(0, 1.3 * durations[case]))
            except subprocess.TimeoutExpired:
                strike = chance.choice(STRIKES)
                alone = chance.random() < 0.5
                code = end(process, strike, alone)
                struck[f"{case}: {signal.Signals(strike).name} to {'the first process' if alone else 'all'}"] += 1
            said = (args.runs / f"{run_id}.log").read_text()
            survivor = code == 2 and "devices=2" in "".join(CASES[case]) and NO_CHECKPOINT in said.splitlines()[-1]
            if (code not in FINE and not survivor) or "Traceback" in said:
                raise SystemExit(f"{case}: exit code {code}, see {args.runs / run_id}.log")
            if code == 0 and "test accuracy" in said:
                break
        weights, records = state(args.runs / "soak" / run_id)
        torch.testing.assert_close(weights, references[case][0], rtol=0, atol=0)
        pd.testing.assert_frame_equal(records, references[case][1], check_exact=True)
        finished[case] += 1
        print(f"{(time.monotonic() - began) / 60:5.1f} min  {case}: same after {attempt} strikes", flush=True)
        shutil.rmtree(args.runs / "soak" / run_id)
    print(f"\n{(time.monotonic() - began) / 3600:.2f} hours, torch {torch.__version__}\n\n| what | times |\n|---|---|")
    for name, count in sorted(struck.items()):
        print(f"| struck: {name} | {count} |")
    for name, count in sorted(finished.items()):
        print(f"| ended bit-identical to the undisturbed run: {name} | {count} |")


if __name__ == "__main__":
    main()
