"""What a run asks of its devices: which strategies work, how many processes pay, and what to lower when memory is full.

Every layer is measured whole, so each process holds the whole network: data parallelism alone is supported.
"""

import importlib
import logging
import math
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, StrategyRegistry

from ssl_geometry.errors import UserError, did_you_mean, first_line
from ssl_geometry.runs.slurm import processes_started, this_task

logger = logging.getLogger(__name__)

FEW_IMAGES = 32
"""Images of a step for one process below which further GPUs cost more than they bring."""
FEW_PIXELS = 10_000_000
"""Pixels of the training split below which one GPU is enough: a fifth of CIFAR-10's."""
FULL = r"out of memory|ALLOC(ATION)?_FAILED|DefaultCPUAllocator|can't allocate memory|bad_alloc|alloc fail"
"""In what CUDA, cuDNN, cuBLAS, FAISS and torch on the CPU raise where memory is full."""
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "NODE_RANK", "GROUP_RANK", "LSB_JOBID")
"""Variables of which one is set where something has started a process on each node."""


def check_strategy(strategy: Any) -> None:
    """Refuse strategies that shard the network, or copy a run into processes.

    Args:
        strategy: ``--trainer.strategy`` as plain data: a name, ``{class_path: ...}``, or None.

    Raises:
        UserError: FSDP, DeepSpeed, tensor parallelism, processes that are forked or spawned, or a name that means
            nothing.

    Example:
        >>> check_strategy("ddp")
        >>> check_strategy("fsdp")
        Traceback (most recent call last):
        ssl_geometry.errors.UserError: --trainer.strategy fsdp: it may split the network over the processes, ...
    """
    if strategy in (None, "auto"):
        return
    name = strategy["class_path"] if isinstance(strategy, Mapping) else str(strategy)
    fix = "expected auto or ddp"
    if isinstance(strategy, Mapping):
        module, _, attribute = name.rpartition(".")
        kind, options = getattr(importlib.import_module(module), attribute), strategy.get("init_args") or {}
    elif name.lower() in StrategyRegistry.available_strategies():
        registered = StrategyRegistry[name.lower()]
        kind, options = registered["strategy"], registered["init_params"]
    else:
        raise UserError(f"--trainer.strategy {name}: no such strategy; {fix}")
    if not issubclass(kind, DDPStrategy | SingleDeviceStrategy) or issubclass(kind, DeepSpeedStrategy):
        raise UserError(
            f"--trainer.strategy {name}: it may split the network over the processes, but each must hold it whole to "
            f"measure its layers; {fix} (for less memory per GPU: more --trainer.devices, which share each batch, or "
            "--trainer.precision bf16-mixed)"
        )
    if options.get("start_method", "popen") != "popen":
        raise UserError(
            f"--trainer.strategy {name}: it starts the processes by {options['start_method']}, which a run with its "
            f"open files and signals cannot be handed to; {fix}"
        )


def check_devices(accelerator: Any, devices: Any) -> None:
    """Refuse devices that this machine does not have, or that mean nothing.

    Args:
        accelerator: ``--trainer.accelerator`` as plain data.
        devices: ``--trainer.devices``: auto, a number, -1 for all GPUs, or a list of their numbers.

    Raises:
        UserError: with what would do.

    Example:
        >>> check_devices("cpu", 2)
        >>> check_devices("cpu", "abc")
        Traceback (most recent call last):
        ssl_geometry.errors.UserError: --trainer.devices abc: expected auto or a number of processes of at least 1
    """
    known = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    if isinstance(accelerator, str) and accelerator not in known:
        raise UserError(f"--trainer.accelerator {accelerator}: {did_you_mean(accelerator, known)}")
    gpus = torch.cuda.device_count()
    if accelerator == "cuda" and not gpus:
        raise UserError("--trainer.accelerator cuda: torch finds no GPU here; use auto or cpu")
    if accelerator in ("gpu", "mps") and not (gpus or torch.backends.mps.is_available()):
        raise UserError(f"--trainer.accelerator {accelerator}: torch finds no GPU here; use auto or cpu")
    if accelerator not in ("auto", "cpu", "gpu", "cuda") or devices in (None, "auto"):
        return
    asked = devices
    if isinstance(asked, str) and re.fullmatch(r"-?\d+", asked):
        asked = int(asked)
    elif isinstance(asked, str) and re.fullmatch(r"\d+(,\d+)*,?", asked):
        asked = [int(number) for number in asked.split(",") if number]
    shown = f"[{', '.join(map(str, devices))}]" if isinstance(devices, list) else devices
    if accelerator == "cpu" or not gpus:
        if type(asked) is not int or asked < 1:
            raise UserError(f"--trainer.devices {shown}: expected auto or a number of processes of at least 1")
        return
    numbers = asked if isinstance(asked, list) and asked else range(gpus) if asked == -1 else None
    if type(asked) is int and asked > 0:
        numbers = range(asked)
    if numbers is None or not all(type(number) is int for number in numbers) or len(set(numbers)) < len(numbers):
        raise UserError(f"--trainer.devices {shown}: expected auto, a number of GPUs, or a list of different ones")
    if not all(0 <= number < gpus for number in numbers):
        raise UserError(f"--trainer.devices {shown}: this machine has {gpus} GPU{'s' * (gpus > 1)}, numbered from 0")


