"""Faults and what comes of them: `python -m benchmarks.faults [--n 100] [--only KIND] [--jobs 2] [--seed 0]`.

Real commands meet real faults at random moments: SIGKILL, a full disk, a folder that turns read-only, a file torn as
by a power loss, a W&B server that refuses, hangs or vanishes. The same command (or `resume=`) is then given again, and
what it leaves is compared with what an undisturbed command leaves: metrics.csv but for its times, the samples, the
losses of result.json, the tables of a sweep and of a comparison. A fault that the process survives must be reported in
an `error:` line, without a traceback. For a torn file, one line that names it, with nothing overwritten, is right as
well; the file is then put back, or removed if the line says so. A W&B that fails must not keep a run from its end.

A table has, for each kind of fault, how many there were, how many the program recovered from, and the worst thing seen.
A fault that could not be brought about, even with other draws, counts as such. The exit status is 1 if the program did
not recover from one. What is drawn depends on --seed, the kind and the number of the fault within its kind; where a
process is at a drawn moment depends on the machine.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from benchmarks import injection
from benchmarks.disturbed import BY_HAND, LOST, Campaign, Case, NotInjected, NotRecovered
from benchmarks.fault_kinds import KINDS
from benchmarks.measure import write

ATTEMPTS = 5  # draws until a fault counts as one that could not be brought about
PATIENCE = 30  # seconds for the processes of a command to follow it


@dataclass(frozen=True)
class Result:
    """What came of one fault.

    Attributes:
        kind: of fault.
        number: within the kind, from 0.
        target: the command that was disturbed.
        fault: what was done to it.
        injected: whether it could be brought about.
        recovered: whether the program recovered from it.
        worst: the worst thing seen; empty if there was nothing.
        severity: of that; 0, NOTED, BY_HAND or LOST.
        seconds: that all of it took.
        folder: what is left of it to look at, if the program did not recover.
    """

    kind: str
    number: int
    target: str
    fault: str
    injected: bool
    recovered: bool
    worst: str
    severity: int
    seconds: float
    folder: str | None


@dataclass(frozen=True)
class Fault:
    """What is to be tried: a kind and the number of the fault within it."""

    kind: str
    number: int


def plan(n: int, kinds: Sequence[str]) -> list[Fault]:
    """The first n faults of an endless row in which each kind has its share, well mixed."""
    weights, credit = {kind: KINDS[kind].weight for kind in kinds}, dict.fromkeys(kinds, 0)
    faults, counts = [], dict.fromkeys(kinds, 0)
    for _ in range(n):
        for kind, weight in weights.items():
            credit[kind] += weight
        kind = max(credit, key=lambda k: credit[k])
        credit[kind] -= sum(weights.values())
        faults.append(Fault(kind, counts[kind]))
        counts[kind] += 1
    return faults


def take(campaign: Campaign, fault: Fault) -> Result:
    """Bring a fault about, with other draws if need be, and see what comes of it."""
    for attempt in range(ATTEMPTS):
        begin = time.perf_counter()
        case = Case(campaign, f"{fault.kind}-{fault.number}.{attempt}")
        injected = recovered = True
        try:
            KINDS[fault.kind].inject(case)
            _processes_end(case)
        except NotInjected as error:
            injected, recovered = False, False
            case.note(LOST, str(error))
        except (OSError, subprocess.CalledProcessError) as error:  # what the machine refuses this campaign
            injected, recovered = False, False
            case.note(LOST, f"{type(error).__name__}: {error}")
        except NotRecovered as error:
            recovered = False
            case.note(LOST, str(error))
        finally:
            _kill(case)
        if recovered or not injected:
            shutil.rmtree(case.folder, ignore_errors=True)
        if injected:
            break
    severity, worst = max(case.seen, default=(0, ""), key=lambda seen: seen[0])
    return Result(fault.kind, fault.number, case.target, case.fault.strip(), injected, recovered, worst, severity,
                  time.perf_counter() - begin, None if recovered or not injected else str(case.folder))  # fmt: skip


def _processes_end(case: Case) -> None:
    """Whatever the commands have started should end with them; note what does not."""
    deadline = time.monotonic() + PATIENCE
    while (left := injection.living(case.mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        case.note(BY_HAND, f"{len(left)} processes stay, such as {next(iter(left.values()))[:60]!r}")


def _kill(case: Case) -> None:
    for process in injection.living(case.mark):
        injection.kill(process)


def summary(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """For each kind: faults, those not injected, those recovered from, and the worst thing seen."""
    rows: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        own = [r for r in results if r.kind == kind]
        if own:
            injected = [r for r in own if r.injected]
            worst = max(injected or own, key=lambda r: r.severity)
            rows[kind] = {"number": len(own), "not injected": len(own) - len(injected),
                          "recovered": sum(r.recovered for r in injected), "worst": worst.worst}  # fmt: skip
    return rows


def show(rows: Mapping[str, Mapping[str, Any]], lacking: Mapping[str, str]) -> None:
    """Print the table."""
    table = Table("kind of fault", "number", "not injected", "recovered", "worst thing seen")
    for column in table.columns[1:4]:
        column.justify = "right"
    for kind, row in rows.items():
        failed = row["recovered"] < row["number"] - row["not injected"]
        table.add_row(kind, *(str(row[k]) for k in ("number", "not injected", "recovered")), Text(row["worst"] or "–"),
                      style="red" if failed else "")  # fmt: skip
    for kind, reason in lacking.items():
        table.add_row(kind, "0", "–", "–", Text(f"skipped: {reason}"))
    total = [sum(row[k] for row in rows.values()) for k in ("number", "not injected", "recovered")]
    table.add_section()
    table.add_row("all", *map(str, total), "")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def run(campaign: Campaign, faults: Sequence[Fault], jobs: int) -> list[Result]:
    """Try faults, some at a time; returns what came of each, in their order. Ctrl-C ends it with those tried so far."""
    results: dict[Fault, Result] = {}
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process and no mount is left
    with ThreadPoolExecutor(jobs) as pool:
        try:
            waiting = {pool.submit(take, campaign, fault): fault for fault in faults}
            done = as_completed(waiting)
            for future in track(done, "faults", total=len(faults), console=Console(stderr=True)):
                results[waiting[future]] = future.result()
        except BaseException as error:
            campaign.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
        finally:
            signal.signal(signal.SIGTERM, previous)
    return [results[fault] for fault in faults if fault in results]


def main() -> None:
    """Try the faults, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="faults (100)")
    parser.add_argument("--only", action="append", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}; can be "
                        "given several times")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time, of a thread each (2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/faults.json"), help="JSON with all cases")
    asked = parser.parse_args()
    wanted = [kind for kind in KINDS if kind in (asked.only or KINDS)]
    lacking = {kind: reason for kind in wanted if (reason := KINDS[kind].lacking())}
    kinds = [kind for kind in wanted if kind not in lacking]
    begin, results = time.perf_counter(), list[Result]()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        if kinds:
            results = run(Campaign(folder, asked.seed), plan(asked.n, kinds), asked.jobs)
    finally:
        lost = [result for result in results if result.injected and not result.recovered]
        if not lost:
            shutil.rmtree(folder, ignore_errors=True)
    rows = summary(results)
    show(rows, lacking)
    for result in lost:
        case = f"{result.kind} {result.number}, {result.target}: {result.fault}"
        told = [f"not recovered: {case}", result.worst, str(result.folder)]
        Console().print("\n    ".join(told), highlight=False, markup=False, soft_wrap=True)
    write(asked.out, {"seed": asked.seed, "seconds": time.perf_counter() - begin, "kinds": rows, "skipped": lacking,
                      "faults": [asdict(result) for result in results]})  # fmt: skip
    if kinds and len(results) < asked.n:
        raise SystemExit(128 + signal.SIGINT)
    if lost or not any(result.injected for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
