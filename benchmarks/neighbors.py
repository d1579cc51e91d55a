"""k nearest neighbours: our call, bare FAISS and bare torch in turns, and what a measurement costs.

    python benchmarks/neighbors.py                              # N = 10,000; D = 512 and 2,048
    python benchmarks/neighbors.py --sizes 50000 --rounds 1     # minutes a search
    python benchmarks/neighbors.py --device cuda
    python benchmarks/neighbors.py --part monitor               # a measurement while training, in epochs

Points lie near a curved manifold of ten dimensions in twenty clusters. FAISS runs on the kernels that this package
chose for its BLAS. Searches take turns in one process; ratios are those of a round, to the faster of FAISS and torch.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from ssl_geometry.geometry import exact_search as exact
from ssl_geometry.geometry.neighbors import nearest

faiss = exact.faiss


def manifold(n: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centers, inside = torch.randn(20, 10, generator=generator), torch.randn(n, 10, generator=generator)
    latent = 2 * centers[torch.arange(n) % 20] + inside
    features = (latent @ torch.randn(10, width, generator=generator)).relu()
    return features + 0.1 * torch.randn(n, width, generator=generator)


def rounds(
    calls: dict[str, Callable[[], object]], n: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each call; a first round, unless it is the only one, warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(n + (n > 1)):
        for name, call in calls.items():
            started = time.perf_counter(), time.process_time()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number or n == 1:
                times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return times


def bare_faiss(unit: torch.Tensor, k: int) -> None:
    if not unit.is_cuda:
        faiss.knn(unit.numpy(), unit.numpy(), k, metric=faiss.METRIC_L2)
        return
    resources = exact.gpu_resources(unit.device.index or 0)
    faiss.knn_gpu(resources, unit, unit, k, metric=faiss.METRIC_L2, device=unit.device.index or 0)


def bare_torch(unit: torch.Tensor, k: int) -> None:
    torch.cat([(part @ unit.T).topk(k).indices for part in unit.split(1024)])


def search(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} threads"
    print(f"k = {args.k}, cosine, {place}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, FAISS", end=" ")
    print(
        f"{faiss.__version__} with {exact.faiss_blas() or 'another BLAS'}; ours: {exact.backend(device, args.k + 1)}\n"
    )
    print("| N, D | search | seconds | over the faster of both: median (range) | least wall | least CPU seconds |")
    print("|---|---|---|---|---|---|")
    for n in args.sizes:
        for width in args.widths:
            x = manifold(n, width).to(device)
            unit = F.normalize(x)
            calls: dict[str, Callable[[], object]] = {
                "FAISS (L2 of unit vectors)": lambda unit=unit: bare_faiss(unit, args.k + 1),
                "`nearest`": lambda x=x: nearest(x, k=args.k, index="exact"),
                "torch (product and top-k)": lambda unit=unit: bare_torch(unit, args.k + 1),
            }
            if n <= args.sklearn_up_to and device.type == "cpu":
                calls["scikit-learn (brute, euclidean)"] = lambda unit=unit: (
                    NearestNeighbors(n_neighbors=args.k, algorithm="brute").fit(unit.numpy()).kneighbors()
                )
            times = rounds(calls, args.rounds, device)
            bare = [times[name] for name in calls if name.startswith(("FAISS", "torch"))]
            faster = min(bare, key=lambda pairs: statistics.median(wall for wall, _ in pairs))
            for name, seconds in times.items():
                wall, cpu = zip(*seconds, strict=True)
                ratios = [one / other for one, (other, _) in zip(wall, faster, strict=True)]
                over = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                least = f"{min(wall) / min(faster)[0]:.2f} | {min(cpu) / min(cpu for _, cpu in faster):.2f}"
                print(f"| {n:,}, {width:,} | {name} | {statistics.median(wall):.3f} | {over} | {least} |", flush=True)


def monitor(args: argparse.Namespace) -> None:
    """One measurement of the monitor on a fresh network, and one epoch's training steps, on random images."""
    import lightning as L

    from ssl_geometry.callbacks import GeometryMonitor
    from ssl_geometry.data.datamodule import DataModule
    from ssl_geometry.measure import Neighborhoods
    from ssl_geometry.methods import SimCLR

    class Clock(L.Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            self.started = time.perf_counter()

        def on_train_batch_end(self, *_: object) -> None:
            self.training = time.perf_counter() - self.started

    class TinyImages(DataModule):
        def _read(self):
            from ssl_geometry.data.images import Images

            generator = torch.Generator().manual_seed(0)
            parts = []
            for n in (args.epoch, args.images):
                pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
                parts.append(Images(torch.arange(n) % 10, pixels))
            self.num_classes, self.class_names, self.multi_label = 10, [str(i) for i in range(10)], False
            self.num_train, self.image_shape, self._on_device = args.epoch, (3, 32, 32), True
            train, measured = torch.arange(args.epoch), torch.arange(args.images)
            self._rows = {"train": train, "bank": train, "val": train[:0], "measure": measured, "test": measured}
            return parts[0], parts[1]

    torch.manual_seed(0)
    measured, clock = GeometryMonitor([Neighborhoods(every_n_epochs=1)]), Clock()
    data = TinyImages("random", batch_size=256, measure_size=args.images)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[clock, measured],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(SimCLR(backbone="resnet18", width=args.width, optimizer="sgd", channels_last=False), data)
    seconds = measured.seconds / 2
    epoch = clock.training * 50_000 / args.epoch
    layers = ", ".join(dict.fromkeys(row["layer"] for row in measured.curves))
    print(f"ResNet-18 x {args.width}, {args.images} images, 5 settings x 10 views, layers {layers}:")
    print(f"one measurement {seconds:.1f} s, one epoch of SimCLR on 50,000 images {epoch:.1f} s: {seconds / epoch:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="search", choices=["search", "monitor"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sklearn-up-to", type=int, default=0, help="beside, up to so many points")
    parser.add_argument("--images", type=int, default=2000, help="measured by the monitor")
    parser.add_argument("--epoch", type=int, default=2560, help="images trained on for the monitor's share")
    parser.add_argument("--width", type=float, default=0.25, help="of the ResNet-18")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    {"search": search, "monitor": monitor}[args.part](args)


if __name__ == "__main__":
    main()
