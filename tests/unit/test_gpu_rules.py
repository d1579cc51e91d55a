"""Rules of a GPU that no command runs into, or that are counted piece by piece."""

import pytest
import torch
from torch import Tensor

from ssl_geometry.geometry.cka import cka
from ssl_geometry.geometry.classification import L2, accuracies, one_hot
from ssl_geometry.geometry.ridge import ridge_probe, sufficient_statistics
from ssl_geometry.metrics import RidgeProbe
from tests.fake_cuda import FakeCuda

LAYERS = 6


def features(images: int, device: str) -> dict[str, Tensor]:
    return {f"layer{number}": torch.randn(images, 4, device=device) for number in range(LAYERS)}


@pytest.mark.gpu
def test_measures_run_where_torch_is_to_be_deterministic() -> None:
    x, labels = torch.randn(64, 3).cuda(), torch.randint(2, (64, 3)).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        similarity = cka(x, x + 1, kernel="rbf")
        precision = accuracies(x, labels)["mAP"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert float(similarity) == pytest.approx(1)
    assert 0 < float(precision) < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits are counted on a pretended GPU")
def test_a_batch_of_the_ridge_probe_waits_twice_whatever_the_number_of_layers() -> None:
    with FakeCuda() as gpu:
        probe = RidgeProbe(dict.fromkeys(features(0, "cpu"), 4), num_classes=3).to("cuda")
        index = torch.arange(64, device="cuda")
        with gpu.scope("bank"):
            probe.update_bank(features(64, "cuda"), index % 3, index)
        with gpu.scope("queries"):
            probe.update(features(64, "cuda"), index % 3)
    assert [wait.what for wait in gpu.waits if wait.scope] == ["nonzero", "nonzero"], gpu.report()
    assert not gpu.faults


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits are counted on a pretended GPU")
def test_no_strength_of_ridge_costs_a_wait() -> None:
    waits = []
    for l2 in (L2[:1], L2):
        with FakeCuda() as gpu:
            x, labels = torch.randn(90, 4, device="cuda"), torch.arange(90, device="cuda") % 3
            sums = [sufficient_statistics(x[part], one_hot(labels[part], 3)) for part in (slice(80), slice(80, None))]
            before = len(gpu.waits)
            ridge_probe(*sums, x[80:], labels[80:], l2)
        waits.append(len(gpu.waits) - before)
    assert waits[0] == waits[1] > 0, gpu.report()
