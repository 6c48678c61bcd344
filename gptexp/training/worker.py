"""One process of several that train a run together; started by `launch`, one for each device."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType

from gptexp.console import report_errors
from gptexp.runs import Run


def launch(run: Run, devices: int) -> int:
    """Train a run in `devices` processes on this machine and wait for them.

    Each gets nothing but the run directory, whose configuration is complete. So it makes no difference whether
    the command came from a single run, a multirun or any Hydra launcher, and no process can make a directory
    of its own.

    Returns:
        the exit status of the lowest rank that failed, or 0.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(devices), "NODE_RANK": "0",
              "GPTEXP_WORKER": "1"}  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "gptexp.training.worker", str(run.path)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(devices)
    ]

    noted: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number if len(noted) == 1 else signal.SIGKILL)

    previous = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while any(w.poll() is None for w in workers):
            if any(w.returncode for w in workers if w.returncode is not None):
                _stop(workers)
            time.sleep(0.05)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _stop(workers, patience=0)
    return next((w.returncode for w in workers if w.returncode), 0)


def _stop(workers: list[subprocess.Popen[bytes]], patience: float = 10.0) -> None:
    """Give the other processes a moment to end by themselves; then end them, for they wait for one that is gone."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and any(w.poll() is None for w in workers):
        time.sleep(0.05)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def _end_with(parent: int) -> None:
    """End this process when the one that launched it is gone, killed perhaps, and can no longer look after it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Train the run directory that the command line names, as the rank that the environment names."""
    from gptexp.training.startup import import_lightning
    from gptexp.training.wandb_process import prepare

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    first = os.environ["RANK"] == "0"
    with report_errors(errors=False, messages=first):  # the launching process shows the error
        run = Run.open(sys.argv[1])
        if first:
            prepare(run.config)
        import_lightning()
        from gptexp.training.fit import fit

        fit(run)


if __name__ == "__main__":
    main()
