"""Sampling beside nanoGPT's: `python -m benchmarks.generate --peer DIR [--rounds 5] [--samples 1] [--tokens 2000]`.

Samples on the CPU from two models of the same size, each by its own real command, in turn. What is compared is the
seconds of the command, less those of the same command for a single token: importing, and reading the checkpoint.
nanoGPT draws samples one after another, and each token from the last 256; gptexp draws them together, and each token
from the last 128 to 256.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import CPU, as_text, equal_work, parser, ratios, spread, take_turns, write
from benchmarks.nanogpt import NanoGPT
from gptexp.config.sections import DataConfig
from gptexp.data.corpora import find_corpus


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "generate")
    arguments.add_argument("--peer", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    arguments.add_argument("--tokens", type=int, default=2000, help="new tokens of each sample")
    arguments.add_argument("--samples", type=int, default=1, help="samples; nanoGPT draws them one after another")
    asked = arguments.parse_args()
    equal_work(arguments, asked)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        recipe = ["experiment=nanogpt_cpu", CPU, "model.block_size=256", "data.offline_fallback=null", "max_steps=1",
                  "schedule.warmup_steps=0", "eval_windows=1", "sample_tokens=0", "logger=none"]  # fmt: skip
        command([sys.executable, "-m", "gptexp.train", *recipe, f"hydra.run.dir={run}", *asked.settings])
        peer = NanoGPT(asked.peer, find_corpus(DataConfig(offline_fallback=None)).path, Path(folder))
        peer.train("out", block_size=256, max_iters=1, eval_interval=1, eval_iters=1, always_save_checkpoint=True)

        def theirs(tokens: int) -> float:
            return peer.sample("out", num_samples=asked.samples, max_new_tokens=tokens)

        rounds = take_turns({"gptexp": lambda: ours(run, asked.samples, asked.tokens) - ours(run, asked.samples, 1),
                             "nanoGPT": lambda: theirs(asked.tokens) - theirs(1)}, asked.rounds)  # fmt: skip
    ratio = ratios(rounds, "nanoGPT", "gptexp")
    made = asked.samples * asked.tokens
    table = Table("round", "gptexp", "nanoGPT", "ratio", title=f"tokens a second, {asked.samples} x {asked.tokens}")
    for number, taken in enumerate(rounds, 1):
        table.add_row(str(number), *(f"{made / v:,.0f}" for v in taken.values()),
                      f"{taken['nanoGPT'] / taken['gptexp']:.1f}")  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"gptexp / nanoGPT: {as_text(ratio)}")
    write(asked.out, {"tokens": asked.tokens, "samples": asked.samples, "settings": asked.settings, "seconds": rounds,
                      "ratio": ratio, **{n: spread([made / r[n] for r in rounds]) for n in rounds[0]}})  # fmt: skip


def ours(run: Path, samples: int, tokens: int) -> float:
    """Seconds that sampling from a run takes, the whole command."""
    return command([sys.executable, "-m", "gptexp.sample", f"run={run}", f"max_new_tokens={tokens}",
                    f"num_samples={samples}"])  # fmt: skip


def command(line: list[str]) -> float:
    """Seconds that a command takes."""
    begin = time.perf_counter()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
