"""Run directories as the report page reads them: records, configuration and facts, and how runs are labelled."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ssl_geometry.errors import UserError, did_you_mean, first_line
from ssl_geometry.records import RecordStore

logger = logging.getLogger(__name__)

ALL_SHOWN, MOST_SHOWN = 4, 6
"""So many runs are all shown at first; of more, so many at most."""
NOT_THE_RECIPE = {"seed", "channels_last", "compile", "root", "num_workers"}
"""Options of model and data that runs of one recipe may differ in."""


@dataclass(frozen=True)
class RunRecords:
    """What a run directory holds that a page shows.

    Args:
        directory: the run directory.
        frame: its records.
        config: ``config.yaml``, each option under its dotted name.
        facts: ``run.json``.
        protocols: hash to text.
    """

    directory: Path
    frame: pd.DataFrame
    config: dict[str, Any]
    facts: dict[str, Any]
    protocols: dict[str, Any]


def read_run(path: str | Path, empty: bool = False, strict: bool = False) -> RunRecords:
    """Read a run directory, or the results of a command that compares runs.

    Args:
        path: holds ``records/``.
        empty: a run that has no records yet is no mistake.
        strict: a damaged part of the records, or protocol, is one; else it is left out, with a warning that names it.

    Returns:
        Its records and what describes it.

    Raises:
        UserError: no such folder, no records in it, or with ``strict`` a damaged part.
    """
    directory = Path(path)
    if not directory.is_dir():
        others = [str(other.parent) for other in directory.parent.glob("*/records")]
        raise UserError(f"RUN {path}: no such run; {did_you_mean(str(path), others)}")
    if not empty and not any(directory.glob("records/**/*.parquet")):
        below = [str(other.parent) for other in directory.glob("*/records")]
        hint = did_you_mean(str(path), below) if below else "runs and comparisons write them under records/"
        raise UserError(f"RUN {path}: no records here; {hint}")
    run = _read(directory, fingerprint(directory), strict)
    if not empty and run.frame.empty:
        raise UserError(f"RUN {path}: no part of its records can be read; remove them, or copy them again")
    return run


def fingerprint(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when something is written into a run directory that a page shows."""
    files = [*directory.glob("records/**/*"), directory / "config.yaml", directory / "run.json"]
    found = []
    for file in sorted(files):
        if file.is_file() and not file.name.startswith("."):
            facts = file.stat()
            found.append((str(file), facts.st_mtime_ns, facts.st_size))
    return tuple(found)


@lru_cache(maxsize=64)
def _read(directory: Path, seen: tuple[Any, ...], strict: bool) -> RunRecords:
    config, facts = (_mapping(directory / name) for name in ("config.yaml", "run.json"))
    protocols = {}
    for file in sorted(directory.glob("records/protocols/*.json")):
        try:
            protocols[file.stem] = _mapping(file)
        except UserError as damaged:
            if strict:
                raise
            logger.warning(f"left out: {damaged}")
    return RunRecords(directory, RecordStore(directory / "records").read(strict), flatten(config), facts, protocols)


def _mapping(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from error
    return found if isinstance(found, dict) else {}


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names.

    Example:
        >>> flatten({"model": {"lr": 0.1, "views": ["crop", "flip"]}, "seed": 0})
        {'model.lr': 0.1, 'model.views': ['crop', 'flip'], 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def labels(directories: Sequence[Path]) -> list[str]:
    """Names of runs, with as many parent folders as make them unique.

    Example:
        >>> labels([Path("runs/a/simclr"), Path("runs/b/simclr"), Path("runs/b/supervised")])
        ['a/simclr', 'b/simclr', 'supervised']
    """
    parts = [directory.resolve().parts for directory in directories]

    def name(mine: tuple[str, ...]) -> str:
        for length in range(1, len(mine)):
            if sum(other[-length:] == mine[-length:] for other in parts) == 1:
                return "/".join(mine[-length:])
        return "/".join(mine)

    return [name(mine) for mine in parts]


def natural(text: str) -> list[str | int]:
    """Key of an order in which numbers count as such.

    Example:
        >>> sorted(["seed_10", "seed_2", "Seed_1"], key=natural)
        ['Seed_1', 'seed_2', 'seed_10']
    """
    return [int(part) if part.isdecimal() else part.casefold() for part in re.split(r"(\d+)", text)]


def first_choice(runs: Sequence[RunRecords]) -> list[int]:
    """Which runs the page shows until its reader chooses others.

    Returns:
        Places in ``runs``: all of :data:`ALL_SHOWN` or fewer; of more, the latest run of each recipe (runs that differ
        by more than their seed), :data:`MOST_SHOWN` at most, of as many methods as there are.
    """
    if len(runs) <= ALL_SHOWN:
        return list(range(len(runs)))
    latest: dict[str, int] = {}
    for place, run in enumerate(runs):
        recipe = _recipe(run)
        if recipe not in latest or _started(run) > _started(runs[latest[recipe]]):
            latest[recipe] = place
    of_method: dict[Any, list[int]] = {}
    for place in sorted(latest.values()):
        of_method.setdefault(runs[place].config.get("model.class_path"), []).append(place)
    turns = [(turn, place) for places in of_method.values() for turn, place in enumerate(places)]
    return sorted(place for _, place in sorted(turns)[:MOST_SHOWN])


def _recipe(run: RunRecords) -> str:
    options = {
        name: value
        for name, value in run.config.items()
        if name.partition(".")[0] in ("model", "data") and name.rpartition(".")[2] not in NOT_THE_RECIPE
    }
    return json.dumps(options, sort_keys=True, default=str) if options else str(run.directory)


def _started(run: RunRecords) -> str:
    return str(run.facts.get("started", ""))
