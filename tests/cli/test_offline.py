"""Without an account nothing goes out, and nothing waits for a network that does not answer."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY, finish, spawn


@pytest.fixture
def proxy() -> Iterator[socket.socket]:
    """A proxy that answers nothing. Whoever connects to it waits in the system's queue."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        socket.create_connection(server.getsockname()).close()
        server.accept()[0].close()  # so it would be seen
        server.setblocking(False)
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["wandb", "none"])
def test_a_run_without_an_account_connects_to_nothing(
    logger: str, corpus: Path, tmp_path: Path, proxy: socket.socket
) -> None:
    address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    env = os.environ | dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), address)
    process = spawn(*TINY, f"data.path={corpus}", f"logger={logger}", "max_steps=2", cwd=tmp_path, env=env)
    code, _, err = finish(process)
    assert (code, err) == (0, "")
    with pytest.raises(BlockingIOError):  # nobody
        proxy.accept()


def test_names_out_of_reach_are_replaced_by_running_text(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPTEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.delenv("GPTEXP_DATA", raising=False)
    settings = ["data=names", *TINY[1:], "task.split_seed=7", "max_steps=2", f"hydra.run.dir={tmp_path / 'run'}"]
    assert command(*settings) == 0
    assert capfd.readouterr().out.count("THIS RUN READS ANOTHER TEXT") == 1
    assert command(f"resume={tmp_path / 'run'}", "max_steps=4", "schedule=constant") == 0


def test_the_wandb_run_is_where_its_directory_is_after_a_change_of_folder(
    command: Callable[..., int], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """W&B's own process, which writes the file, stays in the folder that it was started in."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert command(*TINY, f"data.path={corpus}", "logger=wandb", "max_steps=2", "hydra.run.dir=run") == 0
        (file,) = Path("run").glob("wandb/offline-run-*/run-*.wandb")
        assert f"wandb sync {file.parent}\n" in capfd.readouterr().out
