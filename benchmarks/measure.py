"""What the benchmarks share: contestants that take turns, the spread of their ratios, a table and a JSON file."""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from gptexp.runs.files import read_metrics

CPU = "hardware.accelerator=cpu"
"""For what is compared on the CPU, whatever else the machine has."""


def parser(doc: str | None, name: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take: --rounds, --out and further settings of gptexp.train."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"times that each has its turn ({rounds})")
    made.add_argument("--out", type=Path, default=Path(f"outputs/benchmarks/{name}.json"), help="JSON with all figures")
    made.add_argument("settings", nargs="*", help="further settings of gptexp.train")
    return made


def equal_work(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    """Refuse settings that a peer would not have: only those of hardware and logger keep its work the same."""
    other = [s for s in asked.settings if not s.startswith(("hardware", "logger"))]
    if asked.peer and other:
        parser.error(f"{' '.join(other)}: beside a peer only settings of hardware and logger are allowed")


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """What each contestant measures in each round."""
    return list(track(turns(contestants, rounds), "rounds", total=rounds, console=Console(stderr=True)))


def turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Iterator[dict[str, float]]:
    """One round after another. Who begins changes from round to round."""
    names = list(contestants)
    for number in range(rounds):
        order = names if number % 2 == 0 else names[::-1]
        taken = {name: contestants[name]() for name in order}
        yield {name: taken[name] for name in names}


def command_seconds(folder: Path, steps: int, skipped: int, settings: Sequence[str]) -> float:
    """Seconds of a training step of a run of the real command, without evaluation and without the first steps."""
    arguments = [*settings, f"max_steps={steps}", f"eval_interval={steps}", "sample_tokens=0",
                 f"hydra.run.dir={folder}"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "gptexp.train", *arguments], check=True, stdout=subprocess.DEVNULL)
    seconds = {row["step"]: row["seconds"] for row in read_metrics(folder / "metrics.csv")[1:]} | {0: 0.0}
    return (seconds[steps] - seconds[skipped]) / (steps - skipped)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def ratios(rounds: Sequence[Mapping[str, float]], over: str, under: str) -> dict[str, float]:
    """The spread of one contestant's figure over another's, round by round."""
    return spread([r[over] / r[under] for r in rounds])


def as_text(ratio: Mapping[str, float]) -> str:
    """A spread in words."""
    return "{median:.2f} ({lowest:.2f} to {highest:.2f})".format(**ratio)


def write(out: Path, report: Mapping[str, Any]) -> None:
    """Write the JSON and say where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    Console().print(f"{out}")
