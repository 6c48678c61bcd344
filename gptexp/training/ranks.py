"""How the processes end that torchrun or Slurm has started for one command. Nothing here imports torch in vain."""

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from gptexp.errors import GroupFailed, UserError

if TYPE_CHECKING:
    from gptexp.training.processes import Processes

HASTE = 10.0
"""Seconds that a process which finds a mistake before it has met the others looks for them."""

met: list["Processes"] = []
"""Those that this process has met; torch.distributed has one default group, too."""


def several() -> bool:
    """Whether this process is one of several of the same command."""
    if met or "TORCHELASTIC_RUN_ID" in os.environ:
        return bool(met) or int(os.environ.get("WORLD_SIZE", "1")) > 1
    slurm = {"hardware=slurm", "hardware.cluster=slurm"} & set(sys.argv[1:])
    return bool(slurm) and "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def end_together(status: int, problems: list[str]) -> GroupFailed:
    """End the other processes of this command, if there are any, with a status and problems, before this one ends.

    Returns:
        what ended the command first, in this process or in another one.
    """
    if several():
        from gptexp.training.processes import meet, processes

        with suppress(UserError):  # they cannot be reached
            group = processes("slurm")
            meet(group, HASTE)
            return group.fail(status, problems)
    return GroupFailed(status, problems, mine=True)


def part() -> None:
    """The last thing that a process does after a failure: see that the others hear of it."""
    with suppress(KeyboardInterrupt):
        for group in met:
            group.part()
