"""Where metrics go besides metrics.csv: Weights & Biases, TensorBoard, or nowhere."""

import os
import uuid
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from gptexp.config import Config
from gptexp.runs import Run
from gptexp.training.settings import TensorBoardConfig, WandbConfig
from gptexp.training.wandb_process import WandbProcess, request, wandb_process


class WandbRun(Logger):
    """A W&B run, in W&B's process; it may open while this one goes on.

    Args:
        process: W&B's.
        asked: what it has to know to begin the run.
    """

    def __init__(self, process: WandbProcess, asked: dict[str, Any]) -> None:
        super().__init__()
        self.process, self._asked, self._opening, self._open = process, asked, True, False
        process.send("begin", asked)

    @property
    def name(self) -> str:
        """The project."""
        return str(self._asked["settings"]["project"])

    @property
    def version(self) -> str:
        """The run's id."""
        return str(self._asked["options"]["id"])

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in the run's configuration already."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row."""
        self.tell("log", dict(metrics) | {"trainer/global_step": step})

    def tell(self, kind: str, content: Any) -> None:
        """Tell W&B's process something of an open run.

        Raises:
            RuntimeError: when the run cannot be opened, or something before this could not be logged.
        """
        self._await_opening()
        self.process.send(kind, content)

    def close(self, succeeded: bool) -> None:
        """End the run, and wait until all is where it belongs."""
        try:
            self._await_opening(None if succeeded else 5)  # one that is stopped before its first row waits no longer
            if self._open and self.process.usable:
                self._open = False
                self.process.send("finish", 0 if succeeded else 1)
                self.process.await_answer("finished")
        except RuntimeError:
            if succeeded:  # else the error that ended the run is to be seen
                raise

    def _await_opening(self, patience: float | None = None) -> None:
        if self._opening:
            self._opening = False
            self.process.await_answer("opened", patience)
            self._open = self.process.usable


def build_loggers(run: Run, config: Config, name: str, group: str | None) -> list[Logger]:
    """The chosen logger, opened; an empty list for logger=none.

    Args:
        run: keeps the id of its W&B run, so that a resumed run goes on in the same one.
        config: the run's configuration.
        name: the run's readable name.
        group: the sweep that the run belongs to, or None.
    """
    match config.logger:
        case WandbConfig():
            return [_wandb(run, config, config.logger, name, group)]
        case TensorBoardConfig():
            return [TensorBoardLogger(run.path, name="", version="tensorboard")]
    return []


def close_loggers(loggers: list[Logger], succeeded: bool) -> None:
    """End the W&B run of this process, if there is one, with the right exit code."""
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.close(succeeded)


def summarise(loggers: list[Logger], values: dict[str, Any]) -> None:
    """Add values to the summary of the W&B run."""
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.tell("summary", values)


class Samples:
    """The sampled texts as one W&B table that grows through the run."""

    def __init__(self, loggers: list[Logger], before: list[tuple[int, str]]) -> None:
        """`before` holds the steps and texts from before the run was resumed."""
        self._loggers = [x for x in loggers if isinstance(x, WandbRun)]
        self._rows: list[tuple[int, str]] = list(before)

    def add(self, step: int, text: str) -> None:
        """Log the texts so far, this one included."""
        if self._loggers:
            self._rows = [row for row in self._rows if row[0] < step] + [(step, text)]
            for logger in self._loggers:
                logger.tell("samples", [step, self._rows])


def _wandb(run: Run, config: Config, settings: WandbConfig, name: str, group: str | None) -> WandbRun:
    given = os.environ.get("WANDB_RUN_ID") if group is None else None  # a W&B agent's: it watches this run for a loss
    identity = run.info.get("wandb_id") or given or uuid.uuid4().hex[:12]
    run.update(wandb_id=identity)
    options = {
        "name": name, "id": identity, "job_type": settings.job_type, "notes": settings.notes,
        "group": settings.group or group or os.environ.get("WANDB_RUN_GROUP") or os.environ.get("WANDB_SWEEP_ID"),
        "tags": [*config.model.tags, run.info["data"]["corpus"], *settings.tags], "config": config.tree(),
    }  # fmt: skip
    return WandbRun(wandb_process(), request(settings, run.path, options))