def check_nodes(nodes: int, option: str) -> None:
    """Refuse several nodes unless a launcher has started processes on each: this one would wait forever.

    Args:
        nodes: how many.
        option: the option as typed.

    Raises:
        UserError: outside of ``srun`` and torchrun.
    """
    task = this_task()
    started = (task is not None and task.step is not None) or any(name in os.environ for name in LAUNCHERS)
    if nodes > 1 and not started:
        raise UserError(
            f"{option} {nodes}: nothing has started processes on the other nodes; start the command with srun "
            "(slurm/fit.sbatch) or torchrun, or set 1"
        )


def check_torchrun(accelerator: Any, devices: Any, nodes: int, prefix: str) -> None:
    """Refuse numbers that differ from torchrun's: each of its processes would do all the work, in the same folder.

    Args:
        accelerator: ``--trainer.accelerator`` as plain data; "cpu" or "cuda" of other commands.
        devices: of each node, as plain data that :func:`check_devices` lets pass.
        nodes: how many.
        prefix: of the options, such as ``--trainer.``.

    Raises:
        UserError: with the options that fit.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    started = processes_started()
    each = int(os.environ.get("LOCAL_WORLD_SIZE", str(started)))
    every = max(1, 0 if accelerator == "cpu" else torch.cuda.device_count())
    if devices in (None, "auto", -1, "-1"):
        asked = every
    else:
        asked = len(devices) if isinstance(devices, list) else str(devices).strip(",").count(",") + 1
        asked = int(devices) if asked == 1 and str(devices).isdecimal() else asked
    if (asked, nodes) != (each, started // each):
        raise UserError(
            f"{prefix}devices {devices} and {prefix}num_nodes {nodes}: torchrun has started {each} processes on each "
            f"of {started // each} node(s); set {prefix}devices {each} {prefix}num_nodes {started // each}"
        )


class ManyDevices(L.Callback):
    """One line where ``--trainer.devices auto`` has taken more GPUs than the training is worth."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Once the data module knows its images."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage != "fit" or data is None:
            return
        pixels = data.num_train * data.image_shape[-2] * data.image_shape[-1]
        if line := too_many(trainer.world_size, trainer.num_nodes, data.batch_size, data.num_train, pixels):
            logger.warning(line)


