"""Stops a trial of a search that does worse than the others."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

Watch = Callable[[int, float], bool]
"""Is given the step and the loss of an evaluation; returns whether the run is to be pruned."""


class Pruning(Callback):
    """Reports each evaluation of a metric to `watch`, and stops the run where that says so.

    Attributes:
        pruned: whether it stopped the run.
    """

    def __init__(self, watch: Watch, monitor: str) -> None:
        self.watch, self.monitor, self.pruned = watch, monitor, False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"pruned": self.pruned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a checkpoint's."""
        self.pruned = state_dict["pruned"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop again a run that was killed after it was pruned."""
        trainer.should_stop = trainer.should_stop or self.pruned

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report an evaluation; the last one is no longer worth a stop."""
        if trainer.state.fn != "fit" or trainer.should_stop:
            return
        poor = self.watch(trainer.global_step, float(trainer.callback_metrics[self.monitor]))
        if trainer.strategy.reduce_boolean_decision(poor, all=False):  # the first rank knows
            self.pruned = trainer.should_stop = True
