"""Files that are written whole or not at all: a reader, also after a power cut, sees the old file or the new one."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write next to the target, flush to the disk and rename: a reader, also after a power cut, sees old or new.

    Args:
        path: the target; its folder is made.
        write: writes to the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
            write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # some network file systems cannot flush a folder
            _flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk is reported with the file that is written, which pyarrow and figures do not name.

    Raises:
        OSError: that was raised, with the path.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """:func:`write_whole` of a text.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "folder" / "note.txt"
        >>> write_text(path, "one line")
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('one line', ['note.txt'])
    """
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy_whole(source: Path, target: Path) -> None:
    """The same file under a second name, which it takes the place of; copied where the file system has no links."""

    def write(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    write_whole(target, write)
