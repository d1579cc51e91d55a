"""``probe`` on 2 and 3 processes, in memory and in files: the rows of one; one line for a mistake, one exit code."""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from ssl_geometry import probe as command
from ssl_geometry import probe_features
from ssl_geometry.errors import UserError
from ssl_geometry.measure.processes import alone, this_process
from ssl_geometry.metrics import ProbeBank
from ssl_geometry.records import read_records
from tests.distributed.conftest import Ranks
from tests.processes import undrawn

ARGS = [
    *["--models", "a=random:resnet10@16", "--data.dataset=digits", "--device=cpu", "--probes.layers=stages"],
    *["--data.limit_train=130", "--data.limit_test=50", "--data.measure_size=50", "--data.val_fraction=0"],
    *["--data.eval_batch_size=24", "--data.batch_size=32", "--linear_epochs=2", "--draws=1", "--k=[5]"],
    *["--label_fractions=[0.5]", "--finetune_epochs=1"],
]
"""130 and 50 images in batches of 24: no multiple of the processes, and the last batch is short."""
ALL = "--evaluations=[layers, knn, linear, linear_augmented, labels, finetune]"
FREE = 600_000
"""Bytes in which a layer fits, and all of them do not."""
Ended = tuple[int, str, str]
"""Exit code and what was printed."""


def probed(rank: int, world_size: int, args: list[str], in_files: bool = False, broken: Any = None) -> Ended:
    """The command in this process; ``broken`` is a process, what fails in it, and how."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise broken[2]

    out, err, code = StringIO(), StringIO(), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, undrawn(), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(rank_zero_only, "rank", rank)
        if world_size > 1:
            patch.setenv("NODE_RANK", "0")
            patch.setenv("LOCAL_RANK", str(rank))
        if in_files:
            patch.setattr(probe_features, "free_memory", lambda device: FREE)
            patch.setattr(probe_features, "converged_probes_bytes", lambda *args, **kwargs: 0)
        if broken and broken[0] == rank:
            patch.setattr({"update": probe_features.Features, "step": ProbeBank}[broken[1]], broken[1], fail)
        try:
            command.main([*args, f"--devices={world_size}"])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        except Exception as error:
            code = 1
            print(f"{type(error).__name__}: {error}", file=err)
    torch.set_num_threads(threads)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probed") / "out"
    code, said, err = probed(0, 1, [*ARGS, ALL, f"--out={out}"])
    assert code == 0, err
    assert "in files" not in said
    return out


def assert_same_rows(folder: Path, right: Path) -> None:
    pd.testing.assert_frame_equal(read_records(folder), read_records(right), check_exact=True)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in right.iterdir())


def test_processes_give_the_rows_of_one(ranks: Ranks, by_one: Path, tmp_path: Path) -> None:
    first, *others = ranks(probed, [*ARGS, ALL, f"--out={tmp_path / 'out'}"])
    assert first[0] == 0, first
    assert set(others) == {(0, "", "")}, "the first process alone prints"
    assert_same_rows(tmp_path / "out", by_one)
    metrics = set(read_records(by_one)["metric"])
    assert metrics >= {"logistic_probe", "ridge_probe", "knn5", "linear_eval", "linear_eval_augmented", "finetune_50%"}


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_files_give_the_rows_of_memory(ranks: Ranks, by_one: Path, tmp_path: Path) -> None:
    code, said, err = ranks(probed, [*ARGS, ALL, f"--out={tmp_path / 'out'}"], True)[0]
    assert code == 0, err
    assert f"so in files in {tmp_path / 'out'}, removed at the end" in said
    assert_same_rows(tmp_path / "out", by_one)


@pytest.mark.parametrize(
    ("args", "broken", "codes", "line"),
    [
        (["--probes.layers=layer9"], None, [2, 2], "error: --probes.layers='layer9' matches no layer"),
        (["--models=nowhere/x"], None, [2, 2], "error: --models"),
        ([], (1, "update", UserError("image 7: cut short")), [2, 2], "error: image 7: cut short"),
        ([], (1, "update", torch.OutOfMemoryError("x")), [2, 2], "error: out of memory while measuring a (x)"),
        ([], (0, "step", ValueError("too few")), [2, 2], "error: --models a: too few"),
        ([], (0, "step", TypeError("a fault")), [1, 1], "TypeError: a fault"),
        ([], (0, "update", OSError(28, "No space left on device", "x")), [2, 2], "error: x: No space left on device"),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_mistake_is_one_line_and_no_file_is_left(
    ranks: Ranks, tmp_path: Path, args: list[str], broken: Any, codes: list[int], line: str
) -> None:
    few = [*ARGS, "--evaluations=linear_augmented", f"--out={tmp_path / 'out'}", *args]
    first, second = ranks(probed, few, True, broken)
    (said,) = [text for text in first[2].splitlines() if "rror: " in text]
    assert said.startswith(line)
    assert [first[0], second[0]] == codes
    assert second[1:] == ("", "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_fault_is_shown_by_the_process_that_has_it(ranks: Ranks, tmp_path: Path) -> None:
    args = [*ARGS, "--evaluations=knn", f"--out={tmp_path / 'out'}"]
    first, second = ranks(probed, args, False, (1, "update", TypeError("a fault")))
    assert first[0] == 1
    assert "RuntimeError: process 1 of 2: a fault" in first[2]
    assert second == (1, "", "TypeError: a fault\n")


def test_neither_memory_nor_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_features.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    code, _, err = probed(0, 1, [*ARGS, "--evaluations=knn", f"--out={tmp_path / 'out'}"], in_files=True)
    assert code == 2
    assert "error: --train_images 130: 1,472 features of 180 images of a take" in err
    assert "on the disk of --out" in err


def work_alone(rank: int, world_size: int) -> tuple[Any, Any, int]:
    with alone():
        inside = this_process()
    total = torch.ones(())
    dist.all_reduce(total)
    return inside, this_process(), int(total)


def test_who_works_alone_finds_no_other_process(ranks: Ranks) -> None:
    found = ranks(work_alone)
    assert found == [((0, 1), (rank, len(found)), len(found)) for rank in range(len(found))]
