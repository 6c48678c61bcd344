"""A study in words."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gptexp.analysis.factors import ABSENT
from gptexp.analysis.statistics import FEWEST_SEEDS, Verdict
from gptexp.analysis.study import Comparison, Study, mean_loss

ENDED = {"done": "done", "running": "still running", "interrupted": "interrupted", "pruned": "pruned",
         "failed": "failed", "diverged": "diverged", "missing": "without a directory"}  # fmt: skip

VERDICTS: dict[Verdict, str] = {"better": "better", "worse": "worse", "equal": "no different", "undecided": "undecided"}
"""The verdicts as a reader sees them."""


MOST_CLAIMS = 4  # of the headline, of each verdict


def headline(study: Study) -> list[str]:
    """The verdict: one sentence, and perhaps others that add to it. What is undecided comes last."""
    ranked = study.ranked()
    if not ranked:
        return [f"No run has finished, so there is nothing to compare ({counts(study)})."]
    if len(study.variants) == 1:
        (variant,) = ranked
        return [f"There is only one variant, {variant.label}, so there is nothing to compare: {study.measure.title} "
                f"{mean_loss(variant, study.metric):.4f} ({plural(len(variant.runs), 'seed')})."]  # fmt: skip
    against = [c for c in study.comparisons if c.kind == "variant"]
    most = max(c.judgement.n for c in against)
    if most < FEWEST_SEEDS and not any(c.judgement.verdict == "worse" for c in against):
        best, loss = ranked[0].label, mean_loss(ranked[0], study.metric)
        few = ("no two variants share a seed", "one seed decides nothing", "two seeds decide nothing")[most]
        return [f"{best} has the lowest {study.measure.noun}, {loss:.4f}, but {few}.",
                f"A verdict takes at least {FEWEST_SEEDS} seeds that both variants have."]  # fmt: skip
    effects = [c for c in study.comparisons if c.kind == "factor"]
    claims = _claims(effects or against, study)
    first, *others = [f"{words}." for words in claims]
    together = [c for c in study.comparisons if c.kind == "interaction" and c.judgement.verdict in ("better", "worse")]
    more = [_together(c, study.measure.unit) for c in together[:MOST_CLAIMS]]
    if effects:
        decided = Counter(c.judgement.verdict for c in against)
        told = ", ".join(f"{decided[verdict]} {word}" for verdict, word in VERDICTS.items() if decided[verdict])
        first_of_all, lowest = ranked[0].label, mean_loss(ranked[0], study.metric)
        more.append(f"The lowest {study.measure.noun} is that of {first_of_all}, {lowest:.4f}; against "
                    f"{study.baseline}, of {plural(len(against), 'variant')}: {told}.")  # fmt: skip
    return [first, *others, *more]


def _together(interaction: Comparison, unit: str) -> str:
    """What two levels do together, in a sentence."""
    levels = map(_named, interaction.factor.split(" x "), interaction.this.split(" x "))
    amount = f"{abs(interaction.judgement.mean):.2g} {unit} {'more' if interaction.judgement.mean > 0 else 'less'}"
    return f"Together, {' and '.join(levels)} cost {amount} than the sum of both."


def _claims(comparisons: Sequence[Comparison], study: Study) -> list[str]:
    """The verdicts in words, the largest differences first: a sentence on what is decided, and one on what is not."""
    ordered = sorted(comparisons, key=lambda c: -abs(c.judgement.mean) if c.judgement.n else 0.0)
    groups = {v: [c for c in ordered if c.judgement.verdict == v] for v in ("better", "worse", "equal", "undecided")}
    clauses = []
    for verdict in ("better", "worse"):
        shown = groups[verdict][:MOST_CLAIMS]
        clauses += [f"{_name(c)} is {verdict} than {c.that} by {abs(c.judgement.mean):.2g} {study.measure.unit}"
                    if c.judgement.n else f"{_name(c)} diverges more often than {c.that}" for c in shown]  # fmt: skip
        if rest := len(groups[verdict]) - len(shown):
            clauses.append(f"{rest} more are {verdict}")
    if same := groups["equal"]:
        names = _listed([_name(c) for c in same])
        clauses.append(f"{names} {'do' if len(same) > 1 else 'does'} not differ from {_listed([c.that for c in same])} "
                       f"by more than {study.delta:g} {study.measure.unit}")  # fmt: skip
    decided = [c.judgement for c in ordered if c.judgement.verdict in ("better", "worse") and c.judgement.n]
    if decided and len(clauses) == 1:
        j = decided[0]
        low, high = sorted((-j.low, -j.high) if j.mean < 0 else (j.low, j.high))
        clauses = [f"{clauses[0]} ({percent(1 - study.alpha)} interval {low:.3g} to {high:.3g}, "
                   f"{plural(j.n, 'seed')})"]  # fmt: skip
    sentences = ["; ".join(clauses)] if clauses else []
    if open_ := groups["undecided"]:
        words = _listed([_name(c) for c in open_])
        sentences.append(f"{'Still undecided' if clauses else 'Undecided'}: {words}")
    return sentences


def _name(comparison: Comparison) -> str:
    """What is compared, as a sentence names it."""
    return _named(comparison.factor, comparison.this)


def _named(factor: str, level: str) -> str:
    """A level, with its factor's name where it says nothing by itself: a number, yes or no, nothing."""
    bare = level in ("true", "false", "null", ABSENT) or level.replace(".", "").replace("-", "").isdigit()
    return f"{factor}={level}" if factor and bare else level


