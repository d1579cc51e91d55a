"""Records as one self-contained HTML page: no server, no network, no installed viewer.

The page holds the numbers as compressed columns, and a script (``web/``) that unpacks and draws them. A page never
measures: it shows rows of the records, ``config.yaml``, ``run.json`` and the texts of the protocols. It has its own
plotting script of a few hundred lines, because a plotting library would take half of the allowed size of the page, has
no keyboard access to heat maps, and is harder to keep offline.
"""

import base64
import gzip
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ssl_geometry.errors import UserError
from ssl_geometry.files import write_text
from ssl_geometry.records.catalogue import described
from ssl_geometry.report.run_records import RunRecords, first_choice, labels, natural

logger = logging.getLogger(__name__)
SERIES = ["model", "model_other", "metric", "view", "split", "protocol"]
PLACE = ["layer", "depth", "layer_other", "depth_other"]
TIME = ["epoch", "step"]
EXACT, ROUNDED = 8, 3
"""Bytes per number: a float64, or the upper three of a float32, which keep four significant digits."""
FEWER = (64, 32, 16, 8, 4, 2)
WEB = Path(__file__).parent / "web"
SCRIPTS = ("data.js", "draw.js", "sections.js", "main.js")


def pack(runs: Sequence[RunRecords], width: int = EXACT, measurements: int | None = None) -> bytes:
    """Records in the format of the page's script: a JSON header, then columns of numbers; compressed.

    A row has a *series* (run, model, metric, view, ...), a *place* (layers), a *time* (epoch and step) and its numbers.
    Rows of a series are adjacent, so only place and time have a column.

    Args:
        runs: the runs, in any order; the page sorts them by name.
        width: bytes per number: :data:`EXACT` or :data:`ROUNDED`.
        measurements: number of measurements per metric and run, evenly spaced, with the first and the last; None: all.

    Returns:
        Gzip of: length of the header (uint32), header, columns.
    """
    names = labels([run.directory for run in runs])
    order = sorted(range(len(runs)), key=lambda place: natural(names[place]))
    runs, names = [runs[place] for place in order], [names[place] for place in order]
    places, times, frames = _Numbered(), _Numbered(), []
    series: list[list[Any]] = []
    for number, run in enumerate(runs):
        frame = run.frame if measurements is None else thin(run.frame, measurements)
        ids = frame.groupby(SERIES, dropna=False, sort=False).ngroup()
        frame = frame.assign(series=ids + len(series))
        series += [[number, *keys] for keys in _plain(frame.drop_duplicates("series")[SERIES])]
        for name, columns, numbered in (("place", PLACE, places), ("time", TIME, times)):
            ids = frame.groupby(columns, dropna=False, sort=False).ngroup()
            distinct = [numbered.of(row) for row in _plain(frame.loc[~ids.duplicated(), columns])]
            frame[name] = np.array(distinct, dtype=np.uint32)[ids.to_numpy()]
        frames.append(frame[["series", "place", "time", "n", "value", "low", "high"]])
    rows = pd.concat(frames, ignore_index=True).sort_values("series", kind="stable")
    cells = {
        "place": rows["place"].to_numpy(np.uint32).view(np.uint8).reshape(-1, 4),
        "time": rows["time"].to_numpy(np.uint32).view(np.uint8).reshape(-1, 4),
        "n": rows["n"].fillna(-1).to_numpy(np.int32).view(np.uint8).reshape(-1, 4),
        **{name: number_bytes(rows[name].to_numpy(np.float64), width) for name in ("value", "low", "high")},
    }
    metrics = {one[3] for one in series} | {name for run in runs for name in run.facts.get("results") or {}}
    header = {
        "runs": [_described(run, name) for run, name in zip(runs, names, strict=True)],
        "chosen": [names[place] for place in first_choice(runs)],
        "metrics": {
            name: {"label": known.axis, "section": known.section, "bars": known.bars}
            for name in sorted(metrics)
            for known in [described(name)]
        },
        "protocols": {name: text for run in runs for name, text in run.protocols.items()},
        "series": series,
        "ends": np.cumsum(np.bincount(rows["series"], minlength=len(series))).tolist(),
        "places": places.rows,
        "times": times.rows,
        "columns": {name: column.shape[1] for name, column in cells.items()},
        "rows": len(rows),
        "rounded": width != EXACT,
        "thinned": measurements,
    }
    text = json.dumps(_without_nan(header), separators=(",", ":"), default=str).encode()
    planes = b"".join(
        column.T.tobytes() for column in cells.values()
    )  # grouping bytes of equal significance compresses better
    return gzip.compress(len(text).to_bytes(4, "little") + text + planes, 6, mtime=0)


