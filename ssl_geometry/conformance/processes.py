"""The same training on one process and on two, in double precision where the method can."""

import copy
import os
import pickle
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from typing_extensions import override

from ssl_geometry.conformance.trial import Trial, alone
from ssl_geometry.conformance.verdict import NotApplicable, line_of
from ssl_geometry.errors import first_line
from ssl_geometry.methods import Method
from ssl_geometry.models.sync_batchnorm import SyncBatchNormPlugin

PROCESSES, STEPS, IMAGES = 2, 3, 16
"""Processes, steps of the optimiser, images in a global batch."""
KEPT = 4096
"""Values of each gradient that are compared."""
MINUTES = 3
Numbers = dict[str, Tensor]
Precision = Literal["64-true", "32-true"]
TOLERANCES: dict[Precision, float] = {"64-true": 1e-6, "32-true": 1e-2}
"""Of losses and gradients of two processes, relative to those of one."""


class Recorder(L.Callback):
    """Losses, averaged over processes, and gradients as the optimiser gets them."""

    def __init__(self) -> None:
        self.found: Numbers = {}

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                values = parameter.grad.flatten()[:: max(1, parameter.numel() // KEPT)]
                self.found[f"gradient of {name} in step {trainer.global_step + 1}"] = values.clone()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            raise TypeError("training_step returns no loss")
        self.found[f"loss of step {batch_idx + 1}"] = trainer.strategy.reduce(loss.detach().clone())


def numbers(
    method: type[Method], options: Mapping[str, Any], folder: Path, precision: Precision, unused: bool, processes: int
) -> Numbers:
    """Train, in this process's part.

    Args:
        method: its class.
        options: of its constructor.
        folder: for files of the trainer.
        precision: of the trainer.
        unused: whether some parameters get no gradient.
        processes: how many train together; they are joined already.
    """
    trial, recorder = Trial(method, options, folder), Recorder()
    strategy: Any = DDPStrategy(find_unused_parameters=unused, process_group_backend="gloo")
    trial.train(
        trial.build(),
        [recorder],
        {"limit_train": STEPS * IMAGES, "batch_size": IMAGES},
        max_epochs=1,
        accumulate_grad_batches=1,
        precision=precision,
        devices=processes,
        strategy=strategy if processes > 1 else "auto",
        plugins=[_Joined() if processes > 1 else LightningEnvironment(), SyncBatchNormPlugin()],
    )
    return recorder.found


class _Joined(LightningEnvironment):
    """Processes that are there already."""

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True


class Pair:
    """Two processes that train a method, started at once: they import while their caller does something else.

    Args:
        trial: of the method.

    Raises:
        NotApplicable: a class that another process cannot import, or that calls its optimiser itself.
    """

    def __init__(self, trial: Trial) -> None:
        if not trial.main.method.automatic_optimization:
            raise NotApplicable("it calls its optimiser itself (manual optimisation)")
        self.folder = Path(tempfile.mkdtemp(dir=trial.folder))
        task = trial.cls, copy.deepcopy(trial.options), self.folder
        try:
            pickle.dumps(task)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise NotApplicable(f"another process cannot import it ({first_line(error)})") from error
        unused = bool(trial.main.without_gradient)
        self.precision: Precision = "64-true"
        try:
            self.one = numbers(*task, self.precision, unused, 1)
        except RuntimeError:  # it casts to float32 by itself
            self.precision = "32-true"
            self.one = numbers(*task, self.precision, unused, 1)
        context = torch.multiprocessing.get_context("spawn")
        self.processes = [
            context.Process(target=_process, args=(rank, *task, self.precision, unused), daemon=True)
            for rank in range(PROCESSES)
        ]
        for process in self.processes:
            process.start()

    @property
    def tolerance(self) -> float:
        """How far numbers of two processes may be from those of one."""
        return TOLERANCES[self.precision]

    def numbers(self) -> tuple[Numbers, Numbers]:
        """Losses and gradients of one process, and of the two.

        Raises:
            RuntimeError: the two processes did not end well.
        """
        for process in self.processes:
            process.join(60 * MINUTES)
        self.end()
        for failure in sorted(self.folder.glob("error-*")):
            raise RuntimeError(failure.read_text(encoding="utf-8"))
        if not (self.folder / "found").exists():
            raise RuntimeError(f"{PROCESSES} processes did not end within {MINUTES} minutes")
        two = torch.load(self.folder / "found", weights_only=True)
        if self.precision == "32-true":  # rounding grows from step to step
            self.one = {
                name: value for name, value in self.one.items() if name.endswith("step 1") or name.startswith("loss")
            }
        return self.one, two

    def end(self) -> None:
        """Where nobody waits for them any more."""
        for process in self.processes:
            process.kill()


def _process(
    rank: int, method: type[Method], options: Mapping[str, Any], folder: Path, precision: Precision, unused: bool
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(PROCESSES)}
    limit = timedelta(minutes=MINUTES)
    try:
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=limit)
        with alone():
            found = numbers(method, options, folder, precision, unused, PROCESSES)
        if rank == 0:
            torch.save(found, folder / "whole")
            (folder / "whole").rename(folder / "found")
        dist.destroy_process_group()
    except Exception as error:
        line = f"{type(error).__name__} in {line_of(error)}: {first_line(error)}"
        (folder / f"error-{rank}").write_text(line, encoding="utf-8")
