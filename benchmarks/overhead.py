"""What the Lightning path costs: `python -m benchmarks.overhead [--rounds 5] [--steps 300] [setting ...]`.

Trains by the real command and by a bare loop over the same model, batches, loss, clipping and optimizer, in turn, and
compares the seconds of the steps, without evaluation and without the first 20 steps.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import CPU, as_text, command_seconds, parser, ratios, spread, take_turns, write
from gptexp import perf
from gptexp.config.command_line import compose_config
from gptexp.config.schema import Config
from gptexp.data.encoding import read_corpus

SKIPPED = 20  # steps at the start


def bare(config: Config) -> float:
    """Milliseconds of a step of a loop with nothing in it but the training, by the configuration of a run."""
    perf.prepare()
    perf.mkl_kernels.choose(config.hardware.fast_mkl)
    import torch

    from gptexp.models.settings import build_model
    from gptexp.tasks.metrics import summed_loss
    from gptexp.training.hardware import accelerator, precision, thread_count
    from gptexp.training.optimizers import Parameters

    reading = read_corpus(config.data, config.task)
    train, _ = reading.task.splits(reading.encoded, config.data, config.model.block_size)
    device = torch.device(accelerator(config.hardware))
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a run does, before cuBLAS is first used
        torch.use_deterministic_algorithms(config.hardware.deterministic)
    model = build_model(config.sized(reading.encoded.tokenizer.vocab_size), config.seed).to(device)
    torch.set_num_threads(thread_count(model, config, 1))
    named = list(model.named_parameters())
    parameters = Parameters(named, {n for n, p in named if p.ndim >= 2}, model.hidden_matrices)
    optimizer = config.optimizer.build(parameters, config.optimizer.learning_rate, fused=True)
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision(config.hardware) == "bf16-mixed")

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = 0.0
    for step in range(config.max_steps):
        if step == SKIPPED:
            begin = now()
        batch = train.train_batch(config.seed, step, config.batch_size)
        x, y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
        if device.type == "cuda":
            x, y = (part.pin_memory().to(device, non_blocking=True) for part in (x, y))
        with half:
            loss = summed_loss(model(x), y) / batch.tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
    return (now() - begin) / (config.max_steps - SKIPPED) * 1000


def loop(settings: Sequence[str], *options: str) -> float:
    """`bare` of complete settings in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--bare", *options, *settings]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "overhead")
    arguments.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    arguments.add_argument("--bare", action="store_true", help="run the bare loop once, and print its milliseconds")
    asked = arguments.parse_args()
    if asked.bare:
        print(bare(compose_config([*asked.settings, f"max_steps={asked.steps}"])))
        return
    settings = ["experiment=nanogpt_cpu", CPU, *asked.settings]

    def lightning() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return command_seconds(Path(folder, "run"), asked.steps, SKIPPED, settings) * 1000

    rounds = take_turns({"command": lightning, "bare loop": lambda: loop(settings, f"--steps={asked.steps}")},
                        asked.rounds)  # fmt: skip
    ratio = ratios(rounds, "command", "bare loop")
    table = Table("round", "command", "bare loop", "ratio", title="milliseconds a step")
    for number, taken in enumerate(rounds, 1):
        share = taken["command"] / taken["bare loop"]
        table.add_row(str(number), *(f"{v:.1f}" for v in taken.values()), f"{share:.3f}")
    console = Console()
    console.print(table)
    console.print(f"command / bare loop: {as_text(ratio)}")
    write(asked.out, {"steps": asked.steps, "settings": settings, "rounds": rounds, "ratio": ratio,
                      **{name: spread([r[name] for r in rounds]) for name in rounds[0]}})  # fmt: skip


if __name__ == "__main__":
    main()
