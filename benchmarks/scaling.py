"""What a step costs: `python -m benchmarks.scaling [--rounds 3] [--steps 30] [setting ...]`.

Trains by the real command with one of n_layer, n_embd, block_size and batch_size changed at a time, and sets the time
of a step and the peak of the process's memory beside the count of operations. The times are fitted by
a + b n_layer + operations / rate, all at least 0: what a step costs however small it is, what a layer costs, and how
many operations a second the machine does once there are enough of them.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.optimize import nnls

from benchmarks.measure import CPU, parser, spread, write
from gptexp.models.gpt_settings import GPTConfig
from gptexp.models.settings import build_model
from gptexp.runs.files import read_metrics

BASE = {"model.n_layer": 4, "model.n_embd": 128, "model.block_size": 64, "batch_size": 12}
VALUES = {
    "model.n_layer": (1, 2, 8, 16),
    "model.n_embd": (32, 64, 256, 512),
    "model.block_size": (16, 32, 128, 256, 512),
    "batch_size": (3, 6, 24, 48, 96),
}
SKIPPED = 10  # steps at the start


def points() -> list[dict[str, int]]:
    """The base, and each value of each setting."""
    return [BASE, *(BASE | {key: value} for key, values in VALUES.items() for value in values)]


def measure(point: dict[str, int], steps: int, settings: list[str]) -> tuple[float, float]:
    """Milliseconds of a step, and the peak of the process's memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        arguments = [*(f"{k}={v}" for k, v in point.items()), CPU, f"max_steps={steps}", f"eval_interval={steps}",
                     "eval_windows=1", "eval_batch_size=1", "sample_tokens=0", "logger=none",
                     f"log_interval={SKIPPED}", f"hydra.run.dir={run}", *settings]  # fmt: skip
        process = subprocess.Popen([sys.executable, "-m", "gptexp.train", *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"gptexp.train {' '.join(arguments)} ended with status {process.returncode}")
        seconds = {row["step"]: row["seconds"] for row in read_metrics(run / "metrics.csv")[1:]}
    return (seconds[steps] - seconds[SKIPPED]) / (steps - SKIPPED) * 1000, usage.ru_maxrss / 1024


def sized(point: dict[str, int]) -> Any:
    """The model of a point."""
    return build_model(GPTConfig(**{k.removeprefix("model."): v for k, v in point.items() if k != "batch_size"}))


def operations(point: dict[str, int]) -> float:
    """Floating-point operations of a step, in 10^9."""
    return float(sized(point).flops_per_token() * point["batch_size"] * point["model.block_size"] / 1e9)


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Non-negative least squares of relative errors: milliseconds of a step, of a layer, and GFLOP/s."""
    columns = np.array([[1.0, row["model.n_layer"], row["gigaflop"]] for row in rows])
    times = np.array([row["milliseconds"] for row in rows])
    (step, layer, each), _ = nnls(columns / times[:, None], np.ones(len(rows)))
    errors = columns @ [step, layer, each] / times - 1
    return {"step_ms": step, "layer_ms": layer, "gflops": 1000 / each if each else float("inf"),
            "largest_error": float(np.abs(errors).max())}  # fmt: skip


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "scaling", rounds=3)
    arguments.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    asked = arguments.parse_args()
    taken: dict[int, list[tuple[float, float]]] = {}
    order = [i for _ in range(asked.rounds) for i in range(len(points()))]
    for i in track(order, "runs", console=Console(stderr=True)):
        taken.setdefault(i, []).append(measure(points()[i], asked.steps, asked.settings))
    rows = []
    for i, point in enumerate(points()):
        times = [time for time, _ in taken[i]]
        rows.append(point | {"gigaflop": operations(point), "milliseconds": spread(times)["median"],
                             "spread": spread(times), "MiB": max(memory for _, memory in taken[i])})  # fmt: skip
    found = fit(rows)
    table = Table(*(key.removeprefix("model.") for key in BASE), "GFLOP", "ms a step", "GFLOP/s", "peak MiB")
    for row in rows:
        table.add_row(*(str(row[key]) for key in BASE), f"{row['gigaflop']:.2f}", f"{row['milliseconds']:.1f}",
                      f"{row['gigaflop'] / row['milliseconds'] * 1000:.0f}", f"{row['MiB']:.0f}")  # fmt: skip
    console = Console()
    console.print(table)
    console.print("{step_ms:.1f} ms a step + {layer_ms:.1f} ms a layer + operations at {gflops:.0f} GFLOP/s, "
                  "off by {largest_error:.0%} at most".format(**found))  # fmt: skip
    write(asked.out, {"steps": asked.steps, "settings": asked.settings, "points": rows, "fit": found})


if __name__ == "__main__":
    main()
