"""The kinds of faults: how each is brought about, and what the program must do then.

A kind's function takes a case and raises NotInjected or NotRecovered; when it returns, the program has recovered.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import evidence, injection
from benchmarks.disturbed import BY_HAND, NOTED, TARGETS, Case, Ended, Moment, NotInjected, NotRecovered
from benchmarks.wandb_server import Trouble, serving

TRAININGS = [name for name in TARGETS if name.startswith("training")]
ANY = ("training", "training", "training with diagnostics", "sweep", "search", "compare")

WANDB = {"WANDB_INIT_TIMEOUT": "5", "WANDB_FINISH_TIMEOUT": "10", "WANDB_HTTP_TIMEOUT": "3", "WANDB_API_KEY": "0" * 40}
"""W&B's own patience, shortened, and a key that no server ever gave out."""

def killed(*targets: str) -> Callable[[Case], None]:
    """SIGKILL at one to three random moments."""

    def inject(case: Case) -> None:
        base = case.choose(*targets)
        case.prepare(case.target)
        landed = 0
        for _ in range(case.draw.randint(1, 3)):
            process, moment = case.begin(case.target), case.moment(base)
            if not case.reach(process, moment):
                ended = case.end(process)  # it was quicker
                if ended.status:
                    raise NotRecovered(f"the command, given again, ends with status {ended.status}: {ended.error}")
                break
            alone = case.target == "sweep by joblib" and case.draw.random() < 0.5
            if case.kill(process, alone):
                landed += 1
                case.fault += f"killed {'without its workers ' * alone}{moment} "
            _whole_files(case)
        if not landed:
            raise NotInjected("the command ended before")
        resume = _resume(case)
        case.recover(resume)

    return inject


def _resume(case: Case) -> list[str] | None:
    """Half of the time, `resume=` with the directory of the only run there is, if it can be resumed."""
    runs = evidence.run_directories(case.outputs / "runs")
    if len(runs) == 1 and evidence.status(runs[0]) == "running" and case.draw.random() < 0.5:
        return [f"resume={runs[0].relative_to(case.folder)}"]
    return None


def _whole_files(case: Case) -> None:
    """Whatever a killed comparison has written must be whole."""
    if case.target != "compare":
        return
    expected = case.campaign.undisturbed(case.target).left
    for name, lines in TARGETS[case.target].left(case.outputs, "").items():
        if name.endswith((".csv", ".md", ".tex", ".html")) and lines != expected.get(name):
            raise NotRecovered(f"killed, it leaves a part of {name}")


def killed_at_a_write(case: Case) -> None:
    """SIGKILL just before a random one of the system calls that change a file."""
    case.choose(*TRAININGS[:3], "training", "sweep", "search", "compare")
    case.prepare(case.target)
    calls = case.campaign.calls(case.target)
    purpose = case.draw.choice(sorted({call.purpose for call in calls}))  # else most would be of train.log
    call = case.draw.choice([call for call in calls if call.purpose == purpose])
    case.fault = f"killed at {call.name} {call.number} ({Path(call.path).name})"
    process = case.begin(case.target, prefix=call.prefix())
    ended = case.end(process)
    if ended.status not in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise NotInjected(f"the command ended with status {ended.status} before")
    _whole_files(case)
    case.recover(_resume(case))


def no_space(case: Case) -> None:
    """A disk that becomes full somewhere on the way, and then has space again."""
    base = case.choose(*ANY)
    mounted = injection.can_mount() and case.draw.random() < 0.75
    with ExitStack() as stack:
        if mounted:
            case.outputs.mkdir()
            stack.enter_context(injection.small_disk(case.outputs))
            case.prepare(case.target)
            room = case.draw.randrange(base.room)
            own = {"GPTEXP_CACHE": str(case.outputs / "cache")} if case.draw.random() < 0.25 else {}
            ballast = injection.fill(case.outputs, room)
            case.fault = f"a disk with room for {room:,} bytes{', cache included' * bool(own)}"
            ended = case.run(case.target, **own)
            ballast.unlink()
        else:
            case.prepare(case.target)
            size = case.draw.randrange(8192, max(base.largest, 8193))  # what is printed must fit
            case.fault = f"no file may exceed {size:,} bytes"
            process = case.begin(case.target)
            with injection.limited_files(process, size):
                ended = case.end(process)
        check_told(ended)
        case.recover()


def read_only(case: Case) -> None:
    """A folder that nothing can be written to from some moment on, and then can be again."""
    base = case.choose(*ANY)
    case.prepare(case.target)
    with ExitStack() as stack:
        if case.draw.random() < 0.3:
            case.fault = "read-only from the beginning"
            stack.enter_context(injection.read_only(case.outputs))
            process = case.begin(case.target)
        else:
            moment = case.moment(base)
            case.fault = f"read-only {moment}"
            process = case.begin(case.target)
            if not case.reach(process, moment):
                raise NotInjected("the command ended before")
            stack.enter_context(injection.read_only(case.outputs))
        ended = case.end(process)
    check_told(ended)
    case.recover()


def check_told(ended: Ended) -> None:
    """A command that met with a fault must say so in a line.

    Raises:
        NotInjected: when it never met with it.
        NotRecovered: for a traceback, no word, or a status other than 1 and 2.
    """
    if "Traceback (most recent call last)" in ended.out + ended.err:
        raise NotRecovered(f"a traceback in place of an error line, ending in {ended.error!r}")
    if ended.status == 0:
        if not ended.says("No space left", "File too large", "Read-only", "Permission denied", "no picture", "cannot"):
            raise NotInjected("the command did not come to need what it was denied")
        return
    if ended.status not in (1, 2) or "error: " not in ended.err:
        raise NotRecovered(f"ends with status {ended.status} and says {ended.error!r}")


