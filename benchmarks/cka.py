"""What the map of CKA between all layers of two networks costs: ours and the packages on PyPI, on the same images.

    pip install torch-cka pytorch-cka cka-pytorch ckatorch     # the peers; one that is absent is skipped with a line
    python benchmarks/cka.py                                   # ResNet-18, CIFAR stem, 17 x 17 layers, N = 2,048
    python benchmarks/cka.py --backbone resnet50 --images 512 --only ours

Two networks with random weights see N random 32 x 32 images. The layers are the stem and, of each block, the last
convolution and the output: nothing overwrites them afterwards, so every package sees the same tensors. Each contender
runs in a process of its own, so that its peak memory is its own; in it, bare forward passes of both networks (the
floor) and measured passes alternate. Printed are medians over the rounds; where others use the machine, the ratio of
the seconds of CPU, with --threads 1, is the one to trust.

Errors are largest absolute differences over the map: "own" to the float64 value of the contender's own estimator (the
ratio of sums of unbiased HSIC over Gram matrices of its size), "full" (largest, mean) to the float64 unbiased CKA of
one Gram matrix over all N images. "Gram MACs" is the work that no implementation of this estimator can leave out,
half of a Gram matrix being the mirror of the other: images in a Gram matrix x widths of the layers / 2, over the
multiplications of the forward passes.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from ssl_geometry.geometry.gram import gram_vector
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.models import build_backbone
from ssl_geometry.models.layers import layer_names
from ssl_geometry.models.taps import Taps

PEERS = ("torch-cka", "pytorch-cka", "cka-pytorch", "ckatorch")
OURS = {"ours, Gram 64": 64, "ours, Gram 256": 256}


def setting(args: argparse.Namespace) -> tuple[list[nn.Module], list[str], DataLoader]:
    """The two networks, the layers and the images."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    nets = [build_backbone(args.backbone, stem="cifar").eval() for _ in range(2)]
    images = torch.rand(args.images, 3, 32, 32)
    if args.channels_last:
        nets = [net.to(memory_format=torch.channels_last) for net in nets]
    blocks = layer_names(nets[0], "post_residual")
    conv = "conv3" if hasattr(nets[0].get_submodule(blocks[0]), "conv3") else "conv2"
    layers = ["maxpool", *(name for block in blocks for name in (f"{block}.{conv}", block))]
    labels = torch.zeros(args.images)
    # ckatorch passes every part of a batch to the network.
    parts = (images,) if args.one == "ckatorch" else (images, labels)
    return nets, layers, DataLoader(TensorDataset(*parts), batch_size=args.batch_size)


def cka_map(name: str, nets: list[nn.Module], layers: list[str], loader: DataLoader) -> Tensor:
    a, b = nets
    if name in OURS:
        taps = [Taps(net, layers, lambda _, x: gram_vector(x, OURS[name])) for net in nets]
        metric = LayerwiseCKA(taps[0].names, taps[1].names, OURS[name])
        with taps[0], taps[1], torch.no_grad():
            for images, _ in loader:
                metric.update(taps[0](images), taps[1](images))
        return metric.compute()
    if name == "torch-cka":
        from torch_cka import CKA

        cka = CKA(a, b, model1_layers=layers, model2_layers=layers)
        cka.compare(loader)
        return cka.export()["CKA"]
    if name == "pytorch-cka":
        from cka import compute_cka

        return compute_cka(a, b, loader, layers=layers, device="cpu", progress=False)[0]
    if name == "cka-pytorch":
        from cka_pytorch import CKACalculator

        calculator = CKACalculator(a, b, model1_layers=layers, verbose=False)
        matrix = calculator.calculate_cka_matrix(loader, num_epochs=1)
        calculator.reset()  # takes its hooks away
        return matrix
    from ckatorch import CKA as TokenCKA

    return TokenCKA(a, b, layers=layers)(loader, epochs=1)


