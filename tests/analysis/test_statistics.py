"""The statistics by example, against independent computations, and by simulation."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.power import NOISES, coverage, false_claims, power
from gptexp.analysis.statistics import Array, equivalence, fewest_seeds, holm, interval, judge, seeds_needed, sign_flip

values = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=9).map(np.array)


@settings(max_examples=60, deadline=None)
@given(values)
def test_the_test_counts_every_choice_of_signs(d: Array) -> None:
    sums = [math.fsum(s * x for s, x in zip(signs, d, strict=True)) for signs in product((1, -1), repeat=len(d))]
    observed = math.fsum(d)
    assert sign_flip(d) == np.mean([abs(s) >= abs(observed) - 1e-9 for s in sums])
    assert sign_flip(d, "greater") == np.mean([s >= observed - 1e-9 for s in sums])
    assert sign_flip(d, "less") == np.mean([s <= observed + 1e-9 for s in sums])


@pytest.mark.parametrize("n", [5, 13, 20])
def test_the_test_agrees_with_scipy(n: int) -> None:
    d = np.random.default_rng(n).standard_normal(n) + 0.4
    other = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=2**14, rng=1).pvalue
    assert sign_flip(d) == pytest.approx(other, abs=0 if n < 14 else 0.02)


def test_the_test_takes_many_samples_at_once() -> None:
    d = np.random.default_rng(0).standard_normal((3, 4, 6))
    assert sign_flip(d).shape == (3, 4)
    assert sign_flip(d)[1, 2] == sign_flip(d[1, 2])


def test_five_seeds_cannot_pass_five_percent() -> None:
    assert sign_flip(np.full(5, 1.0)) == 0.0625
    assert fewest_seeds(0.05) == 6
    assert fewest_seeds(0.05 / 5) == 8
    assert fewest_seeds(1e-9) is None  # more choices of signs than are drawn


def test_equivalence_is_the_larger_of_two_one_sided_tests() -> None:
    d = np.array([0.001, -0.002, 0.003, 0.0, 0.004, -0.001])
    assert equivalence(d, 0.01) == 2.0**-6
    assert equivalence(d, 0.001) == max(sign_flip(d + 0.001, "greater"), sign_flip(d - 0.001, "less")) > 0.05


def test_holm_by_hand() -> None:
    # Sorted: .005 x 4 = .02, .01 x 3 = .03, .03 x 2 = .06, .04 x 1 = .04, raised to the .06 before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def bca(d: Array, alpha: float, resamples: int) -> tuple[float, float]:
    """Efron's interval with Hesterberg's widening, written out."""
    n, draw = len(d), np.random.default_rng(5)
    means = np.sort(draw.choice(d, (resamples, n)).mean(1))
    below = (np.sum(means < d.mean()) + np.sum(means <= d.mean())) / (2 * resamples)
    z0 = stats.norm.ppf(below)
    jackknife = np.array([np.delete(d, i).mean() for i in range(n)])
    u = jackknife.mean() - jackknife
    a = np.sum(u**3) / (6 * np.sum(u**2) ** 1.5)
    wide = math.sqrt(n / (n - 1)) * stats.t.ppf(1 - alpha / 2, n - 1)
    ends = [stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in (-wide, wide)]
    low, high = np.quantile(means, ends)
    return float(low), float(high)


@pytest.mark.parametrize("n", [6, 10, 25])
def test_the_interval_is_bca_written_out(n: int) -> None:
    d = np.random.default_rng(n).exponential(size=n)
    low, high = interval(d)
    other = bca(d, 0.05, 200_000)
    assert (float(low), float(high)) == pytest.approx(other, abs=0.04 * (other[1] - other[0]))
    assert interval(d[None])[0][0] == low


def test_an_interval_of_equal_differences_is_their_value() -> None:
    low, high = interval(np.array([[0.5, 0.5, 0.5], [0.0, 0.1, 0.2]]))
    assert low[0] == high[0] == 0.5
    assert low[1] < 0.1 < high[1]


def spread(mean: float, sd: float, n: int) -> Array:
    """n differences of exactly this mean and standard deviation."""
    z = stats.norm.ppf((np.arange(n) + 0.5) / n)
    return np.asarray(mean + sd * z / z.std(ddof=1))


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        (spread(-0.02, 0.005, 10), "better"),
        (spread(0.02, 0.005, 10), "worse"),
        (spread(0.001, 0.004, 10), "equal"),
        (spread(0.0, 0.05, 10), "undecided"),
        (spread(-0.02, 0.005, 5), "undecided"),  # the test cannot go under 0.0625
        (np.zeros(10), "equal"),
        (np.full(10, 0.5), "worse"),
        (np.array([-1.0, -1.0]), "undecided"),
        (np.array([-1.0]), "undecided"),
        (np.array([]), "undecided"),
    ],
)
def test_verdicts(differences: Array, verdict: str) -> None:
    (judgement,) = judge([differences], delta=0.01)
    assert judgement.verdict == verdict
    assert judgement.n == len(differences)
    if verdict != "undecided":
        assert judgement.seeds_needed is None


def test_a_clear_difference_is_no_equality_however_small() -> None:
    """Both claims hold of 0.005 +- 0.001 with delta 0.01; the difference is the one that is told."""
    (judgement,) = judge([spread(0.005, 0.001, 10)], delta=0.01)
    assert judgement.verdict == "worse"
    assert judgement.p_equal < 0.05


def test_the_effect_is_hedges_g() -> None:
    (judgement,) = judge([spread(-0.02, 0.01, 10)], delta=0.01)
    assert judgement.effect == pytest.approx(-2 * (1 - 3 / 35))
    assert math.isnan(judge([np.full(10, 0.5)], delta=0.01)[0].effect)


def test_every_comparison_of_the_family_counts() -> None:
    alone, many = judge([spread(-0.02, 0.005, 6)], 0.01), judge([spread(-0.02, 0.005, 6)] * 5, 0.01)
    assert alone[0].verdict == "better"
    assert [j.verdict for j in many] == ["undecided"] * 5
    assert many[0].seeds_needed == 8
    assert many[0].p == pytest.approx(5 * alone[0].p)


def test_a_comparison_without_pairs_is_part_of_the_family() -> None:
    judgements = judge([spread(-0.02, 0.005, 7), np.array([]), np.array([])], 0.01)
    assert judgements[0].p == pytest.approx(3 * 2 / 2**7)
    assert math.isnan(judgements[1].mean)


def test_seeds_needed_knows_when_no_number_will_do() -> None:
    assert seeds_needed(0.0001, 0.5, 0.01, 0.05) is None
    assert seeds_needed(0.0, 0.0, 0.01, 0.05) == 5
    assert seeds_needed(0.5, 0.0, 0.01, 0.05) == 6


def test_no_five_seeds_declare_a_difference() -> None:
    assert false_claims(NOISES["normal"], seeds=5, sweeps=60) == 0


@pytest.mark.parametrize(("seeds", "least"), [(5, 0.915), (10, 0.93), (20, 0.93)])
def test_coverage_of_the_interval(seeds: int, least: float) -> None:
    assert least <= coverage(NOISES["normal"], seeds, 2000) <= 0.97


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("noise", [n for n in NOISES if not NOISES[n].opposed])
def test_at_most_one_sweep_in_twenty_declares_a_difference_that_is_none(noise: str) -> None:
    """1,000 sweeps of 6 variants and 10 seeds: 5 % and 2 standard errors of a thousand, 1.4 %."""
    assert false_claims(NOISES[noise], seeds=10, sweeps=1000) <= (0.05 if noise == "normal" else 0.064)


@pytest.mark.slow
def test_opposed_skews_are_beyond_any_test_of_few_pairs() -> None:
    """A limit that docs/statistics.md tells: the noise of one variant skewed one way, the baseline's the other."""
    assert 0.05 < false_claims(NOISES["skewed, opposed"], seeds=10, sweeps=300) < 0.15


