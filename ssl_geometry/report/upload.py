"""Runs in W&B: what a run is called there, what its axes are, and records sent after training.

A run is found by one id, which stands in ``run.json``, whether it is logged live or later. What was sent is what W&B's
own files below ``wandb/`` hold, so a second upload adds nothing.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import wandb
import yaml

from ssl_geometry.errors import UserError, nearest
from ssl_geometry.records import RecordStore, wandb_files
from ssl_geometry.report.moments import Row, curve_rows, pictures, scalars

LOGGED = ("train", "val", "test")
"""Prefixes of the numbers that training itself logs, which are metrics of the records under the same name."""
TIMEOUT_SECONDS = 30


def wandb_options(directory: Path, config: Mapping[str, Any], facts: Mapping[str, Any], project: str) -> dict[str, Any]:
    """How W&B knows a run.

    Args:
        directory: the run directory.
        config: the run's configuration, nested as in ``config.yaml``.
        facts: ``run.json``, with the id.
        project: of W&B.

    Returns:
        Arguments of ``wandb.init``. Runs of an experiment are a group; the method is the job type and a tag, as are
        backbone and data. The configuration is whole, and says at its top what runs are compared by.

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
    }


def define_axes(run: Any, names: Iterable[str]) -> None:
    """Epochs are the horizontal axis of everything but the training steps; neither is drawn as a curve of its own.

    Name by name: Lightning defines ``*`` for itself, and of two patterns that fit W&B takes either one.

    Args:
        run: of W&B.
        names: to be logged for the first time.
    """
    for name in ("epoch", wandb_files.STEP):
        run.define_metric(name, hidden=True)
    for name in names:
        run.define_metric(name, step_metric=wandb_files.STEP if name.startswith("train/") else "epoch")


def new_id(directory: Path) -> str:
    """An id that no other run of any project has."""
    return f"{directory.name}-{uuid.uuid4().hex[:8]}"


def upload(directory: Path, project: str | None, tell: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> int:
    """Send the records of a run to W&B that are not there yet.

    Args:
        directory: the run directory.
        project: of W&B; None takes the run's own.
        tell: passes moments on, and shows how far they are.

    Returns:
        How many numbers and pictures were sent.

    Raises:
        UserError: no run of ``fit``, no key, or a server that does not answer.
    """
    config, facts = _described(directory)
    online = os.environ.get("WANDB_MODE") not in ("offline", "dryrun")
    if online:
        _log_in()
    if not facts.get("wandb_id"):
        facts["wandb_id"] = new_id(directory)
        temporary = directory / f".run.json.{os.getpid()}.partial"
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(temporary, directory / "run.json")
    points = wandb_files.points(directory, facts["wandb_id"], on_server=online)
    sent = {(name.removesuffix("/_type"), step) for name, step, _ in points}
    new = [moment for moment in moments(RecordStore(directory / "records").rows()) if moment.lacks(sent)]
    if not new:
        return 0
    options = wandb_options(directory, config, facts, project or config.get("wandb_project", "ssl_geometry"))
    os.environ.setdefault("WANDB_SILENT", "true")
    settings = wandb.Settings(init_timeout=TIMEOUT_SECONDS)
    try:
        run = wandb.init(**options, dir=directory, mode="online" if online else "offline", settings=settings)
    except Exception as error:
        raise UserError(f"--to-wandb: W&B does not take the run ({str(error).splitlines()[0]})") from error
    count = 0
    with run:
        define_axes(run, dict.fromkeys(name for moment in new for name in moment.lacks(sent)))
        for moment in tell(new):
            names = moment.lacks(sent)
            row = {name: moment.draw(name) for name in names}
            run.log({**row, "epoch": float(moment.epoch), wandb_files.STEP: moment.step})
            count += len(names)
    wandb.teardown()  # the end of `run` does not wait for the last block of its file, which a second upload reads
    return count


class LoggedMoment:
    """What loggers get of one moment.

    Args:
        rows: the moment's records.
        curves: the lasting ones of it and of all before it.
    """

    def __init__(self, rows: list[dict[str, Any]], curves: list[Row]) -> None:
        self.epoch, self.step = int(rows[0]["epoch"] or 0), int(rows[0]["step"] or 0)
        logged = {row["metric"]: row["value"] for row in rows if _is_logged(row)}
        measured = [row for row in rows if not _is_logged(row)]
        self.numbers = {**logged, **scalars(measured)}
        self.pictures = pictures(measured, curves)

    def lacks(self, sent: set[tuple[str, int]]) -> list[str]:
        """Names that were not sent."""
        return [name for name in (*self.numbers, *self.pictures) if (name, self.step) not in sent]

    def draw(self, name: str) -> Any:
        """A number, or a picture as W&B takes it."""
        return self.numbers[name] if name in self.numbers else wandb.Image(self.pictures[name]())


def _is_logged(row: Row) -> bool:
    return row["layer"] is None and row["metric"].partition("/")[0] in LOGGED


def moments(rows: Iterable[dict[str, Any]]) -> list[LoggedMoment]:
    """Records by moment, as loggers got them live.

    Args:
        rows: records of a run, in the order of epochs and steps.
    """
    found, curves = [], list[Row]()
    for _, group in groupby(rows, key=lambda row: (row["epoch"], row["step"])):
        here = list(group)
        curves = [*curves, *curve_rows(here)]
        found.append(LoggedMoment(here, curves))
    return found


def _described(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text())
        facts = json.loads((directory / "run.json").read_text())
    except FileNotFoundError as error:
        beside = [str(other.parent) for other in directory.parent.glob("*/run.json")]
        raise UserError(f"RUN {directory}: {error.filename} is missing; {nearest(str(directory), beside)}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"RUN {directory}: config.yaml or run.json cannot be read ({error})") from error
    return config, facts


def _log_in() -> None:
    try:
        known = wandb.login(prompt=False)
    except Exception as error:
        raise UserError(f"--to-wandb: W&B does not take the key ({str(error).splitlines()[0]})") from error
    if not known:
        raise UserError(
            "--to-wandb: no W&B key here; run `wandb login`, set WANDB_API_KEY, or write offline files with "
            "WANDB_MODE=offline"
        )
