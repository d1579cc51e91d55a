"""Runs in W&B: what a run is called there, what its axes are, and how its rows get there, live or later.

W&B's step is the number of completed optimiser steps, and all that belongs to it (loss, validation, measurements with
their figures, test) is one row. So the rows of a run have an order that its records know as well, and W&B itself
reports on resume how many of them it has: the rest is sent from the records.
"""

import json
import os
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ssl_geometry.errors import UserError, did_you_mean, first_line
from ssl_geometry.files import write_text
from ssl_geometry.records import RecordStore
from ssl_geometry.records.lock import holder, lock, unlock
from ssl_geometry.report.live import MEASURED, Figures, Row, curve_rows, live_figures, scalars, under_way

TIMEOUT_SECONDS = 30
LONGEST_ID = 55
"""Characters of a run's name in its id of W&B, which has at most 64."""
Shown = Callable[[list["LoggedRow"]], Iterable["LoggedRow"]]
"""Passes rows on, and shows how far they are."""


def wandb_options(directory: Path, config: Mapping[str, Any], facts: Mapping[str, Any], project: str) -> dict[str, Any]:
    """How W&B knows a run.

    Args:
        directory: the run directory.
        config: the run's configuration, nested as in ``config.yaml``.
        facts: ``run.json``, with the id.
        project: of W&B.

    Returns:
        Arguments of ``wandb.init``. Runs of an experiment are a group; the method is the job type and a tag, as are
        backbone and data. The configuration is complete, with the values that runs are compared by at its top.

    Example:
        >>> config = {"model": {"class_path": "my.SimCLR", "init_args": {"backbone": "resnet18"}}}
        >>> options = wandb_options(Path("runs/cifar/s0"), config, {"wandb_id": "s0-1"}, "p")
        >>> options["group"], options["job_type"], options["tags"]
        ('cifar', 'SimCLR', ['SimCLR', 'resnet18'])
    """
    model, data = (config.get(name) or {} for name in ("model", "data"))
    summary = {
        "method": str(model.get("class_path", "")).rpartition(".")[2] or None,
        "backbone": (model.get("init_args") or {}).get("backbone"),
        "dataset": Path(str(data["dataset"])).name if data.get("dataset") else None,
        "seed": config.get("seed_everything"),
        "git": facts.get("git"),
        "versions": facts.get("versions"),
    }
    tags = [str(summary[name])[:64] for name in ("method", "backbone", "dataset") if summary[name]]
    return {
        "project": project,
        "name": directory.name,
        "id": facts["wandb_id"],
        "group": directory.resolve().parent.name,
        "job_type": summary["method"],
        "tags": tags,
        "config": {**config, **summary},
        "resume": "allow",
        "dir": directory,
    }


def new_id(directory: Path) -> str:
    """An id that no other run of any project has, of the characters that W&B takes.

    Example:
        >>> re.sub("[0-9a-f]{8}$", "...", new_id(Path("runs/e/my run#1")))
        'my-run-1-...'
    """
    name = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", directory.name).strip("-")[:LONGEST_ID]
    return f"{name or 'run'}-{uuid.uuid4().hex[:8]}"


