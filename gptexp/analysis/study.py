"""Runs as a study: which settings vary (the factors), which runs belong together, and what their differences say."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gptexp.analysis.collect import Collection, Record, Unreadable, without_seed
from gptexp.analysis.factors import Factor, comparable, find_factors, label, level_of, precision
from gptexp.analysis.statistics import Judgement, judge
from gptexp.config.settings import instead
from gptexp.errors import UserError

Metric = Literal["best", "final"]
Cell = tuple[Mapping[int, Record], Mapping[int, Record]]  # the runs of two variants, by seed


@dataclass(frozen=True)
class Variant:
    """Runs that differ only by the seed."""

    label: str  # the readable name
    levels: Mapping[str, str]  # its value of each factor, by the factor's name
    runs: Mapping[int, Record]  # those that are done, by seed
    counts: Mapping[str, int]  # of all its runs, by status; "missing" are jobs of a sweep without a directory


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline, or a factor's level against the baseline's level, averaged over the rest."""

    kind: Literal["variant", "factor"]
    factor: str  # the factor's name, or "" for a variant
    this: str  # the variant's label or the factor's level
    that: str  # what it is compared with
    differences: Mapping[int, float]  # this minus that in the metric, by seed, nats per token
    unpaired: tuple[int, ...]  # seeds that only one side has
    judgement: Judgement


@dataclass(frozen=True)
class Study:
    """Everything that a report says about a set of runs."""

    metric: Metric  # which validation loss is compared
    delta: float  # the largest difference that counts as none, nats per token
    alpha: float  # the probability of any false claim
    factors: tuple[Factor, ...]  # what varies
    variants: tuple[Variant, ...]  # in the order in which they were run; the baseline is one of them
    baseline: str  # the label of that variant; "" if no run is done
    comparisons: tuple[Comparison, ...]  # variants first, then factors
    records: tuple[Record, ...]  # the runs that are compared, done or not
    apart: Mapping[str, Sequence[Record]] = field(default_factory=dict)  # incomparable runs, by the reason
    unreadable: tuple[Unreadable, ...] = ()  # directories that could not be read
    notes: tuple[str, ...] = ()  # warnings, one sentence each

    @property
    def base(self) -> Variant | None:
        """The baseline; None if no run is done."""
        return next((v for v in self.variants if v.label == self.baseline), None)

    def ranked(self) -> list[Variant]:
        """The variants with runs that are done, the lowest mean loss first."""
        return sorted((v for v in self.variants if v.runs), key=lambda v: mean_loss(v, self.metric))


def losses(variant: Variant, metric: Metric) -> list[float]:
    """A variant's validation losses, by seed."""
    return [getattr(run, metric) for run in variant.runs.values()]


def mean_loss(variant: Variant, metric: Metric) -> float:
    """Mean validation loss of a variant over its seeds; nan without a run that is done."""
    return float(np.mean(losses(variant, metric))) if variant.runs else math.nan


def build_study(
    found: Collection, *, baseline: str | None = None, metric: Metric = "best", delta: float = 0.01,
    alpha: float = 0.05,
) -> Study:  # fmt: skip
    """Sort runs into variants and judge their differences.

    Args:
        found: the runs.
        baseline: the label of the variant that others are compared with, or words that no other label has; None is
            the first variant that has a run that is done.
        metric: the loss that is compared.
        delta: the largest difference that counts as none, in nats per token.
        alpha: the probability of any false claim.

    Raises:
        UserError: when there is no such variant, or none of its runs is done.
    """
    together, apart = comparable(found.records)
    factors = find_factors(together)
    variants, notes = _variants(together, factors, found.missing)
    base = next((v for v in variants if v.runs), None) if baseline is None else _named(variants, baseline)
    pairs = list(_pairs(variants, factors, base)) if base else []
    sides = [_differences(cells, metric) for *_, cells in pairs]
    judgements = judge([np.array(list(differences.values())) for differences, _ in sides], delta, alpha)
    comparisons = [Comparison(*pair[:4], *side, judgement)
                   for pair, side, judgement in zip(pairs, sides, judgements, strict=True)]  # fmt: skip
    return Study(
        metric, delta, alpha, factors, variants, base.label if base else "", tuple(comparisons), tuple(together),
        apart, found.unreadable, (*notes, *_mixtures(together)),
    )  # fmt: skip


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


def _pairs(
    variants: Sequence[Variant], factors: Sequence[Factor], base: Variant
) -> Iterator[tuple[Any, str, str, str, list[Cell]]]:
    """What is compared: each variant with the baseline, and the main effects. Kind, factor, this, that, pairs of runs.

    A main effect is that of a level against the baseline's, averaged over every combination of the other factors that
    has both.
    """
    for variant in variants:
        if variant is not base:
            yield "variant", "", variant.label, base.label, [(variant.runs, base.runs)]
    by_levels = {tuple(v.levels.values()): v.runs for v in variants}
    for position, factor in enumerate(factors):
        that = base.levels[factor.name]
        for this in factor.levels:
            cells = [
                (runs, partner) for levels, runs in by_levels.items()
                if levels[position] == this != that and runs
                and (partner := by_levels.get((*levels[:position], that, *levels[position + 1 :])))
            ]  # fmt: skip
            if len(cells) > 1:  # one cell alone is a comparison of variants
                yield "factor", factor.name, this, that, cells


def _differences(cells: Sequence[Cell], metric: Metric) -> tuple[dict[int, float], tuple[int, ...]]:
    """The mean difference over pairs of runs by seed, and the seeds that are not in all of them.

    A seed counts only if every cell has it, so that every average is over the same combinations.
    """
    seeds = [set(side) for cell in cells for side in cell]
    common = set.intersection(*seeds)
    differences = {seed: math.fsum(getattr(a[seed], metric) - getattr(b[seed], metric) for a, b in cells) / len(cells)
                   for seed in sorted(common)}  # fmt: skip
    return differences, tuple(sorted(set.union(*seeds) - common))


def _mixtures(records: Sequence[Record]) -> list[str]:
    """What else differs between runs and may change their losses."""
    devices = [r.info["device"] for r in records if precision(r)]
    mixtures = {
        "{} versions of the code made the runs ({}); that alone can change the last digits":
            Counter(f"of {r.info['fingerprints']['code'][:8]}" for r in records),
        "the runs were made on {} devices ({}): times cannot be compared":
            Counter(f"on {d.get('name')}" for d in devices),
        "the runs had {} different numbers of threads ({}): times cannot be compared":
            Counter(f"with {d.get('threads')}" for d in devices),
    }  # fmt: skip
    notes = [note.format(len(found), ", ".join(f"{n} {value}" for value, n in found.items()))
             for note, found in mixtures.items() if len(found) > 1]  # fmt: skip
    looks = {len(r.curve) for r in records if r.complete}
    if len(looks) > 1:
        notes.append(f"runs have {min(looks)} to {max(looks)} evaluations: the best of more is lower by chance alone; "
                     "metric=final does not favor them")  # fmt: skip
    return notes
