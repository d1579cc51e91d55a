"""Everything that a GPU is needed for, in parts of a few minutes: is it right there, and how fast is it?

    python benchmarks/gpu.py                                # every part; planned for 40 minutes, not timed yet
    python benchmarks/gpu.py --parts step epochs            # some of them
    python benchmarks/gpu.py --images cifar10-jpeg          # whole epochs on a folder with train/ and test/
    python benchmarks/gpu.py --device cpu --tiny            # a rehearsal: every line runs, no number means anything

Each part runs in a process of its own with a time limit, and its section is added to the Markdown file as soon as it is
there: a part that crashes, hangs or is cut off does not take the others with it. Times are medians; ``host ms`` is what
the host spends until it may go on (where it is far below ``ms``, the device is the limit), ``waits`` is how often one
step waits for the device.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parent.parent
PART_SECONDS = 480
TOTAL_SECONDS = 2400
Row = dict[str, Any]


# -- measuring ---------------------------------------------------------------------------------------------------------


def times(call: Callable[[], object], device: str, repeats: int = 20, warm_up: int = 3) -> dict[str, float]:
    """Median time of a call on the device and on the host, in ms."""
    for _ in range(warm_up):
        call()
    on_device, on_host = [], []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
        started = time.perf_counter()
        call()
        on_host.append(1e3 * (time.perf_counter() - started))
        if device == "cuda":
            last.record()
            last.synchronize()
            on_device.append(first.elapsed_time(last))
    host = statistics.median(on_host)
    return {"ms": statistics.median(on_device) if on_device else host, "host ms": host}


def waits(call: Callable[[], object], device: str) -> int | str:
    """How often a call waits for the device, as CUDA's debug mode counts it."""
    if device != "cuda":
        return "not on a CPU"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def gib(device: str) -> float | str:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else "not on a CPU"


def batch_of(size: int, batch: int, device: str) -> dict[str, Tensor]:
    """Random images, as a datamodule that keeps them on the device yields them."""
    return {
        "image": torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device),
        "label": torch.randint(10, (batch,), device=device),
        "index": torch.arange(batch, device=device),
    }


def fit(*options: str) -> Any:
    from ssl_geometry.fit import fit

    return fit([*options, "--loggers=[csv]"])


def quickstart(args: argparse.Namespace, folder: Path, run: str, *options: str, **named: Any) -> list[str]:
    """Options of a short run of ``fit`` in which every monitor measures."""
    given = {
        "runs": folder,
        "run_id": run,
        "trainer.accelerator": args.device,
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.deterministic": True,
        "trainer.max_epochs": 2 if args.tiny else 6,
        "neighbors.every_n_epochs": 1,
        "spectrum.every_n_epochs": 1,
        "invariance.every_n_epochs": 1,
        "probes.every_n_epochs": 1,
        "save_every_n_minutes": 0,
    }
    if args.tiny:
        given |= {
            "data.limit_train": 128, "data.measure_size": 64, "model.width": 1 / 16, "data.eval_batch_size": 64,
            "neighbors.copies": 3, "spectrum.copies": 2, "probes.layers": "stages",
        }  # fmt: skip
    given |= named
    config = ["--config", str(ROOT / "configs/quickstart/simclr.yaml")]
    return [*config, *(f"--{name}={value}" for name, value in given.items()), *options]


def weights(run: Any) -> dict[str, Tensor]:
    return torch.load(run.last_checkpoint, map_location="cpu", weights_only=True)["state_dict"]


def differences(a: Any, b: Any) -> Iterator[Row]:
    """For each metric the largest absolute and relative difference of two runs' records."""
    keys = ["metric", "layer", "layer_other", "model_other", "view", "split", "epoch", "place"]
    frames = []
    for frame in (a, b):
        frame = frame.assign(model_other=frame["model_other"].where(frame["model_other"] != frame["run"], "itself"))
        frames.append(frame.assign(place=frame.groupby(keys[:-1], dropna=False).cumcount()))  # quantiles share a key
    both = frames[0].merge(frames[1], on=keys, suffixes=("", "_b"), how="outer", indicator=True)
    for metric, rows in both.groupby("metric"):
        apart = (rows["value"] - rows["value_b"]).abs()
        scale = rows["value"].abs().max()
        yield {
            "metric": metric,
            "rows": len(rows),
            "only in one": int((rows["_merge"] != "both").sum()),
            "NaN in one": int((rows["value"].isna() != rows["value_b"].isna()).sum()),
            "largest difference": float(apart.max()),
            "over the largest value": float(apart.max() / scale) if scale else 0.0,
        }


