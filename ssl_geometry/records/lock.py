"""A run directory is written by one process at a time: by the one that trains in it, or that sends it to W&B."""

import errno
import fcntl
import logging
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

_held: dict[Path, IO[str]] = {}


def lock(directory: Path) -> bool:
    """Hold a directory until this process ends or :func:`unlock`.

    Returns:
        False where another process holds it.
    """
    if directory in _held:
        return True
    file = (directory / ".lock").open("a+", encoding="utf-8")  # stays open; whoever holds it stands in it
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by data workers, gone with the process
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            return False
        logger.info(f"{directory}: this file system has no locks ({error.strerror})")
    _held[directory] = file
    with suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    return True


def holder(directory: Path) -> str:
    """Who holds a directory that :func:`lock` did not get, such as ``process 4711 on node5``; "" where unknown."""
    with suppress(OSError, UnicodeDecodeError):
        return (directory / ".lock").read_text(encoding="utf-8")
    return ""


def unlock(directory: Path) -> bool:
    """Let other processes have it.

    Returns:
        Whether this process held it.
    """
    file = _held.pop(directory, None)
    if file is not None:
        with suppress(OSError):
            file.truncate(0)
        file.close()
    return file is not None
