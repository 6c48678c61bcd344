"""What a command leaves behind, as text that can be held against what an undisturbed command left.

Everything here reads files and standard output: nothing is known of how the program makes them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Evidence = Mapping[str, Sequence[str]]
"""Lines by what they come from, such as "metrics.csv"."""

TIMES = ("seconds", "tokens_per_second", "mfu")
"""The columns of metrics.csv that differ from one run to the next."""

RESULTS = ("status", "step", "tokens", "best_val_loss", "best_step", "final")
"""The entries of result.json that do not."""


def run_directories(folder: Path) -> list[Path]:
    """The run directories in a folder, by name."""
    return sorted(path.parent for path in folder.glob("*/run.json"))


def status(run: Path) -> str:
    """The status of a run as its run.json has it; "unreadable" if it cannot be read."""
    try:
        return str(json.loads((run / "run.json").read_bytes())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable"


def of_run(run: Path) -> dict[str, list[str]]:
    """The status, the metrics without times, the samples and the losses of a run."""
    found = {"run.json": [f"status {status(run)}"]}
    readers = {"metrics.csv": _timeless, "samples.txt": _lines, "diagnostics.csv": _lines, "result.json": _results}
    for name, read in readers.items():
        if name != "diagnostics.csv" or (run / name).exists():  # the one that not every run has
            try:
                found[name] = read(run / name)
            except (OSError, ValueError, KeyError, TypeError) as error:
                found[name] = [f"unreadable: {type(error).__name__}: {error}"]
    return found


def of_training(outputs: Path, printed: str) -> dict[str, list[str]]:
    """The evidence of the finished run. Where there are several, as after a new start, they must agree."""
    runs = run_directories(outputs / "runs")
    finished = [of_run(run) for run in runs if status(run) == "done"]
    if not finished:
        return {"runs": [f"none is done: {', '.join(map(status, runs)) or 'there is none'}"]}
    return next((other for other in finished if other != finished[0]), finished[0])


def of_sweep(outputs: Path, printed: str) -> dict[str, list[str]]:
    """The evidence of each job by its name, and the final table."""
    runs = run_directories(outputs / "sweeps" / "sweep")
    jobs = {f"{run.name}/{name}": lines for run in runs for name, lines in of_run(run).items()}
    return jobs | {"table": _table(printed)}


def of_search(outputs: Path, printed: str) -> dict[str, list[str]]:
    """The evidence of each trial by what was tried, the losses of the final table, and the best trial.

    A search that was stopped draws its trials in another order, so their numbers say nothing.
    """
    found: dict[str, list[str]] = {}
    for run in run_directories(outputs / "sweeps" / "sweep"):
        try:
            config = yaml.safe_load((run / "config.yaml").read_text())
            tried = f"{config['model']['norm']} {config['seed']}"
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            tried = f"{run.name} ({type(error).__name__})"
        if f"{tried}/run.json" in found:
            tried = f"{tried} once more"
        found |= {f"{tried}/{name}": lines for name, lines in of_run(run).items()}
    best = [line for line in printed.splitlines() if line.startswith("best: ")]
    return found | {"table": [line.partition("trial-")[0] for line in _table(printed)], "best": best}


def of_comparison(outputs: Path, printed: str) -> dict[str, list[str]]:
    """The tables, the page and what was printed, and the runs, which a comparison must leave alone."""
    sweep = outputs / "sweeps" / "sweep"
    report = sweep / "report"
    made = {path.relative_to(report).as_posix(): _lines(path)
            for path in sorted([*report.glob("tables/[!.]*"), *report.glob("[!.]*.html")])}  # fmt: skip
    read = [f"{name} {digest}" for name, digest in digests(sweep).items() if not name.startswith("report/")]
    return {**made, "printed": printed.splitlines(), "the runs themselves": read}


def differences(expected: Evidence, found: Evidence) -> list[str]:
    """Where two pieces of evidence differ, a line each; none where they agree."""
    said = [f"{name} is missing" for name in expected if name not in found]
    said += [f"{name} should not be there" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        a, b = list(expected[name]), list(found[name])
        if a != b:
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            lines = [(x[place] if place < len(x) else "nothing")[:80] for x in (b, a)]
            said.append(f"{name}, line {place + 1}: {lines[0]!r} in place of {lines[1]!r}")
    return sorted(said)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder by its path, but for hidden ones, such as locks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def leftovers(folder: Path) -> list[str]:
    """Hidden files below a folder that are neither locks nor in use: what an atomic write left when it was killed."""
    hidden = (path for path in folder.rglob(".*") if path.is_file() and ".locks" not in path.parts)
    return sorted(path.name for path in hidden if not path.name.endswith(".lock"))


def rows(folder: Path) -> int:
    """Runs below a folder, and lines of all their metrics.csv."""
    return len([*folder.rglob("run.json")]) + sum(_lengths(folder.rglob("metrics.csv")))


def files(folder: Path) -> int:
    """Files of a comparison below a folder."""
    return len([path for path in folder.glob("sweeps/sweep/report/**/*") if path.is_file()])


def _lengths(paths: Iterator[Path]) -> Iterator[int]:
    for path in paths:
        try:
            yield path.read_bytes().count(b"\n")
        except OSError:
            continue


def _lines(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").split("\n")


def _timeless(path: Path) -> list[str]:
    lines = [line.split(",") for line in _lines(path)]
    keep = [i for i, name in enumerate(lines[0]) if name not in TIMES]
    # A row that is torn keeps what it has: it differs from a whole one anyway.
    return [",".join(cells[i] for i in keep if i < len(cells)) for cells in lines]


def _results(path: Path) -> list[str]:
    result: dict[str, Any] = json.loads(path.read_bytes())
    return [f"{name}: {json.dumps(result[name])}" for name in RESULTS]


def _table(printed: str) -> list[str]:
    lines = printed.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("--- ")), len(lines))
    return [line for i, line in enumerate(lines[begin:]) if i == 0 or line.startswith("  ")]
