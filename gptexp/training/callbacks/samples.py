"""Samples a text at each evaluation."""

from collections.abc import Callable

from lightning.pytorch import Callback, Trainer

from gptexp.loggers.media import log_samples
from gptexp.records import append_sample, read_samples
from gptexp.runs import Run
from gptexp.training.module import GPTModule


class Samples(Callback):
    """Adds a text from the model as it is now to samples.txt and to the loggers at each evaluation."""

    def __init__(self, run: Run, sample: Callable[[GPTModule], str]) -> None:
        self.run, self.sample = run, sample

    def on_validation_end(self, trainer: Trainer, pl_module: GPTModule) -> None:
        """Sample; every rank does, so that none waits for another."""
        if trainer.state.fn != "fit":
            return
        text = self.sample(pl_module)
        if trainer.is_global_zero:
            append_sample(self.run.samples_path, trainer.global_step, text)
            for logger in trainer.loggers:
                log_samples(logger, read_samples(self.run.samples_path))
