"""A study as tables: numbers for a machine, text for a reader."""

import math
from typing import Any

import pandas as pd

from gptexp.analysis.collect import AXES
from gptexp.analysis.factors import level_of
from gptexp.analysis.measures import Metric
from gptexp.analysis.study import Study, Variant, losses, mean_loss

ENDS = ("diverged", "failed", "interrupted", "running", "pruned", "missing")
"""How runs end that are not done."""

FORMATS = {  # how a reader sees a column
    **dict.fromkeys(("loss", "bpc", "wrong", "sd", "final", "best", "error", "p", "p_equal", "p_signs", "target"),
                    "{:.4f}"),
    **dict.fromkeys(("difference", "low", "high"), "{:+.4f}"), "effect": "{:+.2f}",
    **dict.fromkeys(("seconds", "to_target_seconds"), "{:.1f}"),
    **dict.fromkeys(("parameters", "tokens_per_second", "sampled_per_second", "kv_cache_bytes", "to_target_tokens",
                     "to_target_step"), "{:,.0f}"),
}  # fmt: skip


def all_tables(study: Study, target: float | None = None) -> dict[str, pd.DataFrame]:
    """Every table, by name. Only "speed" has times, so that equal results give equal bytes in the others."""
    return {
        "variants": variants_table(study), "comparisons": comparisons_table(study), "runs": runs_table(study),
        "speed": speed_table(study, target),
    }  # fmt: skip


def variants_table(study: Study) -> pd.DataFrame:
    """A row per variant, the lowest mean loss first: seeds, losses and how its runs ended."""
    other, column = study.measure.beside, study.measure.column
    return pd.DataFrame([
        {
            "variant": variant.label, **variant.levels, "seeds": len(variant.runs),
            column: mean_loss(variant, study.metric), "sd": pd.Series(losses(variant, study.metric)).std(),
            other: mean_loss(variant, other), "parameters": _mean_result(variant, "parameters"),
            **{end: variant.counts.get(end, 0) for end in ENDS},
        }
        for variant in [*study.ranked(), *(v for v in study.variants if not v.runs)]
    ])  # fmt: skip


def comparisons_table(study: Study) -> pd.DataFrame:
    """A row per comparison, with its statistics."""
    columns = ["kind", "factor", "this", "that", "seeds", "unpaired", "difference", "low", "high", "error", "df",
               "effect", "p", "p_equal", "p_signs", "verdict", "seeds_needed", "other_verdict"]  # fmt: skip
    rows = [(c.kind, c.factor, c.this, c.that, c.judgement.n, len(c.unpaired), *list(vars(c.judgement).values())[1:],
             c.other.verdict) for c in study.comparisons]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"seeds_needed": "Int64"})


def ranking_table(study: Study) -> pd.DataFrame:
    """The variants, the lowest mean loss first, each with its comparison to the baseline."""
    against = comparisons_table(study).query("kind == 'variant'").drop(columns=["kind", "factor", "that", "seeds"])
    variants = variants_table(study)[["variant", "seeds", study.measure.column, "sd", *ENDS]]
    table = variants.merge(against.rename(columns={"this": "variant"}), "left", "variant")
    table["verdict"] = [
        "baseline" if name == study.baseline else verdict if seeds or verdict == "worse" else "no result"
        for name, seeds, verdict in zip(table["variant"], table["seeds"], table["verdict"], strict=True)
    ]
    return table


def runs_table(study: Study) -> pd.DataFrame:
    """A row per run, however it ended."""
    labels = {run.path: v.label for v in study.variants for run in v.runs.values()}
    levels = [f for f in study.factors if f.key != "name"]
    columns = ["name", "compared_as", *(f.name for f in levels), "seed", "status", "best", "final", "config", "data",
               "code", "note"]  # fmt: skip
    rows = [
        (r.name, labels.get(r.path, ""), *(level_of(r, f) for f in levels), r.seed, r.status, r.best, r.final,
         *(r.info["fingerprints"][key] for key in ("config", "data", "code")), note)
        for group, note in [(study.records, ""), *((runs, reason) for reason, runs in study.apart.items())]
        for r in group
    ]  # fmt: skip
    lost = [(u.path.name, "", *[""] * len(levels), None, "unreadable", math.nan, math.nan, "", "", "", u.reason)
            for u in study.unreadable]  # fmt: skip
    return pd.DataFrame(rows + lost, columns=columns).astype({"seed": "Int64"})


def speed_table(study: Study, target: float | None = None) -> pd.DataFrame:
    """A row per variant: loss, speed, and the steps, tokens and seconds to the target loss, each a mean over its runs.

    The target is in the unit of the losses; None is the baseline's mean.
    """
    metric: Metric = "final" if study.metric == "exact_match" else study.metric
    if target is None:
        target = mean_loss(study.base, metric) if study.base else math.nan
    rows = []
    for variant in study.ranked():
        curves = [run.curve for run in variant.runs.values()]
        first = pd.concat([curve[curve["loss"] <= target].head(1) for curve in curves])  # of those that reach it
        rows.append({
            "variant": variant.label, "loss": mean_loss(variant, metric),
            **{key: _mean_result(variant, key) for key in ("seconds", "tokens_per_second")},
            **{key: _mean_result(variant, key) for key in ("sampled_per_second", "kv_cache_bytes")},
            "target": target, "reached": len(first), "of": len(curves),
            **{f"to_target_{axis}": first[axis].mean() for axis in AXES},
        })  # fmt: skip
    return pd.DataFrame(rows)


def _mean_result(variant: Variant, key: str) -> float:
    """The mean of a number in result.json over a variant's runs; nan where a run lacks it."""
    values = pd.Series([r.result.get(key) for r in variant.runs.values()], dtype=float)
    return float(values.mean(skipna=False))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A table as text: rounded numbers, a dash for a missing one; columns that count what never happened left out."""
    kept = [c for c in table if not (c in (*ENDS, "unpaired", "note") and not table[c].any())]
    text = {c: [_cell(c, value) for value in table[c]] for c in kept}
    return pd.DataFrame(text, index=table.index).rename(columns=lambda c: str(c).replace("_", " "))


def _cell(column: str, value: Any) -> str:
    if pd.isna(value):
        return "–"
    if column in ("p", "p_equal") and value < 0.0001:
        return "<0.0001"
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
