"""Linear probes: all layers and strengths at once beside a loop over scikit-learn; the online bank beside a bare step.

    python benchmarks/probes.py                    # 17 layers x 10 strengths, 10,000 images x 512 features, 10 classes
    python benchmarks/probes.py --part online      # ResNet-18, 17 layers x 8 classifiers, step by step in turn
    python benchmarks/probes.py --part ridge --widths 512 1024 2048   # Cholesky beside eigenvalues, in turn

Features are like those of a network: class means in a few directions, a spectrum that decays like 1/i, and more class
structure from layer to layer. scikit-learn runs its lbfgs with the loosest of a few tolerances that reaches the optimum
to 1e-6 relative for every strength; `--sklearn-layers` of the layers are timed and scaled to all, unless it is all.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ssl_geometry.geometry.classification import L2, one_hot
from ssl_geometry.geometry.logistic import logistic_regression
from ssl_geometry.geometry.ridge import ridge, sufficient_statistics
from ssl_geometry.measure.engine import layer_widths
from ssl_geometry.measure.requests import pooled
from ssl_geometry.measure.subject import Subject
from ssl_geometry.methods import SimCLR
from ssl_geometry.metrics import ProbeBank
from ssl_geometry.models.layers import layer_names
from ssl_geometry.models.taps import Taps


def layer(number: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    labels = torch.arange(args.images) % args.classes
    means = torch.randn(args.classes, args.features, generator=generator) * torch.arange(1, args.features + 1) ** -0.5
    noise = torch.randn(args.images, args.features, generator=generator) * torch.arange(1, args.features + 1) ** -0.5
    turn = torch.linalg.qr(torch.randn(args.features, args.features, generator=generator))[0]
    return ((number + 1) / args.layers * means[labels] + noise) @ turn, labels


def objective(x: Tensor, labels: Tensor, model: LogisticRegression, l2: float) -> float:
    weight = torch.from_numpy(model.coef_).double()
    z = x.double() @ weight.T + torch.from_numpy(model.intercept_).double()
    loss = (z.logsumexp(1) - z[torch.arange(len(z)), labels]).mean()
    return float(loss + l2 / 2 * weight.square().sum())


def converged(args: argparse.Namespace) -> None:
    strengths = [10.0**power for power in np.linspace(-6, 0, args.strengths)]
    layers = {f"layer{number}": layer(number, args)[0] for number in range(args.layers)}
    labels = layer(0, args)[1]
    standard = {name: (x - x.mean(0)) / x.std(0, correction=0) for name, x in layers.items()}
    some = list(layers)[:: -(-args.layers // args.sklearn_layers)]

    def loop(tolerance: float) -> tuple[float, dict[tuple[str, int], float]]:
        found = {}
        seconds = 0.0
        for name in some:
            x = standard[name].numpy()
            for number, l2 in enumerate(strengths):
                model = LogisticRegression(C=1 / (len(x) * l2), tol=tolerance, max_iter=10_000)
                started = time.perf_counter()
                model.fit(x, labels.numpy())
                seconds += time.perf_counter() - started
                found[name, number] = objective(standard[name], labels, model, l2)
        return seconds * args.layers / len(some), found

    ours, probes = [], None
    for _ in range(args.rounds):
        started = time.perf_counter()
        probes = logistic_regression(layers, labels, args.classes, strengths)
        ours.append(time.perf_counter() - started)
    assert probes is not None
    mine = {(name, number): float(probes[name].objective[number]) for name in some for number in range(len(strengths))}
    started = time.perf_counter()
    for _ in range(5):
        _ = [float(x.sum()) for x in layers.values()]
    reading = (time.perf_counter() - started) / 5
    started = time.perf_counter()
    for x in layers.values():
        ridge(sufficient_statistics(x, one_hot(labels, args.classes)), strengths)
    ridges = time.perf_counter() - started
    ours_seconds = statistics.median(ours)
    print(
        f"{args.layers} layers x {args.strengths} strengths, {args.images:,} x {args.features}, {args.classes} classes"
    )
    print(f"{args.threads} threads, torch {torch.__version__}; scikit-learn on {len(some)} of {args.layers} layers\n")
    print("| what | seconds | over ours | largest gap to the best objective, relative |")
    print("|---|---|---|---|")
    rows = []
    for tolerance in args.tolerances:
        seconds, theirs = loop(tolerance)
        rows.append((f"scikit-learn lbfgs, tol {tolerance:g}", seconds, theirs))
        best = {key: min(mine[key], *(row[2][key] for row in rows)) for key in mine}
        gaps = [theirs[key] / best[key] - 1 for key in mine]
        print(f"| {rows[-1][0]} | {seconds:.1f} | {seconds / ours_seconds:.1f} | {max(gaps):.1e} |", flush=True)
        if max(gaps) < 1e-6:
            break
    gaps = [mine[key] / best[key] - 1 for key in mine]
    spread = f"{min(ours):.1f}-{max(ours):.1f}"
    print(f"| all at once | {ours_seconds:.1f} ({spread}) | 1 | {max(gaps):.1e} |")
    print(f"| ridge, all strengths, from sums (float64) | {ridges:.1f} | {ridges / ours_seconds:.2f} | closed form |")
    print(f"| reading the features once | {reading:.3f} | {reading / ours_seconds:.4f} | |")
    worst = max(float(probe.gradient_norm.max()) for probe in probes.values())
    print(f"\nLargest entry of any gradient: {worst:.1e}; ours over reading once: {ours_seconds / reading:.0f}")


def by_eigenvalues(sums: Tensor, l2: Sequence[float]) -> Tensor:
    """Ridge regression of standardised features at every strength from one decomposition, float64."""
    width = len(sums) - 1
    n = sums[-1, width]
    covariance, cross = sums[:-1, :width] / n, sums[:-1, width + 1 :] / n
    scale = covariance.diagonal().rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * covariance * scale)
    shrinkage = values[:, None] + torch.tensor(l2, dtype=torch.float64)[:, None, None]
    return scale[:, None] * (vectors @ (vectors.T @ (scale[:, None] * cross) / shrinkage))


def regressions(args: argparse.Namespace) -> None:
    print(f"float64, {args.classes} classes, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds\n")
    print("| features | strengths | eigenvalues, s | Cholesky, s | ratio (median, range) | weights differ, relative |")
    print("|---|---|---|---|---|---|")
    for width in args.widths:
        x = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0))
        sums = sufficient_statistics(x, one_hot(torch.arange(len(x)) % args.classes, args.classes))
        for l2 in (L2, L2[:1]):  # a probe solves both: to choose, and again on all images
            times = []
            for _ in range(args.rounds):
                started = time.perf_counter()
                reference = by_eigenvalues(sums, l2)
                middle = time.perf_counter()
                found = ridge(sums, l2).weight
                times.append((middle - started, time.perf_counter() - middle))
            gap = ((found - reference).abs().amax((1, 2)) / reference.abs().amax((1, 2))).max()
            slow, fast = (statistics.median(values) for values in zip(*times, strict=True))
            ratios = [a / b for a, b in times]
            ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})"
            print(f"| {width:,} | {len(l2)} | {slow:.3f} | {fast:.3f} | {ratio} | {float(gap):.0e} |", flush=True)


def online(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    method = SimCLR(
        backbone="resnet18", width=args.width, image_size=32, optimizer="sgd", channels_last=args.channels_last
    )
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)
    names = layer_names(method, ["blocks", "pooled"])
    bank = ProbeBank(layer_widths(Subject.of(method), names, (3, 32, 32)), args.classes)
    batch = {
        "image": torch.randint(256, (args.batch, 3, 32, 32), dtype=torch.uint8),
        "label": torch.randint(args.classes, (args.batch,)),
        "index": torch.arange(args.batch),
    }

    def step() -> None:
        views = [method.view(batch["image"], batch["index"], seed=0, epoch=0, view=number) for number in range(2)]
        loss = method.loss(method(torch.cat(views)).chunk(2), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def probed() -> None:
        with Taps(method, names, lambda _, output: pooled(output)) as taps:
            taps.captured = {}
            step()
            bank.step(taps.captured, batch["label"], batch["index"])

    times: dict[str, list[float]] = {"bare step": [], "with the bank": []}
    for _ in range(args.rounds + 1):
        for name, call in (("bare step", step), ("with the bank", probed)):
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    bare, with_bank = (values[1:] for values in times.values())
    ratios = [a / b for a, b in zip(with_bank, bare, strict=True)]
    print(
        f"SimCLR, ResNet-18 x {args.width}, batch {args.batch}, "
        f"{len(names)} layers x {len(bank.learning_rate)} classifiers"
    )
    print(f"{args.threads} threads, torch {torch.__version__}, {args.rounds} pairs of steps\n")
    print("| step | seconds (median) | over bare (median, range) |")
    print("|---|---|---|")
    print(f"| bare | {statistics.median(bare):.3f} | 1 |")
    over = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
    print(f"| with the bank | {statistics.median(with_bank):.3f} | {over} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="converged", choices=["converged", "online", "ridge"])
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--strengths", type=int, default=10)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=10, help="three at least: of two, scikit-learn has one column")
    parser.add_argument("--sklearn-layers", type=int, default=3)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=float, default=1.0, help="online: of the ResNet-18")
    parser.add_argument("--batch", type=int, default=128, help="online: images in a step, two views each")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048], help="ridge: features")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.classes < 3:
        parser.error(f"--classes {args.classes}: expected three at least")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="sklearn")
    {"converged": converged, "online": online, "ridge": regressions}[args.part](args)


if __name__ == "__main__":
    main()
