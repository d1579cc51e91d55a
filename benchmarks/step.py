"""What `fit` adds to a bare PyTorch loop over the same training step.

    python benchmarks/step.py           # SimCLR with LARS, ResNet-18 at a quarter of its width, 32 px, batch 256
    python benchmarks/step.py --method Supervised --width 0.5
    python benchmarks/step.py --device cuda --backbone resnet50 --width 1 --batch-size 512 --precision bf16-mixed

Both train the same freshly initialised network on the same random images: the same views, forward, loss, optimiser with
the same groups, precision, and compiled or not as `fit` decides; monitors, checkpoints and evaluation are off. So the
difference is Lightning's loop and our callbacks.
The batches of the bare loop lie ready on the device; `fit` takes its own from the loader.
Rounds alternate, and so does which loop goes first. A round's time covers its steps after a warm-up; the medians are
printed: wall time, and the time that the process had on a CPU, which other processes of a busy machine change less.
"""

import argparse
import contextlib
import datetime
import logging
import math
import os
import time
import warnings
from typing import Any

import lightning as L
import numpy as np
import torch

from ssl_geometry import methods
from ssl_geometry.callbacks import FitProgress, StopOnNaN
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.fit_cli import TRAINER_DEFAULTS

WARM_UP = 2
"""Steps before the clock starts; the first one compiles."""


def now(device: str) -> np.ndarray:
    """Wall and CPU seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


class Clock(L.Callback):
    """Wall time of the steps after the warm-up."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.started = now(pl_module.device.type)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = now(pl_module.device.type) - self.started


def make(args: argparse.Namespace) -> tuple[methods.Method, DataModule]:
    torch.manual_seed(0)
    options = {"optimizer": args.optimizer} if args.optimizer else {}
    if args.method == "Supervised":
        options["num_classes"] = 10  # one way of the two runs without a trainer, which would take it from the data
    method = getattr(methods, args.method)(
        backbone=args.backbone, width=args.width, image_size=args.size, compile=args.compile, **options
    )
    data = DataModule(
        "digits", image_size=args.size, batch_size=args.batch_size, val_fraction=0.0, measure_size=64, storage="device"
    )
    data.prepare_data()
    return method, data


def fit(args: argparse.Namespace) -> np.ndarray:
    method, data = make(args)
    clock = Clock()
    options = {**TRAINER_DEFAULTS, "max_epochs": -1, "max_steps": args.steps + WARM_UP, "sync_batchnorm": False}
    trainer = L.Trainer(
        **options,
        accelerator=args.device,
        devices=1,
        precision=args.precision,
        benchmark=True,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        callbacks=[clock, StopOnNaN(), FitProgress()],
    )
    trainer.fit(method, data)
    return clock.seconds


def bare(args: argparse.Namespace) -> np.ndarray:
    method, data = make(args)
    data.setup("fit")
    method.to(args.device).train()
    method.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    method.on_fit_start()  # compiles, where fit does
    torch.backends.cudnn.benchmark = True
    optimizer = method.build_optimizer(method.hparams["lr"] * args.batch_size / 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps + WARM_UP)
    mixed = args.precision == "bf16-mixed"
    autocast = torch.autocast(args.device, dtype=torch.bfloat16) if mixed else contextlib.nullcontext()
    batches = prepared(data, args)
    for step, batch in enumerate(batches):
        if step == WARM_UP:
            started = now(args.device)
        with autocast:
            loss = method.training_step(batch, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return now(args.device) - started


def prepared(data: DataModule, args: argparse.Namespace) -> list[Any]:
    """The batches of all steps, on the device."""
    batches: list[Any] = []
    loader, steps = data.train_dataloader(), args.steps + WARM_UP
    for epoch in range(math.ceil(steps / len(loader))):
        loader.sampler.set_epoch(epoch)
        batches += [{key: value.to(args.device) for key, value in batch.items()} for batch in loader]
    return batches[:steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="SimCLR", choices=["SimCLR", "Supervised"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--optimizer", choices=["lars", "sgd", "adamw"], help="default: the method's own")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="default: as fit decides, on CUDA where it can"
    )
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--size", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times: dict[str, list[np.ndarray]] = {"bare": [], "fit": []}
    loops = [bare, fit]
    for _ in range(args.rounds):
        for loop in loops:
            times[loop.__name__].append(loop(args) / args.steps)
        loops.reverse()
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    print(
        f"{datetime.date.today()}: {args.method}, {args.optimizer or 'its own optimiser'}, {args.backbone} "
        f"x{args.width}, {args.size} px, batch {args.batch_size}, {args.precision}, {args.device} ({hardware}), "
        f"torch {torch.__version__}, load of the machine {os.getloadavg()[0]:.1f}"
    )
    print("| loop | ms a step | images/s | over bare (range) | CPU ms a step | over bare (range) |")
    print("|---|---|---|---|---|---|")
    ratios = np.array(times["fit"]) / np.array(times["bare"])
    for name, seconds in times.items():
        wall, cpu = np.median(seconds, axis=0)
        over = ["1", "1"]
        if name == "fit":
            over = [f"{np.median(r):.3f} ({r.min():.3f}-{r.max():.3f})" for r in ratios.T]
        print(
            f"| {name} | {wall * 1e3:.1f} | {args.batch_size / wall:,.0f} | {over[0]} | {cpu * 1e3:.1f} | {over[1]} |"
        )


if __name__ == "__main__":
    main()
