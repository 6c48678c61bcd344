"""Runs as a study: which settings vary (the factors), which runs belong together, and what their differences say."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gptexp.analysis.collect import Collection, Record, Unreadable, without_seed
from gptexp.analysis.factors import Factor, comparable, find_factors, label, level_of, precision
from gptexp.analysis.stats import Judgement, judge
from gptexp.errors import UserError
from gptexp.validation import nearest

Metric = Literal["best", "final"]
Cell = tuple[Mapping[int, Record], Mapping[int, Record]]  # the runs of two variants, by seed


@dataclass(frozen=True)
class Variant:
    """Runs that differ by the seed alone."""

    label: str  # the readable name
    levels: Mapping[str, str]  # its value of each factor, by the factor's name
    runs: Mapping[int, Record]  # those at their end, by seed
    counts: Mapping[str, int]  # of all its runs, by status; "missing" are jobs of a sweep without a directory


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline, or a level of a factor against the baseline's, over all that else varies."""

    kind: Literal["variant", "factor"]  # of the two
    factor: str  # the factor's name, or "" for a variant
    this: str  # the variant's label or the factor's level
    that: str  # what it is compared with
    differences: Mapping[int, float]  # this minus that in the metric, by seed, nats a token
    unpaired: tuple[int, ...]  # seeds that only one of the sides has
    judgement: Judgement  # what they say


@dataclass(frozen=True)
class Study:
    """All that a report says of a set of runs."""

    metric: Metric  # "best" or "final" validation loss, in nats a token
    delta: float  # the largest difference that is no difference
    alpha: float  # the probability of any false claim
    factors: tuple[Factor, ...]  # what varies
    variants: tuple[Variant, ...]  # in the order in which they were run; the baseline among them
    baseline: str  # the label of that variant; "" in a study without runs at their end
    comparisons: tuple[Comparison, ...]  # variants first, then factors
    records: tuple[Record, ...]  # the runs that are compared, finished or not
    # runs that cannot be compared with them, by the reason
    apart: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    unreadable: tuple[Unreadable, ...] = ()  # directories that could not be read
    notes: tuple[str, ...] = ()  # what else a reader must know, one sentence each

    @property
    def base(self) -> Variant | None:
        """The baseline; None in a study without runs at their end."""
        return next((v for v in self.variants if v.label == self.baseline), None)

    def ranked(self) -> list[Variant]:
        """The variants that have runs at their end, the lowest mean loss first."""
        return sorted((v for v in self.variants if v.runs), key=lambda v: mean_loss(v, self.metric))


def losses(variant: Variant, metric: Metric) -> list[float]:
    """A variant's validation losses, by seed."""
    return [getattr(run, metric) for run in variant.runs.values()]


def mean_loss(variant: Variant, metric: Metric) -> float:
    """Mean over the seeds of a variant's validation loss; nan without a run at its end."""
    return float(np.mean(losses(variant, metric))) if variant.runs else math.nan


def build_study(
    found: Collection, *, baseline: str | None = None, metric: Metric = "best", delta: float = 0.01,
    alpha: float = 0.05,
) -> Study:  # fmt: skip
    """Sort runs into variants and judge their differences.

    Args:
        found: the runs.
        baseline: the label of the variant that others are compared with; None is the first that has a finished run.
        metric: the loss that is compared.
        delta: the largest difference that is no difference, in nats a token.
        alpha: the probability of any false claim.

    Raises:
        UserError: when there is no such variant, or none of its runs has come to its end.
    """
    together, apart = comparable(found.records)
    factors = find_factors(together)
    variants, notes = _variants(together, factors, found.missing)
    labels = [v.label for v in variants]
    if baseline is not None and baseline not in labels:
        raise UserError(f"baseline={baseline}: no such variant{nearest(baseline, labels)} allowed: {', '.join(labels)}")
    base = next((v for v in variants if v.runs and baseline in (None, v.label)), None)
    if baseline is not None and base is None:
        raise UserError(f"baseline={baseline}: none of its runs is done")
    comparisons: list[Comparison] = []
    if base is not None:
        pairs = list(_pairs(variants, factors, base, metric))
        judgements = judge([np.array(list(p["differences"].values())) for p in pairs], delta, alpha)
        comparisons = [Comparison(**p, judgement=j) for p, j in zip(pairs, judgements, strict=True)]
    return Study(
        metric, delta, alpha, factors, variants, base.label if base else "", tuple(comparisons), tuple(together),
        apart, found.unreadable, (*notes, *_mixtures(together)),
    )  # fmt: skip


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
        name = label(levels)
        runs: dict[int, Record] = {}
        for record in group:
            twice += record.complete and record.seed in runs
            if record.complete:
                runs.setdefault(record.seed, record)
        counts = Counter(r.status for r in group) + Counter({"missing": absent[key]})
        variants.append(Variant(name, levels, dict(sorted(runs.items())), counts))
        lost = counts["diverged"] + counts["failed"]
        if lost and runs:
            notes.append(f"{name}: {lost} of {lost + len(runs)} runs diverged or failed; its losses are those of the "
                         "others alone, and look better than it is")  # fmt: skip
    if twice:
        notes.append(f"{twice} runs repeat a variant and seed that an earlier run has; the first of each counts")
    if absent[None]:
        jobs = [job for job in missing if without_seed(job) not in families]
        notes.append(f"{absent[None]} jobs have no directory, and no run tells their variant: {', '.join(jobs[:5])}"
                     + (" ..." if len(jobs) > 5 else ""))  # fmt: skip
    return tuple(variants), notes


def _pairs(
    variants: Sequence[Variant], factors: Sequence[Factor], base: Variant, metric: Metric
) -> Iterator[dict[str, Any]]:
    """What is compared: each variant with the baseline, and the main effects.

    A main effect is that of a level against the baseline's, averaged over every combination of the other factors that
    has both. A seed counts if it is there in all of them, so that every average is over the same combinations.
    """
    for variant in variants:
        if variant is not base:
            yield _pair("variant", "", variant.label, base.label, [(variant.runs, base.runs)], metric)
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
                yield _pair("factor", factor.name, this, that, cells, metric)


def _pair(kind: str, factor: str, this: str, that: str, cells: Sequence[Cell], metric: Metric) -> dict[str, Any]:
    """A comparison without its judgement, averaged over pairs of runs by seed."""
    seeds = [set(side) for cell in cells for side in cell]
    common = set.intersection(*seeds)
    differences = {
        seed: math.fsum(getattr(a[seed], metric) - getattr(b[seed], metric) for a, b in cells) / len(cells)
        for seed in sorted(common)
    }
    unpaired = tuple(sorted(set.union(*seeds) - common))
    return {"kind": kind, "factor": factor, "this": this, "that": that, "differences": differences,
            "unpaired": unpaired}  # fmt: skip


def _mixtures(records: Sequence[Record]) -> list[str]:
    """What else differs between runs, and may move their losses."""
    devices = [r.info["device"] for r in records if precision(r)]
    mixtures = {
        "{} versions of the code made the runs ({}): bits may differ for that alone":
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
                     "metric=final does not favour them")  # fmt: skip
    return notes