def too_many(processes: int, nodes: int, batch_size: int, images: int, pixels: int) -> str:
    """The warning if fewer processes would be as fast.

    Args:
        processes: of the run.
        nodes: that they run on.
        batch_size: images of a step, over all processes.
        images: of the training split.
        pixels: of all of them.

    Returns:
        One line with the number of devices to ask for; "" where the number is fine.

    Example:
        >>> too_many(8, 1, 128, 1_617, 1_617 * 16 * 16)
        '--trainer.devices auto takes all 8 devices, for 1,617 small training images: --trainer.devices 1 is
        recommended'
        >>> too_many(8, 1, 128, 50_000, 50_000 * 32 * 32)
        '--trainer.devices auto takes all 8 devices, each with 16 of the 128 images of a step: --trainer.devices 4 is
        recommended, with 32 each'
        >>> too_many(8, 1, 512, 50_000, 50_000 * 32 * 32)
        ''
    """
    each = processes // nodes
    if each == 1:
        return ""
    taken = f"--trainer.devices auto takes all {each} devices"
    if pixels < FEW_PIXELS:
        return f"{taken}, for {images:,} small training images: --trainer.devices 1 is recommended"
    if batch_size // processes >= FEW_IMAGES:
        return ""
    shares = {n: batch_size // (n * nodes) for n in range(1, each) if batch_size % (n * nodes) == 0}
    better = max((n for n, share in shares.items() if share >= FEW_IMAGES), default=1)
    return (
        f"{taken}, each with {batch_size // processes} of the {batch_size} images of a step: "
        f"--trainer.devices {better} is recommended, with {batch_size // (better * nodes)} each"
    )


def out_of_memory(error: BaseException) -> str:
    """What an allocator reported, in one line; "" where the error is another.

    Example:
        >>> out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
        "[enforce fail] DefaultCPUAllocator: can't allocate memory"
        >>> out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        ''
    """
    words = first_line(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return words
    return words if isinstance(error, RuntimeError) and re.search(FULL, str(error)) else ""


def less_memory(error: BaseException, trainer: L.Trainer, continued: str) -> str:
    """What to lower where memory ran out in ``fit``.

    Args:
        error: of which :func:`out_of_memory` knows; its traceback shows what was under way.
        trainer: of the run.
        continued: how to go on with the run.

    Returns:
        Options with their values; those that change what is trained ask for a new run.
    """
    data: Any = getattr(trainer, "datamodule", None)
    frames = [(Path(frame.filename).name, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    if ("datamodule.py", "setup") in frames:
        return f"while the images were read: --data.storage workers leaves them on the disk; {continued}"
    if {"engine.py", "evaluation_loop.py"} & {file for file, _ in frames}:
        return f"while measuring: lower --data.eval_batch_size {data.eval_batch_size}; {continued}"
    lower = (
        f"in training: lower --data.batch_size {data.batch_size} (with --trainer.accumulate_grad_batches "
        f"{2 * trainer.accumulate_grad_batches} half of it makes as large a step)"
    )
    if trainer.precision.startswith("32"):
        lower += ", or set --trainer.precision bf16-mixed"
    lower += ", in a new run, as these change what is trained"
    if trainer.strategy.root_device.type == "cuda":
        lower += f"; or share each batch among more GPUs than {trainer.world_size} (--trainer.devices) and {continued}"
    return lower


@contextmanager
def memory_for_measuring(options: Any, network: str | None = None) -> Iterator[None]:
    """Report in one line what to reduce if ``compare``, ``probe`` or ``survey`` runs out of memory.

    Args:
        options: of the command, with its data module.
        network: that is measured.

    Raises:
        UserError: memory is full.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if words := out_of_memory(error):
            measuring = f"measuring {network}" if network else "measuring"
            raise UserError(f"out of memory while {measuring} ({words}): {less_to_measure(options)}") from error
        raise


def less_to_measure(options: Any) -> str:
    """The options of a command that measures networks which need less memory, with their values."""
    elsewhere = f", or measure on --device cpu instead of {options.device}" if options.device != "cpu" else ""
    lower = f"lower --data.eval_batch_size {options.data.eval_batch_size}"
    if getattr(options, "train_images", None):
        lower += f" or --train_images {options.train_images}"
    return f"{lower}, or name fewer {options.layers_option}{elsewhere}"


MOST_OF_FREE = 0.9
"""Share of the free memory, or of a disk, that measuring may take."""


def as_size(count: float) -> str:
    """A number of bytes as text.

    Example:
        >>> as_size(3 * 2**20), as_size(1.5 * 2**30)
        ('3.0 MiB', '1.5 GiB')
    """
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def free_memory(device: str) -> float:
    """Bytes that this process can still take.

    Args:
        device: a CUDA device, or cpu for the host: there its control groups count, those of a container or a job.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # no Linux: what is free, without the cache
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
    return min(int(lines["MemAvailable"].split()[0]) * 1024, left_in_control_groups())


def left_in_control_groups(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the control groups of this process still allow: those of a container, or of a job of SLURM.

    A limit holds for all groups below it; inside a container, its own group is what is mounted at the top. Files that
    the system keeps in memory are given back when they are in the way.
    """
    left = math.inf
    for line in own.read_text(encoding="utf-8").splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):  # version 2 names none
            continue
        names = ("memory.max", "memory.current", "inactive_file")
        top = mounted
        if controllers:
            names, top = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), mounted / "memory"
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            limit, used, files = _memory_of(folder, *names)
            left = min(left, limit - used + files)
    return max(left, 0)


def _memory_of(folder: Path, limit: str, used: str, files: str) -> tuple[float, int, int]:
    """Limit, use, and how much of it are files, of one control group."""
    try:
        most = (folder / limit).read_text(encoding="utf-8").strip()
        if most == "max":
            return math.inf, 0, 0
        kept = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return int(most), int((folder / used).read_text(encoding="utf-8")), int(kept.get(files, 0))
    except OSError:  # the root has no limit; a path of outside is not there in a container
        return math.inf, 0, 0
