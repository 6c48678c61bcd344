"""The statistics by example, against other software, and by simulation."""

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.multitest import multipletests

from benchmarks import power
from gptexp.analysis.looks import Looks, nominal_levels, plan, stand
from gptexp.analysis.statistics import (
    FEWEST_SEEDS,
    Array,
    Judgement,
    holm,
    judge,
    more_often,
    normality,
    pooled_noise,
    seeds_needed,
    sign_flips,
)
from tests.conftest import more


def against_first(variants: int) -> Array:
    """Contrasts of every variant with the first one."""
    return np.concatenate([-np.ones((variants - 1, 1)), np.eye(variants - 1)], axis=1)


def of_pair(differences: Array) -> Judgement:
    """The judgement on a single comparison with these differences."""
    return judge(np.stack([np.zeros(len(differences)), differences]), against_first(2), 0.01)[0]


@pytest.fixture
def losses() -> Array:
    """Six variants and five seeds; the second variant is worse."""
    draw = np.random.default_rng(3)
    made: Array = draw.standard_normal((6, 5)) * 0.0085 + draw.standard_normal(5) * 0.02 + 2
    made[1] += 0.02
    return made


def test_one_comparison_is_scipys_paired_t_test() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 7)) + np.array([[0.9], [0.0]])
    (judgement,) = judge(np.stack([b, a]), against_first(2), 0.01)
    other = stats.ttest_rel(a, b)
    assert judgement.p == pytest.approx(other.pvalue, rel=1e-9)
    ends = other.confidence_interval()
    assert (judgement.low, judgement.high) == pytest.approx((ends.low, ends.high), rel=1e-9)
    assert judgement.p_equal == pytest.approx(
        max(stats.ttest_1samp(a - b, -0.01, alternative="greater").pvalue,
            stats.ttest_1samp(a - b, 0.01, alternative="less").pvalue)
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:The MLE may be on the boundary")
def test_the_pooled_noise_is_that_of_statsmodels(losses: Array) -> None:
    table = pd.DataFrame([(f"v{v}", s, losses[v, s]) for v in range(6) for s in range(5)], columns=["v", "s", "loss"])
    noise = pooled_noise(losses)
    anova = AnovaRM(table, "loss", "s", within=["v"]).fit().anova_table.iloc[0]
    between = 5 * losses.mean(1).var(ddof=1)
    assert between / noise.variance == pytest.approx(anova["F Value"], rel=1e-6)
    assert noise.df == anova["Den DF"]
    mixed = MixedLM.from_formula("loss ~ v", table, groups="s").fit(
        reml=True, method="powell", xtol=1e-14, ftol=1e-14)  # fmt: skip
    judgement = judge(losses, against_first(6), 0.01)[0]
    assert judgement.mean == pytest.approx(mixed.params["v[T.v1]"], rel=1e-6)
    assert math.sqrt(2 * noise.variance / 5) == pytest.approx(mixed.bse["v[T.v1]"], rel=1e-6)


def test_residuals_are_least_squares_where_runs_are_missing(losses: Array) -> None:
    losses[2, 3] = losses[0, 1] = math.nan
    rows, columns = np.nonzero(np.isfinite(losses))
    design = np.column_stack([rows == r for r in range(6)] + [columns == c for c in range(1, 5)]).astype(float)
    _, (rest,), rank, _ = np.linalg.lstsq(design, losses[rows, columns])
    noise = pooled_noise(losses)
    assert noise.df == len(rows) - rank
    assert noise.variance == pytest.approx(rest / noise.df)


def test_holm_is_that_of_statsmodels() -> None:
    p = np.random.default_rng(1).random(12) ** 3
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.01, math.nan]).tolist() == [0.02, 1.0]
    assert len(holm([])) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=6, max_size=9).map(np.array))
def test_a_single_sign_flip_test_counts_every_choice_of_signs(d: Array) -> None:
    sums = [abs(math.fsum(s * x for s, x in zip(signs, d, strict=True))) for signs in product((1, -1), repeat=len(d))]
    assert sign_flips(d[None])[0] == np.mean([s >= abs(math.fsum(d)) - 1e-9 for s in sums])


