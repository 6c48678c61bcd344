"""nanoGPT as the peer of a benchmark: a copy of a checkout of its own, run as its README says."""

import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CPU_RECIPE = {
    "device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 1, "block_size": 64, "batch_size": 12,
    "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000, "dropout": 0.0,
}  # fmt: skip
"""Its README's settings for a CPU, on top of config/train_shakespeare_char.py; `gptexp` has them as nanogpt_cpu."""

ITERATION = re.compile(r"iter (\d+): loss ([\d.]+), time ([\d.]+)ms")


@dataclass(frozen=True)
class Trained:
    """What a training of nanoGPT printed.

    Attributes:
        times: seconds since the process began at which each iteration was printed, by its number.
        steps: seconds of each iteration, by its own clock; those with an evaluation include it.
        seconds: of the whole process.
    """

    times: dict[int, float]
    steps: dict[int, float]
    seconds: float

    def training(self, steps: int) -> float:
        """Seconds of training up to a number of steps: an evaluation's own time is left out."""
        usual = statistics.median(self.steps.values())
        return sum(s if s < 3 * usual else usual for s in (self.steps[i] for i in range(steps)))


class NanoGPT:
    """A private copy of a checkout, with its tiny Shakespeare prepared by its own script.

    Args:
        checkout: which is not written to.
        text: the corpus.
        folder: an empty one for the copy.
    """

    def __init__(self, checkout: Path, text: Path, folder: Path) -> None:
        if not (checkout / "train.py").exists():
            raise SystemExit(f"--peer {checkout}: holds no train.py; it must be a checkout of karpathy/nanoGPT")
        self.folder = folder / "nanoGPT"
        shutil.copytree(checkout, self.folder, ignore=shutil.ignore_patterns(".git", "out*", "wandb", "*.ckpt"))
        data = self.folder / "data" / "shakespeare_char"
        shutil.copy(text, data / "input.txt")
        self._run(["prepare.py"], data)

    def train(self, out_dir: str, on_line: Callable[[str], None] = lambda _: None, **settings: object) -> Trained:
        """Train by its recipe for the CPU with further settings; each line of its output is given to `on_line`."""
        options = [f"--{k}={v}" for k, v in ({**CPU_RECIPE, **settings, "out_dir": out_dir}).items()]
        begin, times, steps = time.perf_counter(), {}, {}
        command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *options]
        with subprocess.Popen(command, cwd=self.folder, text=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if match := ITERATION.match(line):
                    times[int(match[1])] = time.perf_counter() - begin
                    steps[int(match[1])] = float(match[3]) / 1000
                on_line(line)
        if process.returncode:
            raise SystemExit(f"nanoGPT's train.py ended with status {process.returncode}")
        return Trained(times, steps, time.perf_counter() - begin)

    def sample(self, out_dir: str, **settings: object) -> float:
        """Seconds that its sample.py takes."""
        options = [f"--{k}={v}" for k, v in settings.items()]
        begin = time.perf_counter()
        self._run(["sample.py", f"--out_dir={out_dir}", "--device=cpu", "--compile=False", *options], self.folder)
        return time.perf_counter() - begin

    @staticmethod
    def _run(arguments: list[str], folder: Path) -> None:
        subprocess.run([sys.executable, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
