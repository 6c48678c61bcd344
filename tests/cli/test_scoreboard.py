"""The live table of a sweep, over directories in every state."""

import io
import os
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console

from gptexp.sweeps.live_table import Scoreboard
from gptexp.sweeps.sweep import Sweep, summary
from tests.synthetic import write_run

NAMES = ["a-s1", "b-s1", "c-s1"]


@pytest.fixture
def board(tmp_path: Path) -> Scoreboard:
    for name, status, loss in zip(NAMES, ("done", "running", "running"), (2.5, 2.4, 2.3), strict=True):
        run = write_run(tmp_path / name, {"max_steps": 4}, [4.0, 3.0, loss])
        run.update(status=status)
        if status == "running":
            (run.path / "result.json").unlink()
    return Scoreboard(Sweep(tmp_path), NAMES, Console(file=io.StringIO(), width=120))


def shown(board: Scoreboard) -> str:
    with board.console.capture() as capture:
        board.console.print(board.look())
    return capture.get()


def test_it_shows_what_is_done_running_and_best(board: Scoreboard, tmp_path: Path) -> None:
    text = shown(board)
    assert "3 jobs · 1 done · 2 running · 0 failed" in text
    assert text.count("step ") == 2
    assert text.split()[-5:] == ["a-s1", "1.", "done", "val/loss", "2.5000"]
    long_ago = time.time() - 3600
    for file in ("run.json", "metrics.csv"):  # what a killed process left
        os.utime(tmp_path / "b-s1" / file, (long_ago, long_ago))
    assert "1 done · 1 running" in shown(board)


@pytest.mark.parametrize(("file", "content"), [
    ("", None), ("config.yaml", None), ("config.yaml", "max_steps: 4\nmodel: {n_la"), ("run.json", "{}"),
    ("run.json", '{"status": "run'), ("metrics.csv", ""),
])  # fmt: skip
def test_a_directory_that_goes_or_is_not_whole_does_not_stop_it(
    file: str, content: str | None, board: Scoreboard, tmp_path: Path
) -> None:
    assert "2 running" in shown(board)
    path = tmp_path / "b-s1" / file
    if content is not None:
        path.write_text(content)
    elif file:
        path.unlink()
    else:
        shutil.rmtree(path)
    assert f"1 done · {2 if file == 'metrics.csv' else 1} running" in shown(board)


def test_without_a_terminal_each_job_that_ends_is_a_line(board: Scoreboard, tmp_path: Path) -> None:
    with board:
        assert isinstance(board.console.file, io.StringIO)
        out = board.console.file
        # the job ends while the board watches
        write_run(tmp_path / "d", {"max_steps": 4}, [4.0, 2.2])
        shutil.rmtree(tmp_path / "b-s1")
        (tmp_path / "d").rename(tmp_path / "b-s1")
    assert "1 of 3 jobs are done already" in out.getvalue()
    assert "[2/3] done b-s1 · val/loss 2.2000 · best 2.2000 b-s1" in out.getvalue()


def test_jobs_with_different_vocabularies_are_ranked_by_bits_per_character(tmp_path: Path) -> None:
    for name, characters in (("a", 1.0), ("b", 3.0)):
        write_run(tmp_path / name, {"max_steps": 4}, [4.0, 2.0 + characters / 2], chars_per_token=characters)
    sweep = Sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"settings": {}, "jobs": ["a", "b"], "swept": ["data.tokenizer"]}')
    text = shown(Scoreboard(sweep, ["a", "b"], Console(file=io.StringIO(), width=120)))
    assert text.split()[-10:] == ["b", "1.", "done", "val/bpc", "1.6831", "a", "2.", "done", "val/bpc", "3.6067"]
    assert summary([sweep.standing(name) for name in ("a", "b")], sweep.measure).split("\n") == [
        "--- 2 jobs, best val/bpc first", "    1.6831  b", "    3.6067  a"
    ]  # fmt: skip
