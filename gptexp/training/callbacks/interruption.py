"""Turns Ctrl-C and SIGTERM into a clean stop that can be resumed."""

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from gptexp.errors import Stopped
from gptexp.training.callbacks.checkpoints import RunCheckpoints
from gptexp.training.callbacks.evaluations import evaluation_due
from gptexp.training.callbacks.throughput import log_step


class Interruption(Checkpoint):
    """On Ctrl-C, SIGTERM and the signals `more`: finishes the current step, saves, and raises `Stopped`.

    A second Ctrl-C stops at once, without saving. It is a `Checkpoint` so that Lightning calls it last, after
    `RunCheckpoints`.

    Attributes:
        signal: the number of the signal that came, or None.
    """

    def __init__(self, checkpoints: RunCheckpoints, more: Sequence[int] = ()) -> None:
        self.checkpoints = checkpoints
        self.signals = (signal.SIGINT, signal.SIGTERM, *more)
        self.signal: int | None = None
        self._step = -1
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals; Lightning's own handler of SIGTERM would stop without saving."""
        self._step = trainer.global_step
        self._take()

    def _take(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop after a step; if an evaluation follows, after that."""
        step = trainer.global_step
        if step == self._step or evaluation_due(trainer):  # or between the micro-batches of a step
            return
        self._step = step
        logged = step % trainer.log_every_n_steps == 0
        if (trainer.world_size == 1 or logged) and self._noted(trainer):
            if logged:
                log_step(trainer)
            self._stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the final evaluation end: Lightning's own handler waits for ranks that may not have got the signal."""
        if trainer.state.fn == "validate" and trainer.world_size > 1:
            self._take()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after an evaluation, unless the run ends with it."""
        if trainer.state.fn == "fit" and not trainer.should_stop and self._noted(trainer):
            self._stop(trainer)
        if trainer.state.fn == "validate":
            self._restore()

    def _noted(self, trainer: Trainer) -> bool:
        """Whether any rank got a signal; then all stop together."""
        noted = self.signal is not None
        return trainer.strategy.reduce_boolean_decision(noted, all=False) if trainer.world_size > 1 else noted

    def _stop(self, trainer: Trainer) -> None:
        self.checkpoints.save_latest(trainer)
        raise Stopped(self.signal or signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back, before Lightning gives back its own."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back after an error, too."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
