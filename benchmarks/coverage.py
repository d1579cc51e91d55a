"""Bias of CKA and coverage of its error bars by simulation: how often a 95 % bar covers the truth.

    python benchmarks/coverage.py                    # the whole table; --repetitions 100 for a quick look
    python benchmarks/coverage.py --images 256 --classes 10 --order rounds --bars normal   # as it was before

Images are chosen as ``DataModule`` chooses them: the beginning of a stratified order of 10,000 labels, then a random
order. Both are others in each repetition (a run has fixed ones): which classes are chosen, and which of them have an
image more than others, is part of the chance that a bar is about. Features are class means plus Gaussian noise, whose
CKA is known in closed form. Two layers are compared, and one layer with the classes.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ssl_geometry.data.images import shuffled, stratified
from ssl_geometry.geometry.gram import MIN_GRAM_SIZE, class_vector, class_weights, gram_vector
from ssl_geometry.geometry.jackknife import interval, jackknife, standing
from ssl_geometry.metrics.cka import LONELY

TEST_IMAGES = 10_000
WIDTH = 16
BLOCKS = 16
CHUNK = 50
"""Repetitions that are in memory at the same time."""

Order = Literal["random", "rounds"]


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
        self.labels = torch.repeat_interleave(torch.arange(self.classes), counts)
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

    def draw(self, images: int, seeds: range, order: Order) -> tuple[Tensor, Tensor, Tensor]:
        """Features of two layers (R, N, D) and labels (R, N), in the order in which they are measured."""
        rows = [stratified(self.labels, seed)[:images] for seed in seeds]
        if order == "random":
            rows = [row[shuffled(images, seed, 1)] for row, seed in zip(rows, seeds, strict=True)]
        labels = self.labels[torch.stack(rows)]
        shape = len(seeds), images, WIDTH
        x = self.means[labels] + self.spread * self._normal(*shape)
        if self.tails is not None:
            chi2 = 2 * torch._standard_gamma(torch.full((*shape[:2], 1), self.tails / 2).double(), self.generator)
            x = x * (self.tails / chi2).sqrt()
        y = x @ self.mixing + self.noise * self._normal(*shape)
        return x.float(), y.float(), labels


def measure(
    population: Population,
    images: int,
    seeds: range,
    gram_size: int = 64,
    order: Order = "random",
    bars: Literal["t", "normal"] = "t",
) -> tuple[Tensor, Tensor]:
    """CKA of the two layers and of the first with the classes: value, low and high of each repetition, (R, 3).

    What the metrics do for one set of images, for many at once.
    """
    x, y, labels = population.draw(images, seeds, order)
    sizes = torch.stack([row.bincount(minlength=population.classes) for row in labels])

    def vectors(make: Callable[[Tensor], Tensor], parts: Tensor) -> Tensor:
        if images % gram_size:
            return torch.stack([make(part) for part in parts])
        return make(parts.flatten(0, 1)).view(len(parts), -1)

    v, w = (vectors(lambda part: gram_vector(part, gram_size), layer) for layer in (x, y))
    hot = torch.stack([class_vector(part, population.classes, gram_size) for part in labels])
    weights = torch.ones_like(hot)
    if order == "random":
        weights = torch.stack([class_weights(*both, gram_size) for both in zip(labels, sizes, strict=True)])
    layers = _bars(v, w, images, gram_size, bars)
    classes = _bars(v * weights, hot * weights, images, gram_size, bars)
    if order == "random":  # too many classes of a single image, says the metric
        classes[(sizes == 1).sum(1) > LONELY * sizes.square().sum(1)] = torch.nan
    return layers, classes


def _bars(v: Tensor, w: Tensor, images: int, gram_size: int, kind: str) -> Tensor:
    counts = [min(gram_size, images - start) for start in range(0, images, gram_size)]
    counts = [n for n in counts if n >= MIN_GRAM_SIZE]
    block = torch.arange(len(counts)) % BLOCKS

    def sums(a: Tensor, b: Tensor) -> Tensor:
        products = (a.double() * b.double()).split([n * (n - 1) // 2 for n in counts], 1)
        groups = torch.stack([part.sum(1) for part in products])
        return groups.new_zeros(BLOCKS, len(a)).index_add_(0, block, groups).unsqueeze(2)

    counted = torch.tensor([float(n * (n - 3)) for n in counts], dtype=torch.float64)
    weights = counted.new_zeros(BLOCKS).index_add_(0, block, counted)
    value, error = jackknife(sums(v, w).unsqueeze(3), sums(v, v), sums(w, w), weights)
    if kind == "normal":
        low, high = value - 1.96 * error, value + 1.96 * error
    else:
        low, high = interval(value, error, int(standing(weights).sum()))
    return torch.stack([value, low, high], -1).view(-1, 3)


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


def coverage(bars: Tensor, truth: float) -> Coverage:
    """Of the repetitions of one measurement, value, low and high of each."""
    found = bars[bars.isfinite().all(1)]
    undefined = 1 - len(found) / len(bars)
    if len(found) < 2:
        return Coverage(truth, *[math.nan] * 4, undefined=undefined)
    value, low, high = found.T
    covered = ((low <= truth) & (truth <= high)).double().mean()
    spread = value.std()
    width = (high - low).mean() / spread
    return Coverage(truth, float(value.mean()), float(spread), float(covered), float(width), undefined)


def simulate(population: Population, images: int, repetitions: int, **options: Any) -> tuple[Coverage, Coverage]:
    """Of two layers, and of a layer with the classes."""
    seeds = [range(first, min(first + CHUNK, repetitions)) for first in range(0, repetitions, CHUNK)]
    parts = zip(*(measure(population, images, some, **options) for some in seeds), strict=True)
    layers, classes = (torch.cat(part) for part in parts)
    truth = population.truth()
    return coverage(layers, truth[0]), coverage(classes, truth[1])


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
