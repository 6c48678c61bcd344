"""How often a verdict errs, and how often it finds what is there: `python -m benchmarks.power [--sweeps 1000]`.

Simulates sweeps of six variants: a seed moves the loss of all variants alike, and each run has noise of its own. Tells
the share of sweeps without any difference in which one is declared, also with one variant that is two or four times as
noisy as the others, or a baseline that is; the power to find a difference, and to find one of ten standard errors; how
often a difference of delta is declared to be none; the coverage of the intervals; and the same of sweeps that stop when
they know, with the runs that they train.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.measure import write
from gptexp.analysis.looks import Standing, plan, stand
from gptexp.analysis.statistics import Array, Judgement, judge

DIFFERENCE, PAIRED_SD, SEED_SD, DELTA = 0.02, 0.012, 0.012, 0.01
"""In nats per token: a true difference, the spread of paired differences, of what a seed moves in common, and delta."""

VARIANTS = 6
CONTRASTS = np.concatenate([-np.ones((VARIANTS - 1, 1)), np.eye(VARIANTS - 1)], axis=1)
EFFECTS = (0.0, 0.005, 0.01, 0.02, 0.05)
FIXED, MOST = 10, 12  # seeds of a sweep that does not look, and the most of one that does

LOG_MEAN, LOG_SD = math.exp(0.5), math.sqrt(math.e**2 - math.e)  # of the exponential of a normal number

NOISES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "normal": lambda draw, size: draw.standard_normal(size),
    "t3": lambda draw, size: draw.standard_t(3, size) / math.sqrt(3),
    "exponential": lambda draw, size: draw.exponential(size=size) - 1,
    "log-normal": lambda draw, size: (draw.lognormal(size=size) - LOG_MEAN) / LOG_SD,
}
"""The noise of single runs, of mean 0 and standard deviation 1."""

SCALES = {
    "equal": {}, "one variant twice": {1: 2.0}, "one variant four times": {1: 4.0},
    "baseline twice": {0: 2.0}, "baseline four times": {0: 4.0},
}  # fmt: skip
"""By how much the noise of a variant is larger than that of the others; 0 is the baseline."""


def sweep(
    draw: np.random.Generator, noise: str, seeds: int, scales: dict[int, float] | None = None,
    effects: Sequence[float] = (),
) -> Array:  # fmt: skip
    """Losses of a sweep (variants, seeds), the baseline first; `effects` are added to the variants after it."""
    own = NOISES[noise](draw, (VARIANTS, seeds)) * PAIRED_SD / math.sqrt(2)
    for row, scale in (scales or {}).items():
        own[row] *= scale
    own[1 : 1 + len(effects)] += np.asarray(effects)[:, None]
    losses: Array = own + draw.standard_normal(seeds) * SEED_SD
    return losses


def judged(
    noise: str, seeds: int, sweeps: int, scales: dict[int, float] | None = None, effects: Sequence[float] = ()
) -> list[list[Judgement]]:
    """The judgements on many sweeps."""
    draw = np.random.default_rng(seeds)
    return [judge(sweep(draw, noise, seeds, scales, effects), CONTRASTS, DELTA) for _ in range(sweeps)]


def different(judgement: Judgement) -> bool:
    """Whether a difference is declared."""
    return judgement.verdict in ("better", "worse")


def false_alarms(noise: str, seeds: int, sweeps: int, scale: str = "equal") -> float:
    """The share of sweeps without differences in which at least one is declared."""
    return float(np.mean([any(map(different, found)) for found in judged(noise, seeds, sweeps, SCALES[scale])]))


def power(noise: str, seeds: int, sweeps: int, difference: float = DIFFERENCE) -> float:
    """The share of sweeps in which one variant that differs from the five others is found."""
    return float(np.mean([different(found[0]) for found in judged(noise, seeds, sweeps, effects=[difference])]))


def false_equality(noise: str, seeds: int, sweeps: int) -> float:
    """The share of sweeps in which any of five variants that all differ by delta is declared equal."""
    found = judged(noise, seeds, sweeps, effects=[DELTA] * (VARIANTS - 1))
    return float(np.mean([any(j.verdict == "equal" for j in family) for family in found]))


def coverage(noise: str, seeds: int, sweeps: int) -> float:
    """The share of intervals that hold the true difference, 0."""
    return float(np.mean([j.low <= 0 <= j.high for family in judged(noise, seeds, sweeps) for j in family]))


def looked(
    noise: str, sweeps: int, scales: dict[int, float] | None = None, effects: Sequence[float] = ()
) -> list[Standing]:
    """What many sweeps that stop when they know have come to."""
    draw, looks = np.random.default_rng(0), plan(1, MOST)
    return [stand(sweep(draw, noise, MOST, scales, effects), 0, looks, DELTA) for _ in range(sweeps)]


def sequential_false_alarms(noise: str, sweeps: int, scale: str = "equal") -> float:
    """As `false_alarms`, over all looks."""
    return float(np.mean([any(map(different, s.judgements)) for s in looked(noise, sweeps, SCALES[scale])]))


def sequential(sweeps: int) -> dict[str, Any]:
    """Power and runs of sweeps that stop when they know, beside those of ten fixed seeds, for variants of `EFFECTS`."""
    stopped = looked("normal", sweeps, effects=EFFECTS)
    fixed = judged("normal", FIXED, sweeps, effects=EFFECTS)
    runs = np.array([s.trained.sum(1)[1:] for s in stopped])  # the baseline is shared by all
    return {
        "effects": EFFECTS,
        "found": np.mean([[different(j) for j in s.judgements] for s in stopped], axis=0).tolist(),
        "found_fixed": np.mean([[different(j) for j in family] for family in fixed], axis=0).tolist(),
        "decided": np.mean([[j.verdict != "undecided" for j in s.judgements] for s in stopped], axis=0).tolist(),
        "decided_fixed": np.mean([[j.verdict != "undecided" for j in family] for family in fixed], axis=0).tolist(),
        "runs": runs.mean(0).tolist(),
        "saved": float(1 - runs.mean() / FIXED),
    }


def measure(sweeps: int, progress: Progress) -> dict[str, Any]:
    """All tables."""
    few, more = (3, 5, 8), (5, 8, 10, 20)
    report: dict[str, Any] = {name: {} for name in ("false_alarms", "sequential_false_alarms", "power", "undecided",
                                                    "false_equality", "coverage")}  # fmt: skip
    for noise in progress.track(NOISES, description="noises"):
        for scale in SCALES:
            key = f"{noise}, {scale}"
            report["false_alarms"][key] = {n: false_alarms(noise, n, sweeps, scale) for n in few}
            report["sequential_false_alarms"][key] = {"all looks": sequential_false_alarms(noise, sweeps, scale)}
        report["power"][noise] = {n: power(noise, n, sweeps) for n in few}
        ten = {n: 10 * PAIRED_SD / math.sqrt(n) for n in few}
        report["undecided"][noise] = {n: 1 - power(noise, n, sweeps, ten[n]) for n in few}
        report["false_equality"][noise] = {n: false_equality(noise, n, sweeps) for n in few}
        report["coverage"][noise] = {n: coverage(noise, n, sweeps) for n in more}
    report["sequential"] = sequential(sweeps)
    return report


TITLES = {
    "false_alarms": "sweeps of 6 equal variants in which a difference is declared",
    "sequential_false_alarms": f"the same, of sweeps that look after 3 to {MOST} seeds",
    "power": f"a difference of {DIFFERENCE} nats found, paired sd {PAIRED_SD}",
    "undecided": "a difference of 10 standard errors not found",
    "false_equality": f"a difference of delta, {DELTA} nats, declared to be none",
    "coverage": "intervals that hold the true difference",
}


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=1000, help="simulated for each figure")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/power.json"))
    arguments = parser.parse_args()
    with Progress() as progress:
        report = measure(arguments.sweeps, progress)
    console = Console(width=110)
    for key, title in TITLES.items():
        counts = list(next(iter(report[key].values())))
        table = Table("noise", *(f"{n} seeds" if isinstance(n, int) else n for n in counts), title=title)
        for name, row in report[key].items():
            table.add_row(name, *(f"{row[n]:.1%}" for n in counts))
        console.print(table)
    found = report["sequential"]
    table = Table("true difference", "found", "with 10", "decided", "with 10", "runs of a variant",
                  title=f"sweeps that stop when they know: {found['saved']:.0%} fewer runs than 10 seeds")  # fmt: skip
    for row in zip(*(found[k] for k in ("effects", "found", "found_fixed", "decided", "decided_fixed", "runs")),
                   strict=True):  # fmt: skip
        table.add_row(f"{row[0]:g}", *(f"{share:.1%}" for share in row[1:5]), f"{row[5]:.1f}")
    console.print(table)
    write(arguments.out, report)


if __name__ == "__main__":
    main()
