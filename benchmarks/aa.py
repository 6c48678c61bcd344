"""False alarms on real runs: `python -m benchmarks.aa [--comparisons 20] [--seeds 10] [--folder DIR] [setting ...]`.

Trains one variant with 2 x comparisons x seeds different seeds and compares it with itself that many times, each
time one half of its seeds with another half. Every difference that is declared is a false alarm. The pairs are of
different seeds, so nothing is gained by pairing: it is the test's error that is measured, not its power.
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
from gptexp.analysis.statistics import judge
from gptexp.runs.run import Run

SMALL = ["model.n_layer=1", "model.n_embd=32", "model.block_size=16", "heads=h2", "max_steps=200", "eval_interval=200",
         "schedule.warmup_steps=20", "sample_tokens=0", "logger=none", "data=pydocs"]  # fmt: skip


def train(folder: Path, runs: int, settings: list[str]) -> list[float]:
    """The best validation losses of the seeds 1 to runs; those that are there already are not trained again."""
    wanted = [f"hydra.sweep.dir={folder}", f"seed=range(1,{runs + 1})", "hydra/launcher=joblib", *SMALL, *settings]
    subprocess.run([sys.executable, "-m", "gptexp.train", "-m", *wanted], check=True)
    found = {run.config.seed: run.result for path in folder.glob("*/run.json") if (run := Run(path.parent))}
    return [float((found[seed] or {})["best_val_loss"]) for seed in range(1, runs + 1)]


def measure(losses: list[float], comparisons: int, seeds: int) -> dict[str, Any]:
    """What is declared of differences that are none, one at a time and all as one family."""
    table = np.array(losses).reshape(comparisons, 2, seeds)
    differences = table[:, 0] - table[:, 1]
    alone = [judge([d], delta=0.01)[0] for d in differences]
    family = judge(list(differences), delta=0.01)
    return {
        "comparisons": comparisons,
        "seeds": seeds,
        "sd_of_losses": float(np.std(losses, ddof=1)),
        "false_alarms": sum(j.verdict in ("better", "worse") for j in alone),
        "false_alarms_in_one_family": sum(j.verdict in ("better", "worse") for j in family),
        "intervals_without_0": sum(not j.low <= 0 <= j.high for j in alone),
        "smallest_p": min(j.p for j in alone),
    }


def main() -> None:
    """Train, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=10, help="of each side")
    parser.add_argument("--folder", type=Path, default=Path("outputs/sweeps/aa"))
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/aa.json"))
    parser.add_argument("settings", nargs="*", help="further settings of gptexp.train")
    arguments = parser.parse_args()
    losses = train(arguments.folder, 2 * arguments.comparisons * arguments.seeds, arguments.settings)
    report = measure(losses, arguments.comparisons, arguments.seeds)
    table = Table("a variant against itself", "", title="disjoint seeds")
    for key, value in report.items():
        table.add_row(key.replace("_", " "), f"{value:.4g}")
    Console().print(table)
    write(arguments.out, report | {"losses": losses})


if __name__ == "__main__":
    main()
