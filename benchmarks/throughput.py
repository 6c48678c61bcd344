"""Training steps beside nanoGPT's: `python -m benchmarks.throughput --peer DIR [--rounds 5] [setting ...]`.

Trains the recipe of nanoGPT's README for a CPU by both real commands in turn, each with its own logging, and compares
the tokens a second of the steps, without evaluation and without the first 20 steps. On processors that are not
Intel's, hardware.fast_mkl=false gives both the same kernels for products of matrices.
"""

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import CPU, as_text, command_seconds, equal_work, parser, ratios, spread, take_turns, write
from benchmarks.nanogpt import NanoGPT
from gptexp.config.sections import DataConfig
from gptexp.data.corpora import find_corpus

SKIPPED = 20  # steps at the start
TOKENS = 12 * 64  # of a step of the recipe


def ours(steps: int, settings: list[str]) -> float:
    """Tokens a second of a run of the real command."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = ["experiment=nanogpt_cpu", CPU, "data.offline_fallback=null", *settings]
        return TOKENS / command_seconds(Path(folder, "run"), steps, SKIPPED, recipe)


def theirs(peer: NanoGPT, steps: int) -> float:
    """Tokens a second of nanoGPT's train.py; its evaluation comes before the first step alone."""
    times = peer.train("out-throughput", max_iters=steps, eval_interval=10 * steps, eval_iters=1).times
    return (steps - SKIPPED) * TOKENS / (times[steps] - times[SKIPPED])


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "throughput")
    arguments.add_argument("--peer", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    arguments.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    asked = arguments.parse_args()
    equal_work(arguments, asked)
    with tempfile.TemporaryDirectory() as folder:
        peer = NanoGPT(asked.peer, find_corpus(DataConfig(offline_fallback=None)).path, Path(folder))
        rounds = take_turns({"gptexp": lambda: ours(asked.steps, asked.settings),
                             "nanoGPT": lambda: theirs(peer, asked.steps)}, asked.rounds)  # fmt: skip
    ratio = ratios(rounds, "gptexp", "nanoGPT")
    table = Table("round", "gptexp", "nanoGPT", "ratio", title="tokens a second of training")
    for number, taken in enumerate(rounds, 1):
        table.add_row(str(number), *(f"{v:,.0f}" for v in taken.values()), f"{taken['gptexp'] / taken['nanoGPT']:.2f}")
    console = Console()
    console.print(table)
    console.print(f"gptexp / nanoGPT: {as_text(ratio)}")
    write(asked.out, {"steps": asked.steps, "settings": asked.settings, "rounds": rounds, "ratio": ratio,
                      **{name: spread([r[name] for r in rounds]) for name in rounds[0]}})  # fmt: skip


if __name__ == "__main__":
    main()
