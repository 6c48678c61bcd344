"""What looking inside training costs: `python -m benchmarks.diagnostics [--pairs 5] [--steps 300] [setting ...]`.

Trains by the real command, each time in turn with diagnostics_interval null, 100 and 1, and compares the seconds of
training within each round. At an interval of 1 every step is measured, which tells what one measurement costs far
more exactly than the hundredth part of it that shows at 100.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

INTERVALS = (None, 100, 1)


def seconds(interval: int | None, steps: int, settings: list[str]) -> float:
    """Seconds of training that a run of `steps` steps takes, without evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"diagnostics_interval={'null' if interval is None else interval}", f"max_steps={steps}", "logger=none",
            f"eval_interval={steps}", "eval_windows=1", "sample_tokens=0", f"hydra.run.dir={folder}/run", *settings,
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", "gptexp.train", *arguments], check=True, stdout=subprocess.DEVNULL)
        return float(json.loads(Path(folder, "run", "result.json").read_text())["seconds"])


def measure(pairs: int, steps: int, settings: list[str]) -> dict[str, Any]:
    """Each round's seconds, and the ratios to the run without diagnostics."""
    rounds = [{str(i): seconds(i, steps, settings) for i in INTERVALS} for _ in range(pairs)]
    ratios = {str(i): [r[str(i)] / r["None"] for r in rounds] for i in INTERVALS[1:]}
    return {
        "steps": steps,
        "settings": settings,
        "seconds": rounds,
        "ratios": {
            i: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
            for i, values in ratios.items()
        },
        "step_share_at_100": (statistics.median(ratios["1"]) - 1) / 100,
    }


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/diagnostics.json"))
    parser.add_argument("settings", nargs="*", help="further settings of gptexp.train")
    arguments = parser.parse_args()
    report = measure(arguments.pairs, arguments.steps, arguments.settings)

    table = Table("interval", "ms a step (median)", "ratio (median)", "lowest", "highest",
                  title=f"{arguments.pairs} rounds of {arguments.steps} steps")  # fmt: skip
    for interval in map(str, INTERVALS):
        step = statistics.median(r[interval] for r in report["seconds"]) / arguments.steps * 1000
        ratio = report["ratios"].get(interval, {})
        table.add_row("null" if interval == "None" else interval, f"{step:.1f}", *(f"{v:.3f}" for v in ratio.values()))
    console = Console()
    console.print(table)
    console.print(f"one measurement takes {report['step_share_at_100'] * 100:.2f} steps: "
                  f"{report['step_share_at_100']:.2%} of the time at an interval of 100")  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"{arguments.out}")


if __name__ == "__main__":
    main()
