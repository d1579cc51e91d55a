"""Checkpoints: written whole or not at all, and read as data."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ssl_geometry.errors import UserError, first_line
from ssl_geometry.files import write_whole
from ssl_geometry.models.zoo.load import why_unreadable


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints are written next to their place and renamed into it: whole, or the one before stays."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the whole checkpoint, or leave what was there.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        path = Path(path)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)

        try:
            write_whole(path, write)
        except (OSError, RuntimeError) as error:
            fault = _disk_fault(error)
            reason = fault.strerror if fault else first_line(error)
            kept = f"the checkpoint before it is whole ({path})" if path.exists() else "there is no earlier checkpoint"
            raise UserError(
                f"could not save {path}: {reason}; {kept}. Free space and continue with --resume {path.parent.parent}"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain data; code in a file never runs."""
        return read_checkpoint(path, "--resume", map_location or "cpu")


def _disk_fault(error: BaseException | None) -> OSError | None:
    """The system's error, if torch only reports a wrong position in the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def read_checkpoint(
    path: str | Path, option: str, map_location: Any = "cpu", mmap: bool | None = None
) -> dict[str, Any]:
    """Read a checkpoint as data, each part held against the checksum that was written with it.

    Args:
        path: the file.
        option: the option that named it, for the error message.
        map_location: where tensors go.
        mmap: leave tensors on the disk until they are used.

    Returns:
        What the file holds: tensors and plain Python data.

    Raises:
        UserError: no such file, or a file that is cut short or altered, no checkpoint, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    damaged, is_archive = None, zipfile.is_zipfile(path)
    try:
        if is_archive:  # as torch writes it; it does not look at the checksums when it reads
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
                if damaged:
                    raise ValueError(damaged)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and is_archive)
    except Exception as error:
        reason = f"its part {damaged} is not what was written" if damaged else why_unreadable(path, error)
        raise UserError(f"{option} {path}: not a whole, plain checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{option} {path}: expected a dictionary, found {type(checkpoint).__name__}")
    return checkpoint
