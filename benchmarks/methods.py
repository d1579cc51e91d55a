"""What a training step of each method costs over the forwards and backwards of its networks.

    python benchmarks/methods.py           # ResNet-18 at a quarter of its width (MAE: ViT-Ti/4), 32 px, batch 64
    python benchmarks/methods.py --methods DINO SwAV --rounds 9
    python benchmarks/methods.py --methods DINO --option output_dim=65536

A step is what `fit` runs: views, the networks' outputs, the loss, the backward, the optimiser, ``after_step``. The
floor is plain PyTorch on the same views, ready in the memory format of the network: forward and backward of the student
with its head and predictor, forward of the teacher. (Of MAE, the method's own ``outputs`` and their backward.)

Rounds alternate between both, and so does which comes first: a busy machine disturbs both alike. The medians of CPU
time are printed, in which other processes count less than in wall time. "Loss" is forward and backward, the layers in
it included (SwAV's prototypes); "other" is what is left: copies and casts of views and outputs, zeroing gradients. It
may be below 0 by noise, the floor being measured on its own.
"""

import argparse
import datetime
import os
import platform
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ssl_geometry import methods
from ssl_geometry.methods.base import Batch, Method

METHODS = {
    name: getattr(methods, name)
    for name in methods.__all__
    if isinstance(getattr(methods, name), type)
    and issubclass(getattr(methods, name), Method)
    and name not in ("Method", "Published")
}
OPTIONS: dict[str, dict[str, Any]] = {
    "MAE": {"backbone": "vit_tiny_patch16_224", "patch_size": 4, "width": 1.0},
    "Supervised": {"num_classes": 10},
}
STAGES = ("views", "loss", "optimizer", "after_step")


class Step:
    """One method, its optimiser and a batch; counts CPU seconds by stage."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        given = {key: yaml.safe_load(value) for key, value in (option.split("=", 1) for option in args.option)}
        options = {"backbone": "resnet18", "width": args.width, "image_size": args.size, **OPTIONS.get(name, {})}
        self.method: Method = METHODS[name](**options, **given).train()
        self.trainer: Any = SimpleNamespace(estimated_stepping_batches=1000, global_step=0, current_epoch=1)
        self.method.trainer = self.trainer
        self.method.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        self.optimizer = self.method.build_optimizer(self.method.hparams["lr"] * args.batch_size / 256)
        self.trainer.optimizers = [self.optimizer]
        image = torch.randint(0, 256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8)
        label = torch.randint(0, 10, (args.batch_size,))
        self.batch: Batch = {"image": image, "label": label, "index": torch.arange(args.batch_size)}
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.loss_done = 0.0
        self.method.training_views = [
            (self._timed("views", view), numbers)  # type: ignore[misc]
            for view, numbers in self.method.training_views
        ]
        self._loss = self._timed("loss", self.method.loss)
        self.method.loss = self._marked  # type: ignore[method-assign]
        self.outputs: Callable[..., Any] = self.method.outputs
        self.method.outputs = self._kept  # type: ignore[method-assign]
        self.views: Sequence[Tensor] = ()

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[stage] += time.process_time() - started

        return inner

    def _kept(self, views: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
        self.views = [view.clone() for view in views] if not self.views else self.views
        return self.outputs(views, batch)

    def _marked(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """The loss; its backward is done when the last gradient of its inputs is there."""
        inputs = [output.view_as(output) for output in outputs]  # what the loss detaches gets no gradient
        for each in inputs:
            if each.requires_grad:
                each.register_hook(self._reached)
        return self._loss(tuple(inputs), batch)

    def _reached(self, gradient: Tensor) -> None:
        self.loss_done = time.process_time()

    def step(self) -> None:
        loss = self.method.training_step(self.batch, 0)
        self.optimizer.zero_grad()
        started = time.process_time()
        loss.backward()
        self.spent["loss"] += self.loss_done - started
        self.method.on_after_backward()
        self._timed("optimizer", self.optimizer.step)()
        self._timed("after_step", self.method.after_step)(0.5)
        self.trainer.global_step += 1

    def prepare(self) -> None:
        """The views of the floor, one tensor for each size, as the network takes it; and gradients of its outputs.

        Those are random: batch norm turns equal ones into subnormal numbers, which a CPU is slow at.
        """
        sizes: dict[int, list[Tensor]] = {}
        for view in self.views:
            sizes.setdefault(view.shape[-1], []).append(view)
        self.inputs = [torch.cat(same).contiguous(memory_format=torch.channels_last) for same in sizes.values()]
        self.gradients = [torch.randn_like(output) / output.numel() for output in self._networks()]

    def floor(self) -> None:
        outputs = self._networks()
        self.optimizer.zero_grad()  # where a step does it: allocating memory takes time
        torch.autograd.backward(outputs, self.gradients)

    def _networks(self) -> list[Tensor]:
        """The student's outputs for each size of views; the teacher's are made and dropped."""
        method: Any = self.method
        if isinstance(method, methods.MAE):
            return [self.outputs(self.views, self.batch)[0]]
        outputs = [method.head(method.backbone(images)) for images in self.inputs]
        if hasattr(method, "predictor"):
            outputs = [method.predictor(output) for output in outputs]
        if method.teacher is not None:  # the first size: the global views
            method.teacher(self.inputs[0])
        return outputs


def measured(name: str, args: argparse.Namespace) -> tuple[int, np.ndarray]:
    """Views per image; rounds x (step, floor, then the stages), in CPU seconds."""
    one = Step(name, args)
    one.step()  # makes the state of the optimiser, and the views that the floor takes
    one.prepare()
    one.floor()
    rows = []
    runs = [one.step, one.floor]
    for _ in range(args.rounds):
        one.spent.clear()
        for run in runs:
            started = time.process_time()
            for _ in range(args.steps):
                run()
            one.spent[run.__name__] = time.process_time() - started
        rows.append([one.spent[stage] for stage in ("step", "floor", *STAGES)])
        runs.reverse()
    return len(one.views), np.array(rows) / args.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), choices=sorted(METHODS), metavar="METHOD")
    parser.add_argument("--option", nargs="+", default=[], metavar="NAME=VALUE", help="options of the methods")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--size", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    print(
        f"{datetime.date.today()}: ResNet-18 x{args.width} (MAE: ViT-Ti/4), {args.size} px, batch {args.batch_size}, "
        f"float32, {platform.machine()}, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds of "
        f"{args.steps}, load of the machine {os.getloadavg()[0]:.1f}\n"
    )
    print(
        "| method | views | step, CPU ms | floor | over the floor (range) | views | loss | optimiser | after | other |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in args.methods:
        views, rows = measured(name, args)
        step, floor = np.median(rows[:, :2], axis=0)
        ratios = rows[:, 0] / rows[:, 1]
        stages = rows[:, 2:] / rows[:, :1]
        other = 1 - stages.sum(1) - 1 / ratios
        shares = [f"{100 * share:.1f} %" for share in np.median(np.column_stack([stages, other]), axis=0)]
        over = f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})"
        print(
            f"| {name} | {views} | {1e3 * step:.0f} | {1e3 * floor:.0f} | {over} | {' | '.join(shares)} |", flush=True
        )


if __name__ == "__main__":
    main()
