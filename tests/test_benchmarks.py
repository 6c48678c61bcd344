"""Each benchmark that needs no peer, as short as it can be: it ends, prints its table and writes its figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY

BENCHMARKS = {
    "overhead": ["--steps=40", "sample_tokens=0", "data=pydocs"],
    "startup": ["data=pydocs", "logger=none"],
    "encode": ["--megabytes=1", "--text=README.md"],
    "sweep": ["--jobs=2", "--steps=4", *(s for s in TINY if s != "data=file"), "data=pydocs"],
    "diagnostics": ["--steps=3", *(s for s in TINY if s != "data=file"), "data=pydocs"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_writes_its_figures(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds=1", f"--out={tmp_path / 'figures.json'}"]
    done = subprocess.run([*command, *BENCHMARKS[name]], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "┏" in done.stdout
    figures = numbers(json.loads((tmp_path / "figures.json").read_text()))
    assert figures
    assert all(math.isfinite(f) for f in figures)


def numbers(tree: object) -> list[float]:
    """All numbers in a JSON tree."""
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in numbers(value)]
    if isinstance(tree, list):
        return [n for value in tree for n in numbers(value)]
    return [float(tree)] if isinstance(tree, int | float) else []
