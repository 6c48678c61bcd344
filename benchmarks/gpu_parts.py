"""The parts of benchmarks.gpu: each trains or samples by real commands, and gives its figures as they come.

`python -m benchmarks.gpu_parts NAME FOLDER SECONDS [--gpu] [--peer DIR]` runs one and leaves its figures in
FOLDER/figures.json. A part is a generator. Each dictionary that it yields is merged into its figures, so what was
measured before a part fails or runs out of time is kept; "shown" is its line in the table. A part that finds a claim
untrue raises SystemExit with the reason. Without --gpu each is a miniature of itself: models of one layer and a few
steps on the CPU.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import generate, measure, overhead, sweep
from benchmarks.nanogpt import BABY_RECIPE, CPU_RECIPE, NanoGPT
from gptexp.config.sections import DataConfig
from gptexp.data.corpora import find_corpus
from gptexp.runs.files import TIMES, last_row, read_metrics

Figures = dict[str, Any]

NOT_HERE = "not on a CPU"

SMALL = ["data=pydocs", "model.n_layer=1", "model.n_embd=16", "heads=h2", "model.block_size=16", "batch_size=4",
         measure.CPU]  # fmt: skip
"""What makes any experiment a miniature."""

SMALL_PEER = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "batch_size": 4}
"""And nanoGPT."""

SHALLOW = ["experiment=nanogpt_gpu", "model.n_layer=2"]
"""nanoGPT's baby GPT with fewer layers, where many runs save many checkpoints at once and nothing is timed."""

FEW = 40
"""Steps of a miniature."""

TARGET = 1.4697
"""The lowest validation loss that nanoGPT's README gives for its baby GPT, in nats per token."""

ROUNDING = 0.02
"""How far apart two ways to compute one training may end in validation loss, in nats per token: bfloat16 rounds in
another order, and training makes the difference grow."""

DROPOUT = 0.05
"""The same where dropout draws other numbers, too."""

SAVING = 8.0
"""Seconds before a part's end at which its run is told to save and stop."""

FIGURES = "figures.json"
"""Where a part leaves what it has measured so far."""


@dataclass(frozen=True)
class Stage:
    """Where and how long a part runs.

    Attributes:
        gpu: False makes a miniature for the CPU.
        folder: an empty one.
        end: when the part's time is over, by `time.monotonic`.
        peer: a checkout of nanoGPT, or None.
    """

    gpu: bool
    folder: Path
    end: float
    peer: Path | None = None

    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def settings(self, *own: str) -> list[str]:
        """A run's settings: a part's own, and the hardware; a miniature's come last and replace those of the part."""
        there = ["hardware.accelerator=gpu", "data.offline_fallback=null"] if self.gpu else SMALL
        return [*own, *there, "logger=none", "sample_tokens=0"]

    def steps(self, number: int) -> int:
        """Optimizer steps: as many as are asked for, or a miniature's."""
        return number if self.gpu else FEW

    @property
    def tokens(self) -> int:
        """Of a step of nanoGPT's baby recipe, or of its miniature."""
        return 64 * 256 if self.gpu else 4 * 16

    @property
    def text(self) -> Path:
        """The corpus that the runs learn from."""
        return find_corpus(DataConfig(name="shakespeare" if self.gpu else "pydocs", offline_fallback=None)).path


class Part(NamedTuple):
    """A part of the script.

    Attributes:
        measure: yields its figures.
        seconds: that it may take.
        peer: whether it needs nanoGPT.
    """

    measure: Callable[[Stage], Iterator[Figures]]
    seconds: float
    peer: bool = False


