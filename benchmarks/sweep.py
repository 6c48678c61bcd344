"""A sweep side by side and in turn: `python -m benchmarks.sweep [--rounds 3] [--jobs 8] [setting ...]`.

Trains the same jobs by Hydra's own launcher, one after another on all cores, and by joblib, as many at a time as there
are cores with a thread each, in alternation, and compares the seconds of the whole commands.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LAUNCHERS = ("basic", "joblib")


def seconds(launcher: str, jobs: int, settings: list[str]) -> float:
    """Seconds of wall-clock time that the whole command takes."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = [f"hydra.sweep.dir={folder}/sweep", f"hydra/launcher={launcher}", f"seed=range(1,{jobs + 1})"]
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "gptexp.train", "-m", *wanted, "logger=none", *settings],
                       check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        return time.perf_counter() - begin


def measure(rounds: int, jobs: int, settings: list[str]) -> dict[str, Any]:
    """Each round's seconds, and how much sooner joblib is done."""
    times = [{launcher: seconds(launcher, jobs, settings) for launcher in LAUNCHERS} for _ in range(rounds)]
    ratios = [t["basic"] / t["joblib"] for t in times]
    return {"jobs": jobs, "settings": settings, "seconds": times,
            "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}}  # fmt: skip


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/sweep.json"))
    parser.add_argument("settings", nargs="*", default=["max_steps=200", "eval_interval=200", "sample_tokens=0"],
                        help="further settings of gptexp.train")  # fmt: skip
    arguments = parser.parse_args()
    report = measure(arguments.rounds, arguments.jobs, arguments.settings)
    table = Table("round", *LAUNCHERS, "ratio", title=f"{arguments.jobs} jobs, seconds of the whole command")
    for number, times in enumerate(report["seconds"], 1):
        table.add_row(str(number), *(f"{times[launcher]:.1f}" for launcher in LAUNCHERS),
                      f"{times['basic'] / times['joblib']:.2f}")  # fmt: skip
    console = Console()
    console.print(table)
    console.print("joblib is done {median:.2f} times sooner ({lowest:.2f} to {highest:.2f})".format(**report["ratio"]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"{arguments.out}")


if __name__ == "__main__":
    main()
