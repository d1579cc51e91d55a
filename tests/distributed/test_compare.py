"""``compare`` (and ``survey``) on 2 and 3 processes: the numbers of one, one line for a mistake, and one exit code."""

import errno
import os
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from ssl_geometry import compare
from ssl_geometry.cli import run_command
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError
from ssl_geometry.fit import fit
from ssl_geometry.launching import by_turns, together
from ssl_geometry.measure import Neighborhoods
from ssl_geometry.measure.processes import agreeing
from ssl_geometry.measure.similarity import Kept
from ssl_geometry.measure.storage import BatchStorage
from ssl_geometry.probe import probe
from ssl_geometry.records import read_records
from ssl_geometry.survey import survey
from tests.distributed.conftest import Ranks
from tests.processes import undrawn

OPTIONS = SimpleNamespace(data=SimpleNamespace(eval_batch_size=8), device="cpu", layers_option="--cka.layers")
IMAGES = [
    *["--models", "a=random:resnet10@16", "b=random:resnet10@16:1", "--data.dataset=digits", "--device=cpu"],
    *["--data.limit_test=70", "--data.measure_size=70", "--data.eval_batch_size=24"],
]
"""70 images in batches of 24: no multiple of the processes, and the last batch is short."""
OF_COMPARE = ["--cka.gram_size=8", "--cka.layers=stages", "--invariance.views=[flip]", "--permutations=3"]
ARGS = [*IMAGES, *OF_COMPARE, "--show_neighbors=[69]"]
Ended = tuple[int, str, str]
"""Exit code and what was printed."""


def ended(command: Any, args: list[str]) -> Ended:
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run_command(command, args, interrupted="")
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, out.getvalue(), err.getvalue()


def compared(rank: int, world_size: int, args: list[str], in_files: bool = False) -> Ended:
    with pytest.MonkeyPatch.context() as patch, undrawn():
        patch.setattr(rank_zero_only, "rank", rank)
        if world_size > 1:
            patch.setenv("NODE_RANK", "0")
            patch.setenv("LOCAL_RANK", str(rank))
        if in_files:
            patch.setattr(compare, "free_memory", lambda device: 0)
        return ended(compare.compare, [*args, f"--devices={world_size}"])


def mistaken(rank: int, world_size: int, command: Any, args: list[str], cut_short: bool, unread: bool = False) -> Ended:
    """Of the second process alone where an image is cut short, in the pass or before it."""

    def update(*batch: Any) -> None:
        raise UserError("image 7: cut short")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_zero_only, "rank", rank)
        patch.setenv("NODE_RANK", "0")
        patch.setenv("LOCAL_RANK", str(rank))
        if cut_short and rank == 1:
            for measurement in (Kept, Neighborhoods):
                patch.setattr(measurement, "update", update)
        if unread and rank == 1:
            patch.setattr(DataModule, "setup", update)
        return ended(command, [*args, f"--devices={world_size}"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    code, said, _ = compared(0, 1, [*ARGS, f"--out={out}"])
    assert code == 0
    assert "of Gram vectors of 2 networks; of one after another" in said
    assert "in files" not in said
    return out


def test_processes_give_the_numbers_of_one(ranks: Ranks, alone: Path, tmp_path: Path) -> None:
    out, in_files = tmp_path / "out", len(ranks(turns)) == 3
    first, *others = ranks(compared, [*ARGS, f"--out={out}"], in_files)
    assert first[0] == 0, first
    assert (f"so in files in {out}, removed at the end" in first[1]) == in_files
    assert {(code, out) for code, out, _ in others} == {(0, "")}, "the first process alone prints"
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in alone.iterdir())
    left, right = (read_records(path).drop(columns=["run", "protocol"]) for path in (alone, out))
    shared = left["metric"].isin(["invariance", "class_cka"])
    assert set(left["metric"][~shared]) == {"cka", "mutual_knn", "max_cka", "max_cka_null", "max_cka_p"}
    pd.testing.assert_frame_equal(right[~shared], left[~shared], check_exact=True)
    pd.testing.assert_frame_equal(right[shared], left[shared], rtol=1e-12, atol=1e-12)
    assert set(read_records(out)["protocol"]) == set(read_records(alone)["protocol"])


@pytest.mark.parametrize(
    ("command", "args", "line"),
    [
        (compare.compare, ["--cka.layers=layer9"], "--cka.layers='layer9' matches no layer"),
        (compare.compare, [], "image 7: cut short"),
        (survey, ["--neighbors.layers=layer9"], "--neighbors.layers='layer9' matches no layer"),
        (survey, ["--neighbors.settings=[]", "--spectrum.copies=0"], "image 7: cut short"),
    ],
    ids=["compare: of all", "compare: of one", "survey: of all", "survey: of one"],
)
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_mistake_is_one_line_of_the_first_process(
    ranks: Ranks, tmp_path: Path, command: Any, args: list[str], line: str
) -> None:
    first, *others = ranks(mistaken, command, [*IMAGES, f"--out={tmp_path}", *args], "cut short" in line)
    (said,) = [text for text in first[2].splitlines() if text.startswith("error:")]
    assert line in said
    assert first[0] == 2
    assert {(code, out + err) for code, out, err in others} == {(2, "")}


@pytest.mark.parametrize("command", [compare.compare, survey, probe])
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_what_one_process_cannot_read_ends_all(ranks: Ranks, tmp_path: Path, command: Any) -> None:
    """Before anything is measured, when memory is asked for as well."""
    first, *others = ranks(mistaken, command, [*IMAGES, f"--out={tmp_path}"], False, True)
    assert [line for line in first[2].splitlines() if line.startswith("error:")] == ["error: image 7: cut short"]
    assert {code for code, _, _ in (first, *others)} == {2}
    assert {out + err for _, out, err in others} == {""}


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (compare.compare, IMAGES),
        (survey, IMAGES),
        (probe, IMAGES),
        (fit, ["--model=ssl_geometry.methods.SimCLR", "--trainer.accelerator=cpu", "--trainer.devices=1"]),
    ],
)
def test_before_the_processes_meet_the_first_one_speaks(
    command: Any, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not ended by torchrun before: the others end later."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        found.append((ended(command, args), list(waited)))
    for code, out, err in (found[0][0], found[1][0]):  # what the first one has not found, the other reports
        assert (code, out) == (2, "")
        assert re.fullmatch(r"error: --(trainer\.)?devices .* torchrun has started 2 processes on .* 1 node.*\n", err)
    assert [len(waits) for _, waits in found] == [0, 1]


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (fit, ["--model=no.Class"]),
        (fit, ["--model=ssl_geometry.methods.SimCLR", "--data.batch_size=many"]),
        (fit, ["--model=ssl_geometry.methods.SimCLR", "--data.speed=9"]),
        (probe, [*IMAGES, "--evaluations=layer"]),
    ],
)
def test_mistakes_of_the_command_line_wait_for_the_first_process(
    command: Any, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a parser too."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        code, _, err = ended(command, args)
        assert (code, err.count("error:"), len(waited)) == (2, 1, rank)


# -- the parts ---------------------------------------------------------------------------------------------------------


def stored(rank: int, world_size: int, folder: Path | None) -> list[float] | None:
    storage = BatchStorage([4, 0, 4, 4, 2], torch.float64, folder)
    for number, rows in list(enumerate([2, 0, 2, 2, 1]))[rank::world_size]:
        storage.put(number, torch.full((rows, 2), float(number)))
    whole = storage.on_first()
    few = BatchStorage([3], folder=folder)  # the other processes have none
    if rank == 0:
        few.put(0, torch.arange(3))
    assert (few.on_first() is None) == (rank > 0)
    return None if whole is None else whole.tolist()


@pytest.mark.parametrize("in_files", [False, True])
def test_batches_come_together_in_their_order(ranks: Ranks, tmp_path: Path, in_files: bool) -> None:
    folder = tmp_path if in_files else None
    first, *others = ranks(stored, folder)
    assert first == stored(0, 1, folder) == [0.0] * 4 + [2.0] * 4 + [3.0] * 4 + [4.0] * 2
    assert set(others) == {None}
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=rf"^{tmp_path}: no room for 8 MiB that memory does not hold \(No space left"):
        BatchStorage([2**21], folder=tmp_path)


