"""Every command on a GPU, or on a pretended one where there is none (``tests/fake_cuda.py``).

Pretended, a test fails at operands on two devices, an operation or a dtype without a CUDA kernel, one that is not
deterministic where that is asked for, and a tensor of the host in a collective of NCCL.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_geometry.compare import compare
from ssl_geometry.fit import fit
from ssl_geometry.geometry import logistic
from ssl_geometry.probe import probe
from ssl_geometry.records import read_records
from ssl_geometry.survey import survey
from tests.fake_cuda import on_a_gpu
from tests.integration.test_fit import SMALL
from tests.processes import undrawn

pytestmark = pytest.mark.filterwarnings("ignore:logistic regression of .* stopped before the optimum")
FEW = [
    *("--data.limit_train=128", "--data.limit_test=64", "--data.measure_size=64", "--data.eval_batch_size=64"),
    *("--trainer.accelerator=cuda", "--trainer.devices=1", "--trainer.precision=bf16-mixed"),
    "--trainer.check_val_every_n_epoch=1",
]
MONITORS = {
    "cka": ["layers=[stages,pooled,head]"],
    "invariance": ["every_n_epochs=1", "layers=[pooled]", "views=[own,crop]"],
    "probes": ["every_n_epochs=1", "layers=[layer4.0,pooled]", "logistic=true"],
    "neighbors": ["every_n_epochs=1", "layers=[pooled]", "copies=3", "k=5", "settings=[policy,crop]"],
    "spectrum": ["every_n_epochs=1", "layers=[pooled]", "copies=3"],
}
ALL = [f"--{name}.{option}" for name, options in MONITORS.items() for option in options]
OFF = [f"--{name}.every_n_epochs=0" for name in MONITORS]
METRICS = {"cka", "invariance", "class_cka", "ridge_probe", "logistic_probe", "nnk_degree", "rankme"}


@pytest.fixture(autouse=True, scope="module")
def _few_steps_of_a_solver() -> Iterator[None]:
    """Each step is made of the same operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logistic, "logistic_regression", partial(logistic.logistic_regression, max_iterations=4))
        yield


@pytest.fixture(autouse=True)
def _deterministic_no_longer() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supervised run without monitors, and one of SimCLR with all of them, which is resumed."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*SMALL, *FEW, f"--runs={folder}", "--experiment=e"]
    simclr = [
        *("--model=ssl_geometry.methods.SimCLR", *common, *ALL, "--run_id=simclr", "--model.optimizer=lars"),
        *(f"--cka.reference={folder}/e/supervised", "--trainer.accumulate_grad_batches=2"),
        "--trainer.deterministic=true",
    ]
    with pytest.MonkeyPatch.context() as patch, undrawn(), on_a_gpu():
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Lightning sets it, and would leave it
        model = "--model=ssl_geometry.methods.Supervised"
        fit([model, *common, *OFF, "--run_id=supervised", "--trainer.max_epochs=1"])
        fit([*simclr, "--trainer.max_epochs=1"])
        fit([*simclr, "--trainer.max_epochs=2", f"--resume={folder}/e/simclr"])
    return folder / "e"


@pytest.mark.gpu
def test_fit_with_every_monitor_resumed(runs: Path) -> None:
    rows = read_records(runs / "simclr")
    for epoch in range(3):
        assert set(rows[rows["epoch"] == epoch]["metric"]) >= METRICS
    assert {"init", "supervised"} <= set(rows["model_other"].dropna())
    assert np.isfinite(rows[rows["metric"] == "cka"]["value"]).all()


@pytest.mark.gpu
def test_compare(runs: Path, tmp_path: Path) -> None:
    models = [f"simclr={runs / 'simclr'}", f"supervised={runs / 'supervised'}"]
    out = [
        f"--out={tmp_path}/out",
        "--cka.layers=[layer4.0,pooled]",
        "--invariance.views=[own,crop]",
        "--show_neighbors=[0]",
        "--k=5",
    ]
    compare(["--models", *models, *out])


@pytest.mark.gpu
def test_probe(runs: Path, tmp_path: Path) -> None:
    evaluations = "--evaluations=[layers,knn,linear,linear_augmented,labels,finetune]"
    few = ["--linear_epochs=5", "--draws=1", "--label_fractions=[0.5]", "--k=[5]", "--finetune_epochs=1"]
    probe(
        [
            "--models",
            f"simclr={runs / 'simclr'}",
            f"--out={tmp_path}/out",
            "--probes.layers=[pooled]",
            evaluations,
            *few,
        ]
    )


@pytest.mark.gpu
def test_survey(runs: Path, tmp_path: Path) -> None:
    few = ["--neighbors.k=5", "--neighbors.copies=3", "--neighbors.settings=[crop]", "--neighbors.layers=[pooled]"]
    few += ["--spectrum.copies=3", f"--out={tmp_path}/out"]
    survey(["--models", f"simclr={runs / 'simclr'}", f"supervised={runs / 'supervised'}", "untrained=random", *few])
