"""Processes compile all or not at all: batch norm's collectives are others where it is compiled."""

import pytest
import torch

from ssl_geometry.errors import UserError
from ssl_geometry.methods.parts import compilation
from tests.distributed.conftest import Ranks


def decided(rank: int, world_size: int, failures: list[str]) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(compilation, "try_out", lambda device: failures[rank])
        try:
            return str(compilation.is_compiled(True, torch.device("cpu")))
        except UserError as error:
            return str(error)


def test_one_process_that_cannot_compile_keeps_all_from_it(ranks: Ranks) -> None:
    first, second, *_ = ranks(decided, ["", "no compiler", ""])
    assert "--model.compile true: this machine cannot compile (another process cannot)" in first
    assert "--model.compile true: this machine cannot compile (no compiler)" in second
    assert set(ranks(decided, ["", "", ""])) == {"True"}
