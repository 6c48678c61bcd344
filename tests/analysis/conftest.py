"""Run directories that never were."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import write_run
from gptexp.analysis.collect import collect
from gptexp.analysis.study import Study, build_study
from gptexp.runs import Run

Write = Callable[..., Run]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run of a norm, a placement and a seed into a sweep, its losses falling to `loss`."""

    count = iter(range(10**6))

    def run(
        loss: float | Sequence[float], seed: int = 1, norm: str = "layernorm", placement: str = "pre", **more: Any
    ) -> Run:
        settings = {"model": {"norm": norm, "placement": placement, **more.pop("model", {})}, "seed": seed}
        settings |= more.pop("settings", {})
        name = more.pop("name", f"{norm}-{placement}-h4-s{seed}")
        folder = more.pop("folder", "sweep")
        losses = [4.0, loss + 0.1, loss] if isinstance(loss, float) else list(loss)
        written = write_run(tmp_path / folder / name, settings, losses, **more)
        written.update(started=f"2026-01-01 {next(count):06d}")  # one after the other
        return written

    return run


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Study]:
    """The study of what was written."""

    def build(*folders: str, **settings: Any) -> Study:
        return build_study(collect([tmp_path / name for name in folders or ("sweep",)]), **settings)

    return build
