"""Runs as a study: which settings vary (the factors), which runs belong together, and what their differences say."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gptexp.analysis.collect import Collection, Record, Unreadable, without_seed
from gptexp.analysis.contrasts import Kind, contrasts_of
from gptexp.analysis.factors import Factor, comparable, find_factors, label, level_of, mixtures, vocabularies
from gptexp.analysis.looks import Looks, Standing, describe, stand
from gptexp.analysis.measures import BITS, MEASURES, Measure, Metric
from gptexp.analysis.statistics import (
    FEWEST_SEEDS,
    ONCE,
    Array,
    Judgement,
    differences,
    holm,
    judge,
    more_often,
    normality,
    pooled_noise,
)
from gptexp.config.settings import instead
from gptexp.errors import UserError


@dataclass(frozen=True)
class Variant:
    """Runs that differ only by the seed."""

    label: str  # the readable name
    levels: Mapping[str, str]  # its value of each factor, by the factor's name
    runs: Mapping[int, Record]  # those that are done, by seed
    counts: Mapping[str, int]  # of all its runs, by status; "missing" are jobs of a sweep without a directory
    # p-value that it diverges as often as the baseline, corrected for their number; nan if neither does
    p_diverges: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline; a factor's level against the baseline's; or the interaction of two factors.

    A level is compared on average over the other factors. An interaction is how much more, or less, a level of one
    factor adds to the loss together with a level of another one.
    """

    kind: Kind
    factor: str  # the factor's name, or both names; "" for a variant
    this: str  # the variant's label, the factor's level, or both levels
    that: str  # what it is compared with
    differences: Mapping[int, float]  # in the metric, by seed
    unpaired: tuple[int, ...]  # seeds that not all of its variants have
    judgement: Judgement
    other: Judgement  # in the metric beside it


@dataclass(frozen=True)
class Study:
    """Everything that a report says about a set of runs."""

    metric: Metric  # what is compared
    delta: float  # the largest difference that counts as none, in its units
    alpha: float  # the probability of any false claim
    factors: tuple[Factor, ...]  # what varies
    variants: tuple[Variant, ...]  # in the order in which they were run; the baseline is one of them
    baseline: str  # the label of that variant; "" if no run is done
    comparisons: tuple[Comparison, ...]  # variants first, then factors, then interactions
    records: tuple[Record, ...]  # the runs that are compared, done or not
    apart: Mapping[str, Sequence[Record]] = field(default_factory=dict)  # incomparable runs, by the reason
    unreadable: tuple[Unreadable, ...] = ()  # directories that could not be read
    notes: tuple[str, ...] = ()  # warnings, one sentence each
    assumptions: tuple[str, ...] = ()  # what the data say of the statistical model, one sentence each
    looks: Looks | None = None  # the plan of a sweep that stops when it knows
    standing: Standing | None = None  # what its looks have decided
    bits: bool = False  # losses are in bits per character, as vocabularies differ

    @property
    def measures(self) -> Mapping[Metric, Measure]:
        """The words for each measure."""
        return BITS if self.bits else MEASURES

    @property
    def measure(self) -> Measure:
        """The words for what is compared."""
        return self.measures[self.metric]

    @property
    def base(self) -> Variant | None:
        """The baseline; None if no run is done."""
        return next((v for v in self.variants if v.label == self.baseline), None)

    def ranked(self) -> list[Variant]:
        """The variants with runs that are done, the lowest mean first."""
        return sorted((v for v in self.variants if v.runs), key=lambda v: mean_loss(v, self.metric))


def losses(variant: Variant, metric: Metric) -> list[float]:
    """What is compared of a variant, by seed."""
    return [run.measured(metric) for run in variant.runs.values()]


def mean_loss(variant: Variant, metric: Metric) -> float:
    """The mean of `losses`; nan without a run that is done."""
    return float(np.mean(losses(variant, metric))) if variant.runs else math.nan


