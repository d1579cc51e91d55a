"""Bias of CKA and coverage of its error bars by simulation: how often a 95 % bar covers the truth.

    python benchmarks/coverage.py                    # the whole table; --repetitions 100 for a quick look
    python benchmarks/coverage.py --images 256 --classes 10 --order rounds --bars normal   # as it was before

Images are chosen as ``DataModule`` chooses them: the beginning of a stratified order of 10,000 labels, then a random
order (another one each time; a run has a fixed one). Features are class means plus Gaussian noise, whose
CKA is known in closed form. Two layers are compared, and one layer with the classes.
"""

import argparse
import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ssl_geometry.data.datasets import FIXED, shuffled, stratified
from ssl_geometry.geometry.cka import gram_vector
from ssl_geometry.metrics import ClassCKA, LayerwiseCKA

TEST_IMAGES = 10_000
WIDTH = 16


class Bar(NamedTuple):
    """What one measurement gives."""

    value: float
    low: float
    high: float


@dataclass
class Population:
    """Images of C classes in two layers, x and y = x mixing + noise.

    Args:
        classes: how many.
        separation: of the class means, in standard deviations of an image's leading feature.
        noise: of the second layer.
        unequal: class c is 1/c as frequent as the first; else all are equally frequent.
        tails: of Student's t, as degrees of freedom, that scales each image in both layers; None is Gaussian.
    """

    classes: int
    separation: float = 1.0
    noise: float = 1.0
    unequal: bool = False
    tails: float | None = None

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.classes)
        shares = 1 / torch.arange(1, self.classes + 1).double() if self.unequal else torch.ones(self.classes).double()
        counts = (shares / shares.sum() * TEST_IMAGES).round().long().clamp_min(1)
        labels = torch.repeat_interleave(torch.arange(self.classes), counts)
        self.labels = labels[stratified(labels, FIXED)]
        self.shares = counts.double() / counts.sum()
        self.spread = torch.arange(1, WIDTH + 1).double() ** -0.5
        self.means = self.separation * self._normal(self.classes, WIDTH) * self.spread
        self.mixing = self._normal(WIDTH, WIDTH) / WIDTH**0.5

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def truth(self) -> tuple[float, float]:
        """CKA of the two layers, and of the first with the classes, of all images that could be drawn."""
        centred = self.means - self.shares @ self.means
        own = (centred.T * self.shares) @ centred + self.spread.square().diag()
        if self.tails is not None:
            assert self.separation == 0, "scaled classes are no longer those of the closed form"
            own = own * self.tails / (self.tails - 2)
        cross = own @ self.mixing
        other = self.mixing.T @ cross + self.noise**2 * torch.eye(WIDTH).double()
        hot = self.shares.diag() - self.shares.outer(self.shares)
        classes = self.shares.unsqueeze(1) * centred
        layers = cross.square().sum() / (own.norm() * other.norm())
        return float(layers), float(classes.square().sum() / (own.norm() * hot.norm()))

    def draw(self, images: int, seed: int, order: Literal["random", "rounds"]) -> tuple[Tensor, Tensor, Tensor]:
        """Features of two layers and labels, in the order in which they are measured."""
        labels = self.labels[:images]
        if order == "random":
            labels = labels[shuffled(images, seed, 1)]
        x = self.means[labels] + self.spread * self._normal(images, WIDTH)
        if self.tails is not None:
            chi2 = 2 * torch._standard_gamma(torch.full((images, 1), self.tails / 2).double(), generator=self.generator)
            x = x * (self.tails / chi2).sqrt()
        y = x @ self.mixing + self.noise * self._normal(images, WIDTH)
        return x.float(), y.float(), labels


def measure(
    population: Population,
    images: int,
    seed: int,
    gram_size: int = 64,
    order: Literal["random", "rounds"] = "random",
    bars: Literal["t", "normal"] = "t",
) -> tuple[Bar, Bar]:
    """CKA of the two layers, and of the first with the classes, with their error bars."""
    x, y, labels = population.draw(images, seed, order)
    vectors = {"x": gram_vector(x, gram_size), "y": gram_vector(y, gram_size)}
    layers = LayerwiseCKA(["x"], ["y"], gram_size)
    layers.update(vectors, vectors)
    sizes = labels.bincount(minlength=population.classes)
    classes = ClassCKA(["x"], population.classes, gram_size, sizes=sizes if order == "random" else None)
    classes.update(vectors, labels)
    found = []
    for metric in (layers, classes):
        value = float(metric.compute())
        if bars == "normal":
            reach = 1.96 * float(metric.standard_error())
            found.append(Bar(value, value - reach, value + reach))
        else:
            low, high = metric.interval()
            found.append(Bar(value, float(low), float(high)))
    return found[0], found[1]


class Coverage(NamedTuple):
    """What many repetitions give."""

    truth: float
    mean: float
    spread: float
    """Standard deviation over repetitions: what the standard error estimates."""
    covered: float
    width: float
    """Mean width of the bars in these standard deviations: 3.92 for a normal estimate of known spread."""
    undefined: float
    """Share of repetitions without a number or a bar."""

    @property
    def bias(self) -> float:
        """In standard errors."""
        return (self.mean - self.truth) / self.spread


def coverage(bars: list[Bar], truth: float) -> Coverage:
    """Of the repetitions of one measurement."""
    found = [bar for bar in bars if math.isfinite(bar.low)]
    if len(found) < 2:
        return Coverage(truth, *[math.nan] * 4, undefined=1 - len(found) / len(bars))
    value, low, high = torch.tensor(found, dtype=torch.float64).T
    covered = ((low <= truth) & (truth <= high)).double().mean()
    spread = value.std()
    width = (high - low).mean() / spread
    undefined = 1 - len(found) / len(bars)
    return Coverage(truth, float(value.mean()), float(spread), float(covered), float(width), undefined)


def simulate(population: Population, images: int, repetitions: int, **options: object) -> tuple[Coverage, Coverage]:
    """Of two layers, and of a layer with the classes."""
    bars = [measure(population, images, seed, **options) for seed in range(repetitions)]  # type: ignore[arg-type]
    layers, classes = zip(*bars, strict=True)
    truth = population.truth()
    return coverage(list(layers), truth[0]), coverage(list(classes), truth[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--images", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10, 100, 1000])
    parser.add_argument("--separation", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--unequal", action="store_true")
    parser.add_argument("--tails", type=float)
    parser.add_argument("--gram_size", type=int, default=64)
    parser.add_argument("--order", choices=("random", "rounds"), default="random")
    parser.add_argument("--bars", choices=("t", "normal"), default="t")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # few pairs of one class, no number at all: the table shows it
    print("| classes | images | of | truth | mean | bias in standard errors | covered | width of the bars | NaN |")
    print("|---|---|---|---|---|---|---|---|---|")
    for classes in args.classes:
        for images in args.images:
            population = Population(classes, args.separation, args.noise, args.unequal, args.tails)
            options = {name: getattr(args, name) for name in ("gram_size", "order", "bars")}
            both = simulate(population, images, args.repetitions, **options)
            for name, found in zip(("layers", "classes"), both, strict=True):
                numbers = f"{found.truth:.4f} | {found.mean:.4f} | {found.bias:+.2f} | {found.covered:.3f}"
                width = f"{found.width * found.spread:.4f} | {found.undefined:.2f}"
                print(f"| {classes:,} | {images:,} | {name} | {numbers} | {width} |", flush=True)


if __name__ == "__main__":
    main()
