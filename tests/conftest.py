"""Tests marked ``gpu`` run on a CUDA device; where there is none, on a pretended one that must find no fault."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    from tests.fake_cuda import on_a_gpu  # torch takes seconds, and not every test needs it

    with on_a_gpu():
        yield
