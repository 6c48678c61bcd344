"""A callback that brings a run to grief."""

import os
import signal
import threading
from typing import Any

from lightning.pytorch import Callback, Trainer


class Faulty(Callback):
    """At a step, on one rank, raises an error, kills the process, or stalls it for good."""

    def __init__(self, rank: int, step: int, how: str) -> None:
        self.rank, self.step, self.how = rank, step, how

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) != (self.rank, self.step):
            return
        if self.how == "raise":
            raise ValueError("of this rank alone")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


def faulty(rank: int, how: str, step: int = 10) -> list[str]:
    """The overrides that add it to a run."""
    return [f"+callbacks.faulty.{key}={value}" for key, value in
            (("_target_", "tests.cli.faulty.Faulty"), ("rank", rank), ("step", step), ("how", how))]  # fmt: skip
