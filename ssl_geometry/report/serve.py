"""The page of runs that go on: served to a browser on this machine, and brought up to date as records are written."""

import hashlib
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from ssl_geometry.errors import UserError

Build = Callable[[], bytes]


class Server(ThreadingHTTPServer):
    """Serves a page, its newest records, and their version.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        version: of the records as they are now.
        build: packs the records as they are now.
        page: makes the page of packed records and their version.

    Raises:
        UserError: another program listens there, or no such address.
    """

    daemon_threads = True

    def __init__(
        self,
        host: str,
        port: int,
        version: Callable[[], object],
        build: Build,
        page: Callable[[bytes, str], str],
    ) -> None:
        self._version, self._build, self._page = version, build, page
        self._packed: tuple[str, bytes] | None = None
        self._lock = threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: cannot listen on {host}:{port} ({error}); choose another") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}/"

    def version(self) -> str:
        """A short hash of what is on disk."""
        return hashlib.sha256(repr(self._version()).encode()).hexdigest()[:16]

    def packed(self) -> tuple[str, bytes]:
        """Version and records; packed once for all who ask."""
        with self._lock:
            version = self.version()
            if self._packed is None or self._packed[0] != version:
                self._packed = version, self._build()
            return self._packed

    def answer(self, path: str) -> tuple[str, bytes] | None:
        """Type and content of what lies at a path; None where there is nothing."""
        if path == "/version":
            return "text/plain", self.version().encode()
        if path == "/data":
            return "application/octet-stream", self.packed()[1]
        if path == "/":
            version, packed = self.packed()
            return "text/html; charset=utf-8", self._page(packed, version).encode()
        return None


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        own = {"127.0.0.1", "localhost", str(self.server.server_address[0])}
        asked = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if asked not in own and self.server.server_address[0] in ("127.0.0.1", "::1"):
            self.send_error(HTTPStatus.FORBIDDEN)  # another site's name that was made to point here
            return
        try:
            found = self.server.answer(self.path.partition("?")[0])
        except UserError as error:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "the records cannot be read", str(error))
            return
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, content = found
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the page asks every two seconds."""
