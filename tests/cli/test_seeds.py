"""Sweeps that add seeds where they are needed, with real runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp import compare
from tests.conftest import TINY, runs_of

Start = Callable[..., int]
Captured = pytest.CaptureFixture[str]

RATES = "optimizer.learning_rate=0.01,1e-7,0.0101"


@pytest.fixture
def sweep(command: Start, corpus: Path, tmp_path: Path) -> Start:
    """Starts a sweep of the name "auto", of up to four seeds from 1337 on; returns the exit status."""

    def run(*overrides: str) -> int:
        return command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path}", "sweep.name=auto",
                       "sweep.seeds=auto", "sweep.max_seeds=4", *overrides)  # fmt: skip

    return run


def test_seeds_are_added_until_variants_are_decided(
    sweep: Start, command: Start, tmp_path: Path, capfd: Captured
) -> None:
    assert sweep(RATES) == 0
    out, folder = capfd.readouterr().out, tmp_path / "sweeps" / "auto"
    assert "look 1 of 2, after 3 of at most 4 seeds: learning_rate=1e-07 is worse" in out
    runs = runs_of(folder)
    counts = {rate: sum(run.config.optimizer.learning_rate == rate for run in runs.values()) for rate in (0.01, 1e-7)}
    assert counts[1e-7] == 3  # decided, and left alone
    assert {run.config.seed for run in runs.values()} <= {1337, 1338, 1339, 1340}
    assert json.loads((folder / "sweep.json").read_bytes())["looks"] == {"seeds": [1337, 1338, 1339, 1340],
                                                                         "counts": [3, 4]}  # fmt: skip
    before = {name: (run.path / "run.json").read_bytes() for name, run in runs.items()}
    assert sweep(RATES) == 0
    assert {name: (run.path / "run.json").read_bytes() for name, run in runs_of(folder).items()} == before
    capfd.readouterr()
    assert command(str(folder), main=compare.main) == 0
    out = capfd.readouterr().out
    assert "learning_rate=1e-07 is worse than learning_rate=0.01 by" in out
    assert "seeds were added where they were needed (look" in out
    assert sweep(RATES, "sweep.max_seeds=5") == 2
    err = capfd.readouterr().err
    assert "sweep.max_seeds=5: the sweep was planned with the seeds 1337 to 1340; leave them as they were" in err


def test_a_sweep_that_was_stopped_goes_on(sweep: Start, tmp_path: Path) -> None:
    assert sweep(RATES) == 0
    folder = tmp_path / "sweeps" / "auto"
    runs = runs_of(folder)
    lost = next(run for run in runs.values() if run.config.optimizer.learning_rate == 1e-7)
    losses = {name: (run.result or {})["best_val_loss"] for name, run in runs.items()}
    for path in sorted(lost.path.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    lost.path.rmdir()
    assert sweep(RATES) == 0
    assert {name: (run.result or {})["best_val_loss"] for name, run in runs_of(folder).items()} == losses


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["norm=layernorm,rmsnorm", "seed=1,2,3"],
         "seed=1,2,3: sweep.seeds=auto chooses the seeds; leave it out, or give the first alone"),
        (["norm=layernorm,rmsnorm", "sweep.max_seeds=2"], "sweep.max_seeds=2: must be an integer of at least 3"),
        (["norm=layernorm,rmsnorm", "hydra/sweeper=optuna"],
         "sweep.seeds=auto: decides a grid; this sweeper does not"),
        (["norm=layernorm,rmsnorm", "sweep.seeds=five"], "sweep.seeds=five: must be auto or null"),
    ],
)
def test_mistakes(overrides: list[str], line: str, sweep: Start, capfd: Captured) -> None:
    assert sweep(*overrides) == 2
    assert capfd.readouterr().err.splitlines() == [f"error: {line}"]
