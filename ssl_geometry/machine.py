"""What this machine has and lacks: what ``python -m ssl_geometry.doctor`` looks at."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import wandb
from torch import Tensor, nn

from ssl_geometry.data.plan import cores as usable_cores
from ssl_geometry.errors import UserError, first_line
from ssl_geometry.geometry import exact_search
from ssl_geometry.geometry.gram import gram_vector
from ssl_geometry.methods.parts.nt_xent import nt_xent
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.models.sync_batchnorm import SyncBatchNormPlugin
from ssl_geometry.runs.slurm import this_task

GIB = 2**30
SAFE_LIGHTNING = (2, 6, 6)
"""2.6.2 and 2.6.3 were malicious; reading a checkpoint could run code before 2.6.6."""
TOLERANCE = 1e-5


class Finding(NamedTuple):
    """One line."""

    subject: str
    detail: str
    to_do: str = ""
    """What to change; nothing where all is fine."""


def findings(runs: Path, data: Path, with_parity: bool = True) -> Iterator[Finding]:
    """All lines, each as soon as it is known.

    Args:
        runs: folder that runs will be written to.
        data: folder of the images.
        with_parity: compare two processes with one, which takes ten seconds.
    """
    for look in (python, cores, gpu, faiss, slurm, weights_and_biases):
        yield from look()
    yield from folders(runs, data)
    yield from shared_memory()
    if with_parity:
        yield from parity()


def python() -> Iterator[Finding]:
    """Python and the packages that matter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("python", found, "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer")
    for package in ("torch", "torchvision", "lightning", "torchmetrics", "lightly", "wandb"):
        yield Finding(package, version(package))
    numbers = tuple(int(part) for part in version("lightning").split(".")[:3] if part.isdigit())
    if numbers < SAFE_LIGHTNING:
        yield Finding("lightning", f"{version('lightning')} has known holes", "pip install 'lightning>=2.6.6'")


def cores() -> Iterator[Finding]:
    """Cores that this process may use."""
    mine = usable_cores()
    few = mine < 4 and torch.cuda.is_available()
    to_do = "few for feeding a GPU with images: ask SLURM for --cpus-per-task=8" if few else ""
    yield Finding("cores", f"{mine} of {os.cpu_count()}, {torch.get_num_threads()} threads of torch", to_do)


