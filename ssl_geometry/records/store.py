"""Records as Parquet parts in a run directory, each written whole or not at all.

A part is named after the epoch it was measured in, so a resumed run that measures an epoch again replaces its own
part and no row stands twice.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_geometry.errors import UserError, first_line
from ssl_geometry.files import copy_whole, write_text, write_whole
from ssl_geometry.records.schema import COLUMNS, SCHEMA, Protocol

logger = logging.getLogger(__name__)


class RecordStore:
    """The records of one run.

    Args:
        directory: ``records/`` of a run directory; made when the first part is written.

    Example:
        >>> import tempfile
        >>> from ssl_geometry.records import record
        >>> store = RecordStore(Path(tempfile.mkdtemp()) / "records")
        >>> store.write("train/epoch=00001", [record(metric="train/loss", epoch=1, value=0.5)])
        >>> store.write("train/epoch=00001", [record(metric="train/loss", epoch=1, value=0.5)])  # again: replaced
        >>> len(store.read())
        1
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def write(self, part: str, rows: Sequence[Mapping[str, Any]], protocols: Iterable[Protocol] = ()) -> None:
        """Write one part, and the text of the protocols that it names.

        Args:
            part: name of the part: what was measured and when, such as ``measured/epoch=00005``.
            rows: rows made by :func:`ssl_geometry.records.record`.
            protocols: resolved under ``protocols/<hash>.json``.
        """
        for protocol in protocols:
            path = self.directory / "protocols" / f"{protocol.hash}.json"
            if not path.exists():
                write_text(path, protocol.text + "\n")
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
        write_whole(self.directory / f"{part}.parquet", lambda temporary: pq.write_table(table, temporary))

    def read_part(self, part: str) -> list[dict[str, Any]]:
        """The rows of one part; none where it was not written yet.

        Raises:
            UserError: no Parquet file of this schema.
        """
        path = self.directory / f"{part}.parquet"
        return _read_whole(path).to_pylist() if path.exists() else []

    def rollback(self, epochs: int, step: int, aside: Path | None = None) -> None:
        """Keep what lies before a checkpoint; rows of later epochs, which are run again, are removed.

        Parts that are no whole files, after a power cut perhaps, are renamed with a warning.

        Args:
            epochs: completed at the checkpoint; -1 keeps nothing.
            step: completed optimiser steps; of the epoch that was under way, rows of earlier steps are kept.
            aside: folder to keep parts in as they were before rows of them were removed.
        """
        for path in sorted(self.directory.glob("**/*.parquet")):
            try:
                pq.read_metadata(path)
            except (pa.ArrowException, OSError):
                damaged = path.rename(f"{path}.damaged")
                logger.warning(f"{path} was cut short, its rows are lost; what is left of it is now {damaged.name}")
                continue
            named = re.fullmatch(r"epoch=(\d+)", path.stem)
            if not named or int(named[1]) <= epochs:
                continue
            part = path.relative_to(self.directory)
            rows = self.read_part(str(part.with_suffix("")))
            under_way = int(named[1]) == epochs + 1
            earlier = [row for row in rows if under_way and row["step"] is not None and row["step"] < step]
            if len(earlier) == len(rows):
                continue
            if aside:
                copy_whole(path, aside / part)
            if earlier:
                self.write(str(part.with_suffix("")), earlier)
            else:
                path.unlink()

    def read(self, strict: bool = False) -> pd.DataFrame:
        """All rows, in the order of epochs and steps.

        Args:
            strict: refuse to read at all where a part is damaged; else it is left out, with a warning that names it.

        Raises:
            UserError: with ``strict``, a part that is no Parquet file of this schema.
        """
        table = self._table(strict)
        if not len(table):
            return pd.DataFrame(columns=COLUMNS)
        return table.to_pandas().sort_values(["epoch", "step"], kind="stable", ignore_index=True)

    def rows(self) -> list[dict[str, Any]]:
        """All rows as they were written, in the order of epochs and steps, without damaged parts (with a warning)."""
        return sorted(self._table(strict=False).to_pylist(), key=lambda row: (row["epoch"] or 0, row["step"] or 0))

    def _table(self, strict: bool) -> pa.Table:
        tables = [SCHEMA.empty_table()]
        for part in sorted(self.directory.glob("**/*.parquet")):
            try:
                tables.append(_read_whole(part))
            except UserError as damaged:
                if strict:
                    raise
                logger.warning(f"left out: {damaged}")
        return pa.concat_tables(tables)


def _read_whole(part: Path) -> pa.Table:
    try:
        return pq.read_table(part, schema=SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{part}: damaged ({first_line(error)}); remove it, or copy it again") from error


def read_records(*runs: str | Path, strict: bool = False) -> pd.DataFrame:
    """The records of several run directories in one frame, for figures and tables.

    Args:
        runs: run directories (each holds ``records/``).
        strict: refuse to read at all where a part is damaged; else it is left out, with a warning that names it.

    Returns:
        One row per number, with the columns of :data:`ssl_geometry.records.SCHEMA`.

    Raises:
        FileNotFoundError: a run without records.
        UserError: with ``strict``, a part that is no Parquet file of this schema.
    """
    frames = []
    for run in runs:
        directory = Path(run) / "records"
        if not directory.is_dir():
            raise FileNotFoundError(f"{run}: no records here (expected the folder {directory})")
        frames.append(RecordStore(directory).read(strict))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)