def fail(rank: int, world_size: int, errors: dict[int, Exception]) -> Ended:
    def command(args: list[str]) -> None:
        with together(OPTIONS):
            with agreeing():  # in one part of another
                if rank in errors:
                    raise errors[rank]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_zero_only, "rank", rank)
        try:
            return ended(command, [])
        except Exception as error:
            return 1, "", f"{type(error).__name__}: {error}"


FULL_MEMORY = (
    "error: out of memory while measuring (CUDA out of memory): lower --data.eval_batch_size 8, or name fewer "
)


@pytest.mark.parametrize(
    ("errors", "code", "first", "second"),
    [
        ({}, 0, "", ""),
        ({0: UserError("a")}, 2, "error: a\n", ""),
        ({1: UserError("a")}, 2, "error: a\n", ""),
        ({0: UserError("a"), 1: UserError("b")}, 2, "error: a\n", ""),
        ({0: OSError(errno.ENOSPC, "full", "x/y")}, 2, "error: x/y: full\n", ""),
        ({1: OSError(errno.ENOSPC, "full", "x/y")}, 2, "error: [Errno 28] full: 'x/y'\n", ""),
        ({0: ValueError("a")}, 1, "ValueError: a", ""),
        ({1: ValueError("a")}, 1, "RuntimeError: process 1 of 2: a", "ValueError: a"),
        ({0: torch.OutOfMemoryError("CUDA out of memory")}, 2, FULL_MEMORY + "--cka.layers\n", ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_what_fails_in_one_process_fails_in_all(
    ranks: Ranks, errors: dict[int, Exception], code: int, first: str, second: str
) -> None:
    assert ranks(fail, errors) == [(code, "", first), (code, "", second)]


def turns(rank: int, world_size: int) -> float:
    local_rank: Any = SimpleNamespace(local_rank=rank)
    return by_turns(np.random.default_rng(rank).random, OPTIONS, local_rank)


def test_each_process_does_what_it_has_to(ranks: Ranks) -> None:
    found = ranks(turns)
    assert found == [np.random.default_rng(rank).random() for rank in range(len(found))]


def test_a_process_that_has_ended_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "[/x/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:8603. This is typical. See logs"
        )

    monkeypatch.setattr("ssl_geometry.measure.processes.this_process", lambda: (0, 2))
    monkeypatch.setattr("ssl_geometry.measure.processes.hosts", lambda: None)
    monkeypatch.setattr("torch.distributed.all_gather_object", lost)
    with pytest.raises(UserError, match=r"^another process has ended .*\(.*peer \[127.0.0.1\]:8603\); its own output"):
        with together(OPTIONS):
            pass
