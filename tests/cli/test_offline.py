"""Without an account nothing goes out, and nothing waits for a network that does not answer."""

import os
import socket
import threading
from pathlib import Path

import pytest

from tests.conftest import TINY, finish, spawn


@pytest.fixture
def proxy() -> tuple[str, list[bytes]]:
    """The address of a proxy that answers nothing, and the first bytes of whatever connects to it."""
    server, heard = socket.create_server(("127.0.0.1", 0)), []

    def listen() -> None:
        while True:
            connection, _ = server.accept()
            connection.settimeout(5)
            heard.append(connection.recv(200))

    threading.Thread(target=listen, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}", heard


@pytest.mark.parametrize("logger", ["wandb", "none"])
def test_a_run_without_an_account_connects_to_nothing(
    logger: str, corpus: Path, tmp_path: Path, proxy: tuple[str, list[bytes]]
) -> None:
    address, heard = proxy
    env = os.environ | dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), address)
    process = spawn(*TINY, f"data.path={corpus}", f"logger={logger}", "max_steps=2", cwd=tmp_path, env=env)
    code, _, err = finish(process)
    assert (code, err) == (0, "")
    assert heard == []
