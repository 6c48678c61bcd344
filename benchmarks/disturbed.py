"""The commands that a campaign of faults disturbs, what they do undisturbed, and a case of disturbing one."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random

from benchmarks import evidence, injection

TRAIN = (
    "data=file", "data.path=text.txt", "output_dir=outputs", "hardware=cpu", "hardware.threads=1", "model.n_layer=1",
    "model.n_embd=16", "heads=h2", "model.block_size=16", "model.dropout=0.1", "batch_size=4", "max_steps=240",
    "eval_interval=40", "log_interval=4", "checkpoint_interval=12", "schedule.warmup_steps=3", "sample_tokens=8",
)  # fmt: skip
"""A run of a second, most of which goes into starting."""

SWEEP = ("-m", *TRAIN, "logger=none", "max_steps=48", "eval_interval=16", "sweep.name=sweep",
         "norm=layernorm,rmsnorm", "seed=1,2")  # fmt: skip

SEARCH = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.startup_trials=2",
          "hydra.sweeper.pruner=none")  # fmt: skip
"""As many trials as the space holds, so that in the end all have been tried, whatever the order."""

LIMIT = 240  # seconds after which a command counts as one that does not end

NOTED, BY_HAND, LOST = 1, 2, 3
"""How bad a thing is: worth knowing; the user has to do something; not recovered from."""


class NotInjected(Exception):
    """The fault could not be brought about."""


class NotRecovered(Exception):
    """The program did not do what it should after the fault."""


@dataclass(frozen=True)
class Target:
    """A command that is disturbed.

    Attributes:
        arguments: of the command, whose working directory is the case's.
        left: its evidence, from the folder `outputs` and its standard output.
        progress: a number that grows while it runs.
        module: that is run.
    """

    arguments: tuple[str, ...]
    left: Callable[[Path, str], evidence.Evidence]
    progress: Callable[[Path], int] = evidence.rows
    module: str = "gptexp.train"



def _training(*settings: str) -> Target:
    return Target((*TRAIN, "resume=auto", *settings), evidence.of_training)


TARGETS = {
    "training": _training("logger=none"),
    "training with batch norm": _training("logger=none", "norm=batchnorm", "gradient_accumulation_steps=2"),
    "training with diagnostics": _training("logger=none", "optimizer=muon", "diagnostics_interval=20"),
    "training with W&B offline": _training("logger=wandb"),
    "sweep": Target(SWEEP, evidence.of_sweep),
    "sweep by joblib": Target((*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), evidence.of_sweep),
    "search": Target((*SWEEP, *SEARCH), evidence.of_search),
    "compare": Target(("outputs/sweeps/sweep",), evidence.of_comparison, evidence.files, "gptexp.compare"),
}
TRAININGS = [name for name in TARGETS if name.startswith("training")]


@dataclass(frozen=True)
class Undisturbed:
    """What a command does when nothing comes in between.

    Attributes:
        folder: where it ran.
        left: its evidence.
        seconds: that it took.
        progress: at its end.
        room: bytes of disk that it took, in pages.
        largest: bytes of the largest file.
    """

    folder: Path
    left: evidence.Evidence
    seconds: float
    progress: int
    room: int
    largest: int


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, standard output and standard error."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line that says why."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return lines[0] if lines else (self.err.strip().splitlines() or ["no word"])[-1]

    def says(self, *words: str) -> bool:
        """Whether any of the words is in what it printed."""
        return any(word in self.out + self.err for word in words)


class Campaign:
    """What the cases share: undisturbed commands and the processes under way.

    Args:
        folder: for everything; it must exist.
        seed: of what is drawn.
        program: what runs a module.
    """

    def __init__(self, folder: Path, seed: int = 0, program: Sequence[str] = (sys.executable, "-m")) -> None:
        self.folder, self.seed, self.program = folder, seed, tuple(program)
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self._known: dict[str, Undisturbed] = {}
        self._calls: dict[str, list[injection.SystemCall]] = {}
        self._locks = {name: threading.RLock() for name in TARGETS}

    def undisturbed(self, name: str) -> Undisturbed:
        """What a target does by itself; run when first asked for.

        Raises:
            SystemExit: when it fails, for then there is nothing to hold anything against.
        """
        with self._locks[name]:
            if name not in self._known:
                case = Case(self, f"undisturbed-{name}")
                case.prepare(name)
                before = _sizes(case.outputs)
                begin = time.perf_counter()
                ended = case.run(name)
                seconds = time.perf_counter() - begin
                if ended.status:
                    raise SystemExit(f"an undisturbed {name} ends with status {ended.status}: {ended.error}")
                made = [size for path, size in _sizes(case.outputs).items() if path not in before]
                self._known[name] = Undisturbed(
                    case.folder, TARGETS[name].left(case.outputs, ended.out), seconds,
                    TARGETS[name].progress(case.outputs), sum(made) + len(made) * injection.PAGE, max(made),
                )  # fmt: skip
            return self._known[name]

    def calls(self, name: str) -> list[injection.SystemCall]:
        """The system calls of a target by which it changes its files."""
        with self._locks[name]:
            if name not in self._calls:
                case = Case(self, f"traced-{name}")
                case.prepare(name)
                log = case.folder / "calls.txt"
                ended = case.run(name, prefix=injection.counting(log))
                if ended.status:
                    raise NotInjected(f"traced, an undisturbed {name} ends with status {ended.status}: {ended.error}")
                self._calls[name] = injection.traced_calls(log, case.outputs.name)
            return self._calls[name]

    def stop(self) -> None:
        """End everything that is under way."""
        self.stopped = True
        for process in self.processes.copy():
            injection.kill_group(process)


class Case:
    """One fault: a folder, the commands that are run in it, and what was seen.

    Args:
        campaign: that it belongs to.
        name: of the case, from which its draws and its folder follow.
    """

    def __init__(self, campaign: Campaign, name: str) -> None:
        self.campaign, self.folder = campaign, campaign.folder / name.replace(" ", "-")
        self.draw = Random(f"{campaign.seed} {name}")
        self.mark = uuid.uuid4().hex
        self.target, self.fault = "", ""
        self.seen: list[tuple[int, str]] = []
        self._count = 0
        self.folder.mkdir()
        (self.folder / "text.txt").write_text(text())

    @property
    def outputs(self) -> Path:
        """The folder that the commands write."""
        return self.folder / "outputs"

    def choose(self, *names: str) -> Undisturbed:
        """Draw the target from some, and make what it needs, but for the folder `outputs`."""
        available = [name for name in names if find_spec("hydra_plugins.hydra_joblib_launcher") or "joblib" not in name]
        self.target = self.draw.choice([name for name in available if find_spec("optuna") or name != "search"])
        return self.campaign.undisturbed(self.target)

    def prepare(self, target: str) -> None:
        """Make the folder `outputs`, with the runs that are to be compared."""
        self.outputs.mkdir(exist_ok=True)
        if target == "compare":
            runs = self.campaign.undisturbed("sweep").folder / "outputs"
            shutil.copytree(runs, self.outputs, dirs_exist_ok=True)

    def begin(
        self, target: str, arguments: Sequence[str] | None = None, prefix: Sequence[str] = (), **environment: str
    ) -> "subprocess.Popen[str]":
        """Start a target's command, or its module with other arguments, in a session of its own."""
        if self.campaign.stopped:
            raise KeyboardInterrupt
        self._count += 1
        known = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "GPTEXP_"))}
        here = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [known.get("PYTHONPATH")])])
        own = {"GPTEXP_FAULTS": self.mark, "GPTEXP_CACHE": str(self.folder / "cache"), "NETRC": os.devnull,
               "WANDB_MODE": "offline", "PYTHONPATH": here}  # fmt: skip
        command = [*self.campaign.program, TARGETS[target].module, *(arguments or TARGETS[target].arguments)]
        with self._log("out").open("w") as out, self._log("err").open("w") as err:
            process = subprocess.Popen(
                [*prefix, *command], cwd=self.folder, env=known | own | environment, text=True,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        self.campaign.processes.add(process)
        return process

    def end(self, process: "subprocess.Popen[str]") -> Ended:
        """Wait for a command to end.

        Raises:
            NotRecovered: when it does not.
        """
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            injection.kill_group(process)
            process.wait()
            raise NotRecovered(f"did not end within {LIMIT} s") from None
        finally:
            self.campaign.processes.discard(process)
        if self.campaign.stopped:
            raise KeyboardInterrupt
        return Ended(process.returncode, *(self._log(name).read_text(errors="replace") for name in ("out", "err")))

    def run(
        self, target: str, arguments: Sequence[str] | None = None, prefix: Sequence[str] = (), **environment: str
    ) -> Ended:
        """Start a command and wait for its end."""
        return self.end(self.begin(target, arguments, prefix, **environment))

    def recover(self, arguments: Sequence[str] | None = None) -> None:
        """Give the command again, and hold what it leaves against the undisturbed one's.

        Raises:
            NotRecovered: when it fails, or leaves something else.
        """
        ended = self.run(self.target, arguments)
        if ended.status:
            raise NotRecovered(f"the command, given again, ends with status {ended.status}: {ended.error}")
        self.compare(ended)

    def compare(self, ended: Ended) -> None:
        """Hold what a command has left against the undisturbed one's.

        Raises:
            NotRecovered: when it differs.
        """
        found = TARGETS[self.target].left(self.outputs, ended.out)
        different = evidence.differences(self.campaign.undisturbed(self.target).left, found)
        if different:
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            raise NotRecovered(different[0] + more)
        if left := evidence.leftovers(self.outputs):
            self.note(NOTED, f"{len(left)} temporary files stay, such as {left[0]}")

    def note(self, severity: int, what: str) -> None:
        """Keep something that was seen."""
        self.seen.append((severity, what))

    def moment(self, base: Undisturbed) -> "Moment":
        """Draw a moment of a command: a time, or the progress that it has made."""
        if self.draw.random() < 0.5:
            return Moment(seconds=self.draw.uniform(0, base.seconds))
        return Moment(progress=self.draw.randint(1, base.progress))

    def reach(self, process: "subprocess.Popen[str]", moment: "Moment") -> bool:
        """Wait for a moment; returns whether the process has come to it, and goes on."""
        begin, progress = time.perf_counter(), TARGETS[self.target].progress
        while process.poll() is None:
            passed = time.perf_counter() - begin
            if passed > LIMIT:
                return False
            if moment.seconds is not None and passed >= moment.seconds:
                return True
            if moment.progress is not None and progress(self.outputs) >= moment.progress:
                return True
            time.sleep(0.002)
        return False

    def kill(self, process: "subprocess.Popen[str]", alone: bool = False) -> bool:
        """SIGKILL to a command and all that it has started, or to it alone; returns whether it still ran."""
        if alone:
            process.kill()
        else:
            injection.kill_group(process)
        self.campaign.processes.discard(process)
        return process.wait() == -signal.SIGKILL

    def _log(self, name: str) -> Path:
        return self.folder / f"command {self._count} {name}.txt"


@dataclass(frozen=True)
class Moment:
    """Seconds after the start of a command, or the progress that it has made by then."""

    seconds: float | None = None
    progress: int | None = None

    def __str__(self) -> str:
        return f"after {self.seconds:.2f} s" if self.seconds is not None else f"at progress {self.progress}"


def text() -> str:
    """A corpus of about 6,000 characters that a model can learn something from."""
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "tis", "nobler", "slings", "arrows"]
    draw = Random(0)
    return "\n".join(" ".join(draw.choices(words, k=8)).capitalize() + "." for _ in range(120)) + "\n"


def _sizes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
