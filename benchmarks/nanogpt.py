"""nanoGPT as the peer of a benchmark: a copy of a checkout of its own, run as its README says."""

import contextlib
import importlib.util
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptexp.config.sections import DataConfig
from gptexp.data.encoding import read_corpus
from gptexp.tasks.text import Text

CPU_RECIPE: dict[str, Any] = {
    "device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 1, "block_size": 64, "batch_size": 12,
    "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000, "dropout": 0.0,
}  # fmt: skip
"""Its README's settings for a CPU, on top of config/train_shakespeare_char.py; `gptexp` has them as nanogpt_cpu."""

BABY_RECIPE: dict[str, Any] = {"device": "cuda", "compile": True}
"""config/train_shakespeare_char.py as it is, for one GPU; `gptexp` has it as nanogpt_gpu."""

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
        recipe: settings of its train.py, on top of config/train_shakespeare_char.py.
    """

    def __init__(self, checkout: Path, text: Path, folder: Path, recipe: Mapping[str, Any] = CPU_RECIPE) -> None:
        if not (checkout / "train.py").exists():
            raise SystemExit(f"--peer {checkout}: holds no train.py; it must be a checkout of karpathy/nanoGPT")
        self.folder, self.recipe = folder / "nanoGPT", recipe
        shutil.copytree(checkout, self.folder, ignore=shutil.ignore_patterns(".git", "out*", "wandb", "*.ckpt"))
        if importlib.util.find_spec("tiktoken") is None:  # which sample.py imports for GPT-2's tokens alone
            (self.folder / "tiktoken.py").touch()
        data = self.folder / "data" / "shakespeare_char"
        shutil.copy(text, data / "input.txt")
        self._run(["prepare.py"], data)

    def train(self, out_dir: str, on_line: Callable[[str], None] = lambda _: None, **settings: object) -> Trained:
        """Train by the recipe with further settings; each line of its output is given to `on_line`."""
        options = [f"--{k}={v}" for k, v in ({**self.recipe, **settings, "out_dir": out_dir}).items()]
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

    def loss(self, checkpoint: Path) -> float:
        """The loss of a checkpoint over the whole validation split, as `val/loss` is: nats a token."""
        import torch  # slow to import, and all else works without it

        from gptexp.tasks.metrics import summed_loss

        spec = importlib.util.spec_from_file_location("nanogpt_model", self.folder / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        stored = torch.load(checkpoint, weights_only=True)
        with contextlib.redirect_stdout(None):
            model = module.GPT(module.GPTConfig(**stored["model_args"])).eval()
        model.load_state_dict(stored["model"])
        config = DataConfig(offline_fallback=None)
        reading = read_corpus(config, Text())
        _, val = reading.task.splits(reading.encoded, config, stored["model_args"]["block_size"])
        total = 0.0
        with torch.no_grad():
            for begin in range(0, val.n_rows, 64):
                rows = val.rows(np.arange(begin, min(begin + 64, val.n_rows)))
                x, y = torch.from_numpy(rows.x), torch.from_numpy(rows.y)
                total += float(summed_loss(model(x, y)[0], y))  # with targets, it gives all positions' logits
        return total / val.n_tokens

    def sample(self, out_dir: str, **settings: object) -> float:
        """Seconds that its sample.py takes."""
        options = [f"--{k}={v}" for k, v in settings.items()]
        begin = time.perf_counter()
        device = self.recipe["device"]
        self._run(["sample.py", f"--out_dir={out_dir}", f"--device={device}", "--compile=False", *options], self.folder)
        return time.perf_counter() - begin

    @staticmethod
    def _run(arguments: list[str], folder: Path) -> None:
        subprocess.run([sys.executable, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
