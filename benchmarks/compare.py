"""What a comparison of many runs takes: `python -m benchmarks.compare [--runs 1000] [--rows 1000]`.

Writes run directories with made-up losses (five variants of the norm by ten learning rates, the rest seeds), compares
them by the real command, and prints the seconds and the peak memory of it.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import write
from tests.synthetic import write_run

NORMS = ("layernorm", "rmsnorm", "batchnorm", "scalenorm", "dyt")
RATES = tuple(float(f"{rate:.2g}") for rate in np.geomspace(1e-4, 1e-2, 10))


def write_sweep(folder: Path, runs: int, rows: int) -> None:
    """Write a sweep of 50 variants, each with as many seeds as there are runs for."""
    draw = np.random.default_rng(0)
    for number in range(runs):
        seed, variant = divmod(number, len(NORMS) * len(RATES))
        norm, rate = NORMS[variant % len(NORMS)], RATES[variant // len(NORMS)]
        end = 1.9 + 0.05 * (np.log10(rate) + 3) ** 2 + 0.02 * (variant % len(NORMS)) + draw.normal(0, 0.01)
        losses = end + 2.0 * np.exp(-np.arange(20) / 4)
        settings = {"model": {"norm": norm}, "optimizer": {"learning_rate": rate}, "seed": seed}
        write_run(folder / f"{norm}-pre-h4-s{seed}-learning_rate_{rate}", settings, losses.tolist(), rows=rows)


def measure(runs: int, rows: int) -> dict[str, Any]:
    """Seconds and peak memory of the command, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        write_sweep(Path(folder, "sweep"), runs, rows)
        start = time.perf_counter()
        command = [sys.executable, "-m", "gptexp.compare", str(Path(folder, "sweep"))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        page = Path(folder, "sweep", "report", "report.html").stat().st_size
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"runs": runs, "rows": rows, "seconds": seconds, "gigabytes": memory, "page_kilobytes": page / 1000}


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="run directories")
    parser.add_argument("--rows", type=int, default=1000, help="rows of each metrics.csv")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/compare.json"))
    arguments = parser.parse_args()
    report = measure(arguments.runs, arguments.rows)
    table = Table("runs", "rows each", "seconds", "peak memory", "page")
    table.add_row(str(report["runs"]), str(report["rows"]), f"{report['seconds']:.1f}",
                  f"{report['gigabytes']:.2f} GiB", f"{report['page_kilobytes']:.0f} kB")  # fmt: skip
    Console().print(table)
    write(arguments.out, report)


if __name__ == "__main__":
    main()
