"""A monitor in somebody else's module under DDP: the rows of one process, and no word of the others."""

from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ssl_geometry.callbacks import GeometryMonitor
from ssl_geometry.data.views import View
from ssl_geometry.measure import CKA, Invariance, MeasurementImages, Neighborhoods, Probes, Spectrum
from ssl_geometry.records import read_records
from tests.distributed.conftest import Ranks
from tests.processes import undrawn


class Joined(LightningEnvironment):
    """Processes that have joined already."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.set_global_rank(rank)

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self.global_rank()


class Plain(L.LightningModule):
    """Whose network is neither called backbone nor given to the monitor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(rank: int, world_size: int, root: Path) -> dict[str, Tensor]:
    """Every process trains on the same batches, so that DDP's mean gradient is that of one."""
    L.seed_everything(0)
    pixels = torch.randint(0, 256, (120, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(120) % 3
    images = MeasurementImages(pixels[:53], labels[:53], pixels[53:], labels[53:], batch_size=10)
    measurements = [
        CKA(gram_size=5),
        Invariance(gram_size=5, views=["crop"], every_n_epochs=2),
        Neighborhoods(layers="5", k=6, settings=["crop"], copies=3),
        Probes(layers="5", every_n_epochs=2),
        Spectrum(layers="5", copies=2),
    ]
    strategy: Any = DDPStrategy(cluster_environment=Joined(rank)) if world_size > 1 else "auto"
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", devices=world_size, strategy=strategy, precision="64-true",
        callbacks=[GeometryMonitor(measurements, images, clean=View("none", size=16))], logger=CSVLogger(root),
        default_root_dir=root, use_distributed_sampler=False, accumulate_grad_batches=2, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    module = Plain()
    with undrawn():
        trainer.fit(module, DataLoader(TensorDataset(pixels[:60].double() / 255, labels[:60]), batch_size=20))
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def found(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    logged = pd.read_csv(root / "lightning_logs" / "version_0" / "metrics.csv")
    rows = read_records(root / "geometry" / "version_0")
    key = ["metric", "epoch", "model_other", "layer", "layer_other", "view", "low"]  # of a quantile, which one: low
    return rows.sort_values(key, ignore_index=True), logged


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    root = tmp_path_factory.mktemp("alone")
    return root, train(0, 1, root)


def test_a_monitor_of_a_plain_module_gives_the_rows_of_one_process(
    tmp_path: Path, ranks: Ranks, alone: tuple[Path, dict[str, Tensor]]
) -> None:
    root, weights = alone
    for other in ranks(train, tmp_path / "some"):
        torch.testing.assert_close(other, weights, rtol=1e-9, atol=1e-11)
    (rows, logged), (expected, expected_logged) = found(tmp_path / "some"), found(root)
    assert {"cka", "invariance", "class_cka", "ridge_probe", "neighbors", "rankme"} <= set(expected["metric"])
    assert set(expected["epoch"]) == {0, 1, 2}
    pd.testing.assert_frame_equal(rows, expected, rtol=1e-7, atol=1e-9)
    pd.testing.assert_frame_equal(logged, expected_logged, rtol=1e-7, atol=1e-9)
    assert [path.name for path in (tmp_path / "some" / "geometry").iterdir()] == ["version_0"]
