"""Says so, and why, when training becomes much slower than it was at first."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gptexp.training.slowdown import likely_cause, read_clocks, use_between

log = logging.getLogger("gptexp")


class SlowdownWarning(Callback):
    """Warns in one line when a run's speed falls to a fraction of its first, once for each likely cause.

    It measures batches per second, without evaluations and checkpoints, and warns when two measurements in a row are
    slow. A run's first speed is the best of its first three measurements. If other processes already use the cores
    when the run begins, it says that, too.

    Args:
        seconds: of training for each measurement.
        clock: gives the time in seconds.
    """

    def __init__(self, seconds: float = 3.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self.clock = seconds, clock
        self.warned: set[str] = set()
        self._first: list[float] = []
        self._slow = 0  # measurements in a row
        self._mark: float | None = None  # when the last batch ended; None if something else has happened since
        self._trained, self._batches, self._start = 0.0, 0, read_clocks()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin anew: a resumed run has a first speed of its own, on a machine that may be another one."""
        self._first, self._slow, self._mark = [], 0, None
        self._trained, self._batches, self._start = 0.0, 0, read_clocks()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; once there are enough, judge the speed."""
        now = self.clock()
        if self._mark is not None:
            self._trained += now - self._mark
            self._batches += 1
        self._mark = now
        if self._trained >= self.seconds:
            self._judge(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave the evaluation's time out."""
        self._mark = None

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave the time of saving out."""
        self._mark = None

    def _judge(self, trainer: Trainer, module: LightningModule) -> None:
        speed, first, clocks = self._batches / self._trained, max(self._first, default=None), read_clocks()
        if len(self._first) < 3:
            self._first.append(speed)
        use = use_between(self._start, clocks, processes=trainer.num_devices)
        self._trained, self._batches, self._start = 0.0, 0, clocks
        found = likely_cause(speed, first, use, torch.get_num_threads(), module.device.type)
        if found is None:
            self._slow = 0
            return
        cause, text = found
        self._slow += first is not None
        known = cause if first else f"{cause} at first"
        if self._slow != 1 and known not in self.warned:
            self.warned.add(known)
            log.warning("step %d: %s", trainer.global_step, text)
