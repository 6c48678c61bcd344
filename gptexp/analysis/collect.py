"""Reads run directories into records, which hold what a comparison needs of each run."""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from gptexp.analysis.looks import Looks, looks_from
from gptexp.analysis.measures import Metric
from gptexp.config.schema import Config, flatten
from gptexp.config.settings import show
from gptexp.errors import UserError
from gptexp.runs.files import EXACT_MATCH, read_metrics
from gptexp.runs.run import Run

BITS = 1 / math.log(2)  # in a nat
AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}  # as a figure names them
_LOSSES = ("val/loss", "val/loss_windows")


@dataclass(frozen=True)
class Record:
    """A run, as far as it has come."""

    path: Path  # its directory
    name: str  # its readable name
    label: str | None  # the name in its configuration, or None
    status: str  # running, done, failed, diverged, interrupted or pruned
    seed: int  # of initial weights and batches
    # Every other setting that can change a result, by dotted key, as text. The number of threads is left out: a
    # launcher may choose it, and it changes only the last digits. So is the data but for its tokenizer: see `split`
    # and `info`.
    settings: dict[str, str]
    split: str  # the validation fraction and the task, which cut the corpus in two
    questions: str  # what decides which problems are held out; "" where that is all of the above
    length: str  # of training, which can be compared with another one only if its sweep varies that
    order: tuple[Any, ...]  # sorts runs by the directory given, the job's number in its sweep, the time it started
    info: dict[str, Any] = field(repr=False)  # run.json
    # evaluations of the whole validation split: step, tokens, seconds of training, loss in nats per token
    curve: pd.DataFrame = field(repr=False)
    windows: pd.DataFrame = field(repr=False)  # evaluations of some of its windows; often empty
    result: dict[str, Any] = field(repr=False)  # result.json, empty while there is none
    chars_per_token: float = 1.0  # of the validation split

    @cached_property
    def best(self) -> float:
        """The lowest validation loss; nan if there is none."""
        return float(self.curve["loss"].min())

    @cached_property
    def final(self) -> float:
        """The last validation loss; nan if there is none."""
        return math.nan if self.curve.empty else float(self.curve["loss"].iloc[-1])

    def measured(self, metric: Metric) -> float:
        """What is compared, lower being better; nan where the run does not tell."""
        if metric == "exact_match":
            return 1 - float(self.result.get("final", {}).get(EXACT_MATCH, math.nan))
        return self.final if metric == "final" else self.best

    @property
    def corpus(self) -> str:
        """What the text is, however it is cut into symbols."""
        return str(self.info.get("data", {}).get("sha256") or self.info["fingerprints"]["data"])

    @property
    def vocabulary(self) -> str:
        """What the symbols are."""
        return json.dumps(self.info.get("tokenizer"))

    def in_bits(self) -> "Record":
        """The same with losses in bits per character instead of nats per token."""
        curve, windows = (table.assign(loss=table["loss"] * BITS / self.chars_per_token)
                          for table in (self.curve, self.windows))  # fmt: skip
        return replace(self, curve=curve, windows=windows)

    @property
    def complete(self) -> bool:
        """Whether the run is done and has a finite loss."""
        return self.status == "done" and math.isfinite(self.best)


class Unreadable(NamedTuple):
    """A directory that looks like a run but cannot be read, and why."""

    path: Path
    reason: str


class Collection(NamedTuple):
    """What was found in a set of directories."""

    records: tuple[Record, ...]  # the runs, in order
    unreadable: tuple[Unreadable, ...] = ()
    missing: tuple[str, ...] = ()  # names of a sweep's jobs that have no directory
    looks: Looks | None = None  # the plan of the sweep, if it is one alone and adds seeds as they are needed


def without_seed(name: str) -> str:
    """A job's name without its seed, which all jobs of a variant share: rmsnorm-pre-h4 for rmsnorm-pre-h4-s1337."""
    return re.sub(r"-s\d+(?=-|$)", "", name)


def collect(folders: Iterable[Path]) -> Collection:
    """All runs in or below the folders, in the order of their jobs.

    Raises:
        UserError: when a folder does not exist or holds no run.
    """
    problems: list[str] = []
    paths: dict[Path, tuple[int, Path]] = {}  # by resolved path: the number of the folder, and the path in it
    expected: dict[Path, None] = {}  # the directories of all jobs
    sweep_of = cache(_sweep)
    for number, folder in enumerate(folders):
        found = _runs(folder)
        sweeps = {path.parent for path in found if path != folder} | {folder}  # a run named itself stands alone
        wanted = [sweep.resolve() / job for sweep in sweeps for job in sweep_of(sweep).jobs]
        if not found and not wanted:
            problems.append(f"{folder}: {'holds no runs' if folder.is_dir() else 'there is no such directory'}")
        expected |= dict.fromkeys(wanted)
        for path in found:
            paths.setdefault(path.resolve(), (number, path))
    if problems:
        raise UserError(problems)
    records, unreadable = [], []
    for number, path in paths.values():
        try:
            records.append(_read(path, number, sweep_of(path.parent)))
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            unreadable.append(Unreadable(path, _reason(path, error)))
    present = {path.parent.resolve() / path.name for _, path in paths.values()}
    missing = [path.name for path in expected if path not in present]
    plans = {sweep_of(path.parent).looks for _, path in paths.values()}
    looks = plans.pop() if len(plans) == 1 else None
    return Collection(tuple(sorted(records, key=lambda r: r.order)), tuple(unreadable), tuple(missing), looks)


