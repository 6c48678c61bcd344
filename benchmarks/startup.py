"""How long one waits: `python -m benchmarks.startup [--rounds 5] [setting ...]`.

Seconds from the command to its --help, to an error of its settings, to the error of a missing GPU (which torch must be
asked for), and to the end of the first training step of the default run, after its first evaluation.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import parser, spread, take_turns, write
from gptexp.runs.files import last_row

TRAIN = [sys.executable, "-m", "gptexp.train"]


def whole(*arguments: str) -> Callable[[], float]:
    """Measures a command from its beginning to its end."""

    def measure() -> float:
        begin = time.perf_counter()
        subprocess.run([*TRAIN, *arguments], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - begin

    return measure


def first_step(settings: list[str]) -> float:
    """Seconds until the first step is in metrics.csv; then the run is killed."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        run = Path(folder, "run")
        process = subprocess.Popen([*TRAIN, "log_interval=1", f"hydra.run.dir={run}", *settings],
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        while last_row(run / "metrics.csv").get("step", 0) < 1 and process.poll() is None:
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit("the run ended before its first step")
        return seconds


def main() -> None:
    """Measure, print the table and write the JSON."""
    asked = parser(__doc__, "startup").parse_args()
    contestants = {
        "--help": whole("--help"),
        "an error of the settings": whole("norm=rmsnrom"),
        "a missing GPU": whole("hardware=gpu"),
        "the first step": lambda: first_step(asked.settings),
    }
    for measure in contestants.values():
        measure()  # files are then in the system's cache, and the corpus in ours
    rounds = take_turns(contestants, asked.rounds)
    report = {name: spread([r[name] for r in rounds]) for name in contestants}
    table = Table("to", "median", "lowest", "highest", title="seconds after the command")
    for name, values in report.items():
        table.add_row(name, *(f"{v:.2f}" for v in values.values()))
    Console().print(table)
    write(asked.out, {"settings": asked.settings, "rounds": rounds, **report})


if __name__ == "__main__":
    main()
