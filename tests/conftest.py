"""Tests marked ``gpu`` run on a CUDA device; where there is none, on a pretended one that must find no fault.

Files that take minutes come first: dealt out to several workers, short ones fill up what is left at the end.
"""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from multiprocessing.util import get_temp_dir
from tempfile import TemporaryDirectory, gettempdir

import pytest
from hypothesis import settings

settings.register_profile("beside other work", deadline=None)
settings.load_profile("beside other work")

gc.disable()  # while everything is imported, of which nothing is garbage

collect_ignore = ["faulty_methods/unimportable.py"]  # fails on import, as a user's file may

LONG_FIRST = ("tests/slurm", "tests/integration/test_interruption", "tests/integration", "tests/distributed", "tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, start in enumerate(LONG_FIRST) if item.nodeid.startswith(start)), len(LONG_FIRST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Garbage is looked for among what the tests make: among all that is imported, it takes a quarter of their time."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """What is left at the end is put away in the usual order."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _temporary_files_go(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What killed processes leave beside the tests' own folders, such as W&B's copies of images."""
    tmp_path_factory.getbasetemp()  # stays for who looks for the reason of a failure
    get_temp_dir()  # of multiprocessing, which removes it at exit
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{gettempdir()}/inductor"))
        with TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as folder:
            patch.setenv("TMPDIR", folder)
            patch.setattr("tempfile.tempdir", folder)
            yield


@pytest.fixture(scope="session", autouse=True)
def _server_of_processes(_temporary_files_go: None) -> None:
    """Forked before the first test runs, where tests were collected that may start processes."""
    if "tests.processes" in sys.modules:
        sys.modules["tests.processes"].serve()


@pytest.fixture(autouse=True)
def _no_log_of_a_command() -> None:
    """A command that an earlier test ran in this process has its messages printed; a later test sees its own alone."""
    logger = logging.getLogger("ssl_geometry")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    from tests.fake_cuda import on_a_gpu  # torch takes seconds, and not every test needs it

    with on_a_gpu():
        yield
