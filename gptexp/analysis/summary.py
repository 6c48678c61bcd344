"""A study in words."""

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gptexp.analysis.statistics import MOST_SEEDS, Verdict, fewest_seeds
from gptexp.analysis.study import Comparison, Study, mean_loss

ENDED = {"done": "done", "running": "still running", "interrupted": "interrupted", "pruned": "pruned",
         "failed": "failed", "diverged": "diverged", "missing": "without a directory"}  # fmt: skip

VERDICTS: dict[Verdict, str] = {"better": "better", "worse": "worse", "equal": "no different", "undecided": "undecided"}
"""The verdicts as a reader sees them."""


def headline(study: Study) -> list[str]:
    """The verdict: one sentence, and perhaps others that add to it."""
    ranked = study.ranked()
    if not ranked:
        return [f"No run has finished, so there is nothing to compare ({counts(study)})."]
    if len(study.variants) == 1:
        (variant,) = ranked
        return [f"There is only one variant, {variant.label}, so there is nothing to compare: {study.metric} val/loss "
                f"{mean_loss(variant, study.metric):.4f} ({plural(len(variant.runs), 'seed')})."]  # fmt: skip
    against = [c for c in study.comparisons if c.kind == "variant"]
    by_verdict = {verdict: [c for c in against if c.judgement.verdict == verdict] for verdict in VERDICTS}
    if by_verdict["better"]:
        best = min(by_verdict["better"], key=lambda c: c.judgement.mean)
        return [_sentence(best, study.alpha), *_rest(against, best)]
    if len(by_verdict["equal"]) == len(against):
        seeds = plural(min(c.judgement.n for c in against), "seed")
        return [f"No variant differs from {study.baseline} by more than {study.delta:g} nats ({seeds})."]
    if by_verdict["undecided"]:
        decided = len(by_verdict["undecided"]) < len(against)
        return [*_why(study, by_verdict["undecided"]), *(_rest(against, None) if decided else [])]
    worst = max(by_verdict["worse"], key=lambda c: c.judgement.mean)
    return [f"No variant is better than {study.baseline}.", _sentence(worst, study.alpha), *_rest(against, worst)]


def _sentence(comparison: Comparison, alpha: float) -> str:
    """A verdict with the difference without its sign, its interval, p and the number of seeds."""
    j, verdict = comparison.judgement, VERDICTS[comparison.judgement.verdict]
    low, high = sorted((-j.low, -j.high) if j.mean < 0 else (j.low, j.high))
    p = f"p = {j.p:.2g}" if j.p >= 0.001 else "p < 0.001"
    return (f"{comparison.this} is {verdict} than {comparison.that} by {abs(j.mean):.3g} nats ({percent(1 - alpha)} "
            f"interval {low:.3g} to {high:.3g}, {p}, {plural(j.n, 'seed')}).")  # fmt: skip


def _rest(comparisons: Sequence[Comparison], shown: Comparison | None) -> list[str]:
    """The verdicts on the others, counted."""
    others = Counter(c.judgement.verdict for c in comparisons if c is not shown)
    counted = [f"{others[verdict]} {word}" for verdict, word in VERDICTS.items() if others[verdict]]
    return [f"Of the {'other ' if shown else ''}variants: {', '.join(counted)}."] if counted else []


def _why(study: Study, undecided: Sequence[Comparison]) -> list[str]:
    """Why comparisons are undecided, and what would decide the largest difference among them."""
    most, family = max(c.judgement.n for c in undecided), len(study.comparisons)
    if not most:
        return [f"Undecided: no seed has a finished run of {study.baseline} and of another variant."]
    fewest = fewest_seeds(study.alpha / family)
    reason = f"Undecided: {plural(most, 'seed')} cannot decide {plural(family, 'comparison')} at {percent(study.alpha)}"
    if fewest is None:
        reason += "; no number of seeds can, because there are too many comparisons."
    elif most < fewest:
        reason += f": a difference takes at least {fewest}, equality {fewest - 1}."
    else:
        reason = f"Undecided: {plural(most, 'seed')} leave {plural(len(undecided), 'comparison')} open."
    largest = max(undecided, key=lambda c: abs(c.judgement.mean) if c.judgement.n else -1.0)
    j = largest.judgement
    decides = f"; not even {MOST_SEEDS} seeds would decide it" if j.n > 1 else ""
    if j.seeds_needed:
        decides = f"; about {j.seeds_needed} seeds in all would decide it"
    return [reason, f"So far the largest difference is {largest.this}, {abs(j.mean):.3g} nats "
                    f"{'below' if j.mean < 0 else 'above'} {largest.that}{decides}."]  # fmt: skip


def further_seeds(study: Study) -> int | None:
    """How many more seeds would give every comparison a verdict; None if no number is known."""
    undecided = [c.judgement for c in study.comparisons if c.judgement.verdict == "undecided"]
    if any(j.seeds_needed is None for j in undecided):
        return None
    return max((j.seeds_needed - j.n for j in undecided if j.seeds_needed is not None), default=0)


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


def interval_note(study: Study) -> str:
    """A warning where few seeds make the intervals too narrow; "" otherwise."""
    fewest = min((c.judgement.n for c in study.comparisons if c.judgement.n > 2), default=math.inf)
    if fewest > 5:
        return ""
    most = percent(1 - 2.0 ** (1 - fewest))
    return (f"With {fewest} seeds no bootstrap interval can cover more than {most}, whatever its nominal level; the "
            "test allows for this, and no verdict rests on the interval alone.")  # fmt: skip
