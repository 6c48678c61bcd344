"""What every command shares at the terminal: where messages go, and what an error looks like."""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from gptexp.errors import GroupFailed, UserError, ending
from gptexp.processes.ending import met, several

log = logging.getLogger("gptexp")


class _Console(logging.StreamHandler[TextIO]):
    """Prints to standard output, whichever object that is at the moment: a progress bar takes it over."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


@contextmanager
def silenced(*names: str) -> Iterator[None]:
    """Keep the messages of other packages' loggers off the terminal."""
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.propagate, logger.handlers[:]) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [logging.NullHandler()]
    try:
        yield
    finally:
        for logger, (propagate, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, handlers


@contextmanager
def report_errors(errors: bool = True, messages: bool = True) -> Iterator[None]:
    """Turn errors into an exit status, 2 for a user's mistake and 1 for a fault, and a line each on standard error.

    What is logged goes to standard output. Both can be turned off.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that a terminal lacks must not end a run
    logging.raiseExceptions = False  # a terminal that is gone, a closed pipe or a full disk must not end a run
    handler = _Console()
    handler.setLevel(logging.INFO if messages else logging.CRITICAL)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG)
    try:
        yield
    except (Exception, KeyboardInterrupt, GroupFailed) as error:
        if isinstance(error, Exception) and not isinstance(error, UserError) and os.environ.get("GPTEXP_DEBUG"):
            raise
        failed = error if isinstance(error, GroupFailed) else _end(*ending(error))
        if errors and failed.mine:  # of several processes, the one that failed first says why
            for problem in failed.problems:
                print(f"error: {problem}", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):
            for group in met:
                group.leave()  # once the others have heard of it
        sys.exit(failed.status)


def _end(status: int, problems: list[str]) -> GroupFailed:
    """End this command in all of its processes."""
    if not several():
        return GroupFailed(status, problems, mine=True)
    from gptexp.processes.group import end_together  # imports torch

    return end_together(status, problems)


def run_command(text: str | None, run: Callable[[list[str]], object]) -> None:
    """Run a command with the arguments of the command line; with --help, print its module's text instead."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(text)
        return
    with report_errors():
        run(sys.argv[1:])
