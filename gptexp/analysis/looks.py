"""Looks at a study while its seeds are still being trained, planned in advance.

Whoever looks after every seed, and stops at the first p below 5 %, errs far more often than that. So each look may
spend only a part of the 5 % (Lan, DeMets 1983): up to a look with a share t of all seeds, all looks together may have
spent alpha t^2 (Kim, DeMets 1987). That is between the two boundaries that are best known. O'Brien and Fleming's spends
next to nothing after three seeds, where most differences between variants could be decided; Pocock's spends so much
there that small differences are missed at the end.

A variant also gets no further seeds once a verdict on it, either way, has become improbable. That cannot cause an
error.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from gptexp.analysis.statistics import FEWEST_SEEDS, Array, Caution, Judgement, judge

NODES = 64  # of the quadrature

EARLY_LOOKS = 6
"""A look with up to so many seeds, unless it is the last, is more cautious about variants that may be noisier."""

IMPROBABLE = 0.1
"""A variant gets no further seeds if the probability that the last of them bring a verdict is below this."""


@dataclass(frozen=True)
class Looks:
    """A plan: after how many seeds to look, and which seeds these are."""

    seeds: tuple[int, ...]  # in the order in which they are trained
    counts: tuple[int, ...]  # seeds at each look, the last all of them

    def at(self, look: int) -> tuple[int, ...]:
        """The seeds that a look sees, counted from 0."""
        return self.seeds[: self.counts[look]]

    def caution(self, look: int) -> Caution:
        """How a look raises p-values."""
        early = self.counts[look] <= EARLY_LOOKS and look < len(self.counts) - 1
        return Caution(partial(self.adjust, look), EARLY_LOOKS if early else FEWEST_SEEDS)

    def adjust(self, look: int, p: Array) -> Array:
        """p-values at a look that allow for the looks before it: below alpha at most as often as alpha over all."""
        alphas, levels = _table(self.counts)
        known = np.isfinite(p)
        adjusted = np.full(np.shape(p), math.nan)
        adjusted[known] = np.exp(np.interp(np.log(p[known].clip(1e-300)), np.log(levels[:, look]), np.log(alphas)))
        adjusted[known & (p > levels[-1, look])] = 1.0
        return adjusted


def plan(first: int, most: int) -> Looks:
    """Looks after 3, 4, 5, 6 seeds, and then every two, up to the most, of the seeds from the first on."""
    counts = [n for n in (*range(FEWEST_SEEDS, 7), *range(8, most, 2)) if n < most]
    return Looks(tuple(range(first, first + most)), (*counts, most))


def looks_from(stored: Any) -> Looks | None:
    """The plan that sweep.json holds, or None if it holds none."""
    if not isinstance(stored, dict):
        return None
    return Looks(tuple(map(int, stored["seeds"])), tuple(map(int, stored["counts"])))


@cache
def nominal_levels(counts: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """The level of each look's two-sided test, so that all together err with probability alpha.

    By Armitage, McPherson and Rowe's recursion (1969): the density of the sum of differences, as far as no look has
    stopped, is integrated from one look to the next.
    """
    shares = np.array(counts) / counts[-1]
    spent = alpha * shares**2
    points, weights = np.polynomial.legendre.leggauss(NODES)
    bound = float(stats.norm.isf(spent[0] / 2)) * math.sqrt(shares[0])
    levels, before = [float(spent[0])], shares[0]
    x = points * bound
    density = stats.norm.pdf(x, scale=math.sqrt(shares[0])) * weights * bound
    for share, total, last in zip(shares[1:], spent[1:], spent, strict=False):
        scale = math.sqrt(share - before)

        def surplus(bound: float, x: Array = x, density: Array = density, scale: float = scale,
                    part: float = total - last) -> float:  # fmt: skip
            out = stats.norm.sf((bound - x) / scale) + stats.norm.cdf((-bound - x) / scale)
            return float(density @ out) - part

        bound = float(optimize.brentq(surplus, 0.0, 20.0))
        levels.append(float(2 * stats.norm.sf(bound / math.sqrt(share))))
        y = points * bound
        density = density @ stats.norm.pdf((y - x[:, None]) / scale) / scale * weights * bound
        x, before = y, share
    return tuple(levels)


@cache
def _table(counts: tuple[int, ...]) -> tuple[Array, Array]:
    """Values of alpha, and the nominal levels (alphas, looks) that belong to them."""
    alphas = np.concatenate([np.geomspace(1e-12, 0.01, 21), np.linspace(0.02, 0.5, 13)])
    return alphas, np.array([nominal_levels(counts, float(alpha)) for alpha in alphas])


@dataclass(frozen=True)
class Standing:
    """What the looks so far have decided."""

    look: int  # the last one, counted from 0; -1 before the first
    judgements: list[Judgement]  # of each variant against the baseline, at the look that decided it, or the last one
    trained: Array  # (variants, seeds) bool: the runs that the plan has asked for
    open: tuple[int, ...]  # rows of the variants that get further seeds


def stand(
    losses: Array, baseline: int, looks: Looks, delta: float, alpha: float = 0.05, pending: Array | None = None
) -> Standing:
    """Look as planned: at each look the variants that are not decided yet, and the baseline, have all of its seeds.

    A verdict stays as it was at the look that found it, and the variant gets no further seeds.

    Args:
        losses: (variants, seeds) with the plan's seeds in its order; nan where there is no run.
        baseline: its row; each other row is compared with it.
        looks: the plan.
        delta: the largest difference that counts as none.
        alpha: the probability of claiming any difference where there is none, over all looks.
        pending: (variants, seeds) bool: runs that are not at their end. A look that needs one has not happened.
    """
    others = [row for row in range(len(losses)) if row != baseline]
    contrasts = np.zeros((len(others), len(losses)))
    contrasts[np.arange(len(others)), others], contrasts[:, baseline] = 1, -1
    trained, open_, final, reached = np.zeros(losses.shape, bool), list(others), {}, -1
    for look, count in enumerate(looks.counts):
        wanted = trained.copy()
        wanted[[*open_, baseline], :count] = True
        if not open_ or (pending is not None and (wanted & pending).any()):
            break
        trained, reached = wanted, look
        seen = np.where(trained, losses, math.nan)
        for row, judgement in zip(others, judge(seen, contrasts, delta, alpha, looks.caution(look)), strict=True):
            if row in open_:
                final[row] = judgement
        open_ = [row for row in open_ if final[row].verdict == "undecided"
                 and chance(final[row], looks, delta, alpha / len(others)) >= IMPROBABLE]  # fmt: skip
    if reached < 0:
        for row, judgement in zip(others, judge(losses, contrasts, delta, alpha), strict=True):
            final[row] = replace(judgement, verdict="undecided")
    return Standing(reached, [final[row] for row in others], trained, tuple(open_))


def chance(judgement: Judgement, looks: Looks, delta: float, level: float) -> float:
    """The probability that the last look brings a verdict, of what is known now: a flat prior, and normal noise.

    Args:
        judgement: so far.
        looks: the plan.
        delta: the largest difference that counts as none.
        level: alpha over the number of comparisons, Holm's strictest.
    """
    n, last, mean = judgement.n, looks.counts[-1], judgement.mean
    if n < FEWEST_SEEDS or n >= last:
        return 1.0
    sd, df = judgement.error * math.sqrt(n), judgement.df * (last - 1) / (n - 1)
    if not sd:
        return 1.0
    spread, error = sd * math.sqrt((last - n) / (last * n)), sd / math.sqrt(last)  # of the last mean, and its error
    away = float(stats.t.isf(nominal_levels(looks.counts, level)[-1] / 2, df)) * error
    inside = delta - float(stats.t.isf(nominal_levels(looks.counts, 2 * level)[-1] / 2, df)) * error
    differs = special.ndtr((mean - away) / spread) + special.ndtr((-mean - away) / spread)
    same = special.ndtr((inside - mean) / spread) - special.ndtr((-inside - mean) / spread) if inside > 0 else 0.0
    return float(differs + same)


def describe(looks: Looks, look: int) -> str:
    """A look in words: "look 2 of 7, after 4 of at most 12 seeds"."""
    return f"look {look + 1} of {len(looks.counts)}, after {looks.counts[look]} of at most {looks.counts[-1]} seeds"

