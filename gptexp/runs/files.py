"""The files that grow while a run trains: metrics.csv, diagnostics.csv and samples.txt."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gptexp.errors import UserError

METRICS = (
    "step", "tokens", "train/loss", "learning_rate", "grad_norm",
    "val/loss", "val/loss_windows", "val/perplexity", "val/accuracy", "val/bpc",
    "seconds", "tokens_per_second", "mfu",
)  # fmt: skip
"""Columns of metrics.csv. The last three depend on time, so they differ from run to run; the others do not."""

TIMES = METRICS[-3:]

EXACT_MATCH = "val/exact_match"
"""A further column, of tasks whose rows are right or wrong as a whole."""


class Measurement(NamedTuple):
    """A row of diagnostics.csv."""

    step: int  # optimizer steps done before
    layer: str  # name of the module in the model, "embedding" for what enters the first layer
    quantity: str  # what was measured; see `gptexp.training.callbacks.diagnostics`
    value: float  # of it


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, float | str]]) -> None:
    """Append rows to a CSV file, in one write; a new file gets a header, and columns that a row lacks stay empty."""
    with path.open("ab") as file:
        lines = [] if file.tell() else [",".join(columns)]
        for row in rows:
            cells = (row.get(column, "") for column in columns)
            lines.append(",".join(cell if isinstance(cell, str) else repr(cell) for cell in cells))
        file.write("".join(f"{line}\n" for line in lines).encode())


def cut(path: Path, size: int) -> None:
    """Cut a file back to a length.

    Raises:
        UserError: when it is shorter: it would be filled up with zeros.
    """
    held = path.stat().st_size if path.exists() else 0
    if held < size:
        raise UserError(f"{path}: holds {held} bytes, and {size} at the last checkpoint; the run cannot be resumed")
    if held > size:
        os.truncate(path, size)


def read_metrics(path: Path, columns: Sequence[str] = (*METRICS, EXACT_MATCH)) -> list[dict[str, float]]:
    """The rows of a metrics.csv, each with the columns that have a value; no rows while there is no file."""
    header, *rows = _read_table(path) if path.exists() else [[]]
    wanted = [(place, name) for place, name in enumerate(header) if name in columns]
    return [{name: float(row[place]) for place, name in wanted if row[place]} for row in rows]


def last_row(path: Path) -> dict[str, float]:
    """The last row of a metrics.csv; empty while there is none."""
    return (read_metrics(path) or [{}])[-1]


def read_diagnostics(path: Path) -> list[Measurement]:
    """The rows of a diagnostics.csv, oldest first."""
    return [Measurement(int(step), layer, name, float(value)) for step, layer, name, value in _read_table(path)[1:]]


def _read_table(path: Path) -> list[list[str]]:
    """The header of a table and its whole rows; the last one may be half written."""
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").split("\n")[:-1]] or [[]]
    return [row for row in rows if len(row) == len(rows[0])]


def append_sample(path: Path, step: int, text: str) -> None:
    """Add a text to samples.txt under a heading with its step."""
    with path.open("ab") as file:
        file.write(f"--- step {step} ---\n{text}\n\n".encode())


def read_samples(path: Path) -> list[tuple[int, str]]:
    """The steps and texts of a samples.txt, oldest first; none if there is no file."""
    text = path.read_bytes().decode() if path.exists() else ""
    parts = re.split(r"^--- step (\d+) ---\n", text, flags=re.MULTILINE)[1:]
    return [(int(step), body[:-2]) for step, body in zip(parts[::2], parts[1::2], strict=True)]