class _Numbered:
    """Distinct rows, numbered in the order of their first use."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def of(self, row: list[Any]) -> int:
        if tuple(row) not in self._known:
            self._known[tuple(row)] = len(self.rows)
            self.rows.append(row)
        return self._known[tuple(row)]


def _plain(frame: pd.DataFrame) -> list[list[Any]]:
    """Rows for JSON: integers where possible, and null for missing values."""
    rows = [[None if pd.isna(value) else value for value in row] for row in frame.itertuples(index=False)]
    return [[int(value) if isinstance(value, float) and value.is_integer() else value for value in row] for row in rows]


def _without_nan(value: Any) -> Any:
    """The value for JSON, which has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _described(run: RunRecords, label: str) -> dict[str, Any]:
    return {"label": label, "config": run.config, "facts": run.facts}


def thin(frame: pd.DataFrame, measurements: int) -> pd.DataFrame:
    """The rows of a number of measurements of each metric, evenly spaced, with the first and the last.

    Example:
        >>> frame = pd.DataFrame({"metric": "cka", "epoch": range(9), "step": range(9)})
        >>> thin(frame, 3)["epoch"].tolist()
        [0, 4, 8]
    """
    kept = np.zeros(len(frame), dtype=bool)
    for rows in frame.groupby("metric", sort=False).indices.values():
        ranks = frame.iloc[rows].groupby(TIME, dropna=False).ngroup().to_numpy()
        kept[rows] = np.isin(ranks, np.linspace(0, ranks.max(), measurements).round().astype(int))
    return frame[kept]


def number_bytes(numbers: np.ndarray, width: int) -> np.ndarray:
    """Numbers as bytes, little-endian.

    Args:
        numbers: (N,) float64.
        width: 8 for exact numbers; 3 rounds them to the upper 24 bits of a float32, with a relative error of at most
            2**-16 (1.6e-5) for numbers between 1e-38 and 3e38.

    Returns:
        (N, width) uint8.

    Example:
        >>> number_bytes(np.array([1.0]), 3).tolist()
        [[0, 128, 63]]
    """
    if width == EXACT:
        return np.ascontiguousarray(numbers, dtype="<f8").view(np.uint8).reshape(-1, 8)
    with np.errstate(over="ignore"):
        bits = numbers.astype("<f4").view("<u4")
    rounded = np.where(np.isfinite(numbers), bits + np.uint32(0x80), bits)
    return rounded.astype("<u4").view(np.uint8).reshape(-1, 4)[:, 1:]


def smallest_loss(runs: Sequence[RunRecords], limit: float, report: Callable[[str], None]) -> bytes:
    """Pack the records with the smallest loss that fits into the limit.

    Args:
        runs: the runs.
        limit: largest size of the page, in bytes.
        report: called with a message if numbers are rounded or measurements left out.

    Returns:
        See :func:`pack`.

    Raises:
        UserError: the limit is too small for these runs.
    """
    room = (limit - sum((WEB / name).stat().st_size for name in ("page.html", "page.css", *SCRIPTS))) * 3 / 4
    for width, measurements in ((EXACT, None), (ROUNDED, None), *((ROUNDED, count) for count in FEWER)):
        packed = pack(runs, width, measurements)
        if len(packed) <= room:
            if width == ROUNDED:
                few = f", and {measurements} measurements of each metric are shown" if measurements else ""
                report(f"to stay below {limit / 1e6:g} MB, numbers are rounded to 4 significant digits{few}")
            return packed
    raise UserError(f"--max_mb {limit / 1e6:g}: {len(runs)} run(s) do not fit; give fewer runs, or a larger limit")


def render(packed: bytes, version: str = "") -> str:
    """The page as HTML.

    Args:
        packed: see :func:`pack`.
        version: of the records, for a page that is served and polls its server for newer ones.

    Returns:
        HTML. Its content security policy allows only its own script and, if it is served, connections to its server.
    """
    script = "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (WEB / "page.css").read_text(encoding="utf-8")
    script, style = (f"\n{text}" for text in (script, style))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    server = "'self'" if version else "'none'"
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; img-src data:; "
        f"connect-src {server}; base-uri 'none'; form-action 'none'"
    )
    page = (WEB / "page.html").read_text(encoding="utf-8")
    for name, text in {
        "POLICY": policy,
        "STYLE": style,
        "DATA": base64.b64encode(packed).decode(),
        "VERSION": version,
        "SCRIPT": script,
    }.items():
        page = page.replace(f"{{{{{name}}}}}", text, 1)
    return page


def write_page(path: str | Path, page: str) -> Path:
    """Write the page, completely or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(Path(path), page)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error
    return Path(path)
