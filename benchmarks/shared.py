"""A machine that is shared: `python -m benchmarks.shared [--rounds 3] [--contestants A,B,..] [setting ...]`.

Trains the recipe of nanoGPT's README for a CPU by the real command: alone, two at once, and beside a process that
keeps one core busy. A contestant is an environment variable or a setting, or several joined by "+", such as
GOMP_SPINCOUNT=300+hardware.threads=2; "default" changes nothing. Tokens per second are measured over a span in which
all runs train, without their start and their first steps.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import CPU, as_text, parser, ratios, spread, take_turns, write
from gptexp.runs.files import last_row

SKIPPED = 20  # steps at the start

CONTESTANTS = ("default", *(f"GOMP_SPINCOUNT={n}" for n in (300, 1_000, 2_000, 4_000, 20_000, 300_000)),
               "OMP_WAIT_POLICY=passive", "hardware.threads=1")  # fmt: skip
"""300,000 is the choice of GNU's OpenMP; it is what waiting costs where nothing is set."""

SCENARIOS = {"alone": (1, 0), "two at once": (2, 0), "beside a busy process": (1, 1)}
"""How many runs train at once, and beside how many busy processes."""


def parts(contestant: str) -> tuple[dict[str, str], list[str]]:
    """The environment variables and the settings of a contestant."""
    pairs = [] if contestant == "default" else contestant.split("+")
    environment = dict(p.split("=", 1) for p in pairs if p.partition("=")[0].isupper())
    return environment, [p for p in pairs if not p.partition("=")[0].isupper()]


def tokens_per_second(contestant: str, runs: int, busy: int, seconds: float, settings: Sequence[str]) -> list[float]:
    """The speed of each of several runs that train at once.

    Args:
        contestant: what is to be measured, as on the command line.
        runs: how many train at once.
        busy: how many other processes keep a core busy each.
        seconds: of training to measure.
        settings: further settings of gptexp.train.

    Raises:
        SystemExit: when a run ends by itself.
    """
    environment, own = parts(contestant)
    spins = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    env = {k: v for k, v in os.environ.items() if k not in spins} | environment
    fixed = ["max_steps=1000000", "eval_interval=1000000", "eval_windows=1", "eval_batch_size=1", "sample_tokens=0",
             "logger=none", "log_interval=5"]  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(i), "metrics.csv") for i in range(runs)]

        def wait_for(steps: Sequence[float]) -> list[dict[str, float]]:
            """The last rows, once each run has come beyond its step."""
            while True:
                rows = [last_row(file) for file in files]
                if all(row.get("step", -1) > step for row, step in zip(rows, steps, strict=True)):
                    return rows
                if any(process.poll() is not None for process in processes):
                    raise SystemExit(f"a run with {contestant} ended by itself")
                time.sleep(0.05)

        try:
            for file in files:
                command = [sys.executable, "-m", "gptexp.train", "experiment=nanogpt_cpu", CPU, *settings, *own, *fixed]
                processes.append(subprocess.Popen([*command, f"hydra.run.dir={file.parent}"], env=env,
                                                  stdout=subprocess.DEVNULL))  # fmt: skip
            for _ in range(busy):
                processes.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            before = wait_for([SKIPPED] * runs)
            time.sleep(seconds)
            after = wait_for([row["step"] for row in before])
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
    return [(b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in zip(before, after, strict=True)]


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "shared", rounds=3)
    arguments.add_argument("--seconds", type=float, default=8, help="of training that each figure is taken from")
    arguments.add_argument("--cores", type=int, help="use only so many of this machine's cores (Linux)")
    arguments.add_argument("--contestants", default=",".join(CONTESTANTS), help="separated by commas")
    asked = arguments.parse_args()
    if asked.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.cores])
    names = list(dict.fromkeys(["default", *asked.contestants.split(",")]))

    def measure(name: str, runs: int, busy: int) -> Callable[[], float]:
        return lambda: sum(tokens_per_second(name, runs, busy, asked.seconds, asked.settings))

    rounds = take_turns({f"{name}: {scenario}": measure(name, *how) for name in names
                         for scenario, how in SCENARIOS.items()}, asked.rounds)  # fmt: skip
    table = Table("", *SCENARIOS, "two at once / alone", "alone / default", title="tokens per second, of all runs")
    report = {}
    for name in names:
        found = {scenario: spread([r[f"{name}: {scenario}"] for r in rounds]) for scenario in SCENARIOS}
        together = ratios(rounds, f"{name}: two at once", f"{name}: alone")
        alone = ratios(rounds, f"{name}: alone", "default: alone")
        report[name] = {**found, "two at once / alone": together, "alone / default": alone}
        table.add_row(name, *(f"{f['median']:,.0f}" for f in found.values()), as_text(together), as_text(alone))
    Console().print(table)
    write(asked.out, {"seconds": asked.seconds, "settings": asked.settings, "rounds": rounds, "contestants": report})


if __name__ == "__main__":
    main()
