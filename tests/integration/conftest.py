"""Runs that several files read are trained once, and figures that no test looks at are not drawn."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ssl_geometry.fit import fit
from tests.integration.test_fit import options
from tests.processes import undrawn


@pytest.fixture(autouse=True)
def _undrawn() -> Iterator[None]:
    """Of what a test trains for itself; fixtures that are shared are drawn."""
    with undrawn():
        yield


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of all workers to ask for it fills."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supervised run, undrawn, and SimCLR with it as reference: CKA and invariance."""

    def train(folder: Path) -> None:
        views = "--invariance.views=[own, simclr, color]"
        more = ["--invariance.every_n_epochs=2", views, "--data.eval_batch_size=64"]
        more += ["--cka.gram_size=32", "--invariance.gram_size=32"]  # no default of compare
        with undrawn():
            fit(options(folder, "supervised", *more, method="Supervised"))
        fit(options(folder, "simclr", *more, f"--cka.reference={folder / 'e' / 'supervised'}"))

    return once(tmp_path_factory, "runs", train) / "e"


@pytest.fixture(scope="session")
def manifold_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SimCLR: manifolds, neighbours and spectra of every epoch; and a supervised run: its last, undrawn."""

    def train(folder: Path) -> None:
        more = ["--neighbors.every_n_epochs=1", "--neighbors.copies=4", "--neighbors.k=20"]
        more += ["--spectrum.every_n_epochs=1", "--spectrum.copies=4"]
        more += ["--cka.every_n_epochs=0", "--probes.every_n_epochs=0"]
        fit(options(folder, "simclr", *more))
        with undrawn():
            fit(options(folder, "supervised", *more, "--neighbors.every_n_epochs=2", method="Supervised"))

    return once(tmp_path_factory, "manifold_runs", train) / "e"
