"""Errors and power on real runs: `python -m benchmarks.aa [--comparisons 40] [--seeds 5] [--folder DIR] [setting ...]`.

Trains one small variant with 2 x comparisons x seeds different seeds and compares it with itself that many times, each
time one half of its seeds with another half. Every difference that is declared is a false alarm. The pairs are of
different seeds, so nothing is gained by pairing. Also trains the same model without norms, and with a learning rate
20 % lower, and tells how many of 20 studies with disjoint seeds find that each differs.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import write
from gptexp.analysis.statistics import Array, judge
from gptexp.runs.run import Run

SMALL = ["model.n_layer=1", "model.n_embd=32", "model.block_size=16", "heads=h2", "max_steps=200", "eval_interval=200",
         "schedule.warmup_steps=20", "sample_tokens=0", "logger=none", "data=pydocs"]  # fmt: skip


STUDIES = 20
CHANGES = {"norm=none": ["norm=none"], "a learning rate 20 % lower": ["optimizer.learning_rate=8e-4"]}


def train(folder: Path, runs: int, settings: list[str]) -> Array:
    """The final validation losses of the seeds 1 to runs; those that are there already are not trained again."""
    wanted = [f"hydra.sweep.dir={folder}", f"seed=range(1,{runs + 1})", "hydra/launcher=joblib", *SMALL, *settings]
    subprocess.run([sys.executable, "-m", "gptexp.train", "-m", *wanted], check=True)
    found = {run.config.seed: run.result for path in folder.glob("*/run.json") if (run := Run(path.parent))}
    return np.array([float((found[seed] or {})["final"]["val/loss"]) for seed in range(1, runs + 1)])


def different(a: Array, b: Array) -> bool:
    """Whether two variants are declared to differ, of losses of the same seeds."""
    return judge(np.stack([b, a]), np.array([[-1.0, 1.0]]), delta=0.01)[0].verdict in ("better", "worse")


def measure(losses: Array, changed: dict[str, Array], comparisons: int, seeds: int) -> dict[str, Any]:
    """What is declared of differences that are none, one at a time and as one family; and of those that are real."""
    halves = losses[: 2 * comparisons * seeds].reshape(comparisons, 2, seeds)
    contrasts = np.kron(np.eye(comparisons), [1.0, -1.0])
    family = judge(halves.reshape(2 * comparisons, seeds), contrasts, delta=0.01)
    found = {
        "comparisons": comparisons,
        "seeds": seeds,
        "sd_of_losses": float(np.std(losses, ddof=1)),
        "false_alarms": sum(different(*pair) for pair in halves),
        "false_alarms_in_one_family": sum(j.verdict in ("better", "worse") for j in family),
    }
    for name, values in changed.items():
        studies = zip(values.reshape(STUDIES, seeds), losses[: STUDIES * seeds].reshape(STUDIES, seeds), strict=True)
        found[f"{name}: mean difference"] = float(np.mean(values - losses[: len(values)]))
        found[f"{name}: found in {STUDIES} studies"] = sum(different(*study) for study in studies)
    return found


def main() -> None:
    """Train, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5, help="of each side")
    parser.add_argument("--folder", type=Path, default=Path("outputs/sweeps"))
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/aa.json"))
    parser.add_argument("settings", nargs="*", help="further settings of gptexp.train")
    arguments = parser.parse_args()
    runs = 2 * arguments.comparisons * arguments.seeds
    losses = train(arguments.folder / "aa", runs, arguments.settings)
    changed = {name: train(arguments.folder / f"aa-{number}", STUDIES * arguments.seeds, [*arguments.settings, *more])
               for number, (name, more) in enumerate(CHANGES.items(), 1)}  # fmt: skip
    report = measure(losses, changed, arguments.comparisons, arguments.seeds)
    table = Table("a variant against itself, and against others", "", title="disjoint seeds")
    for key, value in report.items():
        table.add_row(key.replace("_", " "), f"{value:.4g}")
    Console().print(table)
    write(arguments.out, report | {"losses": losses.tolist()})


if __name__ == "__main__":
    main()
