"""Where metrics go besides metrics.csv: Weights & Biases, TensorBoard, or nowhere."""

import os
import uuid
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from gptexp.config import Config
from gptexp.runs import Run
from gptexp.tracking import open_wandb
from gptexp.training.settings import TensorBoardConfig, WandbConfig


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
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish(exit_code=0 if succeeded else 1)


def summarise(loggers: list[Logger], values: dict[str, Any]) -> None:
    """Add values to the summary of the W&B run."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(values)


class Samples:
    """The sampled texts as one W&B table that grows through the run."""

    def __init__(self, loggers: list[Logger], before: list[tuple[int, str]]) -> None:
        """`before` holds the steps and texts from before the run was resumed."""
        self._loggers = [x for x in loggers if isinstance(x, WandbLogger)]
        self._rows: list[tuple[int, str]] = list(before)

    def add(self, step: int, text: str) -> None:
        """Log the texts so far, this one included."""
        if self._loggers:
            import wandb

            self._rows = [row for row in self._rows if row[0] < step] + [(step, text)]
            for logger in self._loggers:
                table = wandb.Table(columns=["step", "text"], data=self._rows)
                logger.experiment.log({"samples": table, "step": step, "trainer/global_step": step})


def _wandb(run: Run, config: Config, settings: WandbConfig, name: str, group: str | None) -> WandbLogger:
    given = os.environ.get("WANDB_RUN_ID") if group is None else None  # a W&B agent's: it watches this run for a loss
    identity = run.info.get("wandb_id") or given or uuid.uuid4().hex[:12]
    run.update(wandb_id=identity)
    experiment = open_wandb(
        settings, run.path, name=name, id=identity, job_type=settings.job_type, notes=settings.notes,
        group=settings.group or group or os.environ.get("WANDB_RUN_GROUP") or os.environ.get("WANDB_SWEEP_ID"),
        tags=[*config.model.tags, run.info["data"]["corpus"], *settings.tags], config=config.tree(),
    )  # fmt: skip
    experiment.define_metric("step")
    experiment.define_metric("tokens")
    experiment.define_metric("*", step_metric="step")
    for metric in ("loss", "perplexity", "bpc"):
        experiment.define_metric(f"val/{metric}", step_metric="step", summary="min,last")
    experiment.define_metric("val/accuracy", step_metric="step", summary="max,last")
    return WandbLogger(experiment=experiment, save_dir=str(run.path))
