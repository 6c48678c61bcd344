"""One of several processes that train a run on this machine: `python -m gptexp.training.worker DIR`."""

import sys

from gptexp import perf
from gptexp.console import report_errors
from gptexp.orphans import end_with_parent
from gptexp.runs import Run


def main() -> None:
    """Train the run directory that the command line names."""
    end_with_parent()
    run = Run.open(sys.argv[1])
    perf.prepare()
    with report_errors(errors=False):  # the process that started this one shows the error
        from gptexp.training.fit import fit
        from gptexp.training.processes import joined, processes

        group = processes()
        with joined(group):
            fit(run, group, quiet=not group.first)


if __name__ == "__main__":
    main()
