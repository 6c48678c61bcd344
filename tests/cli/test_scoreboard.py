"""The live table of a sweep, over directories in every state."""

import io
import os
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.compare import write_run
from gptexp.scoreboard import Scoreboard
from gptexp.sweeps import Sweep

NAMES = ["a-s1", "b-s1", "c-s1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, status, loss in zip(NAMES, ("done", "running", "running"), (2.5, 2.4, 2.3), strict=True):
        run = write_run(tmp_path / name, {"max_steps": 4}, [4.0, 3.0, loss])
        run.update(status=status)
        if status == "running":
            (run.path / "result.json").unlink()
    return tmp_path


def board(folder: Path) -> Scoreboard:
    return Scoreboard(Sweep(folder), NAMES, Console(file=io.StringIO(), width=120))


def shown(board: Scoreboard) -> str:
    board._poll()
    with board.console.capture() as capture:
        board.console.print(board.render())
    return capture.get()


def test_it_shows_what_is_done_running_and_best(folder: Path) -> None:
    text = shown(board(folder))
    assert "3 jobs · 1 done · 2 running · 0 failed" in text
    assert text.count("step ") == 2
    assert text.split()[-5:] == ["a-s1", "1.", "done", "val/loss", "2.5000"]
    long_ago = time.time() - 3600
    for file in ("run.json", "metrics.csv"):  # what a killed process left
        os.utime(folder / "b-s1" / file, (long_ago, long_ago))
    assert "1 done · 1 running" in shown(board(folder))


@pytest.mark.parametrize("broken", ["gone", "no config", "half a config", "no status", "half a run.json", "no rows"])
def test_a_directory_that_goes_or_is_not_whole_does_not_stop_it(folder: Path, broken: str) -> None:
    path = folder / "b-s1"
    table = board(folder)
    assert "2 running" in shown(table)
    match broken:
        case "gone":
            shutil.rmtree(path)
        case "no config":
            (path / "config.yaml").unlink()
        case "half a config":
            (path / "config.yaml").write_text("max_steps: 4\nmodel: {n_la")
        case "no status":
            (path / "run.json").write_text("{}")
        case "half a run.json":
            (path / "run.json").write_text('{"status": "run')
        case "no rows":
            (path / "metrics.csv").write_text("")
    assert "1 done" in shown(table)
    assert f"{2 if broken == 'no rows' else 1} running" in shown(table)


def test_without_a_terminal_each_job_that_ends_is_a_line(folder: Path) -> None:
    with board(folder) as table:
        assert isinstance(table.console.file, io.StringIO)
        out = table.console.file
        # the job ends while the board watches
        write_run(folder / "d", {"max_steps": 4}, [4.0, 2.2])
        shutil.rmtree(folder / "b-s1")
        (folder / "d").rename(folder / "b-s1")
    assert "1 of 3 jobs are done already" in out.getvalue()
    assert "[2/3] done b-s1 · val/loss 2.2000 · best 2.2000 b-s1" in out.getvalue()