# -- is it right? ------------------------------------------------------------------------------------------------------


def tests(args: argparse.Namespace) -> Iterator[Row]:
    """The tests that need CUDA: `pytest -m gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for line in ended.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            yield {"exit code": ended.returncode, "result": line}
    yield {"exit code": ended.returncode, "result": (ended.stdout.strip() or ended.stderr.strip()).splitlines()[-1]}


def records(args: argparse.Namespace) -> Iterator[Row]:
    """The quickstart on this device and on the CPU, float32: what every monitor recorded at the initialisation.

    Later epochs differ by rounding that training amplifies; at epoch 0 both see the same weights and the same images.
    """
    from ssl_geometry.records import read_records

    with tempfile.TemporaryDirectory() as folder:
        once = {"trainer.max_epochs": 1}
        here = fit(*quickstart(args, Path(folder), "here", **once))
        there = fit(*quickstart(args, Path(folder), "there", **once, **{"trainer.accelerator": "cpu"}))
        frames = [read_records(run.directory).query("epoch == 0") for run in (here, there)]
        yield from differences(*frames)


def offline(args: argparse.Namespace) -> Iterator[Row]:
    """`compare` on the saved checkpoint gives the numbers that the monitors logged after the last epoch."""
    from ssl_geometry.compare import compare
    from ssl_geometry.records import read_records

    with tempfile.TemporaryDirectory() as folder:
        run = fit(*quickstart(args, Path(folder), "a"))
        out = Path(folder) / "compared"
        compare(["--models", f"a={run.directory}", "--out", str(out), f"--device={args.device}"])
        live = read_records(run.directory)
        live, again = live[live["epoch"] == live["epoch"].max()], read_records(out)
        for metric, condition in {
            "cka": "metric == 'cka' and model_other == 'a'",
            "invariance": "metric == 'invariance'",
            "class_cka": "metric == 'class_cka'",
        }.items():
            keys = ["layer", "layer_other", "view", "protocol"]
            both = live.query(condition).merge(again.query(condition), on=keys, suffixes=("", "_again"))
            yield {
                "metric": metric,
                "rows with one protocol": len(both),
                "largest difference": float((both["value"] - both["value_again"]).abs().max()),
            }


def interruption(args: argparse.Namespace) -> Iterator[Row]:
    """With `--trainer.deterministic true`: twice the same run, and one that is killed, resumed: the same bits?"""
    with tempfile.TemporaryDirectory() as folder:
        a, b = (weights(fit(*quickstart(args, Path(folder), name))) for name in "ab")
        yield {"what": "two runs", "equal tensors": _equal(a, b)}
        for name, number in {"killed": signal.SIGKILL, "signalled": signal.SIGUSR1}.items():
            options = quickstart(args, Path(folder), name, "--resume=auto", "--loggers=[csv]")
            command = [sys.executable, "-m", "ssl_geometry.fit", *options]
            process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            last = Path(folder) / "quickstart" / name / "checkpoints" / "last.ckpt"
            while process.poll() is None and not last.exists():
                time.sleep(0.05)
            process.send_signal(number)
            process.wait()
            yield {
                "what": f"{name} after its first checkpoint, exit code {process.returncode}, resumed",
                "equal tensors": _equal(a, weights(fit(*options))),
            }


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str:
    same = sum(torch.equal(value, b[name]) for name, value in a.items())
    worst = max(float((value.double() - b[name].double()).abs().max()) for name, value in a.items())
    return f"{same} of {len(a)}, largest difference {worst:.3g}"


def processes(args: argparse.Namespace) -> Iterator[Row]:
    """A run through DDP with a group of one process (NCCL on CUDA) and one without: the same training."""
    with tempfile.TemporaryDirectory() as folder:
        alone = weights(fit(*quickstart(args, Path(folder), "alone")))
        options = quickstart(args, Path(folder), "ddp", "--loggers=[csv]", **{"trainer.strategy": "ddp"})
        started = time.perf_counter()
        command = [sys.executable, "-m", "ssl_geometry.fit", *options]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(ended.stderr[-2000:])
        saved = Path(folder) / "quickstart/ddp/checkpoints/last.ckpt"
        ddp = torch.load(saved, map_location="cpu", weights_only=True)["state_dict"]
        yield {"equal tensors": _equal(alone, ddp), "seconds": time.perf_counter() - started}


# -- how fast is it? ---------------------------------------------------------------------------------------------------


class Step:
    """One training step as Lightning runs it: views, forward, loss, backward, optimiser, online probes."""

    def __init__(
        self, args: argparse.Namespace, size: int, batch: int, *, compile: bool, probes: bool = True, **options: Any
    ) -> None:
        from ssl_geometry.measure.engine import layer_widths
        from ssl_geometry.measure.probes import LAYERS
        from ssl_geometry.measure.requests import pooled
        from ssl_geometry.measure.subject import Subject
        from ssl_geometry.methods import SimCLR
        from ssl_geometry.metrics import ProbeBank
        from ssl_geometry.models.layers import layer_names
        from ssl_geometry.models.taps import Taps

        torch.manual_seed(0)
        self.device = args.device
        backbone = "resnet10" if args.tiny else options.pop("backbone", "resnet50")
        options.pop("backbone", None)
        self.method = SimCLR(backbone=backbone, image_size=size, compile=compile, **options).to(args.device)
        self.method.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
        self.batch = batch_of(size, batch, args.device)
        self.method.on_fit_start()  # compiles
        self.optimizer = self.method.build_optimizer(lr=0.1)
        self.taps = self.bank = None
        if probes:
            names = layer_names(self.method, list(LAYERS))
            shape = tuple(self.batch["image"].shape[1:])
            self.bank = ProbeBank(layer_widths(Subject.of(self.method), names, shape), 10).to(args.device)
            self.taps = Taps(self.method, names, lambda _, output: pooled(output)).__enter__()

    def __call__(self) -> None:
        if self.taps is not None:
            self.taps.captured = {}
        with torch.autocast(self.device, dtype=torch.bfloat16):
            loss = self.method.training_step(self.batch, 0)  # type: ignore[arg-type]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.taps is not None and self.bank is not None:
            features, self.taps.captured = self.taps.captured, None
            self.bank.step(features, self.batch["label"], self.batch["index"])

    def close(self) -> None:
        if self.taps is not None:
            self.taps.__exit__()
        torch._dynamo.reset()


def _step_row(args: argparse.Namespace, name: str, size: int, batch: int, **options: Any) -> Row:
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step = Step(args, size, batch, **options)
    step()
    step()
    first = time.perf_counter() - started
    measured = times(step, args.device, *((3, 1) if args.tiny else (30, 8)))
    row = {
        "step": name,
        **measured,
        "images/s": 1e3 * batch / measured["ms"],
        "waits": waits(step, args.device),
        "GiB": gib(args.device),
        "first two steps, s": first,
    }
    step.close()
    return row


def step(args: argparse.Namespace) -> Iterator[Row]:
    """One step of SimCLR ResNet-50 at 32 px, 512 images, bf16, LARS: eager and compiled, with its parts apart."""
    size, batch = (16, 8) if args.tiny else (32, 512)
    for name, benchmark, options in (
        ("eager", False, {"compile": False}),
        ("eager, cudnn.benchmark", True, {"compile": False}),
        ("compiled, cudnn.benchmark (the default on CUDA)", True, {"compile": args.compile}),
        ("the same without online probes", True, {"compile": args.compile, "probes": False}),
    ):
        torch.backends.cudnn.benchmark = benchmark
        yield _step_row(args, name, size, batch, **options)
    yield _step_row(args, "ResNet-18, compiled", size, batch, compile=args.compile, backbone="resnet18")


def imagenet(args: argparse.Namespace) -> Iterator[Row]:
    """Steps at 224 px as the ImageNet configuration has them, images on the device."""
    torch.backends.cudnn.benchmark = True
    for batch in (4,) if args.tiny else (128, 256):
        size = 32 if args.tiny else 224
        for blur in (False, True):
            views = [{"augment": {"simclr": {"strength": 1.0, "blur": blur}}}]
            name = f"{batch} images{', blur' * blur}"
            yield _step_row(args, name, size, batch, compile=args.compile, views=views)


def views(args: argparse.Namespace) -> Iterator[Row]:
    """Views of a batch, drawn and made; the floor is one read of the uint8 images and one write as float32."""
    from ssl_geometry.data.views import View

    for name, augment, batch, stored, size in (
        ("simclr, 32 px", "simclr", 512, 32, 32),
        ("supervised, 32 px", "supervised", 512, 32, 32),
        ("simclr, 224 px", {"simclr": {"strength": 1.0}}, 256, 256, 224),
        ("simclr with blur, 224 px", {"simclr": {"strength": 1.0, "blur": True}}, 256, 256, 224),
    ):
        view, given = View(augment, size=size), batch_of(stored, 8 if args.tiny else batch, args.device)
        floor = times(lambda given=given: given["image"] / 255, args.device)
        made = times(
            lambda view=view, given=given: view(given["image"], given["index"], seed=0, epoch=0, view=0), args.device
        )
        yield {
            "views": name,
            **made,
            "views/s": 1e3 * len(given["index"]) / made["ms"],
            "over the floor": made["ms"] / floor["ms"],
        }


def linalg(args: argparse.Namespace) -> Iterator[Row]:
    """What a measurement decomposes: the ridge probe, spectra, and the pieces they are made of, float64."""
    from ssl_geometry.geometry import spectrum

    for n in (32, 64) if args.tiny else (512, 1024, 2048):
        x = torch.randn(2 * n, n, device=args.device, dtype=torch.float64)
        gram = x.T @ x / n + 1e-3 * torch.eye(n, device=args.device, dtype=torch.float64)
        targets = torch.randn(n, 10, device=args.device, dtype=torch.float64)
        stacked = gram.expand(9, n, n).contiguous()
        for name, call in {
            "eigh": lambda gram=gram: torch.linalg.eigh(gram),
            "eigvalsh": lambda gram=gram: torch.linalg.eigvalsh(gram),
            "9 Cholesky and solves": lambda s=stacked, t=targets: torch.cholesky_solve(
                t.expand(9, -1, -1), torch.linalg.cholesky_ex(s)[0]
            ),
            "rankme": lambda x=x: spectrum.rankme(x.float()),
        }.items():
            yield {"n": n, "what": name, **times(call, args.device, 3, 1)}


def search(args: argparse.Namespace) -> Iterator[Row]:
    """50 nearest neighbours: ours, bare FAISS and torch's product and top-k; then NNK and manifold metrics on them."""
    import faiss

    from ssl_geometry.geometry import manifold, nnk
    from ssl_geometry.geometry.neighbors import nearest

    sizes = (
        ((300, 16),) if args.tiny else ((2_048, 2_048), (10_000, 512), (10_000, 2_048), (50_000, 512), (50_000, 2_048))
    )
    for n, width in sizes:
        x = torch.randn(n, width, device=args.device)
        unit = torch.nn.functional.normalize(x)
        resources = faiss.StandardGpuResources() if hasattr(faiss, "StandardGpuResources") else None
        for k in (20, 50):  # on CUDA shorter lists are FAISS's, longer ones torch's
            calls: dict[str, Callable[[], object]] = {
                "ours": lambda x=x, k=k: nearest(x, k=k),
                "torch: product and top-k": lambda unit=unit, k=k: [
                    (part @ unit.T).topk(k + 1).indices for part in unit.split(4096)
                ],
            }
            if args.device == "cpu":
                calls["bare FAISS"] = lambda unit=unit, k=k: faiss.knn(unit, unit, k + 1, metric=faiss.METRIC_L2)
            elif resources is not None:
                calls["bare FAISS"] = lambda unit=unit, k=k, resources=resources: faiss.knn_gpu(
                    resources, unit, unit, k + 1, metric=faiss.METRIC_L2
                )
            for name, call in calls.items():
                yield {"N": n, "D": width, "k": k, "what": name, **times(call, args.device, 5, 1)}
            if n <= 10_000:
                same = nearest(x, k=k).ids.cpu() == nearest(x.cpu(), k=k).ids
                yield {"N": n, "D": width, "k": k, "what": f"places as on a CPU: {int(same.sum())} of {same.numel()}"}
        if n <= 10_000:
            ids = nearest(x, k=50).ids
            polytopes = nnk.nnk(x, ids)
            for name, call in {
                "NNK": lambda x=x, ids=ids: nnk.nnk(x, ids),
                "manifold metrics": lambda x=x, ids=ids, p=polytopes: manifold.manifold_metrics(x, ids, p),
            }.items():
                yield {"N": n, "D": width, "what": name, **times(call, args.device, 3, 1)}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """A measuring pass over one batch, float32: the bare forward, pooled features of all layers, Gram matrices."""
    from ssl_geometry.measure.engine import forward_pass, measuring
    from ssl_geometry.measure.requests import GramVector, Request, pooled
    from ssl_geometry.measure.subject import Subject
    from ssl_geometry.methods import SimCLR
    from ssl_geometry.models.layers import layer_names

    method = SimCLR(backbone="resnet10" if args.tiny else "resnet50", image_size=32, compile=False).to(args.device)
    images = batch_of(32, 16 if args.tiny else 256, args.device)
    every = tuple(layer_names(method, "all"))
    with measuring(method):
        floor = times(lambda: method.features(images["image"]), args.device, 5)  # type: ignore[arg-type]
        yield {"what": "bare forward", **floor, "over the forward": 1.0}
        for name, requests in {
            "pooled, all layers": [Request(every, pooled)],
            "Gram matrices of 64, all layers": [Request(every, GramVector(8 if args.tiny else 64))],
        }.items():
            took = times(lambda r=requests: list(forward_pass(Subject.of(method), [images], r)), args.device, 5)
            yield {"what": name, **took, "over the forward": took["ms"] / floor["ms"]}


