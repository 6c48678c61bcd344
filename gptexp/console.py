"""What every command shares at the terminal: where messages go, and what an error looks like."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from gptexp.errors import Interrupted, UserError

log = logging.getLogger("gptexp")


class _Console(logging.StreamHandler[TextIO]):
    """Prints to standard output, whichever object that is at the moment: a progress bar takes it over."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout

    def handleError(self, record: logging.LogRecord) -> None:
        """A terminal that is gone, or a closed pipe, must not end a run."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def report_errors(silent: bool = False) -> Iterator[None]:
    """Turn errors into lines on standard error and an exit status: 2 for a user's mistake, 1 for a fault."""
    handler = _Console()
    handler.setLevel(logging.CRITICAL if silent else logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG)
    try:
        yield
    except UserError as error:
        if not silent:
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.signal if isinstance(stop, Interrupted) else signal.SIGINT))
    except Exception as error:
        if os.environ.get("GPTEXP_DEBUG"):
            raise
        if not silent:
            print(f"error: {str(error) or type(error).__name__}".replace("\n", " "), file=sys.stderr)
        sys.exit(1)
