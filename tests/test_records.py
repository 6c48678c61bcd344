"""The files that grow while a run trains, read back."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from gptexp.analysis.collect import evaluations
from gptexp.records import METRICS, TIMES, Table, last_row, read_metrics


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["", "val/loss", "val/loss_windows", "both"])), max_size=8))
def test_evaluations_are_those_of_all_rows(kinds: list[tuple[bool, str]]) -> None:
    """Of rows with and without training, with one loss, the other, both or none; as `read_metrics` finds them."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "metrics.csv")
        table = Table(path, METRICS)
        for step, (trained, loss) in enumerate(kinds):
            row = {"step": step, "tokens": step} | dict.fromkeys(METRICS[2:5] + TIMES if trained else (), step + 0.5)
            row |= {k: 2.0 + step for k in ("val/loss", "val/loss_windows") if loss in (k, "both")}
            row |= {"val/bpc": 1.0, "val/accuracy": 0.5} if loss in ("val/loss", "both") else {}
            table.append(row)
        table.close()
        expected: list[list[tuple[float, ...]]] = [[], []]
        seconds = 0.0
        for row in read_metrics(path):
            seconds = row.get("seconds", seconds)
            for losses, key in zip(expected, ("val/loss", "val/loss_windows"), strict=True):
                if key in row:
                    losses.append((row["step"], row["tokens"], seconds, row[key]))
        found = [evaluations(read_metrics(path), loss) for loss in ("val/loss", "val/loss_windows")]
        assert [list(table.itertuples(index=False, name=None)) for table in found] == expected


def test_the_last_row_is_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert (last_row(path), read_metrics(path)) == ({}, [])
    rows = ["", "step,tokens,mfu\n", "0,0,\n", "10,60,0.5\n", "20,120,0.25"]
    told = [{}, {}, {"step": 0, "tokens": 0}, *[{"step": 10, "tokens": 60, "mfu": 0.5}] * 2]
    for row, last in zip(rows, told, strict=True):
        with path.open("a") as file:
            file.write(row)
        assert last_row(path) == last
