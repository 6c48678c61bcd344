"""A sweep as one object: a directory with a run for each job, that can be stopped, continued and shared.

sweep.json (settings, what varies, the jobs in their order) · .locks/ · a run directory for each job

A job belongs to the process that holds its lock. So rerun the command to continue where the sweep was stopped, and run
it twice at once, on one machine or on several with a shared disk, to share the work.
"""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from gptexp.config.choices import VALUES
from gptexp.config.schema import Config, flatten
from gptexp.config.settings import NEUTRAL, VARIANT, marked, show
from gptexp.errors import GroupFailed, RunFailed, UserError
from gptexp.processes.ending import at_work
from gptexp.runs.run import FINAL, Run, Status, now, write_atomically

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

log = logging.getLogger("gptexp")

NEUTRAL_KEYS = tuple(marked(Config, NEUTRAL))


@dataclass(frozen=True)
class Standing:
    """How a job stands."""

    name: str  # of the job, its run and its directory
    state: Status | Literal["waiting"]  # a job that waits has no directory yet
    loss: float = math.nan  # the lowest validation loss, as result.json has it, in nats per token; nan without one
    bpc: float = math.nan  # the same in bits per character
    error: str | None = None  # what ended it, or None
    attempts: int = 0  # times that it has failed


class Busy(Exception):
    """Another process works on this job."""


