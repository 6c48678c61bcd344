"""Lightning's W&B logger, without questions: online where an API key is configured, offline elsewhere."""

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gptexp.tracking import open_wandb

SUMMARIES = {"val/loss": "min,last", "val/perplexity": "min,last", "val/bpc": "min,last", "val/accuracy": "max,last"}
"""Which of a metric's values count, as W&B's summary shows them."""


class WandbLogger(LightningWandbLogger):
    """A W&B run that an unreachable server cannot stop.

    Args:
        project: W&B's.
        mode: "auto" is online where an API key is configured, else offline.
        save_dir: the folder in which W&B keeps its files.
        log_model: upload checkpoints: True at the end, "all" as they are saved.
        watch: what to log of the model's tensors: "gradients", "parameters" or "all".
        options: of `wandb.init`, such as `id`, by which a resumed run goes on in the same W&B run.
    """

    def __init__(
        self,
        project: str = "gptexp",
        mode: Literal["auto", "online", "offline"] = "auto",
        save_dir: str | Path = ".",
        log_model: Literal["all"] | bool = False,
        watch: Literal["gradients", "parameters", "all"] | None = None,
        **options: Any,
    ) -> None:
        run = None
        if rank_zero_only.rank == 0:
            run = open_wandb(Path(save_dir), mode, project=project, **options)
            run.define_metric("trainer/global_step")  # what Lightning draws everything over
            run.define_metric("tokens")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            for name, summary in SUMMARIES.items():
                run.define_metric(name, step_metric="trainer/global_step", summary=summary)
        super().__init__(project=project, save_dir=save_dir, log_model=log_model, experiment=run, **options)
        self.watched = watch

    @rank_zero_only
    def watch_module(self, module: LightningModule, interval: int) -> None:
        """Log the tensors that `watch` names every `interval` steps, if it names any."""
        if self.watched:
            self.watch(module, log=self.watched, log_freq=interval, log_graph=False)

    @rank_zero_only
    def close(self, succeeded: bool) -> None:
        """End the W&B run, and wait until everything is where it belongs."""
        self.experiment.finish(exit_code=0 if succeeded else 1)
