"""Lightning's W&B logger, without questions: online where an API key is configured, offline elsewhere."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gptexp.tracking import open_wandb

log = logging.getLogger("gptexp")

PATIENCE = 10
"""Seconds that W&B's server may take to answer; asked in vain, it would stop training for 19 each time."""

SUMMARIES = {"val/loss": "min,last", "val/perplexity": "min,last", "val/bpc": "min,last", "val/accuracy": "max,last"}
"""Which of a metric's values count, as W&B's summary shows them."""


class WandbLogger(LightningWandbLogger):
    """A W&B run that neither an unreachable server nor the loss of W&B's own process can stop.

    Args:
        project: W&B's.
        mode: "auto" is online where an API key is configured, else offline.
        save_dir: the folder in which W&B keeps its files.
        log_model: upload checkpoints: True at the end, "all" as they are saved.
        watch: what to log of the model's tensors: "gradients", "parameters" or "all".
        settings: of `wandb.Settings`.
        id: of the W&B run; a run that is resumed goes on in the one that has it.
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

    @contextmanager
    def _spared(self, asks: bool = False) -> Iterator[None]:
        """Around what a run can do without.

        Args:
            asks: W&B asks its server before it returns, as for a table or an artifact. Without an answer it is the last
                such thing.
        """
        start, problem = time.monotonic(), ""
        try:
            yield
        except ConnectionError:
            problem = "its process has ended"
        except Exception as error:
            if not asks:
                raise
            problem = str(error).split("\n")[0]
        if asks and time.monotonic() - start > PATIENCE:
            problem = f"no answer within {PATIENCE} s"
        if problem and not self._deaf:
            log.warning("W&B: %s; the run goes on, and keeps its samples and checkpoints in %s alone", problem,
                        self.save_dir)  # fmt: skip
            self._deaf = True

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add to the W&B run's configuration."""
        with self._spared():
            super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row to the W&B run's history."""
        with self._spared():
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """Log a table; takes Lightning's arguments."""
        if not self._deaf:
            with self._spared(asks=True):
                super().log_table(*args, **kwargs)

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """Upload a checkpoint, or remember it for the end, as `log_model` says."""
        if not self._deaf:
            with self._spared(asks=True):
                super().after_save_checkpoint(checkpoint_callback)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload the checkpoints that are still to be uploaded. The W&B run itself goes on, as Lightning has it."""
        if not self._deaf:
            with self._spared(asks=True):
                super().finalize(status)