def _runs(folder: Path) -> list[Path]:
    found = []
    for path, folders, files in os.walk(folder):  # a directory that vanishes is no error
        if "run.json" in files:
            found.append(Path(path))
            folders.clear()
        links = (Path(path, name) for name in folders if Path(path, name).is_symlink())
        found += [link for link in links if (link / "run.json").exists()]  # to chosen runs
    return sorted(found)


class _Sweep(NamedTuple):
    """What sweep.json says; nothing where there is none."""

    jobs: dict[str, int]  # their numbers by name
    swept: frozenset[str]  # dotted keys that differ among them
    looks: Looks | None


def _sweep(folder: Path) -> _Sweep:
    try:
        info = json.loads((folder / "sweep.json").read_bytes())
        jobs = {str(name): number for number, name in enumerate(info["jobs"])}
        return _Sweep(jobs, frozenset(map(str, info.get("swept", []))), looks_from(info.get("looks")))
    except (OSError, ValueError, KeyError, TypeError):
        return _Sweep({}, frozenset(), None)


def _read(path: Path, folder: int, sweep: _Sweep) -> Record:
    run = Run.open(path)
    info, config, result = run.info, run.config, run.result or {}
    if lacking := {"config", "data", "code"} - set(info["fingerprints"]):
        raise KeyError(f"fingerprints.{min(lacking)}")
    if not isinstance(info.get("data", {}), dict) or not all(isinstance(v, str) for v in info["fingerprints"].values()):
        raise TypeError("run.json is not as it was written")
    numbers = ("parameters", "tokens_per_second", "seconds")
    if not isinstance(result, dict) or not all(isinstance(result.get(k, 0), (int, float)) for k in numbers):
        raise TypeError("result.json is not as it was written")
    settings = {k: show(v) for k, v in flatten(config.essence()).items()
                if (k not in ("seed", "hardware.threads") and not k.startswith("data."))
                or k in ("data.tokenizer", "data.vocab_size")}  # fmt: skip
    if config.init_from:
        settings["init_from"] = str(info["init_from"]["label"])
    evaluations, seconds, chars_per_token = defaultdict(list), 0.0, 1.0
    for row in read_metrics(run.metrics_path, [*AXES, *_LOSSES, "val/bpc"]):
        if bits := row.get("val/bpc"):
            chars_per_token = row["val/loss"] * BITS / bits
        seconds = row.get("seconds", seconds)  # an evaluation has those of the training before it
        for loss in _LOSSES:
            if math.isfinite(row.get(loss, math.nan)):
                evaluations[loss].append((row["step"], row["tokens"], seconds, row[loss]))
    curve, windows = (pd.DataFrame(evaluations[loss], columns=[*AXES, "loss"], dtype=float) for loss in _LOSSES)
    if info["status"] == "done" and curve.empty:
        raise UserError("metrics.csv holds no losses")
    return Record(
        path=path, name=str(info["name"]), label=config.name, status=str(info["status"]), seed=config.seed,
        settings=settings, split=f"data.val_fraction={config.data.val_fraction}, task={show(asdict(config.task))}",
        questions=show(info.get("data", {}).get("questions") or ""),
        length="" if config.name or {"max_steps", "max_seconds"} & sweep.swept else _length(config),
        order=(folder, str(path.parent), sweep.jobs.get(path.name, len(sweep.jobs)), str(info["started"]), str(path)),
        info=info, curve=curve, windows=windows, result=result, chars_per_token=chars_per_token,
    )  # fmt: skip


def _length(config: Config) -> str:
    seconds = "" if config.max_seconds is None else f", max_seconds={config.max_seconds:g}"
    return f"max_steps={show(config.max_steps)}{seconds}"


def _reason(path: Path, error: Exception) -> str:
    if not path.exists():
        return "was deleted"
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    match error:
        case UserError():
            return error.problems[0].removeprefix(f"run={path}: ").removeprefix(f"{path}/")
        case json.JSONDecodeError():
            return "one of its files is not valid JSON"
        case KeyError():
            return f"run.json lacks {error}"
        case ValueError():
            return f"metrics.csv cannot be read ({words})"
    return words
