"""How often a comparison errs, and how often it finds what is there: `python -m benchmarks.power [--sweeps 1000]`.

Simulates sweeps: a seed moves the loss of all variants alike, and each run has noise of its own. Three tables:
the share of sweeps without any difference in which one is declared; the coverage of the interval; and the power to
find a difference, of the verdict and of other tests.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks.measure import write
from gptexp.analysis.statistics import Array, interval, judge, sign_flip


@dataclass(frozen=True)
class Noise:
    """The noise of single runs, of mean 0 and standard deviation 1.

    Attributes:
        draw: numbers of a size.
        opposed: turn the baseline's sign. Differences of skewed noises are symmetric where the noises are alike, and
            as skewed as can be where they are opposed.
    """

    draw: Callable[[np.random.Generator, tuple[int, ...]], Array]
    opposed: bool = False


def _exponential(draw: np.random.Generator, size: tuple[int, ...]) -> Array:
    return draw.exponential(size=size) - 1


def _log_normal(draw: np.random.Generator, size: tuple[int, ...]) -> Array:
    values: Array = (np.exp(draw.standard_normal(size)) - math.exp(0.5)) / math.sqrt(math.e**2 - math.e)
    return values


NOISES = {
    "normal": Noise(lambda draw, size: draw.standard_normal(size)),
    "heavy tails (t, 3 degrees)": Noise(lambda draw, size: draw.standard_t(3, size) / math.sqrt(3)),
    "skewed (exponential), alike": Noise(_exponential),
    "very skewed (log-normal), alike": Noise(_log_normal),
    "skewed, opposed": Noise(_exponential, opposed=True),
    "very skewed, opposed": Noise(_log_normal, opposed=True),
}

DIFFERENCE, PAIRED_SD, SEED_SD = 0.02, 0.012, 0.012
"""In nats a token: a true difference, the spread of paired differences, and of what a seed moves in common."""


def sweep(draw: np.random.Generator, noise: Noise, variants: int, seeds: int) -> Array:
    """Losses of a sweep without differences: (variants, seeds), the first of them the baseline."""
    own = noise.draw(draw, (variants, seeds)) * PAIRED_SD / math.sqrt(2)
    own[0] *= -1 if noise.opposed else 1
    shared: Array = own + draw.standard_normal(seeds) * SEED_SD
    return shared


def false_claims(noise: Noise, seeds: int, sweeps: int, variants: int = 6) -> float:
    """The share of sweeps without differences in which at least one is declared."""
    draw = np.random.default_rng(seeds)
    claims = 0
    for _ in range(sweeps):
        losses = sweep(draw, noise, variants, seeds)
        verdicts = {j.verdict for j in judge(list(losses[1:] - losses[0]), delta=0.0)}
        claims += bool(verdicts & {"better", "worse"})
    return claims / sweeps


def coverage(noise: Noise, seeds: int, samples: int) -> float:
    """The share of pairs of a baseline and a variant whose interval holds the true mean difference, 0."""
    draw = np.random.default_rng(seeds)
    losses = np.stack([sweep(draw, noise, 2, seeds) for _ in range(samples)])
    low, high = interval(losses[:, 1] - losses[:, 0])
    return float(np.mean((low <= 0) & (high >= 0)))


def power(seeds: int, sweeps: int, difference: float = DIFFERENCE, comparisons: int = 1) -> dict[str, float]:
    """The share of sweeps in which a variant is found better by each test at 5 % over the number of comparisons.

    Args:
        seeds: of either variant; the unpaired tests have as many runs.
        sweeps: simulated.
        difference: how much better it is, nats a token; 0 gives the tests' rate of error.
        comparisons: made in the same study, which Bonferroni's level (Holm's strictest) pays for.
    """
    draw, level = np.random.default_rng(seeds), 0.05 / comparisons
    pairs = np.stack([sweep(draw, NOISES["normal"], 2, seeds) for _ in range(sweeps)])
    base, variant = pairs[:, 0], pairs[:, 1] - difference
    paired = variant - base
    high = interval(paired)[1]
    unpaired = stats.permutation_test(
        (variant, base), lambda x, y, axis: x.mean(axis) - y.mean(axis), permutation_type="independent",
        vectorized=True, n_resamples=999, axis=-1, batch=100, rng=draw,
    ).pvalue  # fmt: skip
    better = variant.mean(-1) < base.mean(-1)
    paired_t = stats.ttest_rel(variant, base, axis=-1).pvalue
    welch = stats.ttest_ind(variant, base, axis=-1, equal_var=False).pvalue
    return {
        "verdict": float(np.mean((sign_flip(paired) <= level) & (high < 0))),
        "paired t": float(np.mean(better & (paired_t <= level))),
        "unpaired permutation": float(np.mean(better & (unpaired <= level))),
        "unpaired t (Welch)": float(np.mean(better & (welch <= level))),
    }  # fmt: skip


def measure(sweeps: int) -> dict[str, Any]:
    """All three tables."""
    noises = NOISES.items()
    return {
        "false_claims": {name: {n: false_claims(noise, n, sweeps) for n in (5, 8, 10)} for name, noise in noises},
        "coverage": {name: {n: coverage(noise, n, 4 * sweeps) for n in (5, 6, 8, 10, 20)} for name, noise in noises},
        "power": {m: {n: power(n, sweeps, comparisons=m) for n in (5, 6, 8, 10, 15)} for m in (1, 5)},
    }


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=1000, help="simulated for each figure")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/power.json"))
    arguments = parser.parse_args()
    report = measure(arguments.sweeps)
    console = Console(width=110)
    for key, title in (
        ("false_claims", "sweeps of 6 equal variants in which a difference is declared"),
        ("coverage", "intervals that hold the true mean difference"),
    ):
        counts = list(next(iter(report[key].values())))
        table = Table("noise", *(f"{n} seeds" for n in counts), title=title)
        for name, row in report[key].items():
            table.add_row(name, *(f"{row[n]:.1%}" for n in counts))
        console.print(table)
    for comparisons, rows in report["power"].items():
        title = f"a difference of {DIFFERENCE} nats found, paired sd {PAIRED_SD}, {comparisons} comparison(s)"
        table = Table("seeds", *next(iter(rows.values())), title=title)
        for n, row in rows.items():
            table.add_row(str(n), *(f"{share:.1%}" for share in row.values()))
        console.print(table)
    write(arguments.out, report)


if __name__ == "__main__":
    main()