class EpochClock(L.Callback):
    """Seconds of each epoch, from the start of one to the start of the next: what is measured and saved counts."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.path = Path(os.environ["EPOCH_CLOCK"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(f"{trainer.current_epoch} {time.perf_counter()}\n")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)


def random_images(folder: Path, images: int) -> Path:
    """An image folder of the size of CIFAR-10, of random smooth images."""
    rng = np.random.default_rng(0)
    for split, share in (("train", 5), ("test", 1)):
        for number in range(images * share // 5):
            path = folder / split / str(number % 10) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize((32, 32)).save(path)
    return folder


def epochs(args: argparse.Namespace) -> Iterator[Row]:
    """Whole epochs of configs/simclr_resnet50_cifar10.yaml through `fit`.

    As configured, monitors measure at the initialisation and after the last epoch, CKA and probes after the tenth too.
    What a schedule costs follows from the last row: a monitor that is due every n epochs adds 1/n of what it adds to an
    epoch in which all measure.
    """
    config = ROOT / "configs/simclr_resnet50_cifar10.yaml"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = args.images or random_images(folder / "images", 200 if args.tiny else 50_000)
        groups = ("cka", "invariance", "probes", "neighbors", "spectrum")
        twelve, two = (1, 1) if args.tiny else (12, 2)
        for name, n, options in (
            ("as configured", twelve, []),
            ("not compiled", twelve, ["--model.compile=false"]),
            ("no monitors", twelve, [f"--{group}.every_n_epochs=0" for group in groups]),
            ("all monitors in each epoch", two, [f"--{group}.every_n_epochs=1" for group in groups]),
        ):
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            os.environ["EPOCH_CLOCK"] = str(folder / f"{name}.txt")
            given = {
                "data.dataset": images,
                "runs": folder,
                "run_id": name.replace(" ", "_"),
                "trainer.accelerator": args.device,
                "trainer.devices": 1,
                "trainer.max_epochs": n,
                "trainer.callbacks": json.dumps([{"class_path": "gpu.EpochClock"}]),
            }
            if args.tiny:
                given |= {
                    "model.backbone": "resnet10", "model.width": 1 / 16, "model.image_size": 16, "data.image_size": 16,
                    "data.batch_size": 64, "data.measure_size": 40, "trainer.precision": "32-true", "neighbors.k": 5,
                    "cka.layers": "stages", "invariance.layers": "pooled", "neighbors.copies": 3, "spectrum.copies": 2,
                    "neighbors.layers": "pooled", "probes.layers": "stages",
                }  # fmt: skip
            began = time.perf_counter()
            fit("--config", str(config), *(f"--{key}={value}" for key, value in given.items()), *options)
            starts = [float(line.split()[1]) for line in Path(os.environ["EPOCH_CLOCK"]).read_text().splitlines()]
            seconds = np.diff(starts)
            yield {
                "run": name,
                "epochs": n,
                "seconds per epoch (median)": float(np.median(seconds)),
                "seconds per epoch (mean)": float(seconds.mean()),
                "first epoch": float(seconds[0]),
                "slowest epoch": float(seconds.max()),
                "GiB": gib(args.device),
                "whole run, s": time.perf_counter() - began,
            }


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        tests,
        records,
        offline,
        interruption,
        processes,
        step,
        imagenet,
        views,
        linalg,
        search,
        measure,
        epochs,
    )
}


# -- one process a part ------------------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def table(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run_inside(args: argparse.Namespace) -> None:
    """The child process: print each row as JSON as soon as it is known."""
    (part,) = args.parts
    with contextlib.redirect_stdout(sys.stderr):  # what fit prints is no row
        for row in PARTS[part](args):
            print("ROW " + json.dumps(row), file=sys.__stdout__, flush=True)


def machine(args: argparse.Namespace) -> str:
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{datetime.date.today()}, {name}, torch {torch.__version__}" + " (a rehearsal)" * args.tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="as small as it runs, to rehearse")
    parser.add_argument(
        "--images", type=Path, help="folder with train/ and test/ for whole epochs; default: random images"
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("gpu.md"), help="Markdown file of the results")
    parser.add_argument("--limit", type=float, default=PART_SECONDS, help="seconds that a part may take")
    parser.add_argument("--total", type=float, default=TOTAL_SECONDS, help="seconds that all parts may take together")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.compile = args.device == "cuda"
    warnings.filterwarnings("ignore")
    if args.inside:
        run_inside(args)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; --device cpu --tiny rehearses")
    args.out.write_text(f"# On a GPU\n\n{machine(args)}\n\n    python benchmarks/gpu.py {' '.join(sys.argv[1:])}\n")
    failed, began = False, time.perf_counter()
    for part in args.parts:
        limit = min(args.limit, args.total - (time.perf_counter() - began))
        options = [
            f"--device={args.device}",
            *["--tiny"] * args.tiny,
            *([f"--images={args.images}"] if args.images else []),
        ]
        command = [sys.executable, __file__, "--inside", "--parts", part, *options]
        started = time.perf_counter()
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
            try:
                output, _ = process.communicate(timeout=max(limit, 0))
                how = "" if process.returncode == 0 else f"**failed, exit code {process.returncode}**"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, how = process.communicate()[0], f"**stopped after {max(limit, 0):.0f} s**"
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] if how else []
        failed |= bool(how)
        rows = [json.loads(line.removeprefix("ROW ")) for line in output.splitlines() if line.startswith("ROW ")]
        text = (PARTS[part].__doc__ or "").strip().replace("\n    ", "\n")
        took = f"{time.perf_counter() - started:.0f} s"
        section = "\n\n".join(filter(None, [f"## {part}", text, table(rows) if rows else "", how, *last, f"({took})"]))
        print(section, end="\n\n", flush=True)
        with args.out.open("a") as file:
            file.write(f"\n{section}\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
