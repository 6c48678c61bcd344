"""Reads run directories into records: what a comparison needs of each, and what is wrong with those it cannot use."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from gptexp.config import flatten
from gptexp.errors import UserError
from gptexp.records import read_metrics
from gptexp.runs import Run
from gptexp.validation import show

AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}  # as a figure names them


@dataclass(frozen=True)
class Record:
    """A run, as far as it has come."""

    path: Path  # its directory
    name: str  # its readable name
    label: str | None  # the name that its configuration has; None if it has none
    status: str  # running, done, failed, diverged, interrupted or pruned
    seed: int  # of initial weights and batches
    # every other setting that can change a result, by dotted key, as text; of the data see `info`. The number of
    # threads, which the launcher may choose and which moves the last bits alone, is none.
    settings: dict[str, str]
    split: str  # what cuts the corpus in two: the validation fraction and the seed of the shuffle
    # runs are listed by this: the directory given, the job's number in its sweep, the time it started
    order: tuple[Any, ...]
    info: dict[str, Any] = field(repr=False)  # run.json
    # the evaluations of the whole validation split: step, tokens, seconds of training and loss, nats a token
    curve: pd.DataFrame = field(repr=False)
    windows: pd.DataFrame = field(repr=False)  # those of some of its windows, likewise; empty unless the run made them
    result: dict[str, Any] = field(repr=False)  # result.json, empty while there is none

    @property
    def best(self) -> float:
        """The lowest validation loss; nan if there is none."""
        return float(self.curve["loss"].min())

    @property
    def final(self) -> float:
        """The last validation loss; nan if there is none."""
        return math.nan if self.curve.empty else float(self.curve["loss"].iloc[-1])

    @property
    def complete(self) -> bool:
        """Whether the run has come to its end with a loss that can be compared."""
        return self.status == "done" and math.isfinite(self.best)


class Unreadable(NamedTuple):
    """A directory that looks like a run and cannot be read; why, in a few words."""

    path: Path
    reason: str


class Collection(NamedTuple):
    """What was found in a set of directories."""

    records: tuple[Record, ...]  # the runs, in order
    unreadable: tuple[Unreadable, ...] = ()  # directories that could not be read
    missing: tuple[str, ...] = ()  # names of a sweep's jobs that have no directory: not begun yet, or failed before


def without_seed(name: str) -> str:
    """A job's name without its seed, which the jobs of a variant share: rmsnorm-pre-h4 for rmsnorm-pre-h4-s1337."""
    return re.sub(r"-s\d+(?=-|$)", "", name)


def collect(folders: Iterable[Path]) -> Collection:
    """All runs in or below the folders, in the order of their jobs.

    Raises:
        UserError: when a folder is not there or holds no run.
    """
    records: list[Record] = []
    unreadable: list[Unreadable] = []
    problems: list[str] = []
    paths: dict[Path, tuple[int, Path]] = {}  # by where a run really is: the folder's number, and the path there
    expected: dict[tuple[Path, str], None] = {}  # of which sweep, which job
    jobs = cache(_jobs)
    for number, folder in enumerate(folders):
        found = _runs(folder)
        # A run that is named itself speaks for no sweep.
        sweeps = {path.parent for path in found if path != folder} | {folder}
        wanted = [(sweep.resolve(), job) for sweep in sweeps for job in jobs(sweep)]
        if not found and not wanted:
            problems.append(f"{folder}: {'holds no runs' if folder.is_dir() else 'there is no such directory'}")
        expected |= dict.fromkeys(wanted)
        for path in found:
            paths.setdefault(path.resolve(), (number, path))
    if problems:
        raise UserError(problems)
    for number, path in paths.values():
        try:
            records.append(_read(path, number, jobs(path.parent)))
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            unreadable.append(Unreadable(path, _reason(path, error)))
    present = {(path.parent.resolve(), path.name) for _, path in paths.values()}
    missing = [job for sweep, job in expected if (sweep, job) not in present]
    return Collection(tuple(sorted(records, key=lambda r: r.order)), tuple(unreadable), tuple(missing))


def _runs(folder: Path) -> list[Path]:
    found = []
    for path, folders, files in os.walk(folder):  # says nothing of a directory that vanishes meanwhile
        if "run.json" in files:
            found.append(Path(path))
            folders.clear()
        links = (Path(path, name) for name in folders if Path(path, name).is_symlink())
        found += [link for link in links if (link / "run.json").exists()]  # a chosen set of runs, perhaps
    return sorted(found)


def _jobs(sweep: Path) -> dict[str, int]:
    """The numbers of a sweep's jobs by their names; empty where no sweep.json tells them."""
    try:
        names = json.loads((sweep / "sweep.json").read_bytes())["jobs"]
        return {str(name): number for number, name in enumerate(names)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _read(path: Path, folder: int, jobs: dict[str, int]) -> Record:
    run = Run.open(path)
    info, config = run.info, run.config
    name = str(info["name"])
    if lacking := {"config", "data", "code"} - set(info["fingerprints"]):
        raise KeyError(f"fingerprints.{min(lacking)}")
    if not isinstance(info.get("data", {}), dict) or not all(isinstance(v, str) for v in info["fingerprints"].values()):
        raise TypeError("run.json is not as it was written")
    result, numbers = run.result or {}, ("parameters", "tokens_per_second", "seconds")
    if not isinstance(result, dict) or not all(isinstance(result.get(k, 0), (int, float)) for k in numbers):
        raise TypeError("result.json is not as it was written")
    settings = {k: show(v) for k, v in flatten(config.essence()).items()
                if k not in ("seed", "hardware.threads") and not k.startswith("data.")}  # fmt: skip
    losses = ("val/loss", "val/loss_windows")
    rows = read_metrics(run.metrics_path, [*AXES, *losses])
    curve, windows = (evaluations(rows, loss) for loss in losses)
    if info["status"] == "done" and curve.empty:
        raise UserError("metrics.csv holds no losses")
    return Record(
        path=path, name=name, label=config.name, status=str(info["status"]), seed=config.seed, settings=settings,
        split=f"data.val_fraction={config.data.val_fraction}, data.split_seed={config.data.split_seed}",
        order=(folder, str(path.parent), jobs.get(path.name, len(jobs)), str(info["started"]), str(path)), info=info,
        curve=curve, windows=windows, result=result,
    )  # fmt: skip


def evaluations(rows: Sequence[Mapping[str, float]], loss: str) -> pd.DataFrame:
    """The rows of a metrics.csv that have a loss that is finite: step, tokens, seconds of training and loss.

    An evaluation that stands between two rows of training has the seconds of the first.
    """
    found, seconds = [], 0.0
    for row in rows:
        seconds = row.get("seconds", seconds)
        if math.isfinite(row.get(loss, math.nan)):
            found.append((row["step"], row["tokens"], seconds, row[loss]))
    return pd.DataFrame(found, columns=[*AXES, "loss"], dtype=float)


def _reason(path: Path, error: Exception) -> str:
    if not path.exists():
        return "was deleted meanwhile"
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    match error:
        case UserError():
            return error.problems[0].removeprefix(f"run={path}: ").removeprefix(f"{path}/")
        case json.JSONDecodeError():
            return "a file of it is not valid JSON"
        case KeyError():
            return f"run.json lacks {error}"
        case ValueError():
            return f"metrics.csv cannot be read ({words})"
    return words
