"""A W&B server on this machine, as far as a run asks anything of it; it can hang and vanish."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Takes what a run sends.

    Attributes:
        history: the rows of every run, by its id.
        artifacts: names of the artifacts.
        asked: names of the GraphQL operations.
        asking: set once somebody has sent anything.
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

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: PLR0911
        """To a GraphQL operation."""
        self.asked.append(operation)
        match operation:
            case "RunResumeStatus":
                rows = self.history.get(variables["name"], [])
                tail = json.dumps([json.dumps(row) for row in rows[-1:]])
                bucket = {
                    "id": "b", "name": variables["name"], "displayName": variables["name"], "config": "{}",
                    "summaryMetrics": "{}", "historyLineCount": len(rows), "historyTail": tail, "eventsTail": "[]",
                    "logLineCount": 0, "eventsLineCount": 0, "tags": [], "notes": None, "wandbConfig": '{"t": 1}',
                }  # fmt: skip
                project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "team"}}
                return {"model": project | {"bucket": bucket if rows else None}}
            case "UpsertBucket":
                project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "team"}}
                bucket = {"id": "b", "name": variables["name"], "displayName": variables["name"], "project": project}
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            case "Viewer":
                return {"viewer": {"id": "v", "entity": "team", "username": "me", "flags": "{}",
                                   "teams": {"edges": []}}}  # fmt: skip
            case "ArtifactType":
                return {"project": None}
            case "CreateArtifact":
                self.artifacts.append(variables["input"]["artifactCollectionName"])
                artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
                return {"createArtifact": {"artifact": artifact}}
        return {}


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
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            query = json.loads(body)
            operation = re.search(r"(query|mutation)\s+(\w+)", query["query"])
            assert operation
            answer = {"data": self.server.answer(operation[2], query.get("variables") or {})}
        elif stream := re.fullmatch(r"/files/team/[^/]+/([^/]+)/file_stream", self.path):
            rows = self.server.history.setdefault(stream[1], [])
            if lines := json.loads(body).get("files", {}).get("wandb-history.jsonl"):
                rows[lines["offset"] :] = [flat(json.loads(line)) for line in lines["content"]]
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

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
