"""A W&B server on this machine that keeps what a run sends; it can hang and vanish."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from benchmarks.wandb_server import answer


class Server(ThreadingHTTPServer):
    """Takes what a run sends.

    Attributes:
        history: the rows of every run, by its id.
        artifacts: names of the artifacts.
        asked: names of the GraphQL operations.
        asking: set once somebody has sent anything.
        hanging: once set, no request is answered.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.artifacts: list[str] = []
        self.asked: list[str] = []
        self.asking, self.hanging, self.ended = threading.Event(), threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to find it, and waits for it for 5 seconds only."""
        return {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": self.url, "WANDB_MODE": "online", "no_proxy": "*",
                "WANDB_INIT_TIMEOUT": "5", "WANDB_FINISH_TIMEOUT": "5"}  # fmt: skip

    def handle_error(self, *_: object) -> None:
        """A run that has ended leaves connections open."""

    def answer(self, body: bytes) -> dict[str, Any]:
        """To a GraphQL operation. A run that has sent rows can be resumed."""
        content, query = answer(body), json.loads(body)
        variables = query.get("variables") or {}
        self.asked += re.findall(r"(?:query|mutation)\s+(\w+)", query["query"])
        if name := variables.get("input", {}).get("artifactCollectionName"):
            self.artifacts.append(name)
        if rows := self.history.get(variables.get("name", "")):
            content["data"]["model"]["bucket"] = {
                "id": "run", "name": variables["name"], "displayName": variables["name"], "config": "{}",
                "summaryMetrics": "{}", "historyLineCount": len(rows), "eventsTail": "[]", "logLineCount": 0,
                "historyTail": json.dumps([json.dumps(rows[-1])]), "eventsLineCount": 0, "tags": [], "notes": None,
                "wandbConfig": '{"t": 1}',
            }  # fmt: skip
        return content


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asking.set()
        if self.server.hanging.is_set():
            self.server.ended.wait()
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        content: dict[str, Any] = {}
        if self.path == "/graphql":
            content = self.server.answer(body)
        elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            rows = self.server.history.setdefault(stream[1], [])
            if lines := json.loads(body).get("files", {}).get("wandb-history.jsonl"):
                rows[lines["offset"] :] = [flat(json.loads(line)) for line in lines["content"]]
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = respond


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row with keys such as samples/path for what is nested in it, as a run's file has them."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@contextmanager
def serving() -> Iterator[Server]:
    """A server, for as long as this lasts."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
