"""Statistics of variants that were trained with common seeds.

The model is loss[variant, seed] = variant + seed + noise. A seed fixes the batches and every initial value that two
variants share, so what it adds to the loss of all variants cancels in differences under one seed. What is left, the
noise of single runs, is estimated from all variants together; that is why a few seeds are enough for a verdict.

Losses are (variants, seeds), nan where there is no run. A contrast is (variants,), weights that add up to 0: 1 for a
variant and -1 for its baseline, or the same of averages over variants.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Array = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "equal", "undecided"]

FEWEST_SEEDS = 3
"""With fewer there are estimates, and no verdict."""

NOISIER = 0.0001
"""Level of the F-test by which the noise of a variant is so much larger that it is judged by its own runs alone."""

UNLIKE = 0.1
"""Level of the F-test by which an interval has the larger width of its own differences, and not of the pooled noise."""

QUIETER = 0.01
"""Level of the F-test by which differences that vary much less than the pooled noise are judged by themselves: those of
variants that are nearly the same. Fewer than `QUIET_SEEDS` seeds may vary little by chance."""

QUIET_SEEDS = 5

EARLY = 3.0
"""By how much p-values of the pooled noise are multiplied with three seeds, and at looks with up to six: so few losses
of a noisier variant often lie close together."""

OWN_ERRORS = 3.2
"""So many standard errors of its own differences a mean must have in any case, unless its own t-test needs fewer."""

SIGN_SEEDS = 6  # the fewest seeds for the sign-flip test, which then can go below 0.05
FLIPS = 2**14  # choices of signs that the sign-flip test counts; up to 14 seeds, these are all there are
MOST_SEEDS = 1000

# Below, the functions of scipy.special are the distributions of scipy.stats without its checks, which take most of the
# time: stdtr and stdtrit are Student's, fdtri is F's, ndtr is the normal one.


@dataclass(frozen=True)
class Noise:
    """The noise of single runs, pooled over variants."""

    variance: float  # nan where it cannot be estimated
    df: float  # its degrees of freedom
    noisier: tuple[int, ...]  # rows that are left out, because their own is so much larger
    residuals: Array  # (variants, seeds) of the rows that are not; nan where there is no run


def pooled_noise(losses: Array) -> Noise:
    """The variance of the residuals from variant + seed. Variants that are much noisier than the others are left out.

    One variant at a time is left out, while an F-test of what it adds to the residuals is significant at `NOISIER`.
    """
    rows = [row for row, values in enumerate(losses) if np.isfinite(values).sum() > 1]
    residuals, df = _residuals(losses[rows])
    while len(rows) > 2:
        noisiest = np.argsort(np.nansum(residuals**2, axis=1))[-3:].tolist()  # one of them adds the most
        fits = {i: _residuals(losses[[row for row in rows if row != rows[i]]]) for i in noisiest}
        squares, best = min((float(np.nansum(fit[0] ** 2)), i) for i, fit in fits.items())
        added, rest = df - fits[best][1], fits[best][1]
        if added < 1 or rest < 1:
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.divide((np.nansum(residuals**2) - squares) / added, squares / rest)
        if not ratio > special.fdtri(added, rest, 1 - NOISIER):
            break
        del rows[best]
        residuals, df = fits[best]
    whole = np.full(losses.shape, math.nan)
    whole[rows] = residuals
    variance = float(np.nansum(residuals**2) / df) if df > 0 else math.nan
    noisier = tuple(r for r in range(len(losses)) if r not in rows and np.isfinite(losses[r]).sum() > 1)
    return Noise(variance, df, noisier, whole)


def _residuals(losses: Array) -> tuple[Array, float]:
    """What variant + seed do not explain, by least squares, and the degrees of freedom."""
    there = np.isfinite(losses)
    if there.all():
        centered = losses - losses.mean(0, keepdims=True) if len(losses) else losses
        rows, columns = losses.shape
        return centered - centered.mean(1, keepdims=True), float(max(0, rows - 1) * max(0, columns - 1))
    rows, columns = np.nonzero(there)
    counts, means = there.sum(1), np.where(there, losses, 0.0).sum(1) / there.sum(1)
    # What variants explain is taken out of the losses and of the seeds, so that few unknowns are left.
    design = (columns[:, None] == np.arange(losses.shape[1])) - there[rows] / counts[rows, None]
    centered = losses[there] - means[rows]
    solution, _, rank, _ = np.linalg.lstsq(design, centered)
    residuals = np.full(losses.shape, math.nan)
    residuals[there] = centered - design @ solution
    return residuals, float(len(rows) - len(losses) - rank)


def differences(losses: Array, contrast: Array) -> Array:
    """The contrast under each seed, (seeds,); nan where one of its variants has no run."""
    used = np.flatnonzero(contrast)
    return np.asarray(contrast[used] @ losses[used], np.float64)


def holm(p: Sequence[float] | Array) -> Array:
    """p-values corrected for their number (Holm 1979): at level alpha, a family has any error at most that often.

    A nan counts as 1.
    """
    given = np.nan_to_num(np.asarray(p, np.float64), nan=1.0)
    order = np.argsort(given, kind="stable")
    corrected = np.ones(len(given))
    corrected[order] = np.minimum(1, np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1)))
    return corrected


@dataclass(frozen=True)
class Judgement:
    """What a contrast says; lower losses are better. All but n and mean are nan with fewer than three seeds."""

    n: int  # seeds
    mean: float  # of the differences; nan without any
    low: float  # lower end of its interval
    high: float  # upper end
    error: float  # standard error of the mean, for the tests
    df: float  # its degrees of freedom
    effect: float  # the mean in standard deviations of the differences, with Hedges' correction
    p: float  # of the t-test, corrected for the number of comparisons
    p_equal: float  # of the equivalence test, corrected in the same way
    p_signs: float  # of the sign-flip test, which assumes no normal noise; nan with fewer than six seeds
    verdict: Verdict  # better or worse: the mean is not 0. equal: it is within ±delta
    # in all, for a verdict with 80 % power if the mean stays as it is; None if there is a verdict, or none is near
    seeds_needed: int | None


class Caution(NamedTuple):
    """How p-values are raised."""

    adjust: Callable[[Array], Array] = np.asarray  # for earlier looks at the same seeds; see gptexp.analysis.looks
    early: int = FEWEST_SEEDS  # up to so many seeds, those of the pooled noise are also multiplied by `EARLY`


ONCE = Caution()  # the seeds are looked at once


def judge(losses: Array, contrasts: Array, delta: float, alpha: float = 0.05, caution: Caution = ONCE
          ) -> list[Judgement]:  # fmt: skip
    """Judge a family of comparisons together; docs/statistics.md has the rule, its rates of error and its power.

    A standard error is that of the pooled noise or of a contrast's own differences, whichever is larger; that of its
    own where it has a variant that is much noisier than the others, or varies much less.

    Args:
        losses: (variants, seeds), nan where there is no run.
        contrasts: (comparisons, variants).
        delta: the largest difference that counts as none, in the losses' units.
        alpha: the probability of claiming any difference in the family where there is none.
        caution: how p-values are raised.
    """
    if not len(contrasts):
        return []
    by_seed = np.array([differences(losses, contrast) for contrast in contrasts])
    t = _t_tests(by_seed, contrasts, pooled_noise(losses), delta)
    few = t.n < FEWEST_SEEDS
    p, p_equal = np.where(few, math.nan, t.p), np.where(few, math.nan, t.p_equal)
    enough = np.minimum(-special.stdtrit((t.n - 1).clip(1), alpha / 2), OWN_ERRORS)
    adjust, early = caution.adjust, (t.n <= caution.early) & (t.df > t.n - 1)
    p = holm(np.where(early, np.minimum(EARLY * adjust(p), 1), adjust(p)))
    p = np.where(t.own < enough, np.fmax(p, t.p_own), p)
    p_equal = holm(np.where(p_equal < 0.5, adjust(np.minimum(2 * p_equal, 1)) / 2, p_equal))  # it has one side
    p_signs, margin = sign_flips(by_seed), -special.stdtrit(t.df, alpha / 2) * t.sd / np.sqrt(t.n.clip(1))
    judgements = []
    for i in range(len(contrasts)):
        verdict: Verdict = "undecided"
        if not few[i] and p[i] <= alpha:
            verdict = "worse" if t.mean[i] > 0 else "better"
        elif not few[i] and p_equal[i] <= alpha:
            verdict = "equal"
        needed = None
        if verdict == "undecided" and not few[i]:
            sd, df_per_seed = t.error[i] * math.sqrt(t.n[i]), t.df[i] / max(1, t.n[i] - 1)
            needed = seeds_needed(t.mean[i], sd, delta, alpha / len(contrasts), t.n[i] + 1, df_per_seed)
        effect = t.mean[i] / t.sd[i] * (1 - 3 / (4 * t.df[i] - 1)) if t.sd[i] else math.nan
        shown = (t.mean[i] - margin[i], t.mean[i] + margin[i], t.error[i], t.df[i], effect, p[i], p_equal[i])
        low, high, se, freedom, effect, p_value, p_same = [math.nan] * 7 if few[i] else map(float, shown)
        signs = math.nan if t.n[i] < SIGN_SEEDS else float(p_signs[i])
        judgements.append(Judgement(int(t.n[i]), float(t.mean[i]), low, high, se, freedom, effect, p_value, p_same,
                                    signs, verdict, needed))  # fmt: skip
    return judgements


class _Tests(NamedTuple):
    """The t-tests of several comparisons, each an array (comparisons,)."""

    n: Array
    mean: Array
    sd: Array  # of the differences, for intervals
    error: Array  # of the mean, for the tests
    df: Array
    p: Array  # of the hypothesis that the mean is 0
    p_equal: Array  # of the hypothesis that it is outside ±delta
    own: Array  # |t| of the paired t-test
    p_own: Array  # its p


def _t_tests(by_seed: Array, contrasts: Array, noise: Noise, delta: float) -> _Tests:
    found = [d[np.isfinite(d)] for d in by_seed]
    n = np.array([len(d) for d in found])
    mean = np.array([d.mean() if len(d) else math.nan for d in found])
    own = np.array([d.std(ddof=1) if len(d) > 1 else math.nan for d in found])
    pooled = np.sqrt(noise.variance * (contrasts**2).sum(1))
    root, alone = np.sqrt(n.clip(1)), (contrasts[:, list(noise.noisier)] != 0).any(1) | ~np.isfinite(pooled)
    with np.errstate(divide="ignore", invalid="ignore"):
        alone |= (n >= QUIET_SEEDS) & (own**2 < pooled**2 * special.fdtri((n - 1).clip(1), max(noise.df, 1), QUIETER))
        df = np.where(alone, n - 1, noise.df).clip(1)
        unlike = own**2 > pooled**2 * special.fdtri((n - 1).clip(1), df, 1 - UNLIKE)
        error = np.where(alone, own, np.fmax(own, pooled)) / root
        t, own_t = (np.where(mean == 0, 0.0, abs(mean) / of) for of in (error, own / root))
        inside = np.nan_to_num((delta - abs(mean)) / error, nan=-math.inf)
    return _Tests(n, mean, np.where(alone | unlike, own, pooled), error, df, 2 * special.stdtr(df, -t),
                  special.stdtr(df, -inside), own_t, 2 * special.stdtr((n - 1).clip(1), -own_t))  # fmt: skip


def sign_flips(by_seed: Array) -> Array:
    """p-values of a test that assumes only that noise is symmetric, corrected for the number of comparisons.

    If no comparison has a difference, turning the signs of all differences of a seed changes nothing. The p-value of a
    comparison is the share of choices of signs by which the largest |t| of all comparisons is at least its own |t|.
    Source: Westfall, Young 1993, "Resampling-Based Multiple Testing".

    Args:
        by_seed: differences (comparisons, seeds), nan where there is none; p-values are (comparisons,).
    """
    there = np.isfinite(by_seed)
    n, values = there.sum(1), np.where(there, by_seed, 0.0)
    squares = (values**2).sum(1)

    def t(sums: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = (squares - sums**2 / n).clip(1e-12 * squares) / (n - 1)
            return np.asarray(np.nan_to_num(abs(sums) / np.sqrt(n * spread), nan=0.0), np.float64)

    signs, exact = _signs(by_seed.shape[1])
    largest, observed = t(signs @ values.T).max(1), t(values.sum(1))
    count = (largest[:, None] >= observed * (1 - 1e-9)).sum(0)
    return np.asarray(count / len(signs) if exact else (count + 1) / (len(signs) + 1), np.float64)


@cache
def _signs(n: int) -> tuple[Array, bool]:
    """Choices of n signs (choices, n), and whether they are all that there are."""
    if 2**n <= FLIPS:
        return np.asarray(1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1), np.float64), True
    return np.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, n)), np.float64), False


def seeds_needed(mean: float, sd: float, delta: float, level: float, at_least: int, df_per_seed: float) -> int | None:
    """About how many seeds give a verdict with a probability of 80 %; None if more than `MOST_SEEDS`.

    Args:
        mean: of the differences, as it was seen.
        sd: their standard deviation.
        delta: the largest difference that counts as none.
        level: alpha over the number of comparisons, Holm's strictest.
        at_least: the smallest possible answer.
        df_per_seed: degrees of freedom that each seed after the first adds.
    """
    n = np.unique(np.geomspace(max(FEWEST_SEEDS, at_least), MOST_SEEDS, 80).astype(int))
    df, z = df_per_seed * (n - 1), special.ndtr
    with np.errstate(divide="ignore", invalid="ignore"):  # differences that do not spread
        error = np.float64(sd) / np.sqrt(n)
        differs = z(abs(mean) / error + special.stdtrit(df, level / 2))
        inside = -special.stdtrit(df, level)
        same = z((delta - mean) / error - inside) + z((delta + mean) / error - inside) - 1
    enough = n[(differs >= 0.8) | (same >= 0.8)]
    return int(enough[0]) if len(enough) else None


def more_often(count: int, of: int, base: int, base_of: int) -> float:
    """The p-value that something happens equally often in two variants: Fisher's exact test, two-sided."""
    return float(stats.fisher_exact([[count, of - count], [base, base_of - base]]).pvalue)


def normality(residuals: Array) -> float:
    """The p-value that residuals are normal: Shapiro and Wilk's test; nan for fewer than eight, or equal ones."""
    values = residuals[np.isfinite(residuals)]
    if len(values) < 8 or not np.ptp(values):
        return math.nan
    return float(stats.shapiro(values[:5000]).pvalue)