def _listed(names: Sequence[str]) -> str:
    """Names, each once: "a, b and c"; of many, some."""
    names = list(dict.fromkeys(names))
    if len(names) > MOST_CLAIMS + 2:
        names = [*names[:MOST_CLAIMS], f"{len(names) - MOST_CLAIMS} others"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def disagreements(study: Study) -> list[str]:
    """Comparisons whose verdict is another one by the measure that is not the headline's."""
    this, other = study.measure.title, study.measures[study.measure.beside].title
    return [f"{c.this} against {c.that}: {VERDICTS[c.judgement.verdict]} by {this}, "
            f"{VERDICTS[c.other.verdict]} by {other}" for c in study.comparisons
            if c.judgement.verdict != c.other.verdict and c.judgement.n]  # fmt: skip


def paper(study: Study) -> list[str]:
    """A sentence for a paper on each comparison of the headline that has a verdict, and one on the method."""
    kind = "factor" if any(c.kind == "factor" for c in study.comparisons) else "variant"
    lines, unit = [], study.measure.unit
    for c in study.comparisons:
        j = c.judgement
        if c.kind != kind or j.n < FEWEST_SEEDS or j.verdict == "undecided":
            continue
        bounds = f"{j.n} seeds, {percent(1 - study.alpha)} CI {j.low:+.4f} to {j.high:+.4f} {unit}"
        if j.verdict == "equal":
            lines.append(f"{_name(c)} and {c.that} do not differ by more than {study.delta:g} {unit} ({bounds}).")
        else:
            p = f"p = {j.p:.2g}" if j.p >= 0.001 else "p < 0.001"
            lines.append(f"{_name(c)} is {j.verdict} than {c.that} by {abs(j.mean):.4f} {unit} ({bounds}, {p}).")
    if lines:
        looks = " with group-sequential levels (Lan and DeMets 1983)" if study.looks else ""
        lines.append(f"Variants share seeds; {study.measure.plural} were compared by "
                     f"t-tests of paired differences with the noise pooled over variants{looks}, equality by two "
                     "one-sided tests (Schuirmann 1987), both corrected by Holm's method (1979) at "
                     f"{percent(study.alpha)}.")  # fmt: skip
    return lines


def open_questions(study: Study) -> list[str]:
    """What is undecided: how large it is so far, and how many seeds would probably decide it."""
    lines = []
    for c in study.comparisons:
        j = c.judgement
        if j.verdict != "undecided" or j.n < FEWEST_SEEDS:
            continue
        needed = f"about {j.seeds_needed} seeds in all" if j.seeds_needed else "no number of seeds that is near"
        size = f"{_name(c)} against {c.that}: {j.mean:+.4f} {study.measure.unit} so far"
        lines.append(f"{size}, too small to matter ({needed} would prove it)" if abs(j.mean) < study.delta else
                     f"{size}; {needed} would probably decide it")  # fmt: skip
    return lines


def further_seeds(study: Study) -> int | None:
    """How many more seeds would probably decide the differences that matter; None if nothing that matters is open.

    With fewer than three seeds it is not known how large differences are, so the answer is three in all.
    """
    if few := [c.judgement.n for c in study.comparisons if c.judgement.n < FEWEST_SEEDS and c.kind == "variant"]:
        return FEWEST_SEEDS - min(few)
    needed = [(c.judgement.seeds_needed, c.judgement.n) for c in study.comparisons
              if c.judgement.verdict == "undecided" and c.judgement.n > 1 and abs(c.judgement.mean) >= study.delta]
    known = [total - n for total, n in needed if total is not None]
    return max(known, default=0) or None


def advice(study: Study) -> str:
    """What further seeds would bring; "" if none are needed."""
    more = further_seeds(study)
    if not more:
        return ""
    if any(c.judgement.n < FEWEST_SEEDS for c in study.comparisons if c.kind == "variant"):
        return f"{plural(more, 'further seed')} would allow verdicts."
    return (f"{plural(more, 'further seed')} would probably decide what is open and large enough to matter, if the "
            "differences stay as they are.")  # fmt: skip


def counts(study: Study) -> str:
    """How the runs ended, in words: "30 runs: 28 done, 2 diverged"."""
    total = sum((Counter(v.counts) for v in study.variants), Counter[str]())
    total += Counter({"set apart": sum(map(len, study.apart.values())), "unreadable": len(study.unreadable)})
    parts = [f"{total[end]} {ENDED.get(end, end)}" for end in {**ENDED, **total} if total[end]]
    return f"{plural(total.total(), 'run')}: {', '.join(parts)}" if parts else "no runs"


def commands(study: Study) -> list[str]:
    """The commands that made the runs, each once, as a user types them."""
    lines = []
    for record in study.records:
        program, *arguments = [str(a) for a in record.info.get("command") or ["?"]]
        # The program adds this one for Hydra.
        own = [a for a in arguments if not a.startswith("hydra.job.config.override_dirname.exclude_keys=")]
        named = f"python -m gptexp.{Path(program).stem}" if Path(program).suffix == ".py" else Path(program).name
        lines.append(f"{named} {shlex.join(own)}".strip())
    return list(dict.fromkeys(lines))


def next_command(study: Study) -> str | None:
    """The command that trains the seeds that are still needed; None unless one command made all runs."""
    made, more = commands(study), further_seeds(study)
    if len(made) != 1 or not more:
        return None
    first = 1 + max(r.seed for r in study.records)
    seeds = f"seed={','.join(str(s) for s in range(first, first + more))}"
    kept = [a for a in shlex.split(made[0]) if not a.startswith(("seed=", "hydra.run.dir=", "resume="))]
    groups = {r.info.get("group") for r in study.records}
    if not any(a.startswith(("sweep=", "sweep.name=", "hydra.sweep.dir=")) for a in kept) and groups != {None}:
        kept.append(f"sweep.name={next(iter(groups))}")  # the new runs join the old ones
    if "-m" not in kept and "--multirun" not in kept:
        kept.insert(3 if kept[:2] == ["python", "-m"] else 1, "-m")
    return shlex.join([*kept, seeds])


def percent(share: float) -> str:
    """A share as "95 %", with a space that does not break."""
    return f"{100 * share:.3g}\u00a0%"


def plural(n: int, noun: str) -> str:
    """A number with its noun."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