def machine(stage: Stage) -> Iterator[Figures]:
    """The device, the processor and the versions."""
    import torch

    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name(0) if gpu else "CPU"
    figures: Figures = {"gpu": gpu, "name": name, "cores": os.cpu_count(), "system": platform.platform(),
                        "python": platform.python_version(), "cuda": torch.version.cuda}  # fmt: skip
    if gpu:
        figures["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    packages = {}
    for package in ("torch", "triton", "lightning", "hydra-core", "hydra-joblib-launcher", "numpy"):
        with suppress(PackageNotFoundError):
            packages[package] = version(package)
    yield figures | {"packages": packages, "shown": f"{name}, torch {torch.__version__}" + ("" if gpu else
                     "; no GPU here, so every part is a miniature and no figure means anything")}  # fmt: skip


def resume(stage: Stage) -> Iterator[Figures]:
    """Both precisions train, are killed, and end as an unbroken run does, to the bit."""
    yield from killed_and_resumed(stage, {
        precision: stage.settings(*SHALLOW, f"hardware.precision={precision}")
        for precision in ("bf16-mixed", "32-true")
    })  # fmt: skip


def strategies(stage: Stage) -> Iterator[Figures]:
    """DDP and FSDP with one device learn what a run without them does, and resume to the bit."""
    recipe = [*SHALLOW, "model.dropout=0"]
    variants = {"auto": recipe, "ddp": ["hardware=ddp", "hardware.devices=1", *recipe]}
    if stage.gpu:
        variants["fsdp"] = ["hardware=fsdp", "hardware.devices=1", *recipe]
    else:
        yield {"fsdp": NOT_HERE}
    found: Figures = {}
    for figures in killed_and_resumed(stage, {name: stage.settings(*own) for name, own in variants.items()}):
        found |= figures
        yield figures
    losses = {name: found[name]["val_loss"] for name in variants}
    shown = "; val/loss " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    yield {"shown": found["shown"] + shown}
    check_close(losses, "auto", ROUNDING)


def killed_and_resumed(stage: Stage, variants: Mapping[str, Sequence[str]]) -> Iterator[Figures]:
    """Train each variant twice, all at once; kill one of the two, resume it and compare.

    Args:
        stage: of the part.
        variants: names and complete settings.

    Yields:
        for each variant the first and last validation loss, the step after which the run was killed, and what then
        differs from the unbroken run.

    Raises:
        SystemExit: for a run that fails, learns nothing, ends before it can be killed, or differs.
    """
    steps, saved = (200, 20) if stage.gpu else (400, 20)  # a miniature would be over before it is killed
    common = [f"max_steps={steps}", f"eval_interval={steps // 2}", f"checkpoint_interval={saved}", "log_interval=5",
              "sample_tokens=20"]  # fmt: skip
    broken = {name: stage.folder / f"{name}-broken" for name in variants}
    unbroken = {name: stage.folder / f"{name}-unbroken" for name in variants}
    killed, problems = {}, []
    with ThreadPoolExecutor(2 * len(variants)) as pool:
        whole = {name: pool.submit(train, f"hydra.run.dir={unbroken[name]}", *own, *common)
                 for name, own in variants.items()}  # fmt: skip
        cut = {name: pool.submit(killed_after, 3 * saved, broken[name], *own, *common)
               for name, own in variants.items()}  # fmt: skip
        for name in variants:
            try:
                whole[name].result()
                killed[name] = cut[name].result()
            except (subprocess.CalledProcessError, SystemExit) as error:
                problems.append(f"{name}: {error}")
        again = {name: pool.submit(train, f"resume={broken[name]}") for name in killed}
        for name, step in killed.items():
            losses = [row["val/loss"] for row in read_metrics(unbroken[name] / "metrics.csv") if "val/loss" in row]
            figures: Figures = {"first_val_loss": losses[0], "val_loss": losses[-1], "killed_after": step}
            try:
                again[name].result()
            except subprocess.CalledProcessError as error:
                problems.append(f"{name}: {error}")
            else:
                figures["differences"] = found = differences(broken[name], unbroken[name])
                problems += [f"{name}: resumed, it differs: {found[0]}"] if found else []
            problems += [] if losses[-1] < losses[0] else [f"{name}: the loss did not fall"]
            yield {name: figures}
    if problems:
        raise SystemExit("\n".join(problems))
    yield {"shown": f"{steps} steps, killed and resumed to the bit: " + ", ".join(killed)}


TRAIN = [sys.executable, "-m", "gptexp.train"]


def train(*settings: str) -> float:
    """Seconds that the real command takes to train.

    Raises:
        subprocess.CalledProcessError: when it fails.
    """
    return generate.command([*TRAIN, *settings])


@contextmanager
def training(folder: Path, *settings: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A run under way by the real command, ended with all its processes if it is still there in the end."""
    process = subprocess.Popen([*TRAIN, *settings, f"hydra.run.dir={folder}"], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            end(process.pid)
            process.wait()


def killed_after(step: int, folder: Path, *settings: str) -> int:
    """Train, and kill the run with all its processes once metrics.csv has come to a step; returns the last step there.

    Raises:
        SystemExit: when the run ends before that.
    """
    with training(folder, *settings) as process:
        while last_row(folder / "metrics.csv").get("step", 0) < step:
            if process.poll() is not None:
                raise SystemExit(f"the run ended with status {process.returncode} before it could be killed")
            time.sleep(0.005)
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the run ended with status {process.returncode} before it could be killed")
    return int(last_row(folder / "metrics.csv")["step"])


def end(pid: int) -> None:
    """Kill a process and all that descends from it. Where there is no /proc, the process alone."""
    os.kill(pid, signal.SIGSTOP)  # at once, and so that it starts no others
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = [pid]
    for member in family:  # grows meanwhile
        family += [child for child, parent in parents.items() if parent == member]
    for member in family:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def differences(run: Path, other: Path) -> list[str]:
    """Where the metrics.csv of two runs differ, byte for byte but for the columns of times; a line for each row."""
    files = ((folder / "metrics.csv").read_text().splitlines() for folder in (run, other))
    (header, *rows), (others_header, *others) = ([line.split(",") for line in lines] for lines in files)
    if header != others_header:
        return [f"columns {','.join(header)} against {','.join(others_header)}"]
    keep = [i for i, column in enumerate(header) if column not in TIMES]
    found = [f"{len(rows)} rows against {len(others)}"] if len(rows) != len(others) else []
    for row, there in zip(rows, others, strict=False):
        if len(row) != len(header) or len(there) != len(header):
            found.append(f"a row of {len(row)} against {len(there)} cells")
        elif any(row[i] != there[i] for i in keep):
            cells = (f"{header[i]} {row[i]} against {there[i]}" for i in keep if row[i] != there[i])
            found.append(f"step {row[0]}: {', '.join(cells)}")
    return found


def check_close(losses: Mapping[str, float], base: str, tolerance: float) -> None:
    """Raise SystemExit if a validation loss is further than the tolerance from that of `base`."""
    far = [f"{name}: val/loss {loss:.4f}, but {losses[base]:.4f} with {base}"
           for name, loss in losses.items() if not abs(loss - losses[base]) <= tolerance]  # fmt: skip
    if far:
        raise SystemExit("\n".join(far))


def compiled(stage: Stage) -> Iterator[Figures]:
    """hardware.compile=true and graphs learn what a plain run does; tokens per second of each."""
    steps = stage.steps(300)
    found: dict[str, Figures] = {}
    problems = []
    for choice in ("false", "true", "graphs"):
        if choice == "graphs" and not stage.gpu:
            yield {choice: NOT_HERE}
            continue
        folder = stage.folder / choice
        settings = stage.settings("experiment=nanogpt_gpu", f"hardware.compile={choice}")
        begin = time.monotonic()
        try:
            rate = tokens_per_second(stage, folder, steps, settings)
        except subprocess.CalledProcessError as error:
            problems.append(f"compile={choice}: {error}")
            continue
        rows = read_metrics(folder / "metrics.csv")
        found[choice] = {"tokens_per_second": rate, "first_val_loss": rows[0]["val/loss"],
                         "val_loss": rows[-1]["val/loss"], "command_seconds": time.monotonic() - begin}  # fmt: skip
        yield {choice: found[choice], "shown": "tokens/s, val/loss: " + "; ".join(
            f"{name} {f['tokens_per_second']:,.0f}, {f['val_loss']:.4f}" for name, f in found.items())}  # fmt: skip
    if problems:
        raise SystemExit("\n".join(problems))
    check_close({name: f["first_val_loss"] for name, f in found.items()}, "false", ROUNDING)
    check_close({name: f["val_loss"] for name, f in found.items()}, "false", DROPOUT)


def tokens_per_second(stage: Stage, folder: Path, steps: int, settings: Sequence[str]) -> float:
    """Of the second half of a run of nanoGPT's baby recipe, by the real command."""
    return stage.tokens / measure.command_seconds(folder, steps, steps // 2, settings)


def throughput(stage: Stage) -> Iterator[Figures]:
    """Training beside nanoGPT's at its baby recipe, both compiled, in turn."""
    peer, steps = nanogpt_peer(stage), stage.steps(400)
    count = iter(range(1000))

    def ours() -> float:
        compiled = "true" if stage.gpu else "false"  # a miniature of nanoGPT is not compiled either
        settings = stage.settings("experiment=nanogpt_gpu", f"hardware.compile={compiled}")
        return tokens_per_second(stage, stage.folder / f"{next(count)}", steps, settings)

    def theirs() -> float:
        times = peer.train("out", max_iters=steps, eval_interval=10 * steps, eval_iters=1).times
        return stage.tokens * (steps - steps // 2) / (times[steps] - times[steps // 2])

    for rounds in rounds_in_time(stage, {"gptexp": ours, "nanoGPT": theirs}):
        yield compared(rounds, "gptexp", "nanoGPT", "tokens/s")


def rounds_in_time(stage: Stage, contestants: Mapping[str, Callable[[], float]]) -> Iterator[list[dict[str, float]]]:
    """The rounds so far, after each one: three, or as many as there is time for, and one of a miniature."""
    rounds: list[dict[str, float]] = []
    begin = time.monotonic()
    for taken in measure.turns(contestants, 3 if stage.gpu else 1):
        rounds.append(taken)
        yield rounds
        now = time.monotonic()
        if stage.left() < now - begin:  # the next would take as long
            return
        begin = now


def compared(rounds: Sequence[Mapping[str, float]], over: str, under: str, unit: str) -> Figures:
    """Rounds as a part's figures."""
    ratio = measure.ratios(rounds, over, under)
    spreads = {name: measure.spread([taken[name] for taken in rounds]) for name in rounds[0]}
    shown = f"{unit}: " + ", ".join(f"{name} {s['median']:,.5g}" for name, s in spreads.items())
    return {"rounds": rounds, "ratio": ratio, **spreads, "shown": f"{shown}; {over} / {under} {measure.as_text(ratio)}"}


def nanogpt_peer(stage: Stage) -> NanoGPT:
    """nanoGPT at its baby recipe, or a miniature of it."""
    assert stage.peer is not None
    return NanoGPT(stage.peer, stage.text, stage.folder, BABY_RECIPE if stage.gpu else {**CPU_RECIPE, **SMALL_PEER})


def as_far_as_it_comes(stage: Stage, target: float, *settings: str) -> Iterator[Figures]:
    """Train until the end, or until the part's time is over; the run then saves and stops, as at any SIGTERM.

    Args:
        stage: of the part.
        target: a loss, in nats per token; when it was first reached is told.
        settings: of the run.
    """
    folder = stage.folder / "run"
    short = [] if stage.gpu else [f"max_steps={FEW}", "eval_interval=10"]
    with training(folder, *stage.settings(*settings), *short) as process:
        while process.poll() is None and stage.left() > SAVING:
            time.sleep(0.05)
        if process.poll() is None:
            process.terminate()
        code = process.wait()
    if code not in (0, 128 + signal.SIGTERM):
        raise SystemExit(f"the run ended with status {code}")
    status = json.loads((folder / "run.json").read_text())["status"]
    rows = read_metrics(folder / "metrics.csv")
    evaluations = [row for row in rows if "val/loss" in row]
    trained = [row for row in rows if "tokens_per_second" in row]
    if not evaluations or not trained:
        raise SystemExit("the run came to no step in its time")
    reached = next((row for row in evaluations if row["val/loss"] <= target), None)
    best = min(evaluations, key=lambda row: row["val/loss"])
    last = trained[-1]
    shown = f"{last['step']:.0f} steps, {status}"
    shown += f"; best val/loss {best['val/loss']:.4f} at step {best['step']:.0f}; {target} "
    shown += f"after {reached.get('seconds', 0):.1f} s of training" if reached else "not reached"
    pick = ("step", "seconds", "val/loss")
    yield {
        "status": status, "steps": int(last["step"]), "training_seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"], "best": {k: best.get(k) for k in pick},
        "target": target, "reached": {k: reached.get(k) for k in pick} if reached else None,
        "evaluations": [{k: row.get(k) for k in pick} for row in evaluations], "shown": shown,
    }  # fmt: skip


def nanogpt(stage: Stage) -> Iterator[Figures]:
    """experiment=nanogpt_gpu, as many steps as fit."""
    return as_far_as_it_comes(stage, TARGET, "experiment=nanogpt_gpu")


def fast(stage: Stage) -> Iterator[Figures]:
    """experiment=fast_gpu, to the loss of nanoGPT's README and to its end."""
    return as_far_as_it_comes(stage, TARGET, "experiment=fast_gpu", "eval_interval=50")


def ladder(stage: Stage) -> Iterator[Figures]:
    """The ladder's rung 7, as many steps as fit; the lecture ends at 1.48."""
    return as_far_as_it_comes(stage, 1.48, "experiment/ladder=7_scaled")


def sampling(stage: Stage) -> Iterator[Figures]:
    """Sampling from the baby GPT beside nanoGPT's sample.py, one text and sixteen, without the time to load."""
    peer, run = nanogpt_peer(stage), stage.folder / "run"
    with ThreadPoolExecutor() as pool:
        ready = pool.submit(train, f"hydra.run.dir={run}", *stage.settings("experiment=nanogpt_gpu"), "max_steps=1",
                            "eval_windows=1")  # fmt: skip
        peer.train("out", compile=False, max_iters=1, eval_interval=1, eval_iters=1, always_save_checkpoint=True)
        ready.result()
    loading = {"gptexp": generate.ours(run, 1, 1), "nanoGPT": peer.sample("out", num_samples=1, max_new_tokens=1)}
    yield {"loading_seconds": loading}
    told = []
    for samples, ours, theirs in ((1, 1000, 1000), (16, 1000, 200)) if stage.gpu else ((1, 100, 100), (2, 100, 50)):
        seconds = {"gptexp": generate.ours(run, samples, ours),
                   "nanoGPT": peer.sample("out", num_samples=samples, max_new_tokens=theirs)}  # fmt: skip
        tokens = {"gptexp": samples * ours, "nanoGPT": samples * theirs}
        taken = {name: seconds[name] - loading[name] for name in seconds}
        figures: Figures = {"new_tokens": tokens, "seconds": seconds}
        if min(taken.values()) > 0:
            rates = {name: tokens[name] / taken[name] for name in tokens}
            figures |= {"tokens_per_second": rates, "ratio": rates["gptexp"] / rates["nanoGPT"]}
            each = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
            told.append(f"{samples} at once: {each}, ratio {figures['ratio']:.1f}")
        else:  # so few tokens that loading, which varies, took longer another time
            told.append(f"{samples} at once: too short to tell")
        yield {f"samples={samples}": figures, "shown": f"tokens/s: {'; '.join(told)}"}


def many(stage: Stage) -> Iterator[Figures]:
    """Small runs side by side on one device against one after another, the whole commands."""
    jobs, steps = (8, 400) if stage.gpu else (2, 4)
    settings = stage.settings("experiment=nanogpt_cpu")
    launcher = "joblib" if find_spec("hydra_plugins.hydra_joblib_launcher") else None
    together = f"{jobs} at once, " + ("by joblib" if launcher else "each a command of its own")
    seconds = {together: side_by_side(stage.folder, launcher, jobs, steps, settings)}
    yield {"jobs": jobs, "steps": steps, "seconds": seconds}
    seconds["one after another"] = sweep.seconds("basic", jobs, steps, settings)
    ratio = seconds["one after another"] / seconds[together]
    yield {"seconds": seconds, "ratio": ratio, "shown": f"{jobs} runs of {steps} steps: " + ", ".join(
        f"{name} {s:.1f} s" for name, s in seconds.items()) + f"; {ratio:.2f} times as fast"}  # fmt: skip


def side_by_side(folder: Path, launcher: str | None, jobs: int, steps: int, settings: Sequence[str]) -> float:
    """Seconds until runs that train at once, on one device, have all ended.

    Args:
        folder: an empty one.
        launcher: of Hydra, such as "joblib"; None starts each run as a command of its own.
        jobs: runs.
        steps: of each.
        settings: of all.
    """
    if launcher:
        return sweep.seconds(launcher, jobs, steps, [f"hydra.launcher.n_jobs={jobs}", *settings])
    begin = time.monotonic()
    common = [*settings, f"max_steps={steps}", f"eval_interval={steps}", f"eval_windows={sweep.WINDOWS}"]
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(train, f"hydra.run.dir={folder / str(seed)}", *common, f"seed={seed}")
                for seed in range(1, jobs + 1)]  # fmt: skip
        for run in runs:
            run.result()
    return time.monotonic() - begin


def command_overhead(stage: Stage) -> Iterator[Figures]:
    """A training step of the command over one of a bare loop, at nanoGPT's baby recipe."""
    steps = stage.steps(400)
    settings = stage.settings("experiment=nanogpt_gpu")
    count = iter(range(1000))

    def command() -> float:
        return stage.tokens / tokens_per_second(stage, stage.folder / f"{next(count)}", steps, settings) * 1000

    def bare() -> float:
        return overhead.loop(settings, f"--steps={steps}")

    for rounds in rounds_in_time(stage, {"command": command, "bare loop": bare}):
        yield compared(rounds, "command", "bare loop", "ms per step")


PARTS: dict[str, Part] = {
    "machine": Part(machine, 40),
    "resume": Part(resume, 45),
    "compile": Part(compiled, 95),
    "strategies": Part(strategies, 45),
    "throughput": Part(throughput, 90, peer=True),
    "fast": Part(fast, 35),
    "generate": Part(sampling, 55, peer=True),
    "many": Part(many, 45),
    "overhead": Part(command_overhead, 35),
    "nanogpt": Part(nanogpt, 30),
    "ladder": Part(ladder, 20),
}
"""The parts by name, in their order. What one leaves of its seconds, the next may use: the last two train for as long
as they have."""


def main() -> None:
    """Run one part, and write its figures to its folder whenever there are more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("folder", type=Path, help="an empty one")
    parser.add_argument("seconds", type=float, help="that the part may take")
    parser.add_argument("--gpu", action="store_true", help="not in miniature")
    parser.add_argument("--peer", type=Path, help="a checkout of karpathy/nanoGPT")
    asked = parser.parse_args()
    if not asked.gpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # several miniatures share the cores
    stage = Stage(asked.gpu, asked.folder, time.monotonic() + asked.seconds, asked.peer)
    gathered: Figures = {}
    try:
        for figures in PARTS[asked.name].measure(stage):
            gathered |= figures
            write(stage.folder / FIGURES, gathered)
    except subprocess.CalledProcessError as error:
        raise SystemExit(str(error)) from None  # what the command itself said stands above


def write(path: Path, figures: Mapping[str, Any]) -> None:
    """Write a JSON file that is whole whenever the script is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(figures, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
