"""What the tests of training share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp.errors import RunFailed
from gptexp.processes.group import processes
from gptexp.runs.run import Run
from gptexp.training.launch import start
from tests.conftest import failing


@pytest.fixture
def killed(tiny: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Trains a tiny run that fails after a step, and then goes on with it to its end."""

    def run(name: str, step: int, *overrides: str) -> Run:
        with failing(step), pytest.raises(RunFailed, match="in the middle"):
            tiny(name, *overrides)
        start(Run.open(tmp_path / name), processes())
        return Run.open(tmp_path / name)

    return run
