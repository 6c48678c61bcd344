"""A stand-in for W&B's server on the loopback address, which refuses, hangs or vanishes.

It answers what a W&B client asks while it opens, follows and ends a run, as far as that client needs it: the GraphQL
queries by one answer that fits them all, everything else by an empty one.
"""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Trouble = Literal["refuses", "hangs", "vanishes"]


class Server(ThreadingHTTPServer):
    """Answers `healthy` requests, and then makes trouble for good.

    Attributes:
        trouble: "refuses" answers with status 500, "hangs" takes requests and stays silent, "vanishes" closes all
            connections and takes no further ones.
        healthy: requests that are answered before that.
        troubled: requests that met with trouble.
    """

    daemon_threads = True

    def __init__(self, trouble: Trouble, healthy: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.trouble, self.healthy, self.troubled = trouble, healthy, 0
        self.over = threading.Event()
        self._lock, self._open = threading.Lock(), set[socket.socket]()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def take_request(self) -> bool:
        """Count a request; returns whether it is to be answered."""
        with self._lock:
            self.healthy -= 1
            self.troubled += self.healthy < 0
            return self.healthy >= 0

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note the connection, then serve it in a thread."""
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection and close it."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def vanish(self) -> None:
        """Close all connections and listen no longer, for good."""
        self.over.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.take_request():
            self._answer(200, answer(body) if self.path.startswith("/graphql") else {})
            return
        match self.server.trouble:
            case "refuses":
                self._answer(500, {})
            case "hangs":
                self.server.over.wait()
                self.close_connection = True
            case "vanishes":
                self.close_connection = True
                self.server.vanish()

    do_GET = do_PUT = do_POST

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing of it is to be seen."""


def answer(query: bytes) -> dict[str, Any]:
    """An answer to a GraphQL query that has what each of a client's queries looks for."""
    asked = json.loads(query).get("variables") or {}
    project = {"id": "project", "name": asked.get("project") or "project", "entity": {"id": "entity", "name": "me"}}
    run = {"id": "run", "name": asked.get("name"), "displayName": asked.get("displayName"), "config": "{}",
           "historyLineCount": 0, "project": project}  # fmt: skip
    viewer = {"id": "viewer", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
    artifact = {"id": "artifact", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
    return {"data": {
        "viewer": viewer, "serverInfo": {"features": []}, "model": {"bucket": None}, "project": None,
        "upsertBucket": {"bucket": run, "inserted": True}, "createArtifact": {"artifact": artifact},
        "createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []},
    }}  # fmt: skip


@contextmanager
def serving(trouble: Trouble, healthy: int) -> Iterator[Server]:
    """A server in a thread, and the end of it."""
    server = Server(trouble, healthy)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.vanish()
        thread.join()
