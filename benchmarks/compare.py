"""What a comparison of many runs takes: `python -m benchmarks.compare [--runs 1000] [--rows 1000]`.

Writes run directories with made-up losses (five variants of the norm by ten learning rates, the rest seeds), compares
them by the real command, and prints the seconds and the peak memory of it.
"""

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import write
from gptexp import records
from gptexp.config import read_config
from gptexp.runs import Run

NORMS = ("layernorm", "rmsnorm", "batchnorm", "scalenorm", "dyt")
RATES = tuple(float(f"{rate:.2g}") for rate in np.geomspace(1e-4, 1e-2, 10))


def write_run(
    path: Path, settings: Mapping[str, Any], losses: Sequence[float], *, rows: int = 0, status: str = "done",
    data: str = "d" * 64, precision: str = "32-true", **info: Any,
) -> Run:  # fmt: skip
    """Write the directory of a run that never was.

    Args:
        path: the directory to make.
        settings: of its configuration, nested; the rest are the defaults.
        losses: of its evaluations, nats a token, evenly spaced over its rows.
        rows: of metrics.csv; at least one an evaluation.
        status: how it ended.
        data: fingerprint of its corpus.
        precision: that it computed in.
        info: further entries of run.json.
    """
    config = read_config(settings)
    run = Run.claim(path, config, {
        "name": path.name, "group": path.parent.name, "variant": config.variant,
        "fingerprints": {"config": config.fingerprint(), "data": data, "code": "c" * 64},
        "data": {"corpus": "shakespeare"}, "command": ["gptexp/train.py", "-m", "seed=1,2"], "error": None,
        "device": {"accelerator": "cpu", "name": "none", "precision": precision},
        "train_loss": {"sees_later_tokens": config.model.norm == "batchnorm", "sees_other_sequences": False}, **info,
    })  # fmt: skip
    metrics = records.Table(run.metrics_path, records.METRICS)
    rows = max(rows, len(losses))
    evaluations = dict(zip(np.linspace(0, rows - 1, len(losses)).astype(int).tolist(), losses, strict=True))
    for step in range(rows):
        row = {"step": step, "tokens": step * 768, "train/loss": 2.5, "learning_rate": 1e-3, "seconds": step / 100}
        metrics.append(row | ({"val/loss": evaluations[step]} if step in evaluations else {}))
    metrics.close()
    if status in ("done", "diverged", "interrupted"):
        best = min(filter(math.isfinite, losses), default=None)
        run.write_result({"status": status, "best_val_loss": best, "parameters": 1000, "seconds": rows / 100,
                          "tokens_per_second": 76800.0})  # fmt: skip
    run.finish(status)  # type: ignore[arg-type]
    return run


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
