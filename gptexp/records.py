"""The files of a run that grow while it trains: metrics.csv, diagnostics.csv and samples.txt."""

import csv
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gptexp.errors import UserError

METRICS = (
    "step", "tokens", "train/loss", "learning_rate", "grad_norm",
    "val/loss", "val/loss_windows", "val/perplexity", "val/accuracy", "val/bpc",
    "seconds", "tokens_per_second", "mfu",
)  # fmt: skip
"""Columns of metrics.csv. The last three are times and differ from machine to machine; nothing else does."""

TIMES = METRICS[-3:]


class Measurement(NamedTuple):
    """A row of diagnostics.csv.

    Attributes:
        step: optimizer steps done before.
        layer: name of the module in the model, "embedding" for what enters the first layer.
        quantity: what was measured; see `gptexp.training.callbacks.diagnostics`.
        value: of it.
    """

    step: int
    layer: str
    quantity: str
    value: float


class Table:
    """A CSV file to which rows are only ever appended, each at once and whole.

    Args:
        path: of the file; a new one gets a header.
        columns: of the table.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.columns = columns
        self._file = path.open("ab")
        if self._file.tell() == 0:
            self._line(columns)

    def append(self, row: Mapping[str, float | str]) -> None:
        """Write a row; columns that it lacks stay empty."""
        cells = (row.get(c, "") for c in self.columns)
        self._line([cell if isinstance(cell, str) else repr(cell) for cell in cells])

    def _line(self, cells: Sequence[str]) -> None:
        self._file.write((",".join(cells) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv; each holds the columns that have a value in it. A half-written row is left out."""
    header, rows = _read_table(path)
    return [{k: float(v) for k, v in zip(header, row, strict=True) if v} for row in rows]


def last_row(path: Path) -> dict[str, float]:
    """The last row of a metrics.csv, as far as it is written; empty while there is none."""
    try:
        with path.open("rb") as file:
            header = file.readline().decode().rstrip("\n").split(",")
            file.seek(max(file.tell(), path.stat().st_size - 1000))
            rows = file.read().decode().splitlines(keepends=True)
    except OSError:
        return {}
    whole = [cells for row in rows if row.endswith("\n") and len(cells := row.rstrip("\n").split(",")) == len(header)]
    return {k: float(v) for k, v in zip(header, whole[-1], strict=True) if v} if whole else {}


Evaluations = list[tuple[float, float, float, float]]


def read_evaluations(path: Path, losses: Sequence[str]) -> list[Evaluations]:
    """Step, tokens, seconds of training and loss, for each loss of the rows of a metrics.csv that have it, if finite.

    An evaluation that stands between two rows of training has the seconds of the first. A half-written row is left out.
    Faster than `read_metrics`: only the numbers that are asked for are read.
    """
    found: list[Evaluations] = [[] for _ in losses]
    header, rows = _read_table(path)
    if not rows:
        return found
    step, tokens, time, *columns = map(header.index, ("step", "tokens", "seconds", *losses))
    seconds = "0"
    for row in rows:
        seconds = row[time] or seconds
        for evaluations, column in zip(found, columns, strict=True):
            if row[column] and math.isfinite(loss := float(row[column])):
                evaluations.append((float(row[step]), float(row[tokens]), float(seconds), loss))
    return found


def read_diagnostics(path: Path) -> list[Measurement]:
    """The rows of a diagnostics.csv, oldest first. A half-written row is left out."""
    return [Measurement(int(step), layer, name, float(value)) for step, layer, name, value in _read_table(path)[1]]


def _read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    header = rows[0] if rows else []
    return header, [row for row in rows[1:] if len(row) == len(header)]


def append_sample(path: Path, step: int, text: str) -> None:
    """Add a text to samples.txt under a heading with its step."""
    with path.open("ab") as file:
        file.write(f"--- step {step} ---\n{text}\n\n".encode())


def read_samples(path: Path) -> list[tuple[int, str]]:
    """The steps and texts of a samples.txt, oldest first; none if there is no file."""
    text = path.read_bytes().decode() if path.exists() else ""
    parts = re.split(r"^--- step (\d+) ---\n", text, flags=re.MULTILINE)[1:]
    return [(int(step), body[:-2]) for step, body in zip(parts[::2], parts[1::2], strict=True)]
