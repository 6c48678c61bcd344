"""Samples a text at each evaluation."""

from contextlib import suppress

from lightning.pytorch import Callback, Trainer

from gptexp.config.schema import Config
from gptexp.data.datamodule import CharDataModule
from gptexp.errors import UserError
from gptexp.loggers.media import log_samples
from gptexp.runs.files import append_sample, read_samples
from gptexp.runs.run import Run
from gptexp.training.module import GPTModule


class Samples(Callback):
    """Adds what the model writes at this step, one text or some documents, to samples.txt and to the loggers."""

    def __init__(self, run: Run, config: Config, data: CharDataModule) -> None:
        self.run, self.tokenizer = run, data.encoded.tokenizer
        opening = [0]
        with suppress(UserError):  # a corpus without a newline
            opening = self.tokenizer.encode("\n").tolist()
        self.prompts = [opening] * data.task.samples()
        self.stop = opening if data.task.document_end(data.config) is not None else []
        self.length, self.seed = config.sample_tokens, config.seed

    def on_validation_end(self, trainer: Trainer, pl_module: GPTModule) -> None:
        """Sample; every rank does, so that none waits for another."""
        if trainer.state.fn != "fit":
            return
        with trainer.precision_plugin.forward_context():
            rows = pl_module.model.generate(self.prompts, self.length, stop=self.stop, seed=self.seed)
        if trainer.is_global_zero:
            whole = [row[:-1] if self.stop and row[-1:] == self.stop else row for row in rows]
            text = "\n".join(map(self.tokenizer.decode, whole))
            append_sample(self.run.samples_path, trainer.global_step, text)
            for logger in trainer.loggers:
                log_samples(logger, read_samples(self.run.samples_path))
