"""A W&B server as far as a run needs one: it takes what is sent, says what it has, and can stop answering."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ssl_geometry.records.wandb_files import STEP

PROJECT = {"id": "UHJvajox", "name": "p", "entity": {"id": "RW50OjE=", "name": "u"}}
RUN = {"id": "UnVuOjE=", "displayName": "r", "config": "{}", "project": PROJECT, "tags": []}
USER = {"id": "VXNlcjox", "username": "u", "entity": "u", "email": "e", "flags": "{}", "teams": {"edges": []}}


class Server(ThreadingHTTPServer):
    """Listens on a port of its own; ``GET /away/3`` makes it silent once it has three rows of history."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lines: list[str] = []
        """The history, row by row."""
        self.back = threading.Event()
        self.back.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send W&B here."""
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def points(self) -> list[tuple[str, int]]:
        """Name and training step of each number."""
        found = []
        for row in map(json.loads, self.lines):
            if STEP in row:
                found += [(name, int(row[STEP])) for name in row if name[0] != "_" and name not in ("epoch", STEP)]
        return found

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """What a request gets."""
        if path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if history:
                self.lines[history["offset"] :] = history["content"]
            return {}
        asked = json.loads(body) if path.endswith("graphql") else {}
        run = {**RUN, "name": asked.get("variables", {}).get("name")}
        if "RunResumeStatus" in asked.get("query", ""):
            there = {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "summaryMetrics": "{}"}
            there |= {
                "historyLineCount": len(self.lines),
                "historyTail": json.dumps(self.lines[-1:]),
                "wandbConfig": '{"t": 1}',
            }
            return {"data": {"model": {**PROJECT, "bucket": {**run, **there} if self.lines else None}}}
        known = {"viewer": USER, "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "features": []}}
        files = {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
        return {"data": {**known, **files, "upsertBucket": {"bucket": run, "inserted": not self.lines}}}


class Handler(BaseHTTPRequestHandler):
    """Of one request."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """As all others."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/away/"):
            while len(self.server.lines) < int(self.path.rpartition("/")[2]):
                time.sleep(0.1)
            self.server.back.clear()
        elif not self.server.back.is_set():
            self.server.back.wait()
            self.close_connection = True  # what was sent meanwhile is lost
            return
        answer = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET
