"""The ways in which a command can end early."""

import signal
import traceback
from collections.abc import Iterable
from dataclasses import dataclass


class UserError(Exception):
    """One or more mistakes in what the user asked for.

    Entry points print each problem as one line on standard error and exit with status 2; no
    traceback is shown.

    Args:
        problems: one line for each mistake. A good line names the key, the value and what is allowed.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class RunFailed(Exception):
    """A run ended with an error that is no mistake of the user's; its train.log holds the traceback."""


class Diverged(Exception):
    """A run's loss or gradient is no longer finite."""


@dataclass(eq=False)
class Stopped(Exception):
    """Training was stopped by a signal, after saving. Within a Trainer, which has ways of its own with Ctrl-C."""

    signal: int  # its number


@dataclass(eq=False)
class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal, after saving."""

    signal: int  # its number


@dataclass(eq=False)
class GroupFailed(BaseException):
    """The processes of a command end, because one of them failed. No `Exception`: nothing may go on after it."""

    status: int  # what all exit with
    problems: list[str]  # one line for each mistake, or the fault
    mine: bool  # whether it was this process, which then says so

    def __str__(self) -> str:
        return "; ".join(self.problems) or f"stopped with status {self.status}"


def ending(error: BaseException) -> tuple[int, list[str]]:
    """The exit status that an error leads to, and what to say of it, one line per problem.

    2 is a user's mistake, 1 a fault, 128 and more a signal, of which there is nothing to say.
    """
    match error:
        case GroupFailed():
            return error.status, error.problems
        case UserError():
            return 2, error.problems
        case KeyboardInterrupt():
            return 128 + (error.signal if isinstance(error, Interrupted) else signal.SIGINT), []
        case RunFailed():
            return 1, [str(error)]
        case _:
            return 1, [" ".join(f"{type(error).__name__}: {str(error) or _place(error)}".split())]


def _place(error: BaseException) -> str:
    """Where an error without a text was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"in {frames[-1].filename}, line {frames[-1].lineno}; GPTEXP_DEBUG=1 shows the way there" if frames else ""
