"""One of several processes that train a run on this machine: `python -m gptexp.training.worker DIR PARENT VOLUME`."""

import sys

from gptexp import perf
from gptexp.console import report_errors
from gptexp.orphans import end_with_parent
from gptexp.runs import Run


def main() -> None:
    """Train a run directory as long as the process lives that started this one."""
    path, parent, volume = sys.argv[1:]
    end_with_parent(int(parent))
    with report_errors(errors=False, messages=volume == "loud"):  # the parent shows the error
        run = Run.open(path)
        perf.prepare()
        from gptexp.training.fit import fit
        from gptexp.training.processes import meet, processes

        group = processes()
        meet(group, run.config.hardware.timeout)
        fit(run, group, quiet=volume == "quiet" or not group.first)


if __name__ == "__main__":
    main()
