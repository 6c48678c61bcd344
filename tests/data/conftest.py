"""Every test has a cache of its own and reaches no network."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gptexp.data import corpora

REAL_DATA = os.environ.get("GPTEXP_DATA")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GPTEXP_CACHE", str(folder))
    monkeypatch.delenv("GPTEXP_DATA", raising=False)
    refusing = ("http://127.0.0.1:9/",)  # the discard port, where nobody listens
    for name, source in list(corpora.SOURCES.items()):
        monkeypatch.setitem(corpora.SOURCES, name, replace(source, urls=refusing))
    return folder


@pytest.fixture
def real_file() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        if not REAL_DATA:
            pytest.skip("GPTEXP_DATA is not set")
        return Path(REAL_DATA) / name

    return find