def build_study(
    found: Collection, *, baseline: str | None = None, metric: Metric = "final", delta: float = 0.01,
    alpha: float = 0.05,
) -> Study:  # fmt: skip
    """Sort runs into variants and judge their differences.

    Args:
        found: the runs.
        baseline: the label of the variant that others are compared with, or words that no other label has; None is
            the first variant that has a run that is done.
        metric: what is compared.
        delta: the largest difference that counts as none, in its units.
        alpha: the probability of any false claim about the variants, and of any about the factors.

    Raises:
        UserError: when there is no such variant, or none of its runs is done.
    """
    together, apart = comparable(found.records, metric)
    if metric == "exact_match" and all(math.isnan(r.measured(metric)) for r in together if r.complete):
        raise UserError("metric=exact_match: no run tells it; it needs runs of a task of problems that are done")
    bits = vocabularies(together) > 1
    if bits:
        together = [r.in_bits() for r in together]
    factors = find_factors(together)
    variants, notes = _variants(together, factors, found.missing)
    base = next((v for v in variants if v.runs), None) if baseline is None else _named(variants, baseline)
    variants = _with_divergence(variants, base)
    base = next((v for v in variants if base and v.label == base.label), None)
    study = Study(
        metric, delta, alpha, factors, variants, base.label if base else "", (), tuple(together), apart,
        found.unreadable, (*notes, *mixtures(together)), looks=found.looks, bits=bits,
    )  # fmt: skip
    return _judged(study, base) if base else study


def _judged(study: Study, base: Variant) -> Study:
    """The study with its comparisons."""
    variants, looks, standing = study.variants, study.looks, None
    seeds = list(looks.seeds) if looks else sorted({seed for v in variants for seed in v.runs})
    notes, row = list(study.notes), variants.index(base)
    if looks:
        pending = _pending(study, seeds)
        standing = stand(_losses(variants, study.metric, seeds), row, looks, study.delta, study.alpha, pending)
        notes.append(f"seeds were added where they were needed ({describe(looks, max(0, standing.look))}); p-values "
                     "allow for the earlier looks")  # fmt: skip
        strange = sorted({seed for v in variants for seed in v.runs} - set(seeds))
        if strange:
            notes.append(f"the seeds {', '.join(map(str, strange))} are not in the sweep's plan and are left out")
    pairs = contrasts_of([tuple(v.levels.values()) for v in variants], [bool(v.runs) for v in variants], row,
                         study.factors, [v.label for v in variants])  # fmt: skip
    contrasts = np.array([pair.weights for pair in pairs]).reshape(len(pairs), len(variants))
    families = [[i for i, pair in enumerate(pairs) if (pair.kind == "variant") == of] for of in (True, False)]
    judged: dict[Metric, dict[int, Judgement]] = {}
    for metric in (study.metric, study.measure.beside):
        losses, found = _losses(variants, metric, seeds), dict[int, Judgement]()
        if standing:
            losses = np.where(standing.trained, losses, math.nan)
        caution = looks.caution(standing.look) if looks and standing and standing.look >= 0 else ONCE
        for family in families:
            found |= dict(zip(family, judge(losses, contrasts[family], study.delta, study.alpha, caution), strict=True))
        if standing and metric == study.metric:
            found |= dict(zip(families[0], standing.judgements, strict=True))
        judged[metric] = found
    table = _losses(variants, study.metric, seeds)
    if standing:
        table = np.where(standing.trained, table, math.nan)
    comparisons = []
    for i, (kind, factor, this, that, weights) in enumerate(pairs):
        values = differences(table, weights)
        some = np.isfinite(table[np.flatnonzero(weights)]).any(0) & ~np.isfinite(values)
        judgement = judged[study.metric][i]
        if kind == "variant" and next(v for v in variants if v.label == this).p_diverges <= study.alpha:
            judgement = replace(judgement, verdict="worse", seeds_needed=None)
        comparisons.append(Comparison(
            kind, factor, this, that, {s: float(d) for s, d in zip(seeds, values, strict=True) if math.isfinite(d)},
            tuple(np.array(seeds)[some].tolist()), judgement, judged[study.measure.beside][i],
        ))  # fmt: skip
    return replace(study, comparisons=tuple(comparisons), notes=tuple(notes), standing=standing,
                   assumptions=tuple(_assumptions(study, table)))  # fmt: skip


def _losses(variants: Sequence[Variant], metric: Metric, seeds: Sequence[int]) -> Array:
    """(variants, seeds), nan where a variant has no run that is done."""
    return np.array([[v.runs[s].measured(metric) if s in v.runs else math.nan for s in seeds] for v in variants])


