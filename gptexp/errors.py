"""The one exception that stands for a user's mistake rather than a fault of the program."""

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
