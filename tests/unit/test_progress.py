"""One look of progress bars, in one place."""

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ssl_geometry import progress
from ssl_geometry.callbacks import FitProgress
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.methods import SimCLR
from tests.training import quiet_trainer

ROOT = Path(progress.__file__).parent


def test_no_module_makes_a_bar_of_its_own() -> None:
    own = {
        path.relative_to(ROOT).as_posix(): found
        for path in ROOT.rglob("*.py")
        if (
            found := re.findall(
                r"\b(?:Bar|TimeRemaining)Column\(|rich.progress import .*track", path.read_text("utf-8")
            )
        )
    }
    assert list(own) == ["progress.py"]


@pytest.mark.parametrize(
    ("in_bytes", "words"),
    [(False, "reading ━+ +2000/4000 100.0/s 0:00:20"), (True, r"2.0/4.0 kB 100 bytes/s 0:00:20")],
)
def test_a_bar_shows_count_rate_and_time_left(in_bytes: bool, words: str) -> None:
    now = [0.0]
    text = StringIO()
    bar = progress.progress_bar(in_bytes=in_bytes, console=Console(file=text, width=100))
    bar.get_time = lambda: now[0]
    task = bar.add_task("reading", total=4000)
    for _ in range(20):
        now[0] += 1
        bar.advance(task, 100)
    bar.console.print(bar.make_tasks_table(bar.tasks))
    assert re.search(words, text.getvalue())


def test_of_several_processes_the_others_are_silent(capsys: pytest.CaptureFixture) -> None:
    with progress.progress_bar(shown=False) as bar:
        bar.advance(bar.add_task("reading", total=1))
        bar.console.print("a line")
    assert capsys.readouterr() == ("", "")


def test_training_shows_steps_and_how_many_images_a_second_they_are() -> None:
    bar, text = FitProgress(refresh_seconds=0), StringIO()
    bar._console = Console(file=text, force_terminal=True, width=160, color_system=None)
    data = DataModule("digits", image_size=8, limit_train=64, limit_test=8, batch_size=16, val_fraction=0.0)
    method = SimCLR(backbone="resnet10", width=1 / 16, image_size=8, warmup_epochs=0)
    quiet_trainer(callbacks=[bar], enable_progress_bar=True, limit_val_batches=0).fit(method, data)
    assert re.search(r"epoch 1/1 ━+ 4/4 .*[\d.]+/s .*\d:\d\d:\d\d .*images/s", text.getvalue())
