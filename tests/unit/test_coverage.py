"""CKA's error bars by simulation: bias, and how often 95 % bars cover a truth that is known in closed form.

Seeds are fixed, so a result never changes; bounds leave room for chance all the same (3.3 binomial standard errors, one
in a thousand), so that another seed would pass as well. ``benchmarks/coverage.py`` has the simulation and many more.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.data.images import Images
from ssl_geometry.geometry.gram import gram_vector
from ssl_geometry.metrics import ClassCKA, LayerwiseCKA

CHANCE = 3.3
TARGET = 0.93, 0.97
"""Of the coverage; bias has to stay below a quarter of the standard error."""


@cache
def simulation() -> ModuleType:
    """``benchmarks/coverage.py``, which is a script."""
    path = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("benchmarks_coverage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def misses(found, repetitions: int, at_most: float = TARGET[1]) -> list[str]:
    """What is outside the target by more than chance explains."""
    low, high = (
        share + sign * CHANCE * (share * (1 - share) / repetitions) ** 0.5
        for share, sign in ((TARGET[0], -1), (at_most, 1))
    )
    said = []
    if not abs(found.bias) < 0.25 + CHANCE / repetitions**0.5:
        said.append(f"bias of {found.bias:+.2f} standard errors")
    if not low <= found.covered <= high:
        said.append(f"coverage {found.covered:.3f}, expected {low:.3f} to {high:.3f}")
    if found.undefined:
        said.append(f"no number in {found.undefined:.0%}")
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "images", "repetitions", "options"),
    [
        (2, 256, 400, {}),
        (10, 256, 400, {}),
        (10, 300, 400, {}),  # uneven: the last Gram matrix has 44 images
        (100, 512, 300, {}),
        (100, 512, 300, {"unequal": True}),
        (1000, 2048, 150, {}),
        (10, 256, 400, {"noise": 0.05}),  # near 1
        (10, 256, 400, {"noise": 30, "separation": 0}),  # near 0
    ],
)
def test_error_bars_cover_the_truth_as_often_as_they_say(classes, images, repetitions, options):
    layers, of_classes = simulation().simulate(simulation().Population(classes, **options), images, repetitions)
    assert not misses(layers, repetitions)
    # Images drawn class by class vary less than the jackknife knows where classes make the variation: on the safe side.
    assert not misses(of_classes, repetitions, at_most=1)


def test_which_classes_are_chosen_is_chance_and_no_bias():
    """256 images of 1,000 classes show one in four: each repetition chooses others."""
    layers, of_classes = simulation().simulate(simulation().Population(1000, separation=3), 256, 200)
    assert not misses(layers, 200)
    assert of_classes.undefined == 1, "no two images share a class"


@pytest.mark.parametrize(
    ("options", "classes", "expected"),
    [
        ({"bars": "normal"}, 2, "coverage"),  # 1.96 standard errors of four blocks
        ({"order": "rounds"}, 50, "bias"),  # of the classes, 64 images in a row
        ({"order": "rounds"}, 100, "no number"),
    ],
)
def test_the_order_and_the_bars_of_before_would_be_found(options, classes, expected):
    both = simulation().simulate(simulation().Population(classes), 256, 400, **options)
    said = [line for found in both for line in misses(found, 400, at_most=1)]
    assert any(line.startswith(expected) for line in said), said


@pytest.mark.parametrize("images", [300, 1152])  # a short last Gram matrix; 18 of them in 16 blocks
def test_the_simulation_measures_what_the_metrics_measure(images):
    first, second = (simulation().Population(10, unequal=True) for _ in range(2))
    both = simulation().measure(first, images, range(2))
    x, y, labels = second.draw(images, range(2), "random")
    for row in range(2):
        vectors = {"x": gram_vector(x[row]), "y": gram_vector(y[row])}
        layers = LayerwiseCKA(["x"], ["y"])
        layers.update(vectors, vectors)
        classes = ClassCKA(["x"], 10, sizes=labels[row].bincount(minlength=10))
        classes.update(vectors, labels[row])
        for metric, bars in zip((layers, classes), both, strict=True):
            torch.testing.assert_close(
                torch.cat([part.flatten() for part in (metric.compute(), *metric.interval())]), bars[row]
            )


def test_a_data_module_hands_out_what_is_simulated(monkeypatch):
    population = simulation().Population(100)
    monkeypatch.setattr(
        "ssl_geometry.data.datamodule.load",
        lambda *args, **kwargs: (black(population.labels), black(population.labels), [str(c) for c in range(100)]),
    )
    data = DataModule("digits", measure_size=512)
    data.setup()
    labels = torch.cat([batch["label"] for batch in data.loader("measure")])
    drawn = population.draw(512, range(2101, 2102), order="random")[2][0]
    assert torch.equal(labels, drawn)
    assert torch.equal(data.measure_sizes, drawn.bincount(minlength=100))


def black(labels):
    return Images(labels, torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8))
