"""Processes that this command starts on this machine to train a run, one per device.

Each is `python -m gptexp.training.workers DIR PARENT VOLUME`.
"""

import math
import os
import signal
import sys
import threading
from collections.abc import Mapping

from gptexp.errors import Interrupted, RunFailed, UserError
from gptexp.processes.console import report_errors, silenced
from gptexp.processes.ending import end_with_parent
from gptexp.runs.run import Run


def start_workers(run: Run, count: int, quiet: bool = False) -> float:
    """Train a run in `count` processes, which torchrun's library starts and ends together.

    Returns:
        the lowest validation loss, in nats per token.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM.
        UserError: for a mistake that a process found.
        RunFailed: when one failed or was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with run.lock():  # refuses a run that is being trained; the first worker takes the lock over
        run.update(error=None)
    plan = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=run.path.name, rdzv_backend="c10d",
                        rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=0)  # fmt: skip
    command = ("-m", __name__, str(run.path), str(os.getpid()), "quiet" if quiet else "loud")
    main = threading.current_thread() is threading.main_thread()
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if main else ()
    handlers = {number: signal.getsignal(number) for number in taken}
    try:
        with silenced("torch.distributed.elastic"):
            elastic_launch(plan, sys.executable)(*command)
    except SignalException as stop:
        raise Interrupted(int(stop.sigval)) from stop
    except ChildFailedError as failed:
        raise _what_failed(run, {rank: f.exitcode for rank, f in failed.failures.items()}) from failed
    finally:
        for number, handler in handlers.items():  # which torchrun's library has replaced
            signal.signal(number, handler)
    best = (run.result or {}).get("best_val_loss")
    return math.nan if best is None else float(best)


def _what_failed(run: Run, codes: Mapping[int, int]) -> Exception:
    """What ended a run's processes, by their exit statuses; completes run.json if they could not."""
    killed = [f"rank {rank} was killed ({signal.Signals(-code).name}); see {run.log_path}"
              for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM]  # fmt: skip
    code = next(iter(codes.values()))
    reasons = [*killed, run.info.get("error"), f"a process ended with status {code}; see {run.log_path}"]
    message = next(filter(None, reasons))
    if code == 2 and not killed:
        return UserError(message.split("; "))
    if killed or run.info["status"] == "running":
        run.finish("failed", error=message)
    return RunFailed(message)


def main() -> None:
    """Train a run directory as long as the process lives that started this one."""
    path, parent, volume = sys.argv[1:]
    end_with_parent(int(parent))
    with report_errors(errors=False, messages=volume == "loud"):  # the parent shows the error
        run = Run.open(path)
        from gptexp.processes.group import gather
        from gptexp.training.fit import fit

        group = gather("auto", run.config.hardware.timeout)
        fit(run, group, quiet=volume == "quiet" or not group.first)


if __name__ == "__main__":
    main()
