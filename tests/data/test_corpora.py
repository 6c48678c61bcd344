import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gptexp.config.sections import DataConfig
from gptexp.data import corpora
from gptexp.data.corpora import Names, find_corpus
from gptexp.errors import UserError
from gptexp.registry import CORPORA

TEXT = b"emma\nolivia\nava"
NAMES = DataConfig(name="names")


class Server:
    """A web server on this machine: `pages` maps a path to (status, body), `hits` are the paths asked for."""

    def __init__(self, http: ThreadingHTTPServer) -> None:
        self.pages: dict[str, tuple[int, bytes]] = {}
        self.hits: list[str] = []
        self.url = f"http://127.0.0.1:{http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.hits.append(self.path)
            status, body = server.pages.get(self.path, (404, b""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server = Server(http)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        http.shutdown()
        thread.join()


@pytest.fixture
def names_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def publish(*urls: str) -> None:
        monkeypatch.setattr(Names, "sha256", hashlib.sha256(TEXT).hexdigest())
        monkeypatch.setattr(Names, "urls", urls)

    return publish


def problem_of(config: DataConfig) -> str:
    """The one line that finding this corpus fails with."""
    with pytest.raises(UserError) as caught:
        find_corpus(config)
    [problem] = caught.value.problems
    assert "\n" not in problem
    return problem


def test_download_and_then_the_cache(server, names_at, cache, capfd):
    server.pages["/names"] = (200, TEXT)
    names_at(f"{server.url}/names")
    for _ in range(2):
        corpus = find_corpus(NAMES)
        assert (corpus.name, corpus.requested) == ("names", "names")
        assert corpus.path == cache / "names.txt"
        assert corpus.path.read_bytes() == TEXT
        assert corpus.sha256 == hashlib.sha256(TEXT).hexdigest()
    assert server.hits == ["/names"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("first", [(200, b"<html>log in to the network</html>"), (200, TEXT[:-1]), (500, b"")])
def test_mirror_takes_over(server, names_at, first):
    server.pages.update({"/first": first, "/mirror": (200, TEXT)})
    names_at(f"{server.url}/first", f"{server.url}/mirror")
    assert find_corpus(NAMES).path.read_bytes() == TEXT
    assert server.hits == ["/first", "/mirror"]


def test_every_address_fails_with_its_reason(server, names_at, cache, nobody):
    server.pages["/wrong"] = (200, b"something else")
    names_at(f"{server.url}/wrong", f"{server.url}/gone", f"{nobody}/names")
    problem = problem_of(DataConfig(name="names", offline_fallback=None))
    assert problem.startswith("data.name=names: names.txt could not be downloaded")
    for reason in ("/wrong: wrong SHA-256", "/gone: HTTP status 404", f"{nobody}/names: no connection"):
        assert reason in problem
    for remedy in ("set GPTEXP_DATA to a folder", "data=pydocs", "data=file data.path="):
        assert remedy in problem
    assert not (cache / "names.txt").exists()


def test_server_that_does_not_answer(names_at, monkeypatch):
    monkeypatch.setattr(corpora, "TIMEOUT", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:  # takes the call, never speaks
        names_at(f"http://127.0.0.1:{silent.server_port}/names")
        with pytest.raises(UserError, match=r"no answer within 0\.2 seconds"):
            find_corpus(DataConfig(name="names", offline_fallback=None))


def test_fallback_says_so_and_is_running_text(caplog, cache):
    corpus = find_corpus(NAMES)
    assert (corpus.name, corpus.requested) == ("pydocs", "names")
    assert corpus.path.parent == cache
    [record] = caplog.records
    assert (record.name, record.levelno) == ("gptexp", logging.WARNING)
    assert "THIS RUN READS ANOTHER TEXT" in record.getMessage()
    assert "GPTEXP_DATA" in record.getMessage()


def test_pydocs_is_a_long_clean_text():
    corpus = find_corpus(DataConfig(name="pydocs"))
    assert (corpus.name, corpus.requested) == ("pydocs", "pydocs")
    text = corpus.path.read_text(encoding="utf-8")
    assert len(text) > 300_000
    assert all(line == line.rstrip() for line in text.split("\n"))
    assert corpus.sha256 == hashlib.sha256(corpus.path.read_bytes()).hexdigest()
    corpus.path.write_text("tampered")
    assert find_corpus(DataConfig(name="pydocs")) == corpus
    assert corpus.path.read_text(encoding="utf-8") == text


def test_data_folder_comes_before_the_network(server, names_at, cache, tmp_path, monkeypatch):
    names_at(f"{server.url}/names")
    (tmp_path / "names.txt").write_bytes(TEXT)
    monkeypatch.setenv("GPTEXP_DATA", str(tmp_path))
    assert find_corpus(NAMES).path == tmp_path / "names.txt"
    assert server.hits == []
    assert not cache.exists()


def test_damaged_files_are_passed_over_and_the_cached_one_replaced(server, names_at, cache, monkeypatch, caplog):
    given = cache.parent
    server.pages["/names"] = (200, TEXT)
    names_at(f"{server.url}/names")
    cache.mkdir()
    for folder in (cache, given):
        (folder / "names.txt").write_bytes(TEXT + b"\n")
    monkeypatch.setenv("GPTEXP_DATA", str(given))
    assert find_corpus(NAMES).path == cache / "names.txt"
    assert (cache / "names.txt").read_bytes() == TEXT
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in messages] == [str(f / "names.txt") for f in (cache, given)]
    assert all("wrong SHA-256" in message and "\n" not in message for message in messages)


def test_data_folder_that_is_not_there(names_at, server, tmp_path, monkeypatch, caplog):
    server.pages["/names"] = (200, TEXT)
    names_at(f"{server.url}/names")
    monkeypatch.setenv("GPTEXP_DATA", str(tmp_path / "nowhere"))
    find_corpus(NAMES)
    assert "no such folder" in caplog.text


def test_cache_that_cannot_be_written(names_at, server, tmp_path, monkeypatch):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("GPTEXP_CACHE", str(blocked / "cache"))
    server.pages["/names"] = (200, TEXT)
    names_at(f"{server.url}/names")
    for config in (NAMES, DataConfig(name="pydocs")):
        assert problem_of(config).startswith(f"GPTEXP_CACHE={blocked / 'cache'}: cannot be written (")
    (tmp_path / "names.txt").write_bytes(TEXT)
    monkeypatch.setenv("GPTEXP_DATA", str(tmp_path))
    assert find_corpus(NAMES).path == tmp_path / "names.txt"


def test_a_file_of_ones_own(tmp_path: Path):
    path, empty = tmp_path / "mine.txt", tmp_path / "empty.txt"
    empty.touch()
    for wrong, problem in ((path, "no such file"), (empty, "empty"), (tmp_path, "holds no file that is not")):
        line = problem_of(DataConfig(name="file", path=str(wrong)))
        assert line.startswith(f"data.path={wrong}: {problem}")
    path.write_bytes(b"a\r\nb")
    corpus = find_corpus(DataConfig(name="file", path=str(path)))
    assert corpus == corpora.Corpus("file", "file", path, hashlib.sha256(b"a\r\nb").hexdigest())


@pytest.mark.parametrize("name", ["shakespeare", "names"])
def test_the_real_files_have_the_published_bytes(name, real_file, monkeypatch):
    path = real_file(CORPORA[name].made.file)
    monkeypatch.setenv("GPTEXP_DATA", str(path.parent))
    assert find_corpus(DataConfig(name=name, offline_fallback=None)).path == path
