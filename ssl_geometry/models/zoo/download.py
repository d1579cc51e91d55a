"""Downloads that can be continued, are checked, and appear whole or not at all."""

import fcntl
import hashlib
import os
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from ssl_geometry.errors import UserError
from ssl_geometry.files import write_text
from ssl_geometry.models.zoo.table import Checkpoint
from ssl_geometry.progress import progress_bar

CACHE_VARIABLE = "SSL_GEOMETRY_CACHE"
CHUNK = 1 << 20
PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
"""How web pages begin; weights may begin with any byte."""
TIMEOUT = 30
"""Seconds without a byte before a download stops."""


def cache_folder() -> Path:
    """Where downloaded checkpoints are: ``$SSL_GEOMETRY_CACHE``, else ``ssl_geometry`` in torch.hub's folder."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
    return Path(home).expanduser() / "hub" / "ssl_geometry"  # the same as torch.hub.get_dir(), without torch


def cached(checkpoint: Checkpoint) -> list[Path]:
    """The files of a checkpoint where the cache holds all of them, else none."""
    files = [cache_folder() / checkpoint.name / name for name in checkpoint.file_names]
    return files if all(file.is_file() for file in files) else []


def fetch(checkpoint: Checkpoint) -> Path:
    """The file of a checkpoint that is to be read; what the cache lacks is downloaded, what it has is checked.

    Args:
        checkpoint: a row of the table.

    Returns:
        Its first file.

    Raises:
        UserError: a download that failed, a web page in place of a file, or a file with another hash.
    """
    folder = cache_folder() / checkpoint.name
    files = [folder / name for name in checkpoint.file_names]
    for number, (url, file) in enumerate(zip(checkpoint.urls, files, strict=True)):
        expected = checkpoint.sha256 if number == 0 else None
        if file.is_file():
            verify(file, expected)
        else:
            _download(checkpoint.name, url, file, expected)
    return files[0]


def verify(file: Path, expected: str | None = None) -> str:
    """Check a file against a published hash, or against the one that its first download left next to it.

    Args:
        file: the file.
        expected: a SHA-256 in hexadecimal, or its leading digits; None takes that of ``FILE.sha256``, which is written
            where it is not there.

    Returns:
        Its SHA-256.

    Raises:
        UserError: another hash.
    """
    found, noted = _sha256(file), file.with_name(f"{file.name}.sha256")
    if expected is None and noted.is_file():
        expected = noted.read_text(encoding="utf-8").strip()
    elif expected is None:
        write_text(noted, f"{found}\n")
    if expected is not None and not found.startswith(expected):
        raise UserError(
            f"{file}: its SHA-256 is {found}, expected {expected}: delete it and fetch it again; where its publisher "
            f"changed it, delete {noted.name} too"
        )
    return found


def _download(name: str, url: str, file: Path, expected: str | None) -> None:
    """Into ``FILE.partial``, continued where one is there, and renamed when it is whole and has the right hash."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{name}: {url}: only http and https addresses are downloaded")
    partial = file.with_name(f"{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX)  # of several processes one downloads, the others wait for it
            if file.is_file():
                verify(file, expected)
                return
            start = stream.seek(0, os.SEEK_END)
            with _open(url, start) as response:
                if response.status != 206 and start:  # a server that sends the whole file again
                    stream.truncate(0)
                    start = 0
                _receive(name, response, stream, start)
            stream.flush()
            found = _sha256(partial)
            if expected is not None and not found.startswith(expected):
                partial.unlink()
                raise UserError(
                    f"{name}: the SHA-256 of {url} is {found}, expected {expected}: it was damaged on the way or "
                    f"changed; run again, or download it in a browser and give {name}:FILE"
                )
            write_text(file.with_name(f"{file.name}.sha256"), f"{found}\n")
            os.replace(partial, file)  # before the lock is released
    except _WebPage as error:
        partial.unlink()
        raise UserError(
            f"{name}: {url} is a web page, not a checkpoint (a login or share page?): download it in a browser and "
            f"give {name}:FILE"
        ) from error
    except (OSError, HTTPException) as error:
        kept = partial.stat().st_size if partial.exists() else 0
        again = f"; {kept:,} bytes are kept, run again to continue" if kept else ""
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        status = f"{error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        raise UserError(f"{name}: could not download {url} to {file.parent}: {status}{reason}{again}") from error


class _WebPage(Exception):
    pass


def _open(url: str, start: int) -> HTTPResponse:
    opener = urllib.request.OpenerDirector()  # without urllib's file:, ftp: and data: addresses, also after a redirect
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    headers = {"User-Agent": "ssl_geometry", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # what is there is no beginning of this file
            return _open(url, 0)
        raise


def _receive(name: str, response: HTTPResponse, stream: IO[bytes], start: int) -> None:
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    with progress_bar(in_bytes=True) as progress:
        task = progress.add_task(name, total=total, completed=start)
        done = start
        while chunk := response.read(CHUNK):
            page = response.headers.get_content_type() == "text/html" or chunk.lstrip()[:9].lower().startswith(PAGES)
            if page and done == start == 0:
                raise _WebPage
            stream.write(chunk)
            done += len(chunk)
            progress.update(task, completed=done)
    if total is not None and done < total:
        raise OSError(f"the connection ended after {done:,} of {total:,} bytes")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
