"""What W&B wrote to disk, read back: to complete it after a crash, and to test what a user will see."""

import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

BLOCK, HEADER = 32768, 7
"""The log format of LevelDB, after a header of as many bytes as each chunk has."""
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
STEP = "trainer/global_step"


def read(file: str | Path) -> Iterator[Record]:
    """The records of one ``.wandb`` file, up to where it is cut short."""
    data, position, parts = Path(file).read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        chunk = data[position + HEADER : position + HEADER + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(chunk) < length:
            return
        position += HEADER + length
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def points(run: str | Path, identity: str = "*", on_server: bool = False) -> list[tuple[str, int, str]]:
    """Every point in the files of a run directory.

    Args:
        run: directory that holds ``wandb/``.
        identity: W&B's id of the run, if it has several.
        on_server: only the files of runs that were online, or were synchronised since.

    Returns:
        (metric, training step, value as JSON), as often as it was written; a picture is several, ``name/sha256`` and
        the like.
    """
    found = []
    for file in sorted(Path(run).glob(f"wandb/*run-*/run-{identity}.wandb")):
        if on_server and file.parent.name.startswith("offline-") and not Path(f"{file}.synced").exists():
            continue
        for record in read(file):
            if record.HasField("history"):
                row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                if STEP in row:
                    step = int(float(row.pop(STEP)))
                    found += [(key, step, value) for key, value in row.items() if key[0] != "_" and key != "epoch"]
    return found
