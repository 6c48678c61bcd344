"""Samples a text at each evaluation."""

import time
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, Trainer

from gptexp.config.schema import Config
from gptexp.data.datamodule import CharDataModule
from gptexp.errors import UserError
from gptexp.loggers.media import log_samples
from gptexp.runs.files import append_sample, read_samples
from gptexp.runs.run import Run
from gptexp.tasks.problems import Problems
from gptexp.training.module import GPTModule


class Samples(Callback):
    """Adds what the model writes at this step to samples.txt and to the loggers.

    That is one text, some documents, or the likeliest answers to some of the problems that are held out.
    """

    def __init__(self, run: Run, config: Config, data: CharDataModule) -> None:
        self.run, self.tokenizer = run, data.encoded.tokenizer
        opening = [0]
        with suppress(UserError):  # a corpus without a newline
            opening = self.tokenizer.encode("\n").tolist()
        end, count = data.task.document_end(data.config), data.task.samples()
        self.problems = data.val.problems[:count] if isinstance(data.val, Problems) else []
        self.prompts = [self.tokenizer.encode(p.prompt).tolist() for p in self.problems] or [opening] * count
        self.stop = self.tokenizer.encode(end).tolist() if end else []
        self.options = {"stop": self.stop, "seed": config.seed, "temperature": 0.0 if self.problems else 1.0}
        self.length = config.sample_tokens
        self.tokens, self.seconds = 0, 0.0  # written so far by this process, and the time that it took

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting from a checkpoint."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]

    def on_validation_end(self, trainer: Trainer, pl_module: GPTModule) -> None:
        """Sample; every rank does, so that none waits for another."""
        if trainer.state.fn != "fit":
            return
        begin = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            rows = pl_module.model.generate(self.prompts, self.length, **self.options)
        self.seconds += time.perf_counter() - begin
        self.tokens += sum(map(len, rows))
        if trainer.is_global_zero:
            whole = [row[:-1] if self.stop and row[-1:] == self.stop else row for row in rows]
            texts = [self.tokenizer.decode(row) for row in whole]
            for i, (prompt, answer) in enumerate(self.problems):
                texts[i] = f"{prompt}{texts[i]}{'' if texts[i] == answer else f' (wrong: {answer})'}"
            append_sample(self.run.samples_path, trainer.global_step, "\n".join(texts))
            for logger in trainer.loggers:
                log_samples(logger, read_samples(self.run.samples_path))
