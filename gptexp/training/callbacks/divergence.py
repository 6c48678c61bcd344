"""Stops a run whose loss or gradient is no longer finite."""

import math
from typing import Any

from lightning.pytorch import Callback, Trainer

from gptexp.errors import Diverged
from gptexp.training.callbacks.evaluations import evaluation_due
from gptexp.training.callbacks.throughput import log_step
from gptexp.training.module import GPTModule


class Divergence(Callback):
    """Raises `Diverged`, before anything of that step is saved.

    On the CPU the gradient's norm is checked after every step. Elsewhere a check would wait for the device, so it is
    made with each row of metrics and each checkpoint, every `interval` steps. All ranks see the same norm, and stop
    together.
    """

    def __init__(self, monitor: str, interval: int) -> None:
        self.monitor, self.interval = monitor, interval

    def on_train_batch_end(self, trainer: Trainer, pl_module: GPTModule, *_: Any) -> None:
        """Check the gradient's norm."""
        if trainer.precision == "16-mixed":  # where infinite gradients are normal: the loss scaler skips their steps
            return
        step = trainer.global_step
        due = step % trainer.log_every_n_steps == 0 or step % self.interval == 0 or evaluation_due(trainer)
        if (due or pl_module.device.type == "cpu") and not math.isfinite(float(pl_module.grad_norm)):
            pl_module.log_step(step)
            log_step(trainer)
            raise Diverged

    def on_validation_end(self, trainer: Trainer, pl_module: GPTModule) -> None:
        """Check the validation loss."""
        if not math.isfinite(float(trainer.callback_metrics.get(self.monitor, 0.0))):
            raise Diverged
