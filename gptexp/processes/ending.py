"""How the processes of a command end: together, and not after the process that started them.

Nothing here imports torch in vain.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptexp.errors import Interrupted

SAVE_SECONDS = 120
"""Seconds that a run has to save once its parent is gone."""

END_SECONDS = 15.0
"""Seconds that a process has to end by itself once another one has failed."""

met: list[Any] = []
"""The `Processes` that this process has met, once it has; torch.distributed has one default group, too."""

_jobs: list[object] = []  # under way in this process


def several() -> bool:
    """Whether torchrun or Slurm has started this process as one of several of the same command."""
    if met or "TORCHELASTIC_RUN_ID" in os.environ:
        return bool(met) or int(os.environ.get("WORLD_SIZE", "1")) > 1
    slurm = {"hardware=slurm", "hardware.cluster=slurm"} & set(sys.argv[1:])
    return bool(slurm) and "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def interrupt(number: int, _: object) -> None:
    """A handler of signals that raises `Interrupted`."""
    raise Interrupted(number)


@contextmanager
def at_work() -> Iterator[None]:
    """Around a job; `end_with_parent` waits until it has saved."""
    job = object()
    _jobs.append(job)
    try:
        yield
    finally:
        _jobs.remove(job)


def end_with_parent(parent: int | None = None) -> None:
    """Watch this worker's parent: once that is gone, let the run save as at any SIGTERM, and end the process.

    The parent's id is given if it may be gone already.
    """
    parent, name = os.getppid() if parent is None else parent, "end with the parent"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + SAVE_SECONDS
        while _jobs and time.monotonic() < deadline:
            time.sleep(0.1)
        os._exit(128 + signal.SIGTERM)

    if name not in [thread.name for thread in threading.enumerate()]:  # a process may have many jobs
        threading.Thread(target=watch, name=name, daemon=True).start()


@contextmanager
def watched(store: Any) -> Iterator[None]:
    """Around a run of several processes, which meet at a store of torch's.

    Ends this process if another one has failed and this one does not notice, as it waits for a GPU.
    """
    done = threading.Event()

    def watch() -> None:
        failed = False
        while not failed and not done.wait(1):
            try:
                failed = bool(store.check(["failed"]))
            except RuntimeError:  # the process that has the store is gone
                failed = True
        if not done.wait(END_SECONDS):
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
