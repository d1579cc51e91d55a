"""What agreeing about signals costs a training step with several processes: Lightning's broadcast, ours, nothing.

    python benchmarks/processes.py --processes 2

A step is a pause of random length, different in each process, and a reduction of a gradient; over gloo on the CPU.
Lightning broadcasts a flag and waits for it before each step; ours reduces it on the CPU and reads it a step later.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from ssl_geometry.callbacks import LastCheckpoint, StopOnSignal


def worker(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.processes)
    trainer = SimpleNamespace(received_sigterm=False, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    loop = SimpleNamespace(trainer=trainer)
    ours = StopOnSignal(LastCheckpoint(Path(folder)))
    ours._group = dist.new_group(backend="gloo")
    ways = {
        "nothing": lambda: None,
        "Lightning's broadcast": lambda: _TrainingEpochLoop._broadcast_sigterm_tensor(loop),  # type: ignore[arg-type]
        "ours": ours._agreed,
    }
    gradient, chance = torch.zeros(args.parameters), random.Random(rank)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, agree in ways.items():
            dist.barrier()
            started = time.perf_counter()
            for _ in range(args.steps):
                time.sleep(chance.uniform(0, 2 * args.milliseconds / 1000))
                dist.all_reduce(gradient)
                agree()
            times[name].append((time.perf_counter() - started) / args.steps)
    if rank == 0:
        print(f"{args.processes} processes, gloo, torch {torch.__version__}; {args.rounds} rounds of {args.steps}\n")
        print("| agreeing by | ms a step | over nothing (median, range) |")
        print("|---|---|---|")
        for name, values in times.items():
            ratios = [a / b for a, b in zip(values, times["nothing"], strict=True)]
            spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
            print(f"| {name} | {1000 * statistics.median(values):.2f} | {spread} |")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--milliseconds", type=float, default=10, help="mean pause of a step")
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (args, folder), nprocs=args.processes)


if __name__ == "__main__":
    main()
