"""A W&B server as far as a run needs one: it takes what is sent, says what it has, and can stop answering."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
        self.run: dict[str, Any] = {}
        """What the run is called, and its configuration."""
        self.back = threading.Event()
        self.back.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send W&B here."""
        url = f"http://127.0.0.1:{self.server_address[1]}"
        often = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.2"}  # in seconds; by default 15
        return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", **often}

    def rows(self) -> list[dict[str, Any]]:
        """The history without what W&B adds for itself; ``step`` is its own."""
        rows = map(json.loads, self.lines)
        return [{"step": row["_step"], **{name: row[name] for name in row if name[0] != "_"}} for row in rows]

    def points(self) -> dict[tuple[str, int], Any]:
        """Name and step of each number and figure, to its value."""
        return {
            (name, row["step"]): value
            for row in self.rows()
            for name, value in row.items()
            if name not in ("step", "epoch")
        }

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run."""
        return {name: item["value"] for name, item in json.loads(self.run["config"]).items() if name != "_wandb"}

    @property
    def axes(self) -> dict[str, str]:
        """The axis of each metric that has one of its own; W&B notes it in the configuration."""
        metrics = json.loads(self.run["config"])["_wandb"]["value"]["m"]
        return {metric["1"]: metrics[metric["5"] - 1]["1"] for metric in metrics if "5" in metric}

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """What a request gets."""
        if path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if history:
                self.lines[history["offset"] :] = history["content"]
            return {}
        asked = json.loads(body) if path.endswith("graphql") else {}
        variables = asked.get("variables", {})
        if "UpsertBucket" in asked.get("query", ""):
            self.run |= {name: value for name, value in variables.items() if value is not None}
        run = {**RUN, "name": variables.get("name")}
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
