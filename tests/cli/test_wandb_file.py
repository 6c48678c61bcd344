"""The tests' own reader of W&B's files, on a file that is still being written."""

from pathlib import Path

import pytest
import wandb

from tests.cli.wandb_file import Record, read_run, read_so_far

ROWS = 60


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose records do not fit into one block."""
    folder = tmp_path_factory.mktemp("wandb")
    run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True))
    for step in range(ROWS):
        run.log({"step": step, "text": "x" * 1000})
    run.finish(exit_code=0)
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return path


def test_a_whole_file(file: Path) -> None:
    record = read_run(file)
    assert record.exit_code == 0
    assert [row["step"] for row in record.history] == list(range(ROWS))
    assert file.stat().st_size > 2**15


@pytest.mark.parametrize("rest", [b"", bytes(5000)])  # a file may be longer than what is written of it
def test_a_file_in_the_making_holds_its_beginning(file: Path, rest: bytes, tmp_path: Path) -> None:
    content, rows = file.read_bytes(), []
    for size in range(0, len(content), 97):  # in the middle of a header, a chunk, a padding
        part = tmp_path / "part.wandb"
        part.write_bytes(content[:size] + rest)
        found: Record = read_so_far(part)
        assert [row["step"] for row in found.history] == list(range(len(found.history)))
        assert found.exit_code is None or len(found.history) == ROWS
        rows.append(len(found.history))
    assert rows == sorted(rows)
    assert {0, ROWS} <= set(rows)


def test_a_file_without_an_end(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cli.wandb_file.PATIENCE", 0)
    part = tmp_path / "part.wandb"
    part.write_bytes(file.read_bytes()[:20000])
    with pytest.raises(TimeoutError, match="no end"):
        read_run(part)
