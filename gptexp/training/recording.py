"""What is recorded of a run however it ends: its messages in train.log, its status and error in run.json."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from gptexp.errors import GroupFailed, ending
from gptexp.processes.console import silenced
from gptexp.processes.group import Processes, connected
from gptexp.runs.run import Run

log = logging.getLogger("gptexp")


@contextmanager
def recorded(run: Run, processes: Processes) -> Iterator[None]:
    """Around training: rank 0 holds the run's lock, and the right status is left behind."""
    status = _status(run) if processes.first else nullcontext()
    # Lightning's and torch's remarks concern settings that the user never made.
    with silenced("lightning.pytorch", "lightning.fabric"), warnings.catch_warnings(), _log_file(run), status:
        warnings.filterwarnings("ignore", module="lightning|torch")
        with connected(processes, run.log_path):
            yield


@contextmanager
def _log_file(run: Run) -> Iterator[None]:
    """Copy all messages, and the traceback of an error, to train.log."""
    handler = logging.FileHandler(run.log_path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    loggers = (log, logging.getLogger("lightning.pytorch"))
    for logger in loggers:
        logger.addHandler(handler)
    try:
        log.debug("started: %s", " ".join(sys.argv))
        yield
    except (Exception, GroupFailed):
        log.debug("failed", exc_info=True)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


@contextmanager
def _status(run: Run) -> Iterator[None]:
    with run.lock():
        try:
            yield
        except BaseException as error:
            status, problems = ending(error)
            text = "; ".join(problems)
            try:
                if status > 128:
                    if run.info["status"] == "running":  # else it was saved, and its results are written
                        run.finish("interrupted")
                elif status == 2 and run.info.get("resumable"):  # a mistake found before training can be corrected
                    run.update(error=text)
                else:
                    run.finish("failed", error=text)
            except OSError:  # a full disk: the error itself is what the user must see
                log.warning("%s: cannot write run.json", run.path)
            raise