@pytest.mark.slow
@pytest.mark.exhaustive
def test_at_most_one_of_a_thousand_sweeps_of_five_seeds() -> None:
    assert false_claims(NOISES["normal"], seeds=5, sweeps=1000) <= 0.05


@pytest.mark.slow
def test_power_of_pairs() -> None:
    five, ten = power(5, 1000), power(10, 1000)
    assert five["verdict"] == 0  # and this is said, not guessed
    assert ten["verdict"] > 0.95
    assert ten["verdict"] > ten["unpaired permutation"] + 0.1
    assert ten["paired t"] > ten["unpaired t (Welch)"] + 0.1
    assert power(10, 1000, difference=0.0)["verdict"] < 0.04  # one of the two sides


@pytest.mark.slow
@pytest.mark.parametrize(("mean", "sd"), [(0.02, 0.012), (0.012, 0.012), (0.002, 0.005), (0.0, 0.01)])
@pytest.mark.parametrize("comparisons", [1, 5])
def test_seeds_needed_give_a_verdict_four_times_in_five(mean: float, sd: float, comparisons: int) -> None:
    level = 0.05 / comparisons
    n = seeds_needed(mean, sd, 0.01, level)
    assert n is not None
    d = np.random.default_rng(n).normal(mean, sd, (500, n))
    low, high = interval(d)
    differs = (sign_flip(d) <= level) & ((low > 0) | (high < 0))
    same = (equivalence(d, 0.01) <= level) & (low > -0.01) & (high < 0.01)
    assert 0.72 <= np.mean(differs | same) <= 0.96
