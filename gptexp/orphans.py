"""Worker processes that end with the process that has started them, rather than stay for ever."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

PATIENCE = 120  # seconds that a run has to save

_jobs: list[object] = []  # under way in this process


@contextmanager
def at_work() -> Iterator[None]:
    """Around a job."""
    job = object()
    _jobs.append(job)
    try:
        yield
    finally:
        _jobs.remove(job)


@cache  # once a process, which may have many jobs
def end_with_parent(parent: int | None = None) -> None:
    """From now on, when this worker's parent is gone, have the run save as at any SIGTERM, and end the process.

    The parent's id is given if it may be gone already.
    """
    parent = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while _jobs and time.monotonic() < deadline:
            time.sleep(0.1)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
