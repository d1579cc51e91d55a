"""What measuring CKA costs: time over the time of the bare forward passes, and peak memory, against N images.

    python benchmarks/cka.py                       # ResNet-18, CIFAR stem, N = 512, 1,024, 2,048
    python benchmarks/cka.py --backbone resnet50 --images 256 512 --gram-size 64 256

Each (N, Gram size) runs in a process of its own, so that its peak memory is its own; in it, bare and measured passes
alternate, and the
medians are printed. The floor of the extra work is the Gram matrices: gram_size x (sum of the layers' widths)
multiplications an image.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from ssl_geometry.geometry.cka import gram_vector
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.models import build_backbone
from ssl_geometry.models.taps import Taps


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_one(
    backbone: str, images: int, gram_size: int, batch_size: int, rounds: int, threads: int
) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = build_backbone(backbone, stem="cifar").eval()
    batches = torch.rand(images, 3, 32, 32).split(batch_size)

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            net(batch)

    widths: dict[str, int] = {}

    def reduce(name: str, activations: torch.Tensor) -> torch.Tensor:
        widths[name] = activations[0].numel()
        return gram_vector(activations, gram_size)

    @torch.no_grad()
    def measured() -> None:
        with Taps(net, ["stem", "blocks"], reduce) as taps:
            metric = LayerwiseCKA(taps.names)
            for batch in batches:
                metric.update(taps(batch))
            metric.compute()

    bare()
    peak_bare = peak_mb()
    measured()
    peak_measured = peak_mb()
    times: dict[str, list[float]] = {"bare": [], "measured": []}
    for _ in range(rounds):
        for name, run in (("bare", bare), ("measured", measured)):
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    ratios = [m / b for b, m in zip(times["bare"], times["measured"], strict=True)]
    return {
        "layers": len(widths),
        "bare_s": statistics.median(times["bare"]),
        "measured_s": statistics.median(times["measured"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_bare_mb": peak_bare,
        "peak_measured_mb": peak_measured,
        "gram_gmacs": gram_size * sum(widths.values()) * images / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18", help="resnet10, resnet18, resnet34, resnet50, ...")
    parser.add_argument("--images", type=int, nargs="+", default=[512, 1024, 2048], help="numbers of images N")
    parser.add_argument("--gram-size", type=int, nargs="+", default=[64], help="images in a Gram matrix")
    parser.add_argument("--batch-size", type=int, default=256, help="images in a forward pass")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of bare and measured passes")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(
            json.dumps(
                measure_one(
                    args.backbone, args.images[0], args.gram_size[0], args.batch_size, args.rounds, args.threads
                )
            )
        )
        return
    print(f"{args.backbone}, CIFAR stem, batch {args.batch_size}, {args.threads} threads, torch {torch.__version__}\n")
    print("| N | Gram size | layers | bare s | measured s | ratio (range) | peak MB bare | measured | Gram GMACs |")
    print("|---|---|---|---|---|---|---|---|---|")
    for images in args.images:
        for gram_size in args.gram_size:
            command = [sys.executable, __file__, "--one", "--backbone", args.backbone, "--images", str(images)]
            command += ["--gram-size", str(gram_size), "--batch-size", str(args.batch_size)]
            command += ["--rounds", str(args.rounds), "--threads", str(args.threads)]
            r = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"| {images:,} | {gram_size} | {r['layers']} | {r['bare_s']:.2f} | {r['measured_s']:.2f} | "
                f"{r['ratio']:.3f} ({r['ratio_min']:.3f}-{r['ratio_max']:.3f}) | {r['peak_bare_mb']:.0f} | "
                f"{r['peak_measured_mb']:.0f} | {r['gram_gmacs']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