class Sender:
    """Sends the rows of a run to W&B in their order, each once.

    Rows before the step that W&B starts a resumed run with are there. As a row that W&B has cannot be added to, each
    waits here until the next one begins: a row that a failed run left incomplete is not sent, but whole on resume.

    Args:
        run: of W&B, just started.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._step = 0
        self._row: dict[str, Any] = {}
        self._defined: set[str] = set()
        run.define_metric("epoch", hidden=True)

    def lacks(self, step: int) -> bool:
        """Whether W&B does not have the row of so many completed steps."""
        return step >= self._run.starting_step

    def add(self, step: int, epoch: float | None, values: Mapping[str, Any]) -> None:
        """Add to the row of a step; the one before is sent.

        Args:
            step: completed optimiser steps; what comes late joins the row that is under way.
            epoch: completed epochs, that of the row counted; None where it is not known.
            values: numbers and figures by name.
        """
        if step > self._step:
            self.send()
            self._step = step
        if self.lacks(self._step):
            known = {} if epoch is None else {"epoch": max(float(epoch), self._row.get("epoch", 0.0))}
            self._row |= {**values, **known}

    def send(self) -> None:
        """The row is complete."""
        row, self._row = self._row, {}
        for name in row.keys() - self._defined:
            if name.partition("/")[0] in ("val", "test", *MEASURED):
                self._run.define_metric(name, step_metric="epoch")
        self._defined |= row.keys()
        if row:  # W&B drops a row behind its own step, which is further where others log to the run as well
            own = getattr(self._run, "_local_step", 0)  # `run.step` asks its process, and training would wait
            self._run.log(row, step=max(self._step, own), commit=True)


class Sent(NamedTuple):
    """What became of a run that was sent to W&B.

    Args:
        numbers: how many numbers and figures.
        folder: that W&B wrote them into, offline; None where they are in W&B.
    """

    numbers: int
    folder: Path | None


class LoggedRow(NamedTuple):
    """What W&B gets of one step.

    Args:
        step: completed optimiser steps.
        epoch: completed epochs.
        numbers: by logged name.
        figures: what draws them, by logged name.
    """

    step: int
    epoch: int
    numbers: dict[str, float]
    figures: Figures


def logged_rows(records: Iterable[Row]) -> Iterator[LoggedRow]:
    """The records of a run as W&B got them live, in their order."""
    steps = defaultdict[int, list[Row]](list)
    for row in records:
        if row["step"] is not None:
            ahead = row["protocol"] is None and row["epoch"] != 0 and under_way(row["metric"])  # 0: before any step
            steps[row["step"] + ahead].append(row)
    curves: list[Row] = []
    for step, rows in sorted(steps.items()):
        measured = [row for row in rows if row["protocol"] is not None]
        logged = {row["metric"]: row["value"] for row in rows if row["protocol"] is None}
        curves = [*curves, *curve_rows(measured)]
        epoch = max(row["epoch"] or 0 for row in rows)
        yield LoggedRow(step, epoch, {**logged, **scalars(measured)}, live_figures(measured, curves))


def send_records(sender: Sender, directory: Path, shown: Shown = iter) -> int:
    """Send what W&B lacks of a run's records; the last row waits for :meth:`Sender.send`.

    Returns:
        How many numbers and figures they hold.
    """
    import wandb  # a third of a second, here and below: no --help waits for it

    missing = [row for row in logged_rows(RecordStore(directory / "records").rows()) if sender.lacks(row.step)]
    for row in shown(missing):
        drawn = {name: wandb.Image(draw()) for name, draw in row.figures.items()}
        sender.add(row.step, row.epoch, {**row.numbers, **drawn})
    return sum(len(row.numbers) + len(row.figures) for row in missing)


def end_wandb(exit_code: int) -> BaseException | None:
    """End W&B's run and its process, which writes its last block before it is gone.

    Args:
        exit_code: from which W&B knows a run that failed.

    Returns:
        What went wrong first, if anything.
    """
    import wandb

    problems: list[BaseException] = []
    for end in (wandb.finish, wandb.teardown):
        try:
            end(exit_code)
        except (Exception, SystemExit) as error:  # its process is gone; teardown then exits
            problems.append(error)
    wandb.run = None  # W&B keeps a run whose process is gone, and starts no other one
    return problems[0] if problems else None


def upload(directory: Path, project: str | None, shown: Shown = iter) -> Sent:
    """Send the records of a run to W&B that are not there yet; offline, write them all into a folder of W&B's.

    Args:
        directory: the run directory.
        project: of W&B; None takes the run's own.
        shown: passes rows on, and shows how far they are.

    Returns:
        How many numbers and figures were sent, or written, and where to.

    Raises:
        UserError: no run of ``fit``, one that a process is at, no key, or W&B is switched off or does not take it.
    """
    config, _ = _described(directory)
    if os.environ.get("WANDB_MODE") == "disabled":
        raise UserError("--to_wandb: WANDB_MODE=disabled switches W&B off; unset it, or set WANDB_MODE=offline")
    if not lock(directory):
        who = holder(directory) or "on an unknown machine"
        raise UserError(f"RUN {directory}: another process trains in it, or sends it ({who}): wait for it to end")
    try:
        if os.environ.get("WANDB_MODE") not in ("offline", "dryrun"):
            _log_in()
        _, facts = _described(directory)
        if not facts.get("wandb_id"):
            facts["wandb_id"] = new_id(directory)
            write_text(directory / "run.json", json.dumps(facts, indent=1) + "\n")
        options = wandb_options(directory, config, facts, project or config.get("wandb_project", "ssl_geometry"))
        return _sent(directory, options, shown)
    finally:
        unlock(directory)


def _sent(directory: Path, options: Mapping[str, Any], shown: Shown) -> Sent:
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    problem: BaseException | None = None
    try:
        run = wandb.init(**options, settings=wandb.Settings(init_timeout=TIMEOUT_SECONDS))
        folder = Path(run.settings.sync_dir) if run.offline else None
        sender = Sender(run)
        count = send_records(sender, directory, shown)
        sender.send()
    except Exception as error:
        problem = error
    problem = problem or end_wandb(0)
    if problem is None:
        return Sent(count, folder)
    end_wandb(1)
    if isinstance(problem, UserError):  # of the records
        raise problem
    reason = first_line(problem)
    raise UserError(
        f"--to_wandb: W&B did not take the whole run ({reason}); the same command sends the rest"
    ) from problem


def _described(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        facts = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        others = [str(other.parent) for other in directory.parent.glob("*/run.json")]
        raise UserError(
            f"RUN {directory}: {error.filename} is missing; {did_you_mean(str(directory), others)}"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"RUN {directory}: config.yaml or run.json cannot be read ({error})") from error
    for name, content in {"run.json": facts, "config.yaml": config}.items():
        if not isinstance(content, dict):
            raise UserError(f"RUN {directory}: {name} is damaged: expected a mapping, found {str(content)[:60]!r}")
    for name in ("model", "data"):
        if not isinstance(config.get(name) or {}, dict):
            raise UserError(f"RUN {directory}: config.yaml is damaged: {name}: {str(config[name])[:60]}")
    return config, facts


def _log_in() -> None:
    import wandb

    try:
        known = wandb.login(prompt=False)
    except Exception as error:
        raise UserError(f"--to_wandb: W&B does not take the key ({first_line(error)})") from error
    if not known:
        raise UserError(
            "--to_wandb: no W&B key here; run `wandb login`, set WANDB_API_KEY, or write offline files with "
            "WANDB_MODE=offline"
        )
