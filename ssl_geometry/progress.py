"""The one look of progress bars: what is done, how many of how many, how fast, and the time left."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text
from typing_extensions import override


class Rate(ProgressColumn):
    """Steps per second, once there are two."""

    @override
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def progress_bar(
    *more: ProgressColumn,
    shown: bool = True,
    in_bytes: bool = False,
    transient: bool = False,
    console: Console | None = None,
) -> Progress:
    """Bars with description, count, rate and time left, on standard error; also in a notebook.

    Args:
        more: columns behind these.
        shown: False for a process that leaves it to the first; its console is silent then.
        in_bytes: a count and a rate of bytes, for a download.
        transient: leave nothing on the screen.
        console: where to show it; None takes standard error.

    Example:
        >>> bar = progress_bar(console=Console(width=60, force_terminal=False))
        >>> task = bar.add_task("reading images", total=3)
        >>> with bar:
        ...     bar.advance(task, 2)
        reading images ━━━━━━━━━━━━━━━━━━━━━            2/3  -:--:--
    """
    count, rate = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(), Rate())
    columns = (TextColumn("{task.description}"), BarColumn(), count, rate, TimeRemainingColumn(), *more)
    console = console or Console(stderr=True, quiet=not shown)
    return Progress(*columns, console=console, transient=transient, disable=not shown)
