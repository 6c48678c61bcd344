"""A run that has become slow: what is taken for the cause, and when it is said."""

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from gptexp.training.callbacks.slowdown import UNKNOWN, SlowdownWarning, crowded, read_clocks


@pytest.mark.parametrize(("others", "threads", "cores", "is_cause"), [
    (1.0, 2, 2, True),  # two runs with two threads each
    (0.67, 2, 2, True),  # three threads on two cores
    (1.0, 1, 2, False),  # the other core was free for others
    (1.5, 1, 2, True), (4.0, 4, 8, False), (6.0, 4, 8, True), (0.2, 2, 2, False), (15.5, 1, 16, True),
    (math.nan, 2, 2, False),  # not known
])  # fmt: skip
def test_others_are_the_cause_if_they_take_what_the_run_wants(
    others: float, threads: int, cores: int, is_cause: bool
) -> None:
    text = crowded(others, threads, cores)
    assert (text is not None) == is_cause
    if text:
        assert text.startswith(f"other processes use {others:.1f} of {cores} cores, and this run has {threads} threads")


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux's")
def test_a_busy_process_is_seen() -> None:
    start = read_clocks()
    code = "import time\nwhile time.process_time() < 1.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    wall, own, busy = (now - before for now, before in zip(read_clocks(), start, strict=True))
    assert own < 1
    assert 1.4 < busy - own < wall * (os.cpu_count() or 1) + 0.1  # the clock ticks every hundredth of a second


class Clocked(LightningModule):
    """Each training step takes as long as `seconds` says, and an evaluation 100 s, by a clock of its own."""

    def __init__(self, seconds: Iterator[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seconds, self.time = seconds, 0.0

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.time += next(self.seconds)
        return self.weight.sum()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.time += 100.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _messages(seconds: list[float], caplog: pytest.LogCaptureFixture, **arguments: Any) -> list[str]:
    """What a stock Trainer's run with steps of these lengths warns of a fall of its speed."""
    module, batches = Clocked(iter(seconds)), DataLoader(torch.zeros(len(seconds), 1))
    warning = SlowdownWarning(clock=lambda: module.time)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=len(seconds), callbacks=[warning], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
    # The log of gptexp goes to the terminal alone while a command runs.
    log = logging.getLogger("gptexp")
    log.addHandler(caplog.handler)
    try:
        trainer.fit(module, batches, DataLoader(torch.zeros(1, 1)))
    finally:
        log.removeHandler(caplog.handler)
    records = dict.fromkeys(caplog.records)  # one that also reached pytest's own handler is there twice
    return [r.getMessage() for r in records if "speed fell" in r.getMessage()]


def test_a_fall_is_told_once_for_each_cause(caplog: pytest.LogCaptureFixture) -> None:
    messages = _messages([0.1] * 150 + [1.0] * 50, caplog)
    told = [m.partition(": speed fell to 10% of its first: ")[2] for m in messages]
    others = [m.startswith("other processes use ") for m in told]  # depends on what else this machine does
    assert told
    assert len(others) == len(set(others))  # although it stays slow
    assert all(m == UNKNOWN or other for m, other in zip(told, others, strict=True))


@pytest.mark.parametrize("seconds", [
    [1.0] * 100 + [0.1] * 100,  # it became faster
    [0.1] * 100 + [0.15] * 100,
    [0.1] * 100 + [3.0] + [0.1] * 100,  # a short disturbance
])  # fmt: skip
def test_a_steady_run_is_not_warned_of(seconds: list[float], caplog: pytest.LogCaptureFixture) -> None:
    assert _messages(seconds, caplog) == []


def test_evaluations_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    assert _messages([0.1] * 200, caplog, val_check_interval=10, check_val_every_n_epoch=None) == []
