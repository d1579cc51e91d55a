"""``measure`` on 2 and 3 processes, in float64: the rows of one process, for a network of nobody's package."""

import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from ssl_geometry.data.views import View
from ssl_geometry.measure import CKA, Invariance, MeasurementImages, Neighborhoods, Probes, Spectrum, measure
from ssl_geometry.measure.processes import this_process
from tests.distributed.conftest import Ranks


def rows(rank: int, world_size: int, batch_size: int = 10) -> pd.DataFrame:
    """53 images in batches of 10: no multiple of the processes, and the last batch is short."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (113, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(113) % 3
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()).double()
    images = MeasurementImages(pixels[:53], labels[:53], pixels[53:], labels[53:], batch_size=batch_size)
    measurements = [
        CKA(gram_size=5),
        Invariance(gram_size=5, views=["crop"]),
        Probes(layers=["3"], logistic=True),
        Neighborhoods(k=6, settings=["crop"], copies=3),
        Spectrum(copies=2),
    ]
    return measure(network, images, measurements, clean=View("none", size=16)).rows


def test_processes_give_the_rows_of_one(ranks: Ranks) -> None:
    expected = rows(0, 1)
    assert {"cka", "invariance", "class_cka", "logistic_probe", "neighbors", "lidar"} <= set(expected["metric"])
    for found in ranks(rows):
        pd.testing.assert_frame_equal(found, expected, rtol=1e-8, atol=1e-10)


def test_a_process_without_images_joins_in(ranks: Ranks) -> None:
    expected = rows(0, 1, 60)
    for found in ranks(rows, 60):
        pd.testing.assert_frame_equal(found, expected, rtol=1e-8, atol=1e-10)


def said(rank: int, world_size: int) -> tuple[str, list[str]]:
    """What is printed, and warned of: class CKA of few pairs, in few Gram matrices."""
    images = MeasurementImages(torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8), torch.arange(12) % 6)
    network, printed, logged = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), StringIO(), StringIO()
    logger, handler = logging.getLogger("ssl_geometry"), logging.StreamHandler(logged)
    logger.addHandler(handler)
    try:
        with redirect_stdout(printed), redirect_stderr(printed), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            measure(network, images, [Invariance(gram_size=6, views=[])], clean=View("none", size=8))
    finally:
        logger.removeHandler(handler)
    return printed.getvalue(), [*logged.getvalue().splitlines(), *(str(warning.message) for warning in warned)]


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_the_first_process_warns_for_all(ranks: Ranks) -> None:
    (_, warned), other = ranks(said)
    few, pairs = warned
    assert few.startswith("Invariance.gram_size 6: 2 Gram matrices of 12 images")
    assert pairs.endswith("would give more pairs")
    assert other == ("", [])


class Faulty(Spectrum):
    """Fails in the second process, as where its GPU alone is full."""

    def update(self, *batch: Any) -> None:
        if this_process()[0] == 1:
            raise RuntimeError("no memory")
        super().update(*batch)


def failed(rank: int, world_size: int) -> str:
    images = MeasurementImages(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), batch_size=2)
    with pytest.raises(RuntimeError) as error:
        measure(nn.Sequential(nn.Conv2d(3, 4, 3)), images, [Faulty(copies=0)], clean=View("none", size=8))
    return str(error.value)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_process_that_fails_keeps_no_other_waiting(ranks: Ranks) -> None:
    assert ranks(failed) == ["process 1 of 2: no memory", "no memory"]
