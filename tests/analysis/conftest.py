"""Run directories that never were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptexp.analysis.collect import collect
from gptexp.analysis.study import Study, build_study
from gptexp.runs.run import Run

Write = Callable[..., Run]


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Study]:
    """The study of what was written."""

    def build(*folders: str, **settings: Any) -> Study:
        return build_study(collect([tmp_path / name for name in folders or ("sweep",)]), **settings)

    return build
