"""How a sweep sees its jobs when their files are not as they were written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp.runs import Run
from gptexp.sweeps import Sweep
from tests.conftest import TINY, timeless


@pytest.mark.parametrize("torn", [b"", b'{"best_val_loss": 3.', b"\xff\x00", b"[]"])
def test_a_torn_result_is_a_failure_that_names_the_file(torn: bytes, write: Callable[..., Run]) -> None:
    run = write(2.0)
    sweep = Sweep(run.path.parent)
    assert sweep.standing(run.path.name).state == "done"
    (run.path / "result.json").write_bytes(torn)
    standing = sweep.standing(run.path.name)
    assert standing.state == "failed"
    assert standing.error == f"{run.path / 'result.json'} is not whole"
    assert not sweep.is_final(run.path.name)


def test_the_same_command_writes_a_torn_result_anew(
    command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ["-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path}", "sweep.name=mine", "seed=1,2"]
    assert command(*settings) == 0
    table = capfd.readouterr().out.partition("--- ")[2]
    runs = [Run.open(path.parent) for path in (tmp_path / "sweeps" / "mine").glob("*/run.json")]
    before = [(timeless(run), run.result) for run in runs]
    (runs[0].path / "result.json").write_bytes(b'{"best')
    assert command(*settings) == 0
    assert capfd.readouterr().out.partition("--- ")[2] == table
    assert [(timeless(run), run.result) for run in runs] == before
