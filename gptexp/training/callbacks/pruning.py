"""Stops a trial of a search that does worse than the others."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

Watch = Callable[[int, float], bool]
"""Takes the step and the loss of an evaluation; returns whether to prune the run."""


class Pruning(Callback):
    """Reports each evaluation of a metric to `watch`, and stops the run if it returns True.

    Attributes:
        pruned: whether it stopped the run.
    """

    def __init__(self, watch: Watch, monitor: str) -> None:
        self.watch, self.monitor, self.pruned = watch, monitor, False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"pruned": self.pruned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.pruned = state_dict["pruned"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report an evaluation; after the last one there is nothing left to prune."""
        if trainer.state.fn != "fit" or trainer.should_stop:
            return
        poor = self.watch(trainer.global_step, float(trainer.callback_metrics[self.monitor]))
        if trainer.strategy.reduce_boolean_decision(poor, all=False):  # the first rank knows
            self.pruned = trainer.should_stop = True
