"""All methods on CIFAR-10 (JPEG) with one budget, two seeds each, and the table of results.

    python docs/studies/methods.py IMAGES --jobs 2       # IMAGES: a folder train/<class>/*.jpg, test/<class>/*.jpg
    python docs/studies/methods.py IMAGES --table        # the table of what is finished
    python docs/studies/methods.py IMAGES --time         # seconds per epoch, one method after another

About 75 minutes on two cores without a GPU, estimated from the first runs. If it is stopped, the same command continues
it.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from ssl_geometry.records import read_records
from ssl_geometry.report.tables import markdown

RUNS = Path("runs")
EPOCHS, IMAGES, SEEDS = 15, 10_000, (0, 1)
RESNET = "--model.backbone resnet18 --model.width 0.25 --model.image_size 32 --model.warmup_epochs 2"
VIT = "--model.backbone vit_tiny_patch16_224 --model.patch_size 4 --model.image_size 32 --model.warmup_epochs 2"
TEACHER = "--model.teacher_momentum 0.99"
"""Of 600 steps; the recipes are for 20,000 and more."""
METHODS = {
    **dict.fromkeys(["Supervised", "SupCon", "SimCLR", "MoCoV2", "MoCoV3"], RESNET),
    **dict.fromkeys(["BYOL", "DINO"], f"{RESNET} {TEACHER}"),
    **dict.fromkeys(["SimSiam", "BarlowTwins", "VICReg", "LeJEPA", "SwAV"], RESNET),
    "MAE": VIT,
}
"""Class to its network; all else is the method's default, which is its recipe for CIFAR-10."""
METRICS = {"ridge_probe": "ridge", "logistic_probe": "logistic", "rankme": "RankMe", "invariance": "invariance"}


def fit(method: str, run_id: str, *more: str) -> None:
    """One run, alone on one core; what it prints is in a file next to its folder."""
    command = [sys.executable, "-m", "ssl_geometry.fit", "--config", "configs/image_folder.yaml"]
    command += ["--model", f"ssl_geometry.methods.{method}", *METHODS[method].split()]
    command += ["--data.batch_size", "256", "--data.val_fraction", "0.02", "--trainer.precision", "bf16-mixed"]
    command += ["--loggers", "[]", "--run_id", run_id, *more]
    RUNS.mkdir(exist_ok=True)
    with open(RUNS / f"{run_id}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)


def train(images: str, method: str, seed: int) -> None:
    """Train and measure one network, unless it is finished."""
    run = RUNS / "methods" / f"{method}-s{seed}"
    if (run / "run.json").exists() and json.loads((run / "run.json").read_text())["status"] == "finished":
        return
    last = str(EPOCHS)
    measured = [f"--{group}.every_n_epochs={last}" for group in ("invariance", "probes", "spectrum")]
    measured += [f"--{group}.layers=[pooled]" for group in ("invariance", "probes", "spectrum")]
    measured += [
        "--probes.online=false",
        "--probes.logistic=true",
        "--invariance.views=[simclr]",
        "--spectrum.copies=0",
    ]
    budget = ["--data.dataset", images, "--data.limit_train", str(IMAGES), "--data.measure_size", "2048"]
    budget += ["--trainer.max_epochs", last, "--trainer.check_val_every_n_epoch", last, "--cka.every_n_epochs", "5"]
    fit(method, run.name, *budget, *measured, "--experiment=methods", f"--seed_everything={seed}", "--resume=auto")


def time(images: str, method: str) -> None:
    """Two short epochs without measurements, for their rate."""
    off = [f"--{group}.every_n_epochs=0" for group in ("cka", "invariance", "probes", "neighbors", "spectrum")]
    budget = ["--data.dataset", images, "--data.limit_train", "2048", "--data.limit_test", "256"]
    budget += ["--trainer.max_epochs", "2", "--trainer.limit_val_batches", "0", "--model.warmup_epochs=1"]
    fit(method, f"{method}-time", *budget, *off, "--experiment=methods-time", "--resume=auto")


def table() -> pd.DataFrame:
    """A row for each method whose runs are finished: numbers of both seeds, of the pooled features."""
    rows: dict[str, dict[str, str]] = {}
    for method in METHODS:
        runs = [RUNS / "methods" / f"{method}-s{seed}" for seed in SEEDS]
        facts = [json.loads((run / "run.json").read_text()) for run in runs if (run / "run.json").exists()]
        if len(facts) < len(SEEDS) or any(fact["status"] != "finished" for fact in facts):
            continue
        columns: dict[str, list[float]] = {"kNN": [100 * fact["results"]["test/knn"] for fact in facts]}
        for run in runs:
            records = read_records(run).query("layer == 'pooled' and epoch == @EPOCHS")
            values = records[records["metric"].isin(METRICS)].groupby("metric")["value"].first()
            for metric, name in METRICS.items():
                scale = 100 if metric.endswith("probe") else 1
                columns.setdefault(name, []).append(scale * float(values[metric]))
        timed = RUNS / "methods-time" / f"{method}-time" / "run.json"
        seconds = [IMAGES / json.loads(timed.read_text())["images_per_second"]] if timed.exists() else []
        digits = {"RankMe": 1, "invariance": 3}
        row = {name: ", ".join(f"{v:.{digits.get(name, 1)}f}" for v in values) for name, values in columns.items()}
        rows[method] = {**row, "s/epoch": ", ".join(f"{value:.0f}" for value in seconds)}
    return pd.DataFrame(rows.values(), index=list(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder of the images")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--table", action="store_true", help="print the table of what is finished")
    parser.add_argument("--time", action="store_true", help="measure seconds per epoch")
    given = parser.parse_args()
    if given.time:
        for method in METHODS:
            time(given.images, method)
    elif not given.table:
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(lambda job: train(given.images, *job), [(m, seed) for seed in SEEDS for m in METHODS]))
    print(markdown(table()))
