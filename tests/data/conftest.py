"""Every test has a cache of its own and reaches no network."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptexp.config.sections import DataConfig
from gptexp.data.batches import Split
from gptexp.data.corpora import Names, Shakespeare
from gptexp.data.encoding import Encoded
from gptexp.tasks.text import Lines, Text

REAL_DATA = os.environ.get("GPTEXP_DATA")


@pytest.fixture(scope="session")
def nobody() -> Iterator[str]:
    """An address of this machine where nobody listens: it is taken, but no connections are."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nobody: str) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GPTEXP_CACHE", str(folder))
    monkeypatch.delenv("GPTEXP_DATA", raising=False)
    for source in (Shakespeare, Names):
        monkeypatch.setattr(source, "urls", (f"{nobody}/",))
    return folder


@pytest.fixture
def real_file() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        if not REAL_DATA:
            pytest.skip("GPTEXP_DATA is not set")
        return Path(REAL_DATA) / name

    return find


def cut(
    encoded: Encoded, block_size: int, documents: bool = False, val_fraction: float = 0.1, split_seed: int = 1337,
    context: int | None = None,
) -> tuple[Split, Split]:  # fmt: skip
    task = Lines(split_seed=split_seed, context=context) if documents else Text()
    return task.splits(encoded, DataConfig(val_fraction=val_fraction), block_size)
