"""A study as tables: numbers for a machine, text for a reader."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from gptexp.analysis.collect import AXES
from gptexp.analysis.study import Metric, Study, Variant, losses, mean_loss

ENDS = ("diverged", "failed", "interrupted", "running", "pruned", "missing")
"""What becomes of runs that do not come to their end."""

FORMATS = {  # how a reader sees a column
    "loss": "{:.4f}", "sd": "{:.4f}", "final": "{:.4f}", "best": "{:.4f}", "difference": "{:+.4f}", "low": "{:+.4f}",
    "high": "{:+.4f}", "effect": "{:+.2f}", "p": "{:.4f}", "p_equal": "{:.4f}", "parameters": "{:,.0f}",
    "seconds": "{:.1f}", "tokens_per_second": "{:,.0f}", "target": "{:.4f}", "to_target_seconds": "{:.1f}",
    "to_target_tokens": "{:,.0f}", "to_target_step": "{:,.0f}",
}  # fmt: skip


def all_tables(study: Study, target: float | None = None) -> dict[str, pd.DataFrame]:
    """Every table, by name. All but "speed" are free of times, so that equal results give equal bytes."""
    return {
        "variants": variants_table(study), "comparisons": comparisons_table(study), "runs": runs_table(study),
        "speed": speed_table(study, target),
    }  # fmt: skip


def variants_table(study: Study) -> pd.DataFrame:
    """A row a variant, the lowest mean loss first: seeds, losses and how its runs ended."""
    other: Metric = "final" if study.metric == "best" else "best"
    return pd.DataFrame([
        {
            "variant": variant.label, **variant.levels, "seeds": len(variant.runs),
            "loss": mean_loss(variant, study.metric), "sd": pd.Series(losses(variant, study.metric)).std(),
            other: mean_loss(variant, other), "parameters": mean_result(variant, "parameters"),
            **{end: variant.counts.get(end, 0) for end in ENDS},
        }
        for variant in [*study.ranked(), *(v for v in study.variants if not v.runs)]
    ])  # fmt: skip


def comparisons_table(study: Study) -> pd.DataFrame:
    """A row a comparison, with what the statistics say of it."""
    columns = ["kind", "factor", "this", "that", "seeds", "unpaired", "difference", "low", "high", "effect", "p",
               "p_equal", "verdict", "seeds_needed"]  # fmt: skip
    rows = [(c.kind, c.factor, c.this, c.that, c.judgement.n, len(c.unpaired), *list(asdict(c.judgement).values())[1:])
            for c in study.comparisons]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"seeds_needed": "Int64"})


def ranking_table(study: Study) -> pd.DataFrame:
    """What a reader wants first: the variants, the lowest mean loss first, each with its comparison to the baseline."""
    against = comparisons_table(study).query("kind == 'variant'").drop(columns=["kind", "factor", "that", "seeds"])
    variants = variants_table(study)[["variant", "seeds", "loss", "sd", *ENDS]]
    table = variants.merge(against.rename(columns={"this": "variant"}), "left", "variant")
    table["verdict"] = [
        "baseline" if name == study.baseline else "no result" if not seeds else verdict
        for name, seeds, verdict in zip(table["variant"], table["seeds"], table["verdict"], strict=True)
    ]
    return table


def runs_table(study: Study) -> pd.DataFrame:
    """A row a run, whatever became of it."""
    labels = {run.path: v.label for v in study.variants for run in v.runs.values()}
    columns = ["name", "compared_as", "seed", "status", "best", "final", "config", "data", "code", "note"]
    rows = [
        (r.name, labels.get(r.path, ""), r.seed, r.status, r.best, r.final,
         *(r.info["fingerprints"][key] for key in ("config", "data", "code")), note)
        for group, note in [(study.records, ""), *((runs, reason) for reason, runs in study.apart.items())]
        for r in group
    ]  # fmt: skip
    lost = [(u.path.name, "", None, "unreadable", math.nan, math.nan, "", "", "", u.reason) for u in study.unreadable]
    return pd.DataFrame(rows + lost, columns=columns).astype({"seed": "Int64"})


def speed_table(study: Study, target: float | None = None) -> pd.DataFrame:
    """A row per variant: loss, speed, and the steps, tokens and seconds to the target loss, each a mean over its runs.

    The target is in nats per token; None stands for the baseline's mean.
    """
    if target is None:
        target = mean_loss(study.base, study.metric) if study.base else math.nan
    ranked, rows = study.ranked(), []
    front = pareto_front({v.label: (mean_result(v, "seconds"), mean_loss(v, study.metric)) for v in ranked})
    for variant in ranked:
        reached = reach(variant, target)
        rows.append({
            "variant": variant.label, "loss": mean_loss(variant, study.metric),
            "seconds": mean_result(variant, "seconds"), "pareto_front": variant.label in front,
            "tokens_per_second": mean_result(variant, "tokens_per_second"),
            "target": target, "reached": len(reached), "of": len(variant.runs),
            **{f"to_target_{axis}": _mean([row[axis] for row in reached]) for axis in AXES},
        })  # fmt: skip
    return pd.DataFrame(rows)


def mean_result(variant: Variant, key: str) -> float:
    """The mean of a number in result.json over a variant's runs; nan where a run lacks it."""
    return _mean([r.result.get(key, math.nan) for r in variant.runs.values()])


def reach(variant: Variant, target: float) -> list[dict[Any, Any]]:
    """For each seed that reaches the loss, the first evaluation at or under it: step, tokens and seconds."""
    curves = [run.curve for run in variant.runs.values()]
    return [row for curve in curves for row in curve[curve["loss"] <= target].head(1).to_dict("records")]


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The labels whose two numbers no other point undercuts in one without exceeding it in the other."""
    values = list(points.values())
    return [label for label, a in points.items() if not any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in values)]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A table as text: rounded numbers, a dash where there is none, counts of what never happened left out."""
    kept = [c for c in table if not (c in (*ENDS, "unpaired", "note") and not table[c].any())]
    text = {c: [_cell(c, value) for value in table[c]] for c in kept}
    return pd.DataFrame(text, index=table.index).rename(columns=lambda c: str(c).replace("_", " "))


def _cell(column: str, value: Any) -> str:
    if pd.isna(value):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return FORMATS.get(column, "{:g}" if isinstance(value, float) else "{}").format(value)


def markdown(table: pd.DataFrame) -> str:
    """A table of text in Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    escaped = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def latex(table: pd.DataFrame) -> str:
    """A table of text in LaTeX, for booktabs."""
    style = table.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    return str(style.to_latex(hrules=True))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
