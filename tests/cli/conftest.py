"""What the tests of the command line share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp.runs.run import Run
from tests.conftest import TINY


@pytest.fixture
def tiny(command: Callable[..., int], corpus: Path, tmp_path: Path) -> Callable[..., Run]:
    """Trains a tiny run by the command, in this process, with more overrides, and returns it."""

    def run(name: str, *overrides: str) -> Run:
        assert command(*TINY, f"data.path={corpus}", f"hydra.run.dir={tmp_path / name}", *overrides) == 0
        return Run.open(tmp_path / name)

    return run
