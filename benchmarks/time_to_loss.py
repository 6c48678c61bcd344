"""How soon a loss is reached: `python -m benchmarks.time_to_loss --peer DIR [--rounds 5] [setting ...]`.

Trains experiment=fast_cpu, with another seed each round, and the recipe of nanoGPT's README for a CPU, which has one
seed, by their real commands in turn, and compares the seconds of training until the loss over the whole validation
split, by the same evaluator, is at the target or below. Evaluation itself is left out of both. The target is the best
of nanoGPT's own estimates from 20 batches. Where its recipe ends above that, its whole time counts, so the ratio is
then a lower bound. It also tells what the whole commands took, with importing and evaluation.
"""

import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.measure import CPU, as_text, equal_work, parser, ratios, spread, take_turns, write
from benchmarks.nanogpt import NanoGPT
from gptexp.config.sections import DataConfig
from gptexp.data.corpora import find_corpus
from gptexp.runs.files import read_metrics


class Reached(NamedTuple):
    """Seconds of training, the loss there, and seconds of the whole command."""

    seconds: float
    loss: float
    whole: float



def ours(seed: int, target: float, settings: list[str]) -> Reached:
    """Of a run of the experiment; the seconds are infinite if it does not reach the target."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        arguments = ["experiment=fast_cpu", CPU, f"seed={seed}", "data.offline_fallback=null", f"hydra.run.dir={run}"]
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "gptexp.train", *arguments, *settings], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        whole = time.perf_counter() - begin
        rows = [row for row in read_metrics(run / "metrics.csv") if "val/loss" in row]
    reached = next((row for row in rows if row["val/loss"] <= target), None)
    found = (reached["seconds"], reached["val/loss"]) if reached else (math.inf, rows[-1]["val/loss"])
    return Reached(*found, whole)


def theirs(peer: NanoGPT, turn: int, target: float) -> Reached:
    """Of nanoGPT's recipe, at the first of its checkpoints that reaches the target, or at the last."""
    saved = peer.folder / f"out-{turn}" / "ckpt.pt"
    pending, kept = [False], []

    def keep(line: str) -> None:
        if line.startswith("saving checkpoint"):
            pending[0] = True
        elif pending[0]:  # the line after it: the file is whole, and the next comes in 250 steps
            kept.append(shutil.copy(saved, saved.with_name(f"{len(kept)}.pt")))
            pending[0] = False

    trained = peer.train(saved.parent.name, keep, always_save_checkpoint=True)
    for number, path in enumerate(kept, 1):
        loss = peer.loss(Path(path))
        if loss <= target or number == len(kept):
            return Reached(trained.training(250 * number), loss, trained.seconds)
    raise SystemExit("nanoGPT saved no checkpoint")


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "time_to_loss")
    arguments.add_argument("--peer", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    arguments.add_argument("--target", type=float, default=1.8857, help="nats a token, over the whole split")
    asked = arguments.parse_args()
    equal_work(arguments, asked)
    losses: dict[str, list[float]] = {"gptexp": [], "nanoGPT": []}
    whole: dict[str, list[float]] = {"gptexp": [], "nanoGPT": []}
    with tempfile.TemporaryDirectory() as folder:
        peer = NanoGPT(asked.peer, find_corpus(DataConfig(offline_fallback=None)).path, Path(folder))

        def kept(name: str, reached: Reached) -> float:
            losses[name].append(reached.loss)
            whole[name].append(reached.whole)
            return reached.seconds

        rounds = take_turns(
            {
                "gptexp": lambda: kept("gptexp", ours(len(losses["gptexp"]) + 1, asked.target, asked.settings)),
                "nanoGPT": lambda: kept("nanoGPT", theirs(peer, len(losses["nanoGPT"]) + 1, asked.target)),
            },
            asked.rounds,
        )
    ratio = ratios(rounds, "nanoGPT", "gptexp")
    table = Table("seed", "gptexp, s", "loss", "nanoGPT, s", "loss", "ratio", title=f"training until {asked.target}")
    for number, taken in enumerate(rounds):
        table.add_row(str(number + 1), f"{taken['gptexp']:.1f}", f"{losses['gptexp'][number]:.4f}",
                      f"{taken['nanoGPT']:.1f}", f"{losses['nanoGPT'][number]:.4f}",
                      f"{taken['nanoGPT'] / taken['gptexp']:.1f}")  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"nanoGPT / gptexp: {as_text(ratio)}; a loss above the target was never reached")
    seconds = ", ".join(f"{name} {as_text(spread(taken))}" for name, taken in whole.items())
    console.print(f"whole commands, s: {seconds}")
    write(asked.out, {"target": asked.target, "settings": asked.settings, "rounds": rounds, "losses": losses,
                      "whole": whole, "ratio": ratio,
                      **{name: spread([r[name] for r in rounds]) for name in losses}})  # fmt: skip


if __name__ == "__main__":
    main()
