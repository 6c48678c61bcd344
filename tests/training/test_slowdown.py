"""A run that has become slow: what is taken for the cause, and when it is said."""

import json
import logging
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

from gptexp.training.callbacks.slowdown import SlowdownWarning
from gptexp.training.slowdown import Reading, Use, likely_cause, use_between


@pytest.mark.parametrize(
    ("ratio", "use", "threads", "accelerator", "cause"),
    [
        (0.9, Use(1.0, 1.0, 0.0, 2), 2, "cpu", None),  # not slow, whatever else runs
        (0.5, Use(1.0, 1.0, 0.0, 2), 2, "cpu", None),
        (0.05, Use(1.0, 1.0, 0.0, 2), 2, "cpu", "others"),  # two runs with two threads each
        (0.1, Use(1.33, 0.67, 0.0, 2), 2, "cpu", "others"),  # three threads on two cores
        (0.4, Use(1.0, 1.0, 0.0, 2), 1, "cpu", "processor"),  # the other core was free for others
        (0.4, Use(0.5, 1.5, 0.0, 2), 1, "cpu", "others"),
        (0.4, Use(4.0, 4.0, 0.0, 8), 4, "cpu", "processor"),
        (0.4, Use(2.0, 6.0, 0.0, 8), 4, "cpu", "others"),
        (0.4, Use(0.8, 0.1, 1.1, 2), 2, "cpu", "host"),
        (0.1, Use(0.2, 0.0, 0.0, 2), 2, "cpu", "waiting"),
        (0.0, Use(0.0, 0.1, 0.0, 2), 2, "cpu", "waiting"),
        (0.4, Use(1.9, 0.0, 0.0, 2), 2, "cpu", "processor"),
        (0.4, Use(1.0, 0.0, 0.0, 16), 16, "cuda", "device"),
        (0.4, Use(0.4, 15.5, 0.0, 16), 16, "cuda", "others"),
    ],
)
def test_the_likely_cause(ratio: float, use: Use, threads: int, accelerator: str, cause: str | None) -> None:
    found = likely_cause(40_000 * ratio, 40_000, use, threads, accelerator)
    assert (found and found[0]) == cause
    if found:
        assert found[1].startswith(f"speed fell to {ratio:.0%} of its first: ")
        assert "\n" not in found[1]


@pytest.mark.parametrize(
    ("use", "threads", "cause"),
    [
        (Use(1.0, 1.0, 0.0, 2), 2, "others"),
        (Use(1.33, 0.67, 0.0, 2), 2, "others"),
        (Use(1.0, 1.0, 0.0, 2), 1, None),  # jobs of a sweep side by side, one core each
        (Use(1.7, 0.2, 0.0, 2), 2, None),
        (Use(0.1, 0.0, 0.0, 2), 2, None),
        (Use(0.5, 0.0, 1.0, 2), 2, "host"),
    ],
)
def test_a_run_that_begins_on_a_busy_machine(use: Use, threads: int, cause: str | None) -> None:
    found = likely_cause(2_000, None, use, threads)
    assert (found and found[0]) == cause
    if found:
        assert found[1].startswith("this run is slower than it could be: ")


def test_numbers_stand_in_the_line() -> None:
    found = likely_cause(2_000, 40_000, Use(1.0, 1.04, 0.0, 2), 2)
    assert found
    assert found[1].startswith("speed fell to 5% of its first: other processes use 1.0 of 2 cores, and this run has 2 ")
    alone = likely_cause(2_000, 40_000, Use(0.5, 0.5, 0.0, 1), 1)
    assert alone
    assert "other processes use 0.5 of 1 core, and this run has 1 thread;" in alone[1]


def test_use_is_what_happened_between_two_readings() -> None:
    start, end = Reading(10.0, 5.0, 100.0, 1.0, 9.0, 4), Reading(14.0, 9.0, 106.0, 3.0, 9.0, 4)
    use = use_between(start, end)
    assert (use.own, use.others, use.stolen, use.cores) == pytest.approx((1.0, 0.5, 0.5, 4))
    assert use_between(start, end, processes=2).others == 0.0  # all of it by this run
    unknown = use_between(Reading(10.0, 5.0, None, None, 0.0, 4), Reading(14.0, 9.0, None, None, 3.0, 4))
    assert (unknown.own, unknown.others, unknown.stolen) == (1.0, 2.0, 0.0)  # the load stands in


BESIDE = """
import json, os, subprocess, sys, time
from gptexp.training.slowdown import likely_cause, read_clocks, use_between
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # the child will share this one core
child = subprocess.Popen([sys.executable, "-c", "print(flush=True)\\nwhile True: pass"], stdout=subprocess.PIPE)
child.stdout.readline()
start = read_clocks()
while time.perf_counter() < start.wall + 2:
    pass
use = use_between(start, read_clocks())
child.kill()
print(json.dumps([use.own, use.others, use.cores, likely_cause(0.3, 1.0, use, 1)]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux's")
def test_a_busy_process_is_seen() -> None:
    done = subprocess.run([sys.executable, "-c", BESIDE], check=True, capture_output=True, text=True)
    own, others, cores, (cause, _) = json.loads(done.stdout)
    assert cores == 1
    assert own > 0
    assert own + others < 1.1  # one core, and clocks that tick every hundredth of a second
    assert cause in ("others", "host")


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
    causes = [m.split(": ")[2][:20] for m in messages]  # which ones depends on what else this machine does
    assert causes
    assert len(causes) == len(set(causes))  # although it stays slow
    assert all("speed fell to 10% of its first" in m for m in messages)


@pytest.mark.parametrize(
    "seconds",
    [
        [0.1] * 200,
        [1.0] * 100 + [0.1] * 100,  # it became faster
        [0.1] * 100 + [0.15] * 100,
        [0.1] * 100 + [3.0] + [0.1] * 100,  # a short disturbance
    ],
)
def test_a_steady_run_is_not_warned_of(seconds: list[float], caplog: pytest.LogCaptureFixture) -> None:
    assert _messages(seconds, caplog) == []


def test_evaluations_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    assert _messages([0.1] * 200, caplog, val_check_interval=10, check_val_every_n_epoch=None) == []
