"""What the tests share: a small corpus, tiny runs in this process, and real processes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: bits depend on the number of threads

import logging
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hypothesis import HealthCheck, settings

from gptexp import perf
from gptexp.config.choices import conf_dir
from gptexp.config.composition import VERSION_BASE, Composer, plain, register_choices
from gptexp.config.schema import Config, read_config
from gptexp.runs.files import METRICS, TIMES
from gptexp.runs.run import Run
from tests.synthetic import write_run

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background; the programs would not get it either
    signal.signal(signal.SIGINT, signal.default_int_handler)

perf.prepare()  # before torch is loaded, as the commands do
perf.mkl_kernels.choose(True)  # their default: bits depend on it, too

# How long an example takes, or takes to draw, is a matter of what else the machine does.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

REPOSITORY = Path(__file__).parent.parent

TINY = [
    "data=file", "logger=none", "hardware=cpu", "model.n_layer=1", "model.n_embd=16", "heads=h2", "model.block_size=16",
    "batch_size=4", "max_steps=24", "eval_interval=8", "log_interval=3", "checkpoint_interval=5",
    "schedule.warmup_steps=3", "sample_tokens=8",
]  # fmt: skip
"""Overrides of a run that takes a second."""


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTEXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in [name for name in os.environ if name.startswith("WANDB_") or name == "GPTEXP_DEBUG"]:
            patch.delenv(name)
        patch.setenv("NETRC", os.devnull)  # no account of the developer's
        for name in ("no_proxy", "NO_PROXY"):  # the tests' own servers are not behind the developer's proxy
            patch.setenv(name, "127.0.0.1")
        yield


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """The next test finds no process, no handler of messages and no number of threads that this one has left.

    Nor do the processes that it starts share the W&B service of a run of this process. Packages change the root
    logger, too: alembic, for one, gives it a handler of its own.
    """
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    while _processes:
        process = _processes.pop()
        if process.poll() is None:  # the test failed before it saw to its end
            process.kill()
            process.wait()  # and not for the end of its output, which other processes may hold
    log = logging.getLogger("gptexp")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    os.environ.pop("WANDB_SERVICE", None)
    if torch and threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 6,000 characters that a model can learn something from."""
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "tis", "nobler", "slings", "arrows"]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=8)).capitalize() + "." for _ in range(120)]
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs gptexp.train (or another module's main) in this process; returns the exit status."""
    from gptexp import train

    def run(*arguments: str, main: Callable[[], None] = train.main) -> int:
        monkeypatch.setattr(sys, "argv", ["gptexp", *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> Callable[..., Run]:
    """Trains a tiny run in this process, with more overrides, and returns it."""

    def run(name: str, *overrides: str) -> Run:
        train(composed(*TINY, f"data.path={corpus}", *overrides), tmp_path / name)
        return Run.open(tmp_path / name)

    return run


@pytest.fixture(scope="session")
def _finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(composed(*TINY, f"data.path={corpus}"), folder)
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Run:
    """A copy of a tiny run without further overrides, trained once for all tests."""
    return Run.open(shutil.copytree(_finished, tmp_path / "run"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Run]:
    """Writes a run of a norm, a placement and a seed into a sweep, its losses falling to `loss`."""

    count = iter(range(10**6))

    def run(
        loss: float | Sequence[float], seed: int = 1, norm: str = "layernorm", placement: str = "pre", **more: Any
    ) -> Run:
        settings = {"model": {"norm": norm, "placement": placement, **more.pop("model", {})}, "seed": seed}
        settings |= more.pop("settings", {})
        name = more.pop("name", f"{norm}-{placement}-h4-s{seed}")
        folder = more.pop("folder", "sweep")
        losses = [4.0, loss + 0.1, loss] if isinstance(loss, float) else list(loss)
        written = write_run(tmp_path / folder / name, settings, losses, **more)
        written.update(started=f"2026-01-01 {next(count):06d}")  # one after the other
        return written

    return run


def more(*values: Any) -> Any:
    """Parameter values for an exhaustive test: further variations of what the other values cover."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.exhaustive])


_processes: list[subprocess.Popen[str]] = []


def spawn(*arguments: str, cwd: Path, module: str = "gptexp.train", **options: object) -> subprocess.Popen[str]:
    """A real process of the command line, its output captured; it does not outlive the test."""
    process: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # type: ignore[call-overload]  # fmt: skip
    _processes.append(process)
    return process


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a process."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def composed(*overrides: str) -> Config:
    """The configuration of a command line; of those that choose the same groups, Hydra composes one alone."""
    register_choices()
    with initialize_config_dir(conf_dir(), version_base=VERSION_BASE, job_name="gptexp"):
        return read_config(plain(_composer().compose(overrides)))


@cache
def _composer() -> Composer:
    return Composer("config")


def train(config: Config, path: Path) -> float:
    """Train a configuration in a new directory, in this process."""
    from gptexp.processes.group import processes
    from gptexp.training.launch import claim, start

    return start(claim(config, path, path.name, None, ["test"]), processes())


@contextmanager
def failing(step: int | None = None) -> Iterator[list[int]]:
    """In here training fails after this step, once its row is written and before it is saved; None is every step.

    Gives the steps after which it has failed.
    """
    from gptexp.training.callbacks.divergence import Divergence

    hook, failed = Divergence.on_train_batch_end, []

    def fail(self: Any, trainer: Any, *args: Any) -> None:
        hook(self, trainer, *args)
        if step in (None, trainer.global_step):
            failed.append(trainer.global_step)
            raise RuntimeError("in the middle")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Divergence, "on_train_batch_end", fail)
        yield failed


def runs_of(folder: Path) -> dict[str, Run]:
    """The runs in a folder by the names of their directories."""
    return {p.name: Run.open(p) for p in sorted(folder.iterdir()) if (p / "run.json").exists()}


def timeless(run: Run) -> list[list[str]]:
    """The cells of metrics.csv but for the times, as the bytes they are in the file."""
    keep = [i for i, column in enumerate(METRICS) if column not in TIMES]
    rows = [line.split(",") for line in run.metrics_path.read_text().splitlines()]
    assert rows[0] == list(METRICS)
    assert all(len(row) == len(METRICS) for row in rows)
    return [[row[i] for i in keep] for row in rows]
