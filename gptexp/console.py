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
def report_errors(errors: bool = True, messages: bool = True) -> Iterator[None]:
    """Turn errors into an exit status, 2 for a user's mistake and 1 for a fault, and a line each on standard error.

    Args:
        errors: show the lines.
        messages: show what is logged on standard output.
    """
    handler = _Console()
    handler.setLevel(logging.INFO if messages else logging.CRITICAL)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG)
    try:
        yield
    except UserError as error:
        if errors:
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.signal if isinstance(stop, Interrupted) else signal.SIGINT))
    except Exception as error:
        if os.environ.get("GPTEXP_DEBUG"):
            raise
        if errors:
            print(f"error: {str(error) or type(error).__name__}".replace("\n", " "), file=sys.stderr)
        sys.exit(1)
