"""The ways in which a command can end early."""

from collections.abc import Iterable


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
    """A run's loss or gradient is no longer finite.

    Attributes:
        step: optimizer steps done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"diverged at step {step}")
        self.step = step


class Stopped(Exception):
    """Training was stopped by a signal, after saving. Within a Trainer, which has ways of its own with Ctrl-C.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.signal = number


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal, after saving.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class GroupFailed(BaseException):
    """The processes of a command end, because one of them failed. No `Exception`: nothing may go on after it.

    Attributes:
        status: what all exit with.
        problems: one line for each mistake, or the fault.
        mine: whether it was this process, which then says so.
    """

    def __init__(self, status: int, problems: list[str], mine: bool) -> None:
        super().__init__("; ".join(problems) or f"stopped with status {status}")
        self.status, self.problems, self.mine = status, problems, mine
