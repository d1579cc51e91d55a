"""Records as one HTML page that needs nothing else: no server, no network, no installed viewer.

The numbers travel in the page as columns of numbers, compressed; the page's own script (``web/``) unpacks and draws
them. A page never measures: what it shows are rows of the records, ``config.yaml``, ``run.json`` and the texts of the
protocols. The script is a few hundred lines of ours, as a plotting library to be put into every page is half of its
allowed size, draws no map by keyboard, and is harder to keep from the network.
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
from ssl_geometry.report.runs import RunRecords, first_choice, labels, natural

logger = logging.getLogger(__name__)
SERIES = ["model", "model_other", "metric", "view", "split", "protocol"]
PLACE = ["layer", "depth", "layer_other", "depth_other"]
MOMENT = ["epoch", "step"]
EXACT, ROUNDED = 8, 3
"""Bytes of a number: all of a float64, or the upper ones of a float32, which keep four significant digits."""
FEWER_MOMENTS = (64, 32, 16, 8, 4, 2)
WEB = Path(__file__).parent / "web"
SCRIPTS = ("data.js", "draw.js", "sections.js", "main.js")


def pack(runs: Sequence[RunRecords], width: int = EXACT, moments: int | None = None) -> bytes:
    """Records as the page's script reads them: a header as JSON, then columns of numbers; compressed.

    A row is a *series* (which run, model, metric, view, ...), a *place* (which layers), a *moment* (epoch and step),
    and its numbers. Rows of a series lie together, so only the other two have a column.

    Args:
        runs: what is shown, in any order; the page has them in the natural order of their names.
        width: bytes of each number: :data:`EXACT` or :data:`ROUNDED`.
        moments: of each metric of a run, show so many, evenly spaced, the first and the last among them; None: all.

    Returns:
        Gzip of: length of the header (uint32), header, columns.
    """
    names = labels([run.directory for run in runs])
    order = sorted(range(len(runs)), key=lambda place: natural(names[place]))
    runs, names = [runs[place] for place in order], [names[place] for place in order]
    places, times, frames = _Numbered(), _Numbered(), []
    series: list[list[Any]] = []
    for number, run in enumerate(runs):
        frame = run.frame if moments is None else thin(run.frame, moments)
        ids = frame.groupby(SERIES, dropna=False, sort=False).ngroup()
        frame = frame.assign(series=ids + len(series))
        series += [[number, *keys] for keys in _plain(frame.drop_duplicates("series")[SERIES])]
        for name, columns, numbered in (("place", PLACE, places), ("moment", MOMENT, times)):
            ids = frame.groupby(columns, dropna=False, sort=False).ngroup()
            distinct = [numbered.of(row) for row in _plain(frame.loc[~ids.duplicated(), columns])]
            frame[name] = np.array(distinct, dtype=np.uint32)[ids.to_numpy()]
        frames.append(frame[["series", "place", "moment", "n", "value", "low", "high"]])
    rows = pd.concat(frames, ignore_index=True).sort_values("series", kind="stable")
    cells = {
        "place": rows["place"].to_numpy(np.uint32).view(np.uint8).reshape(-1, 4),
        "moment": rows["moment"].to_numpy(np.uint32).view(np.uint8).reshape(-1, 4),
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
        "moments": times.rows,
        "columns": {name: column.shape[1] for name, column in cells.items()},
        "rows": len(rows),
        "rounded": width != EXACT,
        "thinned": moments,
    }
    text = json.dumps(_without_nan(header), separators=(",", ":"), default=str).encode()
    planes = b"".join(column.T.tobytes() for column in cells.values())  # equal bytes together: that compresses
    return gzip.compress(len(text).to_bytes(4, "little") + text + planes, 6, mtime=0)


class _Numbered:
    """Distinct rows, numbered as they come."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def of(self, row: list[Any]) -> int:
        if tuple(row) not in self._known:
            self._known[tuple(row)] = len(self.rows)
            self.rows.append(row)
        return self._known[tuple(row)]


def _plain(frame: pd.DataFrame) -> list[list[Any]]:
    """Rows as JSON has them: numbers that are whole as such, and null for what is not there."""
    rows = [[None if pd.isna(value) else value for value in row] for row in frame.itertuples(index=False)]
    return [[int(value) if isinstance(value, float) and value.is_integer() else value for value in row] for row in rows]


def _without_nan(value: Any) -> Any:
    """As JSON: it has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _described(run: RunRecords, label: str) -> dict[str, Any]:
    return {"label": label, "config": run.config, "facts": run.facts}


def thin(frame: pd.DataFrame, moments: int) -> pd.DataFrame:
    """The rows of so many moments of each metric, evenly spaced, the first and the last among them.

    Example:
        >>> frame = pd.DataFrame({"metric": "cka", "epoch": range(9), "step": range(9)})
        >>> thin(frame, 3)["epoch"].tolist()
        [0, 4, 8]
    """
    kept = np.zeros(len(frame), dtype=bool)
    for rows in frame.groupby("metric", sort=False).indices.values():
        ranks = frame.iloc[rows].groupby(MOMENT, dropna=False).ngroup().to_numpy()
        kept[rows] = np.isin(ranks, np.linspace(0, ranks.max(), moments).round().astype(int))
    return frame[kept]


def number_bytes(numbers: np.ndarray, width: int) -> np.ndarray:
    """Numbers as bytes, the lowest first.

    Args:
        numbers: (N,) float64.
        width: 8 keeps them as they are; 3 rounds them to the upper 24 bits of a float32, a relative error of at most
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


def smallest_loss(runs: Sequence[RunRecords], limit: float, say: Callable[[str], None]) -> bytes:
    """The records packed with as little left out as fits.

    Args:
        runs: what is shown.
        limit: of the page, in bytes.
        say: called with what has to be left out.

    Returns:
        See :func:`pack`.

    Raises:
        UserError: the limit is too small for these runs.
    """
    room = (limit - sum((WEB / name).stat().st_size for name in ("page.html", "page.css", *SCRIPTS))) * 3 / 4
    for width, moments in ((EXACT, None), (ROUNDED, None), *((ROUNDED, count) for count in FEWER_MOMENTS)):
        packed = pack(runs, width, moments)
        if len(packed) <= room:
            if width == ROUNDED:
                few = f", and {moments} measurements of each metric are shown" if moments else ""
                say(f"to stay below {limit / 1e6:g} MB, numbers are rounded to 4 significant digits{few}")
            return packed
    raise UserError(f"--max_mb {limit / 1e6:g}: {len(runs)} run(s) do not fit; name fewer, or allow more")


def render(packed: bytes, version: str = "") -> str:
    """The page.

    Args:
        packed: see :func:`pack`.
        version: of the records; a page that has one is served, and asks its server for newer ones.

    Returns:
        HTML. Its policy allows no script but its own, and no network but, where it is served, its own server.
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
    """Write the page, whole or not at all.

    Raises:
        UserError: the place cannot be written to.
    """
    try:
        write_text(Path(path), page)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error
    return Path(path)
