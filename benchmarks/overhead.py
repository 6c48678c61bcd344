"""What the Lightning path costs: `python -m benchmarks.overhead [--rounds 5] [--steps 300] [setting ...]`.

Trains by the real command and by a bare loop over the same model, batches, loss, clipping and optimizer, in turn, and
compares the seconds of the steps, without evaluation and without the first 20 steps.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import CPU, command_seconds, parser, ratios, spread, take_turns, told, write
from gptexp import perf
from gptexp.config import Config
from gptexp.data.batches import split_corpus
from gptexp.data.corpora import find_corpus
from gptexp.data.encoded import encode_corpus
from gptexp.overrides import compose_config

SKIPPED = 20  # steps at the start


def bare(config: Config) -> float:
    """Milliseconds of a step of a loop with nothing in it but the training."""
    perf.prepare()
    perf.mkl_kernels.choose(config.hardware.fast_mkl)
    import torch

    from gptexp.models.settings import build_model
    from gptexp.training.hardware import thread_count
    from gptexp.training.metrics import summed_loss
    from gptexp.training.optimizers import build_optimizer

    encoded = encode_corpus(find_corpus(config.data), config.data)
    train, _ = split_corpus(encoded, config.data, config.model.block_size)
    model = build_model(config.sized(encoded.tokenizer.vocab_size), config.seed)
    torch.set_num_threads(thread_count(model, config, 1))
    optimizer = build_optimizer(config.optimizer, list(model.named_parameters()),
                                {n for n, p in model.named_parameters() if p.ndim >= 2},
                                model.hidden_matrices)  # fmt: skip
    begin = 0.0
    for step in range(config.max_steps):
        if step == SKIPPED:
            begin = time.perf_counter()
        rows = train.train_batch(config.seed, step, config.batch_size)
        loss = summed_loss(model(torch.from_numpy(rows.x)), torch.from_numpy(rows.y)) / rows.tokens
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * group.get("lr_scale", 1.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
    return (time.perf_counter() - begin) / (config.max_steps - SKIPPED) * 1000


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "overhead")
    arguments.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    arguments.add_argument("--bare", action="store_true", help="run the bare loop once, and print its milliseconds")
    asked = arguments.parse_args()
    settings = ["experiment=nanogpt_cpu", CPU, *asked.settings]
    if asked.bare:
        print(bare(compose_config([*settings, f"max_steps={asked.steps}"])))
        return

    def loop() -> float:
        command = [sys.executable, "-m", "benchmarks.overhead", "--bare", f"--steps={asked.steps}", *asked.settings]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    def lightning() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return command_seconds(Path(folder, "run"), asked.steps, SKIPPED, settings) * 1000

    rounds = take_turns({"command": lightning, "bare loop": loop}, asked.rounds)
    ratio = ratios(rounds, "command", "bare loop")
    table = Table("round", "command", "bare loop", "ratio", title="milliseconds a step")
    for number, taken in enumerate(rounds, 1):
        share = taken["command"] / taken["bare loop"]
        table.add_row(str(number), *(f"{v:.1f}" for v in taken.values()), f"{share:.3f}")
    console = Console()
    console.print(table)
    console.print(f"command / bare loop: {told(ratio)}")
    write(asked.out, {"steps": asked.steps, "settings": settings, "rounds": rounds, "ratio": ratio,
                      **{name: spread([r[name] for r in rounds]) for name in rounds[0]}})  # fmt: skip


if __name__ == "__main__":
    main()
