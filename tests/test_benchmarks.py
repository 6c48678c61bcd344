"""Each benchmark that needs no peer, as short as it can be, and what is read of a peer."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.nanogpt import NanoGPT
from benchmarks.shared import parts
from tests.conftest import REPOSITORY, TINY, more

SMALL = [setting for setting in TINY if setting != "data=file"]
BENCHMARKS = {
    "overhead": ["--steps=40", "sample_tokens=0"],
    "startup": ["logger=none"],
    "encode": ["--megabytes=1", "--text=README.md"],
    "sweep": ["--jobs=2", "--steps=4", *SMALL],
    "shared": ["--seconds=0.2", "--contestants=OMP_WAIT_POLICY=passive", *SMALL],
    "perf": ["--seconds=0.2", *SMALL],
    "diagnostics": ["--steps=3", *SMALL],
}

PEER = """
print("number of parameters: 0.80M")
print("step 0: train loss 4.1783, val loss 4.1770")
for i in range(7):
    seconds = 900.0 if i in (0, 4) else 40.0 + i  # those with an evaluation
    print(f"iter {i}: loss 4.1713, time {seconds:.2f}ms, mfu -100.00%")
"""


def test_what_the_peer_prints_is_read(tmp_path: Path) -> None:
    """And the time of an evaluation is left out: a usual step counts in its place."""
    checkout = tmp_path / "checkout"
    data = checkout / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    (checkout / "train.py").write_text(PEER)
    (data / "prepare.py").write_text("open('prepared', 'w').write(open('input.txt').read())")
    text = tmp_path / "text.txt"
    text.write_text("to be")
    peer = NanoGPT(checkout, text, tmp_path)
    assert (peer.folder / "data" / "shakespeare_char" / "prepared").read_text() == "to be"
    assert not (data / "prepared").exists()
    lines: list[str] = []
    trained = peer.train("out", lines.append)
    assert len(lines) == 9
    assert list(trained.times) == list(trained.steps) == list(range(7))
    assert trained.training(4) == pytest.approx((45 + 41 + 42 + 43) / 1000)  # 45 ms is the median
    assert trained.training(7) == pytest.approx((45 + 41 + 42 + 43 + 45 + 45 + 46) / 1000)


def test_beside_a_peer_the_work_stays_the_same(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.throughput", f"--peer={tmp_path}", "hardware.threads=2",
                           "model.n_layer=1"], cwd=REPOSITORY, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "model.n_layer=1: beside a peer only settings of hardware and logger are allowed" in done.stderr


def test_a_contestant_is_made_of_environment_and_settings() -> None:
    assert parts("default") == ({}, [])
    assert parts("GOMP_SPINCOUNT=300+hardware.threads=2") == ({"GOMP_SPINCOUNT": "300"}, ["hardware.threads=2"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n == "encode" else more(n) for n in BENCHMARKS])
def test_a_benchmark_writes_its_figures(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds=1", f"--out={tmp_path / 'figures.json'}"]
    command += BENCHMARKS[name] if name == "encode" else [*BENCHMARKS[name], "data=pydocs"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
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
