"""TensorFlow's checkpoints, read without TensorFlow.

A TensorBundle is an ``.index``, a LevelDB table from names to entries (type, shape, shard, offset, size), and the raw
tensors in ``.data-…`` shards. Both are read from a folder, or from within a zip archive: nothing is extracted.
"""

import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ssl_geometry.errors import UserError

MAGIC = 0xDB4775248B80FB57
FOOTER, TRAILER = 48, 5
"""Bytes at the end of the table, and after each of its blocks (kind of compression, checksum)."""
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
"""TensorFlow's numbers of the types that weights have."""


class _Damaged(Exception):
    pass


def is_bundle(file: Path) -> bool:
    """Whether a file is the index of a TensorBundle, or a zip archive that holds one."""
    if file.suffix == ".index":
        return True
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith(".index") for name in archive.namelist())


def read_bundle(file: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read tensors of a TensorFlow checkpoint.

    Args:
        file: ``….index``, with its ``.data-…`` next to it, or a zip archive of both.
        wanted: decides by a tensor's name whether it is to be read.

    Returns:
        The wanted tensors, and the names of the others.

    Raises:
        UserError: a damaged file, a part that is missing, or a kind of tensor that weights do not have.
    """
    try:
        if file.suffix == ".index":
            prefix = file.name.removesuffix(".index")
            return _read(file.read_bytes(), lambda end: (file.parent / f"{prefix}{end}").read_bytes(), wanted)
        with zipfile.ZipFile(file) as archive:
            indices = [name for name in archive.namelist() if name.endswith(".index")]
            if len(indices) > 1:  # the same weights once more, as a module of TensorFlow Hub
                indices = [name for name in indices if not name.endswith("variables/variables.index")]
            if len(indices) != 1:
                raise UserError(f"{file}: holds {len(indices)} TensorFlow checkpoints, expected one")
            prefix = indices[0].removesuffix(".index")
            return _read(archive.read(indices[0]), lambda end: archive.read(f"{prefix}{end}"), wanted)
    except FileNotFoundError as error:
        raise UserError(f"{file}: {Path(error.filename).name} is missing next to it") from error
    except (_Damaged, KeyError, IndexError, ValueError, struct.error, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{file}: not a whole TensorFlow checkpoint ({error}); delete it and fetch it again") from error


def _read(
    index: bytes, shard: Callable[[str], bytes], wanted: Callable[[str], bool]
) -> tuple[dict[str, np.ndarray], list[str]]:
    entries = {key.decode(): _fields(value) for key, value in _table(index)}
    header = entries.pop("", {})
    count = header.get(1, [1])[0]
    data = {number: shard(f".data-{number:05}-of-{count:05}") for number in range(count)}
    tensors, others = {}, []
    for name, entry in entries.items():
        if not wanted(name):
            others.append(name)
            continue
        number, offset, size = (entry.get(field, [0])[0] for field in (3, 4, 5))
        shape = [_fields(dim).get(1, [0])[0] for dim in _fields(entry.get(2, [b""])[0]).get(2, [])]
        kind = DTYPES.get(entry.get(1, [0])[0])
        if kind is None or 7 in entry:
            raise _Damaged(f"{name} is of a type, or in slices, that weights are not")
        dtype = np.dtype(kind)
        if size != dtype.itemsize * int(np.prod(shape)) or offset + size > len(data[number]):
            raise _Damaged(f"{name} is cut short")
        tensors[name] = np.frombuffer(data[number], dtype, size // dtype.itemsize, offset).reshape(shape)
    return tensors, others


def _table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table, in its order."""
    if len(table) < FOOTER or struct.unpack("<Q", table[-8:])[0] != MAGIC:
        raise _Damaged("its index has no end")
    footer = table[-FOOTER:]
    place = _varint(footer, _varint(footer, 0)[1])[1]  # after the handle of the blocks of metadata
    for _, handle in _block(table, *_handle(footer, place)):
        yield from _block(table, *_handle(handle, 0))


def _handle(data: bytes, place: int) -> tuple[int, int]:
    offset, place = _varint(data, place)
    return offset, _varint(data, place)[0]


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    block, trailer = table[offset : offset + size], table[offset + size : offset + size + TRAILER]
    if len(trailer) < TRAILER or trailer[0] != 0:
        raise _Damaged("a block of its index is cut short or compressed")
    restarts = struct.unpack("<I", block[-4:])[0]
    end, place, key = size - 4 * (restarts + 1), 0, b""
    while place < end:
        shared, place = _varint(block, place)
        own, place = _varint(block, place)
        length, place = _varint(block, place)
        key = key[:shared] + block[place : place + own]
        place += own
        yield key, block[place : place + length]
        place += length


def _fields(message: bytes) -> dict[int, list]:
    """Field number to values of a protocol buffer; messages stay bytes."""
    fields: dict[int, list] = {}
    value: int | bytes
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        match tag & 7:
            case 0:
                value, place = _varint(message, place)
            case 2:
                length, place = _varint(message, place)
                value, place = message[place : place + length], place + length
            case 5:
                value, place = message[place : place + 4], place + 4
            case wire:
                raise _Damaged(f"a field of its index is of kind {wire}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