def _pending(study: Study, seeds: Sequence[int]) -> Array:
    """(variants, seeds) bool: runs that may still come, as there are none yet, or they are not at their end."""
    ended = {(label_of(study, r), r.seed) for r in study.records if r.status not in ("running", "interrupted")}
    return np.array([[(v.label, seed) not in ended for seed in seeds] for v in study.variants])


def label_of(study: Study, record: Record) -> str:
    """The label of the variant that a run belongs to."""
    return label({f.name: level_of(record, f) for f in study.factors})


def _with_divergence(variants: Sequence[Variant], base: Variant | None) -> tuple[Variant, ...]:
    """The variants with the p-value that they diverge as often as the baseline."""
    def ends(variant: Variant) -> tuple[int, int]:
        return variant.counts["diverged"], variant.counts["diverged"] + len(variant.runs)

    others = [v for v in variants if base and v is not base and (ends(v)[0] or ends(base)[0])]
    if base is None or not others:
        return tuple(variants)
    p = holm([more_often(*ends(v), *ends(base)) if ends(v)[0] else 1.0 for v in others])
    found = {v.label: float(value) for v, value in zip(others, p, strict=True)}
    return tuple(replace(v, p_diverges=found.get(v.label, math.nan)) for v in variants)


def _assumptions(study: Study, losses: Array) -> list[str]:
    """Where the data contradict the model of the t-test."""
    noise, said = pooled_noise(losses), []
    if max((len(v.runs) for v in study.variants), default=0) < FEWEST_SEEDS:
        return []
    if noise.noisier:
        names = ", ".join(study.variants[row].label for row in noise.noisier)
        said.append(f"{names}: the noise is so much larger than that of the others that only its own runs count")
    if normality(noise.residuals) < 0.01:
        said.append("the noise is not normal (Shapiro-Wilk, p < 0.01): p-values are less exact, and a verdict that the "
                    "sign-flip test confirms is safer")  # fmt: skip
    return said


def _named(variants: Sequence[Variant], name: str) -> Variant:
    """The variant with this label, or the only one whose label has these words: "rmsnorm" for "rmsnorm pre"."""

    def words(text: str) -> set[str]:
        return set(text.replace("-", " ").split())  # the names of runs have dashes

    labels = [v.label for v in variants]
    found = [v for v in variants if v.label == name] or [v for v in variants if words(name) <= words(v.label)]
    if not found:
        raise UserError(f"baseline={name}: no such variant{instead(name, labels)}")
    if len(found) > 1:
        raise UserError(f"baseline={name}: may be any of {', '.join(v.label for v in found)}; write one of these")
    if not found[0].runs:
        raise UserError(f"baseline={name}: none of its runs is done")
    return found[0]


def _variants(
    records: Sequence[Record], factors: Sequence[Factor], missing: Sequence[str]
) -> tuple[tuple[Variant, ...], list[str]]:
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(level_of(record, f) for f in factors), []).append(record)
    families = {without_seed(record.name): key for key, group in groups.items() for record in group}
    absent = Counter(families.get(without_seed(job)) for job in missing)
    variants, twice, notes = [], 0, []
    for key, group in groups.items():
        levels = {f.name: level for f, level in zip(factors, key, strict=True)}
        done = [r for r in group if r.complete]
        runs = dict(sorted({r.seed: r for r in reversed(done)}.items()))  # the first of each seed
        twice += len(done) - len(runs)
        counts = Counter(r.status for r in group) + Counter({"missing": absent[key]})
        variants.append(Variant(label(levels), levels, runs, counts))
        lost = counts["diverged"] + counts["failed"]
        if lost and runs:
            notes.append(f"{label(levels)}: {lost} of {lost + len(runs)} runs diverged or failed; averaging only the "
                         "others flatters it")  # fmt: skip
    if twice:
        notes.append(f"{twice} runs repeat a variant and seed that an earlier run has; the first of each counts")
    if absent[None]:
        jobs = [job for job in missing if without_seed(job) not in families]
        notes.append(f"{absent[None]} jobs have no directory, and no run shows their variant: {', '.join(jobs[:5])}"
                     + (" ..." if len(jobs) > 5 else ""))  # fmt: skip
    return tuple(variants), notes