CHANGING = ("run.json", "train.log", "curves.png")  # a refused run may note that it was refused

TORN = {
    "last.ckpt": ("cut", "zeros", "hole", "older"),
    "run.json": ("cut", "zeros", "older"),
    "config.yaml": ("cut", "zeros"),
    "metrics.csv": ("cut", "longer"),
    "samples.txt": ("cut", "longer"),
    "result.json": ("cut", "zeros"),
    "sweep.json": ("cut", "zeros", "older"),
    "optuna.db": ("cut", "zeros"),
}
"""Ways to tear each file. Those that grow are cut or get longer."""


def torn(case: Case) -> None:
    """A file as a power loss leaves it: a beginning, zeros, or what it was before."""
    base = case.choose("training", "training", "training with batch norm", "sweep", "search")
    case.prepare(case.target)
    process, moment = case.begin(case.target), Moment(progress=case.draw.randint(1, base.progress))
    case.reach(process, Moment(progress=case.draw.randint(1, moment.progress or 1)))
    older = {path: path.read_bytes() for path in _tearable(case.outputs)}
    case.reach(process, moment)
    case.kill(process)
    path, how = _choose_torn(case, older)
    whole = path.read_bytes()
    case.fault = f"killed {moment}, {injection.tear(path, how, case.draw, older.get(path))}"
    before = evidence.digests(case.outputs)
    resume = _resume(case)
    ended = case.run(case.target, resume)
    if ended.status == 0:
        case.compare(ended)
        return
    check_told(ended)
    line = next((line for line in (ended.err + ended.out).splitlines() if path.name in line), None)
    if line is None:
        raise NotRecovered(f"the line that refuses does not name {path.name}: {ended.error}")
    # Other jobs of a sweep may have gone on.
    own = path.relative_to(case.outputs).as_posix()
    run = next((p for p in path.parents if (p / "config.yaml").exists()), case.outputs)
    for name, digest in evidence.digests(case.outputs).items():
        concerned = name == own or ((case.outputs / name).is_relative_to(run) and Path(name).name not in CHANGING)
        if concerned and before.get(name, digest) != digest:
            raise NotRecovered(f"refuses {path.name} and yet changes {Path(name).name}")
    case.note(BY_HAND, line.strip())
    if "remove it" in line:
        path.unlink()
    else:
        path.write_bytes(whole)
    case.recover(resume)


def _tearable(outputs: Path) -> list[Path]:
    """The files that can be torn. Of a finished run, those that grew were on the disk before it was called finished."""
    found = [path for name in TORN for path in outputs.rglob(name)]
    return [p for p in found if p.name not in ("metrics.csv", "samples.txt") or evidence.status(p.parent) == "running"]


def _choose_torn(case: Case, older: Mapping[Path, bytes]) -> tuple[Path, str]:
    found = _tearable(case.outputs)
    if not found:
        raise NotInjected("there was no file yet")
    name = case.draw.choice(sorted({path.name for path in found}))
    path = max((path for path in found if path.name == name), key=lambda p: p.stat().st_mtime)
    ways = [how for how in TORN[name] if how != "older" or older.get(path, path.read_bytes()) != path.read_bytes()]
    return path, case.draw.choice(ways)


def wandb(trouble: Trouble) -> Callable[[Case], None]:
    """A W&B server that makes trouble from the beginning, or after a number of requests."""

    def inject(case: Case) -> None:
        base = case.choose("training")
        case.prepare(case.target)
        healthy = 0 if trouble != "vanishes" and case.draw.random() < 0.4 else case.draw.randint(2, 12)
        case.fault = f"W&B {trouble} after {healthy} requests"
        arguments = [a if a != "logger=none" else "logger=wandb" for a in TARGETS[case.target].arguments]
        with serving(trouble, healthy) as server:
            begin = time.perf_counter()
            ended = case.run(case.target, arguments, **WANDB, WANDB_MODE="online", WANDB_BASE_URL=server.url)
            longer = time.perf_counter() - begin - base.seconds
            if not server.troubled:
                raise NotInjected("the run ended before")
        if ended.status:
            raise NotRecovered(f"costs the run, status {ended.status}: {ended.error}")
        case.compare(ended)
        if not [*case.outputs.rglob("*.wandb")] and not ended.says("W&B cannot"):
            raise NotRecovered("keeps no W&B run, and says nothing of it")
        case.note(NOTED, f"{longer:.0f} s longer")

    return inject


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        weight: its share of all faults, in percent.
        inject: brings it about and looks what comes of it.
        lacking: says what the machine lacks for it; empty if nothing.
    """

    weight: int
    inject: Callable[[Case], None]
    lacking: Callable[[], str] = lambda: ""


def _no_search() -> str:
    return "" if find_spec("optuna") else "optuna is not installed"


def _no_trace() -> str:
    return "" if injection.can_trace() else "there is no strace that may trace"


def _no_read_only() -> str:
    return "" if injection.can_mount() or os.geteuid() else "root may not mount here"


KINDS = {
    "kill-training": Kind(18, killed(*TRAININGS)),
    "kill-sweep": Kind(10, killed("sweep", "sweep", "sweep by joblib")),
    "kill-search": Kind(10, killed("search"), _no_search),
    "kill-compare": Kind(6, killed("compare")),
    "kill-at-a-write": Kind(14, killed_at_a_write, _no_trace),
    "no-space": Kind(12, no_space),
    "read-only": Kind(8, read_only, _no_read_only),
    "torn": Kind(12, torn),
    "wandb-refuses": Kind(3, wandb("refuses")),
    "wandb-hangs": Kind(3, wandb("hangs")),
    "wandb-vanishes": Kind(4, wandb("vanishes")),
}