def test_sign_flips_of_several_comparisons_take_the_largest_t() -> None:
    d = np.random.default_rng(2).standard_normal((3, 7)) + np.array([[1.5], [0.2], [0.0]])
    largest = []
    for signs in product((1, -1), repeat=7):
        flipped = d * np.array(signs)
        largest.append(max(abs(stats.ttest_1samp(row, 0).statistic) for row in flipped))
    expected = [np.mean(np.array(largest) >= abs(stats.ttest_1samp(row, 0).statistic) - 1e-9) for row in d]
    assert sign_flips(d) == pytest.approx(expected)


def spread(mean: float, sd: float, n: int) -> Array:
    """n differences of exactly this mean and standard deviation."""
    z = stats.norm.ppf((np.arange(n) + 0.5) / n)
    return np.asarray(mean + sd * z / z.std(ddof=1))


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        (spread(-0.02, 0.005, 4), "better"),
        (spread(0.02, 0.005, 4), "worse"),
        (spread(0.001, 0.004, 5), "equal"),
        (spread(0.0, 0.05, 10), "undecided"),
        (spread(0.02, 0.005, 2), "undecided"),
        (np.zeros(3), "equal"),
        (np.full(3, 0.5), "worse"),
        (np.array([-1.0, -1.0]), "undecided"),
        (np.array([-1.0]), "undecided"),
    ],
)
def test_verdicts(differences: Array, verdict: str) -> None:
    judgement = of_pair(differences)
    assert judgement.verdict == verdict
    assert judgement.n == len(differences)
    assert math.isnan(judgement.p) == (judgement.n < FEWEST_SEEDS)  # no p without a verdict
    if verdict != "undecided":
        assert judgement.seeds_needed is None


def test_a_difference_that_is_clear_is_no_equality_however_small() -> None:
    judgement = of_pair(spread(0.005, 0.001, 10))
    assert judgement.verdict == "worse"
    assert judgement.p_equal < 0.05
    assert judgement.effect == pytest.approx(5 * (1 - 3 / 35))


def test_five_seeds_decide_what_eight_did_not() -> None:
    """Batch norm was worse in every seed, by 22 standard deviations."""
    draw = np.random.default_rng(0)
    losses = 2 + draw.standard_normal((6, 3)) * 0.01
    losses[2] += 0.478
    assert judge(losses, against_first(6), 0.01)[1].verdict == "worse"


def test_a_variant_that_is_much_noisier_is_judged_by_its_own_runs(losses: Array) -> None:
    losses[1] += 0.02
    losses[3] += np.array([3.0, -2.0, 1.0, 4.0, -1.0])
    noise = pooled_noise(losses)
    assert noise.noisier == (3,)
    first, _, third, *_ = judge(losses, against_first(6), 0.01)
    assert first.verdict == "worse"  # it is as clear as it was
    assert (third.df, third.verdict) == (4, "undecided")
    assert third.p == pytest.approx(min(1, stats.ttest_rel(losses[3], losses[0]).pvalue * 4), rel=1e-6)


def test_missing_runs_leave_the_others_in_pairs(losses: Array) -> None:
    losses[1, 0] = losses[2, 1:] = losses[3] = math.nan
    first, second, third, *_ = judge(losses, against_first(6), 0.01)
    assert [first.n, second.n, third.n] == [4, 1, 0]
    assert first.mean == pytest.approx((losses[1] - losses[0])[1:].mean())
    assert math.isnan(third.mean)
    assert judge(losses, np.zeros((0, 6)), 0.01) == []


def test_seeds_needed() -> None:
    assert seeds_needed(0.0001, 0.5, 0.01, 0.05, 3, 1) is None
    assert seeds_needed(0.5, 0.0, 0.01, 0.05, 4, 1) == 4
    n = seeds_needed(0.02, 0.012, 0.01, 0.01, 3, 5)
    assert n is not None
    found = [j[0].verdict != "undecided" for j in power.judged("normal", n, 300, effects=[0.02])]
    assert 0.7 < np.mean(found) < 0.95


