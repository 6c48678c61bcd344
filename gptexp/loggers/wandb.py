"""Lightning's W&B logger, which never asks a question: online with an API key, offline without."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gptexp.loggers.wandb_run import open_wandb

log = logging.getLogger("gptexp")

ANSWER_SECONDS = 10
"""Seconds that W&B's server may take to answer; without an answer, each call would stop training for 19."""

SUMMARIES = {"val/loss": "min,last", "val/perplexity": "min,last", "val/bpc": "min,last", "val/accuracy": "max,last"}
"""What W&B's summary shows of a metric."""


class WandbLogger(LightningWandbLogger):
    """A W&B run. Training continues if its server cannot be reached or W&B's own process dies.

    Args:
        project: W&B's.
        mode: "auto" is online with an API key, else offline.
        save_dir: the folder in which W&B keeps its files.
        log_model: upload checkpoints: True at the end, "all" as they are saved.
        watch: what to log of the model's tensors: "gradients", "parameters" or "all".
        settings: of `wandb.Settings`.
        id: of the W&B run; a resumed run continues the one that has it.
        name: of the W&B run.
        options: of `wandb.init`, such as `entity`, `group` and `tags`.

    Attributes:
        watched: the argument `watch`.
    """

    def __init__(
        self,
        project: str = "gptexp",
        mode: Literal["auto", "online", "offline"] = "auto",
        save_dir: str | Path = ".",
        log_model: Literal["all"] | bool = False,
        watch: Literal["gradients", "parameters", "all"] | None = None,
        settings: dict[str, Any] | None = None,
        id: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        run = None
        if rank_zero_only.rank == 0:
            patience = 600 if log_model else 60  # checkpoints take longer than a few last rows
            run = open_wandb(Path(save_dir), mode, settings, patience, project=project, id=id, name=name, **options)
            run.define_metric("trainer/global_step")  # what Lightning draws everything over
            run.define_metric("tokens")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            for metric, summary in SUMMARIES.items():
                run.define_metric(metric, step_metric="trainer/global_step", summary=summary)
        super().__init__(name, save_dir, project=project, id=id, log_model=log_model, experiment=run, **options)
        self.watched = watch
        self._deaf = False  # W&B or its server

    def _try(self, do: Callable[..., None], *args: Any, asks: bool = False, **kwargs: Any) -> None:
        """Do what a run can do without.

        Args:
            do: to call with the other arguments.
            asks: W&B asks its server before it returns, as for a table or an artifact. Without an answer nothing is
                asked again.
        """
        if asks and self._deaf:
            return
        start, problem = time.monotonic(), ""
        try:
            do(*args, **kwargs)
        except ConnectionError:
            problem = "its process has ended"
        except Exception as error:
            if not asks:
                raise
            problem = str(error).split("\n")[0]
        if asks and time.monotonic() - start > ANSWER_SECONDS:
            problem = f"no answer within {ANSWER_SECONDS} s"
        if problem and not self._deaf:
            log.warning("W&B: %s; the run continues, and keeps its samples and checkpoints only in %s", problem,
                        self.save_dir)  # fmt: skip
            self._deaf = True

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add to the W&B run's configuration."""
        self._try(super().log_hyperparams, params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row to the W&B run's history."""
        self._try(super().log_metrics, metrics, step)

    @rank_zero_only
    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """Log a table; takes Lightning's arguments."""
        self._try(super().log_table, *args, asks=True, **kwargs)

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """Upload a checkpoint now or at the end, as `log_model` says."""
        self._try(super().after_save_checkpoint, checkpoint_callback, asks=True)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload the remaining checkpoints. The W&B run stays open, as with Lightning's logger."""
        self._try(super().finalize, status, asks=True)
