"""What 95 % intervals of semantic manifold metrics cover; prints a Markdown table.

    OMP_NUM_THREADS=1 python benchmarks/coverage_manifold.py
    OMP_NUM_THREADS=1 python benchmarks/coverage_manifold.py --images 2048 --classes 10 --samples 100

Images are drawn again and again from one population: classes that are curved manifolds of six dimensions in 24, "plain"
with noise, "relu" with inactive features, "clusters" with 64 clusters a class. Of each sample the metrics are computed
as the monitors compute them (k = 50 candidates of the same class). What is to be covered is the mean over all samples:
of samples of this size, for the metrics themselves depend on it. "independent" is sd / sqrt(N), as if images shared
nothing; "ours" are the errors of `manifold_metrics_and_errors`. Variance is the mean estimate over the truth.
"""

import argparse
from collections.abc import Callable

import torch
from scipy.stats import t as student
from torch import Tensor

from ssl_geometry.geometry.manifold import manifold_metrics_and_errors, same_class_ids
from ssl_geometry.geometry.nnk import nnk

WIDTH, LATENT = 24, 6
METRICS = ("neighbors", "diameter", "affinity", "affinity_random", "angle", "angle_random")


def population(kind: str, classes: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """A function of the number of images and a seed that draws a sample, and its classes."""
    fixed = torch.Generator().manual_seed(1)
    centers = torch.randn(classes, WIDTH, generator=fixed)
    maps = torch.randn(classes, LATENT, WIDTH, generator=fixed) / LATENT**0.5

    def draw(images: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (images,), generator=generator)
        latent = torch.randn(images, LATENT, generator=generator)
        latent = latent + 0.3 * latent.square()
        if kind == "clusters":
            latent = latent + 2 * torch.randn(images, LATENT, generator=generator).sign()
        noise = 0.1 * torch.randn(images, WIDTH, generator=generator)
        x = centers[labels] + (latent.unsqueeze(1) @ maps[labels]).squeeze(1) + noise
        return (x.relu() if kind == "relu" else x), labels

    return draw


def errors(images: int, classes: int, kind: str, samples: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each metric: the means of all samples, our standard errors, and those as if images were independent."""
    draw = population(kind, classes)
    found: dict[str, list[list[float]]] = {name: [] for name in METRICS}
    for sample in range(samples):
        x, labels = draw(images, 100 + sample)
        ids = same_class_ids(x, labels, 50)
        values, ours = manifold_metrics_and_errors(x, ids, nnk(x, ids), labels)
        for name, value in values.items():
            known = value[~value.isnan()]
            independent = float(known.std()) / len(known) ** 0.5
            found[name].append([float(known.mean()), float(ours[name]), independent])
    return {name: tuple(torch.tensor(rows, dtype=torch.float64).unbind(1)) for name, rows in found.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10, 50])
    parser.add_argument("--kinds", nargs="+", default=["plain", "relu", "clusters"])
    parser.add_argument("--samples", type=int, default=150)
    args = parser.parse_args()
    print(f"{args.samples} samples each; coverage of 95 % (variance over the truth)\n")
    print("| images | classes | kind | error | " + " | ".join(METRICS) + " |")
    print("|---" * (4 + len(METRICS)) + "|")
    for images in args.images:
        factor = float(student.ppf(0.975, images - 1))
        for classes in args.classes:
            for kind in args.kinds:
                found = errors(images, classes, kind, args.samples)
                for place, name in ((1, "ours"), (2, "independent")):
                    cells = []
                    for columns in found.values():
                        mean, error = columns[0], columns[place]
                        covered = ((mean - mean.mean()).abs() < factor * error).double().mean()
                        cells.append(f"{covered:.2f} ({error.square().mean() / mean.var():.2f})")
                    print(f"| {images:,} | {classes} | {kind} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
