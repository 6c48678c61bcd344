"""Run directories: claimed once, written whole, cut back exactly."""

import json
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptexp.config import Config
from gptexp.errors import UserError
from gptexp.records import METRICS, Table, append_sample, cut, read_metrics, read_samples
from gptexp.runs import Run, code_fingerprint, unfinished, write_atomically


def claim(folder: Path, **info: object) -> Run:
    return Run.claim(folder / "run", Config(), info)


def _claim_path(folder: Path) -> str:
    return str(claim(folder).path)


def test_processes_never_share_a_directory(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        paths = pool.map(_claim_path, [tmp_path] * 12)
    assert len(set(paths)) == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["run", *(f"run-{n}" for n in range(2, 13))])


def test_the_newest_unfinished_run_of_a_configuration(tmp_path: Path) -> None:
    fingerprints = {"config": "f"}
    claim(tmp_path, fingerprints=fingerprints).update(started="2030-01-01", status="done")
    claim(tmp_path, fingerprints=fingerprints).update(started="2020-01-01", status="interrupted")
    newest = claim(tmp_path, fingerprints=fingerprints)
    newest.update(started="2025-01-01", status="running")
    claim(tmp_path, fingerprints={"config": "other"}).update(started="2029-01-01")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    found = unfinished(tmp_path, "f")
    assert found is not None
    assert found.path == newest.path
    assert unfinished(tmp_path, "g") is None
    assert unfinished(tmp_path / "nowhere", "f") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_torn_run_json_is_a_users_error(content: str, tmp_path: Path) -> None:
    run = claim(tmp_path)
    (run.path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json"):
        Run.open(run.path)


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text, not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=8), st.integers(0, 7))
def test_metrics_are_cut_back_and_written_again_to_the_same_bytes(values: list[float], keep: int) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.csv"
        rows = [{"step": i, "train/loss": v} for i, v in enumerate(values)]
        whole, sizes = Table(path, METRICS), []
        for row in rows:
            whole.append(row)
            sizes.append(path.stat().st_size)
        whole.close()
        content, keep = path.read_bytes(), keep % (len(rows) + 1)
        cut(path, sizes[keep - 1] if keep else 0)
        again = Table(path, METRICS)
        for row in rows[keep:]:
            again.append(row)
        again.close()
        assert path.read_bytes() == content
        assert [row["train/loss"] for row in read_metrics(path)] == values


def test_a_file_that_has_lost_rows_is_not_filled_up(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step\n1\n")
    with pytest.raises(UserError, match="holds 7 bytes, and 8 at the last checkpoint"):
        cut(path, 8)
    assert path.read_text() == "step\n1\n"


def test_a_half_written_row_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(",".join(METRICS) + "\n0,0" + "," * (len(METRICS) - 2) + "\n10,6")
    assert read_metrics(path) == [{"step": 0.0, "tokens": 0.0}]


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=30), max_size=5))
def test_samples_come_back_as_they_were(texts: list[str]) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "samples.txt"
        for step, text in enumerate(texts):
            append_sample(path, step, text)
        assert read_samples(path) == list(enumerate(texts))


def test_result_is_json(tmp_path: Path) -> None:
    run = claim(tmp_path)
    assert run.result is None
    run.write_result({"best_val_loss": 1.5})
    assert json.loads((run.path / "result.json").read_text()) == run.result == {"best_val_loss": 1.5}


def test_the_code_has_a_fingerprint() -> None:
    assert code_fingerprint(Config()) == code_fingerprint(Config())
    assert len(code_fingerprint(Config())) == 64
