"""The logger that writes a run's metrics.csv."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gptexp.runs.files import METRICS, append_rows

WHOLE = ("step", "tokens")  # columns of whole numbers


class MetricsCSV(Logger):
    """One row per step, with the columns of `METRICS` and `more`; other metrics are left to other loggers.

    What is logged for one step, before and after its evaluation, becomes one row. A row is written once `flush` is
    called or another step begins. Metrics that are already in the file may be logged again: Lightning hands out a
    step's metrics after its callbacks, and a checkpoint must not count a row that is still to come.

    Args:
        path: of the file; rows are appended.
        more: further columns.

    Attributes:
        row: the row that is not in the file yet, by column.
    """

    def __init__(self, path: Path, *more: str) -> None:
        super().__init__()
        self.path, self.columns = path, (*METRICS, *more)
        self.row: dict[str, float] = {}
        self._written: dict[str, float] = {}

    @property
    def name(self) -> str:
        """Empty, so that callbacks keep their files in the run directory itself."""
        return ""

    version = name

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of a step."""
        row = {k: float(metrics[k]) for k in self.columns if k in metrics} | {"step": float(step or 0)}
        again = row["step"] == self._written.get("step") and row.keys() <= self._written.keys()
        if len(row) == 1 or again:
            return
        if self.row and self.row["step"] != row["step"]:
            self.flush()
        self.row = row | self.row  # the first value stays: the seconds of training, not those of the evaluation

    @rank_zero_only
    def flush(self) -> None:
        """Write the open row, if there is one."""
        if len(self.row) > 1:
            append_rows(self.path, self.columns, [{k: int(v) if k in WHOLE else v for k, v in self.row.items()}])
            self._written, self.row = self.row, {}
