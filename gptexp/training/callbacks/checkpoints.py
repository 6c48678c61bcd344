"""Saves checkpoints/last and checkpoints/best, and turns Ctrl-C and SIGTERM into a clean, resumable stop."""

import os
import shutil
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer

from gptexp.config import Config
from gptexp.runs import Run
from gptexp.training.callbacks.recorder import Recorder
from gptexp.training.lean import LeanCallback
from gptexp.training.module import GPTModule


class Checkpoints(LeanCallback):
    """Saves after the recorder has written its row, so a checkpoint and metrics.csv always agree.

    `best` is replaced before `last`. A run killed between the two resumes from the older `last`, comes to the same
    evaluation and writes the same `best` again. A diverged step is never saved. The untrained model is saved, too, so
    a run has both checkpoints from its first evaluation on, and run.json says so: one that is missing later is lost.
    """

    def __init__(self, run: Run, config: Config, recorder: Recorder) -> None:
        self.run, self.recorder = run, recorder
        self.max_steps = config.max_steps
        self.interval = config.checkpoint_interval or config.eval_interval
        self._step = -1

    def on_train_start(self, trainer: Trainer, module: GPTModule) -> None:  # type: ignore[override]
        """Note where the run begins."""
        self._step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, module: GPTModule) -> None:  # type: ignore[override]
        """Save a new model as it is before its first step."""
        if trainer.global_step == 0 and module.state.status == "running":
            self._save(trainer, module, ["best", "last"])
            if trainer.is_global_zero:
                self.run.update(resumable=True)

    def on_train_batch_end(self, trainer: Trainer, module: GPTModule, *_: Any) -> None:  # type: ignore[override]
        """Save what is due after an optimizer step."""
        step, state = trainer.global_step, module.state
        if step == self._step or state.status == "diverged":
            return
        self._step = step
        best = state.best_step == step
        last = step % self.interval == 0 or step == self.max_steps or state.status != "running"
        if best or last:
            self._save(trainer, module, [*(["best"] if best else []), *(["last"] if last else [])])

    def _save(self, trainer: Trainer, module: GPTModule, names: list[Any]) -> None:
        self.recorder.flush(trainer, module)
        if module.state.status == "diverged":
            return
        temporary = self.run.checkpoint("last").with_name(".saving.ckpt")
        try:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                for path in (temporary, *self.run.growing):  # the rows that the checkpoint counts, before it counts
                    with suppress(FileNotFoundError), path.open("rb") as file:
                        os.fsync(file.fileno())
                if len(names) == 2:
                    copy = temporary.with_name(".copy.ckpt")
                    shutil.copyfile(temporary, copy)
                    copy.replace(self.run.checkpoint("best"))
                temporary.replace(self.run.checkpoint(names[-1]))
            self.recorder.restart_clock()
        except BaseException:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)
            raise


class Interruption(LeanCallback):
    """Lets Ctrl-C and SIGTERM finish the current step, and then stops the run with status "interrupted".

    A second Ctrl-C stops at once, without saving.

    Attributes:
        signal: the number of the signal that stopped the run, or None.
    """

    def __init__(self, config: Config) -> None:
        self.log_interval, self.max_steps = config.log_interval, config.max_steps
        self.signal: int | None = None
        self._step = -1
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: GPTModule) -> None:  # type: ignore[override]
        """Take over the signals; Lightning's own SIGTERM handler would stop without saving."""
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number and "GPTEXP_WORKER" not in os.environ:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_batch_end(self, trainer: Trainer, module: GPTModule, *_: Any) -> None:  # type: ignore[override]
        """Stop all ranks together after an optimizer step, if any of them got a signal."""
        if trainer.global_step == self._step:  # between the micro-batches of a step
            return
        self._step = trainer.global_step
        noted = self.signal is not None
        if trainer.world_size > 1:
            if self._step % self.log_interval:
                return
            noted = trainer.strategy.reduce_boolean_decision(noted, all=False)
        if noted and module.state.status == "running" and self._step < self.max_steps:
            module.state.status = "interrupted"
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: GPTModule) -> None:  # type: ignore[override]
        """Give the signals back, before Lightning gives back its own."""
        self._restore()

    def on_exception(self, trainer: Trainer, module: GPTModule, error: BaseException) -> None:  # type: ignore[override]
        """Give the signals back after an error, too."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