def test_how_often_is_fishers_test_and_normality_is_shapiros() -> None:
    assert more_often(5, 5, 0, 5) == pytest.approx(2 / 252)
    assert normality(np.random.default_rng(0).standard_normal(40)) > 0.05
    assert normality(np.random.default_rng(0).exponential(size=40)) < 0.01
    assert math.isnan(normality(np.zeros(40)))


def test_looks_spend_the_level_that_they_have() -> None:
    looks = plan(7, 12)
    assert looks == Looks(tuple(range(7, 19)), (3, 4, 5, 6, 8, 10, 12))
    assert plan(0, 4).counts == (3, 4)
    levels = nominal_levels(looks.counts, 0.05)
    assert levels[0] == pytest.approx(0.05 / 16)  # a quarter of the seeds, squared
    sums = np.cumsum(np.random.default_rng(0).standard_normal((200_000, 12)), axis=1)
    z = np.abs(sums[:, np.array(looks.counts) - 1]) / np.sqrt(looks.counts)
    assert np.mean((z >= stats.norm.isf(np.array(levels) / 2)).any(1)) == pytest.approx(0.05, abs=0.0015)
    p = looks.adjust(2, np.array([levels[2], 0.9, math.nan]))
    assert p[:2] == pytest.approx([0.05, 1.0], rel=0.01)
    assert math.isnan(p[2])


def test_a_single_look_is_no_look() -> None:
    assert nominal_levels((3,), 0.05) == pytest.approx((0.05,))
    assert plan(1, 3).adjust(0, np.array([0.03]))[0] == pytest.approx(0.03, rel=0.02)


def test_variants_get_seeds_until_they_are_decided() -> None:
    draw = np.random.default_rng(5)
    losses = 2 + draw.standard_normal((4, 12)) * 0.008
    losses[1] += 0.1
    losses[2] += 0.012
    standing = stand(losses, 0, plan(1, 12), 0.01)
    assert standing.trained.sum(1)[1] == 3  # decided at the first look
    assert standing.judgements[0].verdict == "worse"
    assert standing.trained[0].sum() == standing.trained.sum(1).max()  # the baseline is always there
    pending = np.zeros((4, 12), bool)
    pending[0, 2] = True
    early = stand(losses, 0, plan(1, 12), 0.01, pending=pending)
    assert early.look == -1
    assert {j.verdict for j in early.judgements} == {"undecided"}


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["normal", "log-normal", more("t3"), more("exponential")])
def test_false_alarms(noise: str) -> None:
    """Limits of 6, 7 and 9 % with equal noise, a variant twice and one four times as noisy.

    The last is 12 % with five seeds and skewed noise: docs/statistics.md says why no test does better.
    """
    for scale, limit in {"equal": 0.06, "one variant twice": 0.07, "one variant four times": 0.09}.items():
        for seeds in (3, 5, 8):
            known = limit == 0.09 and seeds == 5 and noise in ("exponential", "log-normal")
            assert power.false_alarms(noise, seeds, 1000, scale) <= (0.12 if known else limit), (scale, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["normal", more("t3"), more("exponential"), more("log-normal")])
def test_power_equality_and_coverage(noise: str) -> None:
    assert power.power(noise, 5, 1000) >= 0.70
    assert power.power(noise, 8, 1000) >= 0.90
    assert power.false_equality(noise, 8, 1000) <= 0.05
    assert 0.93 <= power.coverage(noise, 5, 1000) <= 0.975
    if noise == "normal":
        assert power.power(noise, 3, 1000, difference=10 * power.PAIRED_SD / math.sqrt(3)) == 1


@pytest.mark.slow
def test_sweeps_that_look_err_no_more_and_train_less() -> None:
    for scale, limit in {"equal": 0.06, "one variant twice": 0.07, "one variant four times": 0.09}.items():
        assert power.sequential_false_alarms("normal", 500, scale) <= limit
    found = power.sequential(500)
    assert found["saved"] >= 0.3
    assert all(a >= b - 0.02 for a, b in zip(found["found"], found["found_fixed"], strict=True))