def measure(args: argparse.Namespace) -> dict:
    """One contender: times and peak memory of the floor and of the map, and the map."""
    nets, layers, loader = setting(args)

    @torch.no_grad()
    def floor() -> None:
        for images, *_ in loader:
            for net in nets:
                net(images)

    wall: dict[str, list[float]] = {"floor": [], "map": []}
    cpu: dict[str, list[float]] = {"floor": [], "map": []}
    peaks = {}
    matrix = torch.empty(0)
    with torch.no_grad():
        nets[0](next(iter(loader))[0])  # the first pass of a process is slow
    for _ in range(args.rounds):
        for kind in wall:
            started = time.perf_counter(), time.process_time()
            if kind == "floor":
                floor()
            else:
                matrix = cka_map(args.one, nets, layers, loader)
            wall[kind].append(time.perf_counter() - started[0])
            cpu[kind].append(time.process_time() - started[1])
            peaks.setdefault(kind, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    ratios = [[b / a for a, b in zip(times["floor"], times["map"], strict=True)] for times in (wall, cpu)]
    return {"wall": wall, "ratios": ratios[0], "cpu_ratios": ratios[1], "peaks": peaks, "map": matrix.tolist()}


def hsic(k: np.ndarray, l: np.ndarray) -> np.ndarray:  # noqa: E741
    """Song et al. 2012, eq. 5, of all pairs of Gram matrices (L, n, n) with zero diagonals."""
    n = k.shape[1]
    traces = k.reshape(len(k), -1) @ l.reshape(len(l), -1).T
    sums = np.outer(k.sum((1, 2)), l.sum((1, 2))) / ((n - 1) * (n - 2))
    return (traces + sums - 2 / (n - 2) * k.sum(1) @ l.sum(1).T) / (n * (n - 3))


def reference(args: argparse.Namespace) -> dict:
    """The float64 values from Gram matrices over all images: whole, and of the diagonal blocks of each size."""
    nets, layers, loader = setting(args)
    grams = []
    forward, widths = 0, 0
    for net in nets:
        with Taps(net, layers) as taps, torch.no_grad():
            outputs = [taps(images) for images, _ in loader]
        stack = torch.empty(len(layers), args.images, args.images, dtype=torch.float64)
        for gram, layer in zip(stack, layers, strict=True):
            x = torch.cat([output.pop(layer).flatten(1) for output in outputs])
            gram.zero_()
            for part in x.split(2048, 1):
                part = part.double() - part.double().mean(0)
                gram.addmm_(part, part.T)
            gram.fill_diagonal_(0)
            widths += x.shape[1]
        grams.append(stack.numpy())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(next(iter(loader))[0][:1])
        forward += counter.get_total_flops() // 2
    maps = {}
    for size in {args.images, *(min(size, args.batch_size) for size in (*OURS.values(), args.batch_size))}:
        sums = np.zeros((3, len(layers), len(layers)))
        for start in range(0, args.images - 3, size):
            k, l = (gram[:, start : start + size, start : start + size] for gram in grams)  # noqa: E741
            sums += k.shape[1] * (k.shape[1] - 3) * np.stack([hsic(k, l), hsic(k, k), hsic(l, l)])
        maps[size] = (sums[0] / np.sqrt(np.outer(sums[1].diagonal(), sums[2].diagonal()))).tolist()
    return {"maps": maps, "layers": len(layers), "macs": {n: n * widths / 2 / forward for n in OURS.values()}}


def subprocess_of(what: str, argv: list[str]) -> dict:
    """Run one contender (or "reference") by itself; {"error": last line} where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            # -P: this file would pass for pytorch-cka, whose module is called `cka`.
            [sys.executable, "-P", __file__, *argv, "--one", what, "--result", str(result)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
        return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18", help="resnet10, resnet18, resnet34, resnet50, ...")
    parser.add_argument("--images", type=int, default=2048, help="number of images N")
    parser.add_argument("--batch-size", type=int, default=256, help="images in a forward pass")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a bare and a measured pass")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--channels-last", action="store_true", help="networks in channels-last memory format")
    parser.add_argument("--only", nargs="+", choices=["ours", *PEERS], default=["ours", *PEERS], help="contenders")
    parser.add_argument("--no-errors", action="store_true", help="leave out the float64 reference")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            result = reference(args) if args.one == "reference" else measure(args)
        Path(args.result).write_text(json.dumps(result))
        return

    print(
        f"{args.backbone}, CIFAR stem{', channels last' if args.channels_last else ''}, N = {args.images:,}, batch "
        f"{args.batch_size}, {args.threads} threads, {args.rounds} rounds, torch {torch.__version__}\n"
    )
    argv = sys.argv[1:]
    truth = None if args.no_errors else subprocess_of("reference", argv)
    if truth and "error" in truth:
        sys.exit(truth["error"])
    print(
        "| contender | floor s | map s | map / floor (range) | of CPU | MB floor | map | error own | full max (mean) |"
    )
    print("|---" * 9 + "|")
    for name in [*(OURS if "ours" in args.only else ()), *(peer for peer in PEERS if peer in args.only)]:
        label = name
        if name in PEERS:
            try:
                label = f"{name} {version(name)}"
            except PackageNotFoundError:
                print(f"| {name} | not installed | | | | | | | |", flush=True)
                continue
        r = subprocess_of(name, argv)
        if "error" in r:
            print(f"| {label} | {r['error']} | | | | | | | |", flush=True)
            continue
        own = full = "-"
        if truth is not None:
            matrix = np.array(r["map"])
            size = str(min(OURS.get(name, args.batch_size), args.batch_size))
            own = f"{np.abs(matrix - np.array(truth['maps'][size])).max():.1e}"
            full_error = np.abs(matrix - np.array(truth["maps"][str(args.images)]))
            full = f"{full_error.max():.4f} ({full_error.mean():.4f})"
        print(
            f"| {label} | {statistics.median(r['wall']['floor']):.1f} | {statistics.median(r['wall']['map']):.1f} | "
            f"{statistics.median(r['ratios']):.2f} ({min(r['ratios']):.2f}-{max(r['ratios']):.2f}) | "
            f"{statistics.median(r['cpu_ratios']):.2f} | "
            f"{r['peaks']['floor']:.0f} | {r['peaks']['map']:.0f} | {own} | {full} |",
            flush=True,
        )
    if truth is not None:
        macs = ", ".join(f"{size}: {share:.1%}" for size, share in truth["macs"].items())
        print(f"\n{truth['layers']} x {truth['layers']} layers. Gram MACs over forward MACs, by Gram size: {macs}")


if __name__ == "__main__":
    main()
