"""A sweep side by side and in turn: `python -m benchmarks.sweep [--rounds 3] [--jobs 8] [--peer DIR] [setting ...]`.

Trains the same jobs by Hydra's own launcher, one after another on all cores, and by joblib, as many at a time as there
are cores with a thread each, in turn, and compares the seconds of the whole commands. With a checkout of nanoGPT it
trains that as often, one run after another, for as many steps of the same recipe. All evaluate at the start and at the
end, on as many windows as nanoGPT's recipe for a CPU does; a run of this laboratory sees the whole validation split at
the end, besides.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import CPU, as_text, equal_work, parser, ratios, spread, take_turns, write
from benchmarks.nanogpt import CPU_RECIPE, NanoGPT
from gptexp.config.sections import DataConfig
from gptexp.data.corpora import find_corpus

WINDOWS = 2 * CPU_RECIPE["eval_iters"] * CPU_RECIPE["batch_size"]
"""Of an evaluation of nanoGPT, which draws as many from the training split as from the validation split."""


def seconds(launcher: str, jobs: int, steps: int, settings: list[str]) -> float:
    """Seconds of wall-clock time that a multirun by a launcher takes, the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = [f"hydra.sweep.dir={folder}/sweep", f"hydra/launcher={launcher}", f"seed=range(1,{jobs + 1})",
                  f"max_steps={steps}", f"eval_interval={steps}", f"eval_windows={WINDOWS}", "sample_tokens=0",
                  "logger=none"]  # fmt: skip
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "gptexp.train", "-m", *wanted, *settings],
                       check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        return time.perf_counter() - begin


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "sweep", rounds=3)
    arguments.add_argument("--jobs", type=int, default=8)
    arguments.add_argument("--steps", type=int, default=200, help="optimizer steps of each job")
    arguments.add_argument("--peer", type=Path, help="a checkout of karpathy/nanoGPT")
    asked = arguments.parse_args()
    equal_work(arguments, asked)
    jobs, steps = asked.jobs, asked.steps
    contestants: dict[str, Callable[[], float]] = {
        "joblib": lambda: seconds("joblib", jobs, steps, [CPU, *asked.settings]),
        "basic": lambda: seconds("basic", jobs, steps, [CPU, *asked.settings]),
    }
    with tempfile.TemporaryDirectory() as folder:
        if asked.peer:
            peer = NanoGPT(asked.peer, find_corpus(DataConfig(offline_fallback=None)).path, Path(folder))
            # Its rate decays after a warm-up of 100 steps, by a share of the steps between, which may not be none.
            contestants["nanoGPT"] = lambda: sum(
                peer.train("out", max_iters=steps, lr_decay_iters=max(steps, 101), eval_interval=steps).seconds
                for _ in range(jobs)
            )
        rounds = take_turns(contestants, asked.rounds)
    shares = {name: ratios(rounds, name, "joblib") for name in contestants if name != "joblib"}
    table = Table("round", *contestants, title=f"{jobs} jobs of {steps} steps, seconds in all")
    for number, taken in enumerate(rounds, 1):
        table.add_row(str(number), *(f"{v:.1f}" for v in taken.values()))
    console = Console()
    console.print(table)
    for name, share in shares.items():
        console.print(f"{name} / joblib: {as_text(share)}")
    if asked.peer:
        console.print(f"nanoGPT / basic: {as_text(ratios(rounds, 'nanoGPT', 'basic'))}")
    write(asked.out, {"jobs": jobs, "steps": steps, "settings": asked.settings, "rounds": rounds, "ratios": shares,
                      **{name: spread([r[name] for r in rounds]) for name in contestants}})  # fmt: skip


if __name__ == "__main__":
    main()
