"""Training for a given time."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from gptexp.data.batches import Batch
from gptexp.training.callbacks.throughput import Throughput
from gptexp.training.module import GPTModule


class TimeBudget(Callback):
    """Ends training after some seconds of it, and has the learning rate's schedule follow them.

    The steps that the whole training will have are estimated anew before each step, from those done and the share of
    the time that they took. All processes go by the clock of the first. The last step is known as such before it
    begins, so that it is logged and evaluated as a last one is.

    Args:
        budget: in seconds.
        clock: knows the seconds spent, which a resumed run goes on with.
    """

    def __init__(self, budget: float, clock: Throughput) -> None:
        self.budget, self.clock = budget, clock

    def on_train_batch_start(self, trainer: Trainer, pl_module: GPTModule, batch: Batch, batch_idx: int) -> Any:
        """Look at the clock, before the last micro-batch of a step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        spent, step = float(trainer.strategy.broadcast(self.clock.elapsed)), trainer.global_step
        if step:
            limit = trainer.max_steps if trainer.max_steps > 0 else None
            steps = max(step + 1, round(step * self.budget / spent))
            pl_module.planned_steps = steps if limit is None else min(limit, steps)
        if spent >= self.budget:
            trainer.should_stop = True
