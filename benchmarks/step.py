"""What `fit` adds to a bare PyTorch loop over the same model, batches and views.

    python benchmarks/step.py                    # SimCLR, ResNet-18 at a quarter of its width, 32 px, batch 256
    python benchmarks/step.py --method Supervised --width 0.5

Both train the same freshly initialised network on the same random pictures, same loss, same optimiser; monitors,
checkpoints and evaluation are off.
Rounds alternate; a round's time covers its steps after a warm-up, and the medians are printed.
"""

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import lightning as L
import torch

from ssl_geometry import methods
from ssl_geometry.callbacks import FitProgress, StopOnNaN
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.fit import TRAINER_DEFAULTS

WARM_UP = 2


class Clock(L.Callback):
    """Wall time of the steps after the warm-up."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.started = time.perf_counter()

    def on_train_end(self, *args: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def make(args: argparse.Namespace) -> tuple[methods.Method, DataModule]:
    torch.manual_seed(0)
    method = getattr(methods, args.method)(
        backbone=args.backbone, width=args.width, image_size=args.size, optimizer="sgd"
    )
    data = DataModule(
        "digits", image_size=args.size, batch_size=args.batch_size, val_fraction=0.0, measure_size=64, storage="device"
    )
    data.prepare_data()
    return method, data


def fit(args: argparse.Namespace) -> float:
    method, data = make(args)
    clock = Clock()
    options = {**TRAINER_DEFAULTS, "max_epochs": -1, "max_steps": args.steps + WARM_UP, "sync_batchnorm": False}
    trainer = L.Trainer(
        **options,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        callbacks=[clock, StopOnNaN(), FitProgress()],
    )
    trainer.fit(method, data)
    return clock.seconds


def bare(args: argparse.Namespace) -> float:
    method, data = make(args)
    data.setup("fit")
    method.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    decayed = [p for p in method.parameters() if p.ndim > 1]
    free = [p for p in method.parameters() if p.ndim < 2]
    rate = method.hparams["lr"] * args.batch_size / 256
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": method.hparams["weight_decay"]}, {"params": free}], lr=rate, momentum=0.9
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    loader = data.train_dataloader()
    method.train()
    step, epoch, started = 0, 0, 0.0
    while step < args.steps + WARM_UP:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            views = [
                method.view(batch["image"], batch["index"], seed=0, epoch=epoch, view=number)
                for number in range(method.num_views)
            ]
            outputs = method.head(method.backbone(torch.cat(views).contiguous(memory_format=torch.channels_last)))
            loss = method.loss(outputs.chunk(method.num_views), batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == WARM_UP:
                started = time.perf_counter()
            if step == args.steps + WARM_UP:
                break
        epoch += 1
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="SimCLR", choices=["SimCLR", "Supervised"])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--size", type=int, default=32, help="side of the pictures, in pixels")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times: dict[str, list[float]] = {"bare": [], "fit": []}
    for _ in range(args.rounds):
        times["bare"].append(bare(args) / args.steps)
        times["fit"].append(fit(args) / args.steps)
    ratios = [f / b for b, f in zip(times["bare"], times["fit"], strict=True)]
    print(
        f"{args.method}, {args.backbone} x{args.width}, {args.size} px, batch {args.batch_size}, "
        f"{args.threads} threads, torch {torch.__version__}"
    )
    print("| loop | ms a step (median) | images/s | over bare (median, range) |")
    print("|---|---|---|---|")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        over = "1" if name == "bare" else f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        print(f"| {name} | {middle * 1e3:.1f} | {args.batch_size / middle:,.0f} | {over} |")


if __name__ == "__main__":
    main()