class Sweep:
    """A sweep's directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # its name is the sweep's

    @property
    def info(self) -> dict[str, Any]:
        """sweep.json; empty while there is none.

        Raises:
            UserError: when it cannot be read.
        """
        path = self.folder / "sweep.json"
        if not path.exists():
            return {}
        try:
            info = json.loads(path.read_bytes())
        except ValueError:
            info = None
        if not isinstance(info, dict) or not {"settings", "jobs"} <= info.keys():
            raise UserError(f"{path}: is not whole; remove it, and the same command writes it anew")
        return info

    def join(
        self, settings: Mapping[str, Any], swept: Sequence[str], varied: Sequence[str],
        jobs: Mapping[str, Config | None], command: Sequence[str], looks: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Begin the sweep or continue it; new jobs, such as more seeds, come after those that it has.

        Args:
            settings: what all its jobs share, by dotted key.
            swept: the dotted keys that differ among them.
            varied: the overrides that make them differ, which are part of the jobs' names.
            jobs: the configurations of the jobs by name, in order; None for one that is wrong.
            command: the command line.
            looks: the plan of a sweep that adds seeds as they are needed.

        Raises:
            UserError: when the sweep, its plan or a run in it was begun with other settings, or the folder cannot be
                written.
        """
        try:
            (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".locks" / ".sweep"):
                info = self.info
                merged = {
                    "name": self.folder.name, "started": info.get("started", now()), "command": list(command),
                    "settings": info.get("settings", dict(settings)), "swept": _union(info.get("swept", []), swept),
                    "varied": _union(info.get("varied", []), varied), "jobs": _union(info.get("jobs", []), list(jobs)),
                } | ({"looks": planned} if (planned := info.get("looks", looks)) else {})  # fmt: skip
                if looks and planned and planned != looks:
                    first, *_, last = planned["seeds"]
                    raise UserError(f"sweep.max_seeds={len(looks['seeds'])}: the sweep was planned with the seeds "
                                    f"{first} to {last}; leave them as they were, or give the new sweep another "
                                    "sweep.name")  # fmt: skip
                self._check(merged["settings"], settings, merged["swept"], jobs)
                write_atomically(self.folder / "sweep.json", (json.dumps(merged, indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"output_dir: cannot write {self.folder} ({error.strerror})") from error

    def _check(
        self, old: Mapping[str, Any], new: Mapping[str, Any], vary: Sequence[str], jobs: Mapping[str, Config | None]
    ) -> None:
        """Refuse settings that are not the sweep's, or jobs whose runs have others."""
        free = (*NEUTRAL_KEYS, "seed", "hardware.threads")
        old, new = ({k: v for k, v in tree.items() if not k.startswith(free) and k not in vary} for tree in (old, new))
        problems = [f"sweep.name={self.folder.name}: {difference}; leave it out, or give the new sweep another name"
                    for difference in differences(old, new, "the sweep's")]  # fmt: skip
        for name, config in jobs.items() if not problems else ():
            try:
                if config and (self.folder / name / "run.json").exists():
                    self.check(name, config)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)

    def lock(self, name: str) -> AbstractContextManager[Any]:
        """Hold a job for this process, as a context; the system frees it if the process dies.

        Raises:
            Busy: when another process has it.
        """
        (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(self.folder / ".locks" / name, timeout=0).acquire()
        except Timeout as error:
            raise Busy(name) from error

    @property
    def measure(self) -> Literal["loss", "bpc"]:
        """What its jobs are ranked by: bits per character where vocabularies differ."""
        return "bpc" if {"data.tokenizer", "data.vocab_size"} & set(self.info.get("swept", ())) else "loss"

    def is_busy(self, name: str) -> bool:
        """Whether a process works on the job."""
        try:
            with self.lock(name):
                return False
        except Busy:
            return True

    def standing(self, name: str) -> Standing:
        """How a job stands, according to its directory."""
        run = Run(self.folder / name)
        try:
            info = run.info
            state, error, attempts = info["status"], info.get("error"), int(info.get("attempts", 0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not yet whole, or gone
            return Standing(name, "waiting")
        try:
            result = run.result
            found = [None if result is None else result.get(f"best_val_{measure}") for measure in ("loss", "bpc")]
            loss, bpc = (math.nan if value is None else float(value) for value in found)
            return Standing(name, state, loss, bpc, error, attempts)
        except (OSError, ValueError, TypeError, AttributeError):  # it is written in one step, so this is damage
            return Standing(name, "failed", error=f"{run.path / 'result.json'} is not whole", attempts=attempts)

    def is_final(self, name: str) -> bool:
        """Whether nothing is left to do for the job."""
        return self.standing(name).state in FINAL

    def check(self, name: str, config: Config) -> Run:
        """A job's run, which must be of this configuration. Threads may differ: they change the last bits alone.

        Raises:
            UserError: when it is not, or cannot be read.
        """
        run = Run.open(self.folder / name, key="sweep job")
        old, new = (flatten(c.essence()) | {"hardware.threads": None} for c in (run.config, config))
        if found := differences(old, new, "the run's"):
            raise UserError(f"sweep job {run.path}: {d}; give the new sweep another sweep.name" for d in found)
        if run.info.get("fingerprints", {}).get("config") != run.config.fingerprint():
            raise UserError(f"sweep job {run.path}: run.json does not belong to config.yaml")
        return run

    def work(
        self, name: str, config: Config, claim: Callable[[Path], Run], train: Callable[[Run], float]
    ) -> float:
        """Finish a job, from wherever it stands.

        Args:
            name: of the job.
            config: of its run.
            claim: makes a new run in a directory.
            train: trains a run, or continues it, and returns the loss.

        Returns:
            the lowest validation loss, in nats per token; nothing is trained if the job is finished already.

        Raises:
            Busy: when another process works on it.
            UserError: when its run has another configuration.
            RunFailed: when it has failed more often than `sweep.retries` allows.
        """
        path, run = self.folder / name, None
        with self.lock(name), at_work():
            if path.is_dir() and not (path / "run.json").exists():
                _remove_begun(path)
            if path.exists():
                run, job = self.check(name, config), self.standing(name)
                if job.state in FINAL:
                    return job.loss
                if job.state == "failed" and job.attempts > config.sweep.retries:
                    raise RunFailed(f"failed {job.attempts} times and is not tried again (sweep.retries): {job.error}")
            try:
                return train(run or claim(path))
            except (Exception, GroupFailed):
                if (path / "run.json").exists():
                    run = Run(path)
                    run.update(attempts=int(run.info.get("attempts", 0)) + 1)
                raise


def differences(old: Mapping[str, Any], new: Mapping[str, Any], whose: str) -> list[str]:
    """How new settings differ from old ones, such as "seed=2 differs from the run's seed=1"."""
    return [f"{k}={show(new.get(k))} differs from {whose} {k}={show(old.get(k))}"
            for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]  # fmt: skip


def summary(standings: Sequence[Standing], measure: Literal["loss", "bpc"] = "loss") -> str:
    """A line per job: its lowest validation loss, best first, and at the end those that failed, with the reason."""
    lines, values = [], {s.name: getattr(s, measure) for s in standings}
    for s in sorted(standings, key=lambda s: (s.state == "failed", math.isnan(values[s.name]), values[s.name])):
        loss = "" if s.state == "failed" or math.isnan(values[s.name]) else f"{values[s.name]:.4f}"
        ending = f": {s.error}" if s.state == "failed" else f" ({s.state})" if loss and s.state != "done" else ""
        lines.append(f"  {loss or s.state:>8}  {s.name}{ending}")
    return "\n".join([f"--- {len(lines)} jobs, best val/{measure} first", *lines])


def draw(sweep: Sweep) -> None:
    """Draw the learning curves of a sweep's variants into its directory."""
    from gptexp.analysis.figures import plot_runs

    path = sweep.folder / "curves.png"
    try:
        if plot_runs(sweep.folder, path):
            log.info("picture: %s", path)
    except OSError as error:
        log.warning("no picture: cannot write %s (%s)", path, error.strerror)


def sweep_name(overrides: Sequence["Override"], params: Sequence[str]) -> str:
    """A name for a sweep that has none: the settings that vary, and a digest of the command.

    So the same command finds its sweep again; what changes no result does not change the name. `params` are the keys
    that a file of conf/ varies.
    """
    # But the group `sweep` says what varies, and `name` is part of the names of the jobs.
    elsewhere = tuple("sweep." if key == "sweep" else key for key in NEUTRAL_KEYS if key != "name")
    asked = sorted({str(o.input_line) for o in overrides if not o.key_or_group.startswith(elsewhere)})
    varied = [*params, *(o.key_or_group for o in overrides if o.is_sweep_override())]
    words = dict.fromkeys(key.rpartition(".")[2].replace("/", "-") for key in varied)
    return "-".join([*words, hashlib.sha256("\n".join(asked).encode()).hexdigest()[:6]])


def job_name(config: Config, swept: str) -> str:
    """A run's readable name: the one given or the variant's, and whatever else a sweep varies.

    `swept` is Hydra's override_dirname, such as `model.norm=rmsnorm|optimizer.learning_rate=0.001`.
    """
    variant = {"seed", *marked(Config, VARIANT)}
    groups = {group for group, (section, _) in VALUES.items() if f"{section}.{group}" in variant} | {"heads"}
    shown = variant | groups
    pairs = [pair.partition("=") for pair in swept.split("|") if pair]  # a value can hold a comma
    extra = [f"s{value}" if key == "seed" else f"{key.rpartition('.')[2]}_{value}"
             for key, _, value in pairs
             if not (key.partition("/")[0] == "experiment" if config.name else key in shown)]  # fmt: skip
    return re.sub(r"[^\w.+-]+", "_", "-".join([config.name or config.variant, *extra]))  # as Hydra's grammar takes it


def _union(first: Sequence[str], more: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*first, *more]))


def _remove_begun(path: Path) -> None:
    """Remove a directory that a killed process left before its run began."""
    if any(p.is_file() and p.name != "config.yaml" and not p.name.startswith(".") for p in path.rglob("*")):
        raise UserError(f"{path}: is in the way of a job, and is not a run (it holds no run.json)")
    shutil.rmtree(path)
