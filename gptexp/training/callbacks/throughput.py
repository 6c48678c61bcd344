"""Counts tokens and times training; completes the rows of metrics.csv."""

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer

from gptexp.data.batches import Batch
from gptexp.loggers.metrics_csv import MetricsCSV
from gptexp.training.callbacks.evaluations import evaluation_due
from gptexp.training.module import GPTModule


class Throughput(Callback):
    """Logs `tokens`, `seconds`, `tokens_per_second` and `mfu` with the training metrics.

    Also gives metrics.csv the training metrics of each evaluation's step; Lightning logs them only every
    `log_every_n_steps`.

    Args:
        record: writes metrics.csv.
        flops_per_token: floating-point operations of a training step per token.
        peak_flops: measures how many per second the devices can reach together.

    Attributes:
        tokens: training targets seen, over all devices.
        seconds: of training, saving included, without evaluation.
        eval_seconds: of evaluation and sampling.
    """

    def __init__(self, record: MetricsCSV, flops_per_token: float, peak_flops: Callable[[], float]) -> None:
        self.record, self.flops_per_token, self.peak_flops = record, flops_per_token, peak_flops
        self.tokens, self.seconds, self.eval_seconds = 0, 0.0, 0.0
        self._logged = 0, 0.0  # tokens and seconds
        self._step, self._mark, self._peak = 0, 0.0, 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of training until now, while it runs."""
        return self.seconds + time.perf_counter() - self._mark

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {name: getattr(self, name) for name in ("tokens", "seconds", "eval_seconds")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting from a checkpoint."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: Trainer, pl_module: GPTModule) -> None:
        """Start the clock, once the devices' peak is known."""
        self._peak = self.peak_flops()
        self._logged, self._step = (self.tokens, self.seconds), trainer.global_step
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GPTModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count a step; log where a row is due."""
        if trainer.global_step == self._step:  # between the micro-batches of a step
            return
        self._step = trainer.global_step
        self.tokens += round(batch.tokens * trainer.world_size * trainer.accumulate_grad_batches)
        self.seconds += self._lap()
        evaluates = evaluation_due(trainer)
        if trainer.fast_dev_run or (not evaluates and self._step % trainer.log_every_n_steps):
            return
        tokens, seconds = self.tokens - self._logged[0], self.seconds - self._logged[1]
        self._logged, rate = (self.tokens, self.seconds), tokens / max(seconds, 1e-9)
        self._log(pl_module, tokens=self.tokens, seconds=self.seconds, tokens_per_second=rate,
                  mfu=rate * self.flops_per_token / self._peak)  # fmt: skip
        self.record.log_metrics(training_metrics(trainer), step=self._step)
        if not evaluates:
            self.record.flush()

    def on_validation_start(self, trainer: Trainer, pl_module: GPTModule) -> None:
        """Time evaluations apart from training."""
        lap = self._lap()
        if trainer.state.fn == "fit":
            self.seconds += lap

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: GPTModule) -> None:
        """Log tokens and seconds with an evaluation, as further axes to draw its metrics over."""
        self._log(pl_module, tokens=self.tokens, seconds=self.seconds)

    def on_validation_end(self, trainer: Trainer, pl_module: GPTModule) -> None:
        """Restart the clock of training."""
        self.eval_seconds += self._lap()

    def _lap(self) -> float:
        """Seconds since the last call."""
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def _log(self, pl_module: GPTModule, **values: float) -> None:
        pl_module.log_dict({name: pl_module.exact(value) for name, value in values.items()})


def training_metrics(trainer: Trainer) -> dict[str, float]:
    """What was logged of the step at hand, before any evaluation."""
    return {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("val/") and k != "step"}


def log_step(trainer: Trainer) -> None:
    """Give loggers the training metrics of the step at hand, as Lightning does once the callbacks are done."""
    for logger in trainer.loggers:
        logger.log_metrics(training_metrics(trainer), step=trainer.global_step)
