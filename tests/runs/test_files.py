"""The files that grow while a run trains: written, cut back, and read again."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptexp.errors import UserError
from gptexp.runs.files import METRICS, append_rows, append_sample, cut, last_row, read_metrics, read_samples


def test_the_last_row_is_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert (last_row(path), read_metrics(path)) == ({}, [])
    rows = ["", "step,tokens,mfu\n", "0,0,\n", "10,60,0.5\n", "20,120,0.25"]
    told = [{}, {}, {"step": 0, "tokens": 0}, *[{"step": 10, "tokens": 60, "mfu": 0.5}] * 2]
    for row, last in zip(rows, told, strict=True):
        with path.open("a") as file:
            file.write(row)
        assert last_row(path) == last


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=8), st.integers(0, 7))
def test_metrics_are_cut_back_and_written_again_to_the_same_bytes(values: list[float], keep: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.csv"
        rows, sizes = [{"step": i, ("train/loss", "val/loss")[i % 2]: v} for i, v in enumerate(values)], [0]
        for row in rows:
            append_rows(path, METRICS, [row])
            sizes.append(path.stat().st_size)
        content, keep = path.read_bytes(), keep % (len(rows) + 1)
        cut(path, sizes[keep])
        append_rows(path, METRICS, rows[keep:])
        assert path.read_bytes() == content
        assert read_metrics(path) == rows


def test_a_file_that_has_lost_rows_is_not_filled_up(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step\n1\n")
    with pytest.raises(UserError, match="holds 7 bytes, and 8 at the last checkpoint"):
        cut(path, 8)
    assert path.read_text() == "step\n1\n"


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=30), max_size=5))
def test_samples_come_back_as_they_were(texts: list[str]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "samples.txt"
        for step, text in enumerate(texts):
            append_sample(path, step, text)
        assert read_samples(path) == list(enumerate(texts))
