"""Warns when training becomes much slower than it was at first, and says why."""

import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger("gptexp")

SLOW = 0.5  # a run that is slower than this part of its first speed is slow
TAKEN = 0.3  # of the cores that a run wants: if other processes take as much, they are the cause
UNKNOWN = ("no other process seems to take its cores; perhaps it waits for memory or a disk, a container or the host "
           "of a virtual machine holds it back, or the device is too hot or saves power")  # fmt: skip


class SlowdownWarning(Callback):
    """Warns in one line when a run's speed falls far below its first, or when other processes slow it from the start.

    Each measurement covers `seconds` of training, without evaluations and checkpoints. Two slow ones in a row lead to a
    warning, once per likely cause. A run's first speed is the best of its first three measurements.
    """

    def __init__(self, seconds: float = 3.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self.clock = seconds, clock
        self._warned: set[tuple[bool, bool]] = set()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin anew: a resumed run, perhaps on another machine, has a first speed of its own."""
        self._first: list[float] = []
        self._slow = 0  # measurements in a row
        self._mark: float | None = None  # when the last batch ended; None if something else has happened since
        self._trained, self._batches, self._start = 0.0, 0, read_clocks()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Count the batch; once there are enough, judge the speed."""
        now = self.clock()
        if self._mark is not None:
            self._trained += now - self._mark
            self._batches += 1
        self._mark = now
        if self._trained >= self.seconds:
            self._judge(trainer, torch.get_num_threads() if module.device.type == "cpu" else 1)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave the evaluation's time out."""
        self._mark = None

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave the time of saving out."""
        self._mark = None

    def _judge(self, trainer: Trainer, threads: int) -> None:
        speed, first, clocks = self._batches / self._trained, max(self._first, default=None), read_clocks()
        self._first = [*self._first, speed][:3]
        wall, own, busy = (now - before for now, before in zip(clocks, self._start, strict=True))
        self._trained, self._batches, self._start = 0.0, 0, clocks
        crowd = crowded((busy - own * trainer.num_devices) / wall, threads, os.cpu_count() or 1)
        self._slow = self._slow + 1 if first and speed < SLOW * first else 0
        warned = (first is None, crowd is None)
        if warned in self._warned or not (self._slow > 1 if first else crowd):
            return
        self._warned.add(warned)
        what = f"speed fell to {speed / first:.0%} of its first" if first else "this run is slower than it could be"
        log.warning("step %d: %s: %s", trainer.global_step, what, crowd or UNKNOWN)


def crowded(others: float, threads: int, cores: int) -> str | None:
    """What to say if other processes keep `others` of the machine's cores busy, and so slow a run with `threads`."""
    if not others - (cores - threads) > TAKEN * threads:  # nor if it is nan
        return None
    return (f"other processes use {others:.1f} of {cores} cores, and this run has {threads} threads; end the others, "
            "or give each of several runs fewer threads (hardware.threads=1)")  # fmt: skip


def read_clocks() -> tuple[float, float, float]:
    """Seconds of wall-clock time, of this process's CPU time, and of all the machine's (Linux's; nan elsewhere)."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    except OSError:
        busy = math.nan
    return time.perf_counter(), time.process_time(), busy