def gpu() -> Iterator[Finding]:
    """GPUs, as torch sees them."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            yield Finding(f"GPU {number}", f"{facts.name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free")
        yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        return
    to_do = ""
    if shutil.which("nvidia-smi"):
        to_do = f"nvidia-smi is here, but torch finds no GPU: update the driver to one for CUDA {torch.version.cuda}"
    yield Finding("GPU", "none: training runs on the CPU", to_do)


def faiss() -> Iterator[Finding]:
    """What neighbours are searched on."""
    gpus = exact_search.faiss().get_num_gpus() if exact_search.has_gpu() else 0
    blas = exact_search.faiss_blas()
    detail = [
        exact_search.faiss().__version__,
        f"GPU support, {gpus} GPU(s)" if exact_search.has_gpu() else "no GPU support",
        "its BLAS is not OpenBLAS" if blas is None else f"OpenBLAS {blas[0]} with kernels for {blas[1]}",
        f"{torch.get_num_threads()} threads",
    ]
    to_do = ""
    if torch.cuda.is_available() and not gpus:
        to_do = "exact searches take torch on the GPU, ivf and hnsw the CPU: install faiss-gpu-cuvs for FAISS's own"
        to_do = "" if platform.machine() == "aarch64" else to_do  # there is no such wheel
    if not exact_search.knows_cpu():
        chosen = os.environ.get("OPENBLAS_CORETYPE")
        fix = f"unset OPENBLAS_CORETYPE={chosen}" if chosen else "set OPENBLAS_CORETYPE to newer ones that it can run"
        to_do = f"ivf and hnsw are slow on kernels that are older than this CPU: {fix}"
    yield Finding("FAISS", ", ".join(detail), to_do)


def slurm() -> Iterator[Finding]:
    """The SLURM job around this process."""
    try:
        task = this_task()
    except UserError as error:
        yield Finding("SLURM", "job does not fit", str(error))
        return
    if task is None:
        yield Finding("SLURM", "not in a job" + (", sbatch is here" if shutil.which("sbatch") else ""))
        return
    detail = f"job {task.job}, {task.nodes} node(s) x {task.tasks_per_node} task(s), restarted {task.restarts} times"
    to_do = (
        "" if shutil.which("scontrol") else "no scontrol here (a container?): let the batch script requeue on code 75"
    )
    yield Finding("SLURM", detail, to_do)


def weights_and_biases() -> Iterator[Finding]:
    """Whether curves can be watched online; the key itself is never shown."""
    detail = "no key: curves are kept offline; `wandb login` to watch them"
    try:
        if wandb.login(prompt=False, verify=False):
            detail = "a key is here"
    except Exception as error:  # such as no home directory, or a machine that is too busy
        detail = f"cannot be asked for a key ({first_line(error)})"
    yield Finding("W&B", detail)


def folders(runs: Path, data: Path) -> Iterator[Finding]:
    """Where runs are written, and where images are read."""
    there = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if os.path.isdir(folder))
    free = shutil.disk_usage(there).free / GIB
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(b"x")
            file.flush()
        to_do = "" if free > 5 else "free some space, or choose another --runs"
    except OSError as error:
        to_do = f"cannot write there ({error.strerror}): choose another --runs"
    yield Finding("runs", f"{runs}: {free:.0f} GiB free", to_do)
    inside, to_do = "not there; CIFAR and others are downloaded", ""
    try:
        if data.is_dir():
            inside = f"{sum(1 for _ in data.iterdir())} entries"
    except OSError as error:
        inside, to_do = f"cannot be read ({error.strerror})", "have its owner let you, or choose another --data.root"
    yield Finding("data", f"{data}: {inside}", to_do)


def shared_memory() -> Iterator[Finding]:
    """What data workers hand images over in."""
    folder = Path("/dev/shm")
    if folder.is_dir():
        size = shutil.disk_usage(folder).total / GIB
        to_do = "" if size >= 1 else "too small for data workers: docker run --shm-size=8g, or --data.num_workers 0"
        yield Finding("shared memory", f"{size:.1f} GiB", to_do)


def parity() -> Iterator[Finding]:
    """Two processes against one: a loss, its gradient through batch norm, and CKA."""
    expected = _numbers(0, 1)
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        processes = [context.Process(target=_process, args=(rank, folder, queue), daemon=True) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
        if any(process.exitcode != 0 for process in processes):
            for process in processes:
                process.kill()
            yield Finding("2 processes", "did not finish", "see above; is a firewall in the way of localhost?")
            return
        got = [queue.get() for _ in processes]
    gap = max(
        float((torch.tensor(a) - torch.tensor(b)).abs().max())
        for rank in got
        for a, b in zip(rank, expected, strict=True)
    )
    to_do = "" if gap < TOLERANCE else f"more than {TOLERANCE:g}: do not train with several processes; report this"
    yield Finding("2 processes", f"loss, gradient and CKA as of one, within {gap:.0e}", to_do)


def _process(rank: int, folder: str, queue: "torch.multiprocessing.SimpleQueue[list[list[float]]]") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    queue.put(_numbers(rank, 2))
    dist.destroy_process_group()


def _numbers(rank: int, world_size: int) -> list[list[float]]:
    """Of this process's share of a batch, put together over the processes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 10, generator=generator)
    net: nn.Module = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if world_size > 1:
        net = SyncBatchNormPlugin().apply(net)
    share = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    views = torch.cat([images[:12][share], images[12:][share]])
    first, second = net(views).chunk(2)
    loss = nt_xent(first, second, temperature=0.5)
    loss.backward()
    averaged: list[Tensor] = [loss.detach().clone(), *(p.grad for p in net.parameters() if p.grad is not None)]
    if world_size > 1:
        for tensor in averaged:
            dist.all_reduce(tensor)
            tensor /= world_size
    metric = LayerwiseCKA(["a", "b"])
    for part in torch.randn(48, 5, generator=generator).split(12)[rank::world_size]:
        metric.update({"a": gram_vector(part), "b": gram_vector(part.relu())})
    return [value.flatten().tolist() for value in (*averaged, metric.compute())]
