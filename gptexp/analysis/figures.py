"""Figures of a study. Drawn once, for paper and for the page: the page gives their ink its own colour."""

import io
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptexp.analysis.collect import AXES
from gptexp.analysis.factors import Factor, is_numeric
from gptexp.analysis.plots import UNITS
from gptexp.analysis.study import Study, Variant, losses
from gptexp.analysis.tables import speed_table, variants_table
from gptexp.records import Measurement, read_diagnostics
from gptexp.runs import Run

INK = "#1b1b1f"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#c99700", "#33a9c9", "#aa3377", "#8c6d31", "#7a7a7a")  # after Tol's bright
VERDICT_COLOURS = {"better": "#228833", "worse": "#d1495b", "equal": "#4477aa", "undecided": "#8a8a8a"}
MOST_LINES = len(COLOURS)
MOST_ROWS = 60  # of the forest plot
WIDTH = 5.6  # inches: a phone shows it at nine tenths of its size, a screen at one and a half
_STYLE = {"svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.18, "grid.linewidth": 0.6,
          "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
          "grid.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
          "legend.frameon": False, "axes.titlesize": 9, "axes.titlelocation": "left"}  # fmt: skip


def draw(study: Study) -> dict[str, Figure]:
    """All figures that a study gives occasion for, by name: forest, curves by step, tokens and seconds, heat map,
    sensitivity to each numeric factor, pareto, diagnostics."""
    ranked = study.ranked()
    if not ranked:
        return {}
    numeric = [f for f in study.factors if is_numeric(f) and len(f.levels) > 2]
    grid = sorted((f for f in study.factors if f not in numeric), key=lambda f: -len(f.levels))[:3]
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figures = {"forest": forest(study)} if any(c.judgement.n for c in study.comparisons) else {}
        figures |= {f"curves_{axis}": curves(study, axis) for axis in AXES}
        if len(grid) > 1 and len(ranked) > 2:
            figures["heat_map"] = heat_map(study, *grid)
        figures |= {f"sensitivity_{f.name}": sensitivity(study, f) for f in numeric}
        if len(ranked) > 1:
            figures["pareto"] = pareto(study)
        measured = last_diagnostics(chosen(study))
        if len(measured):
            figures["diagnostics"] = diagnostics(measured, colours(study))
    return figures


def rendered(figure: Figure, form: Literal["png", "svg"], name: str) -> bytes:
    """A figure as PNG, on white, or as SVG, transparent, with ids unlike those of any other name.

    The same figure gives the same bytes.
    """
    file, metadata = io.BytesIO(), {"png": {"Software": None}, "svg": {"Date": None}}[form]
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):  # type: ignore[arg-type]
        figure.savefig(file, format=form, dpi=200, transparent=form == "svg", metadata=metadata)
    return file.getvalue()


def chosen(study: Study) -> list[Variant]:
    """The variants that a crowded figure shows: the baseline and the best of the others, the lowest loss first."""
    ranked = study.ranked()
    best = [v for v in ranked if v is not study.base][: MOST_LINES - 1]
    return [v for v in ranked if v in best or v is study.base]


def colours(study: Study) -> dict[str, str]:
    """The colour of each chosen variant by its label, the same in every figure."""
    return dict(zip((v.label for v in chosen(study)), COLOURS, strict=False))


def curves(study: Study, axis: str) -> Figure:
    """Validation loss: the mean of each variant's seeds, and the range of them as a band."""
    figure, axes = _figure(4.1)
    shown = chosen(study)
    windows = all(len(run.windows) > len(run.curve) for variant in shown for run in variant.runs.values())
    for variant, colour in zip(shown, COLOURS, strict=False):
        x, mean, low, high = band(variant, axis, windows)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=colour, label=variant.label, linewidth=1.4, marker="." if len(x) < 15 else "")
    every = len(study.ranked())
    axes.set(xlabel=AXES[axis], ylabel=f"val/loss{' of some windows' if windows else ''} (nats a token)")
    if every > len(shown):
        axes.set_title(f"{study.baseline} and the best {len(shown) - 1} of {every - 1} others")
    heights = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    low, high = min(y.min() for y in heights), max(y[1 if len(y) > 2 else 0] for y in heights)
    if high > low:  # the untrained loss would flatten what matters
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    _legend(figure)
    return figure


def band(variant: Variant, axis: str, windows: bool = False, points: int = 150) -> tuple[Any, Any, Any, Any]:
    """Mean, lowest and highest loss of a variant's seeds at points of an axis that all of them reach, `points` at most.

    The losses are those of the whole split, or of some windows.
    """
    tables = [run.windows if windows else run.curve for run in variant.runs.values()]
    runs = [(table[axis].to_numpy(), table["loss"].to_numpy()) for table in tables]
    x = runs[0][0]
    if len(x) > points or any(len(other) != len(x) or (other != x).any() for other, _ in runs):
        ends = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
        x = np.linspace(*ends, min(points, max(len(a) for a, _ in runs)))
    values = np.array([np.interp(x, a, b) for a, b in runs])
    return x, values.mean(0), values.min(0), values.max(0)


def forest(study: Study) -> Figure:
    """Every comparison's mean difference with its interval; the band of ±delta is where differences are none."""
    paired = [c for c in study.comparisons if c.judgement.n]
    rows = sorted((c for c in paired if c.kind == "variant"), key=lambda c: c.judgement.mean)
    rows = [*rows, *(c for c in paired if c.kind == "factor")][:MOST_ROWS]
    figure, axes = _figure(1.2 + 0.27 * len(rows))
    axes.axvspan(-study.delta, study.delta, color=VERDICT_COLOURS["equal"], alpha=0.12, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    for y, comparison in enumerate(rows):
        j, colour = comparison.judgement, VERDICT_COLOURS[comparison.judgement.verdict]
        axes.plot(list(comparison.differences.values()), [y] * j.n, "|", color=colour, alpha=0.55, markersize=7)
        if math.isfinite(j.low):
            axes.plot([j.low, j.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(j.mean, y, "o" if comparison.kind == "variant" else "s", color=colour, markersize=5.5)
    variants = sum(c.kind == "variant" for c in rows)
    if 0 < variants < len(rows):
        axes.axhline(variants - 0.5, color=INK, linewidth=0.6, linestyle=":")
    names = [f"{c.factor}: {c.this} – {c.that}" if c.kind == "factor" else c.this for c in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    largest = max(abs(x) for c in rows for x in c.differences.values())
    if largest > 20 * study.delta and len(rows) > 1:
        # One variant that hardly learned must not hide the others.
        axes.set_xscale("symlog", linthresh=study.delta)
        axes.minorticks_off()
        top = 10.0 ** math.floor(math.log10(largest))
        ticks = [-top, -study.delta, 0, study.delta, top]
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xlabel(f"difference from {study.baseline}\nin {study.metric} val/loss (nats a token): ← better · worse →")
    return figure


def heat_map(study: Study, rows: Factor, columns: Factor, panels: Factor | None = None) -> Figure:
    """The mean loss of every pair of levels; a panel for each level of a third factor. Averaged over any others."""
    means = variants_table(study)
    levels = panels.levels if panels else ("",)
    tables = [
        (means[means[panels.name] == level] if panels else means)
        .pivot_table("loss", rows.name, columns.name).reindex(index=rows.levels, columns=columns.levels).to_numpy()
        for level in levels
    ]  # fmt: skip
    finite = np.concatenate([t[np.isfinite(t)] for t in tables])
    # A variant that hardly learned must not flatten the colours of the others.
    low, high = finite.min(), min(finite.max(), finite.min() + 6 * (np.median(finite) - finite.min() + 1e-9))
    width = max(WIDTH, 1.9 + len(levels) * 0.62 * len(columns.levels))
    figure = Figure(figsize=(width, 1.1 + 0.34 * len(rows.levels)), layout="constrained")
    image: Any = None
    for axes, level, table in zip(figure.subplots(1, len(levels), squeeze=False)[0], levels, tables, strict=True):
        image = axes.imshow(table, vmin=low, vmax=high, cmap="viridis_r", aspect="auto")
        for (i, k), value in np.ndenumerate(table):
            ink = "#ffffff" if value > low + 0.5 * (high - low) else "#000000"  # viridis_r ends dark
            axes.text(k, i, f"{value:.3f}" if math.isfinite(value) else "–", ha="center", va="center",
                      color=ink if math.isfinite(value) else INK, fontsize=8)  # fmt: skip
        axes.set_xticks(range(len(columns.levels)), columns.levels)
        axes.set_yticks(range(len(rows.levels)), rows.levels if axes is figure.axes[0] else [])
        axes.set(xlabel=columns.name, title=f"{panels.name} = {level}" if panels else "")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.axes[0].set_ylabel(rows.name)
    beyond = "max" if high < finite.max() else "neither"
    figure.colorbar(image, ax=figure.axes, label=f"{study.metric} val/loss", extend=beyond)
    return figure


def sensitivity(study: Study, factor: Factor) -> Figure:
    """Loss over a numeric setting, such as the learning rate; a line for each combination of the other factors."""
    figure, axes = _figure(4.0)
    lines: dict[str, list[Variant]] = {}
    for variant in study.ranked():
        others = " ".join(f"{k}={v}" for k, v in variant.levels.items() if k != factor.name)
        lines.setdefault(others, []).append(variant)
    for (name, variants), colour in zip(list(lines.items())[:MOST_LINES], COLOURS, strict=False):
        variants.sort(key=lambda v: float(v.levels[factor.name]))
        values = [losses(v, study.metric) for v in variants]
        x, y = [float(v.levels[factor.name]) for v in variants], np.array([np.mean(v) for v in values])
        ends = y - [min(v) for v in values], [max(v) for v in values] - y
        axes.errorbar(x, y, ends, color=colour, label=name, marker="o", markersize=4, capsize=2, linewidth=1.3)
    levels = sorted(float(level) for level in factor.levels)
    if levels[0] > 0 and levels[-1] / levels[0] >= 8:
        axes.set_xscale("log")
    if len(levels) <= 8:
        axes.set_xticks(levels, [f"{level:g}" for level in levels])
        axes.minorticks_off()
    axes.set(xlabel=factor.name, ylabel=f"{study.metric} val/loss (nats a token)")
    if any(lines):
        _legend(figure)
    return figure


def pareto(study: Study) -> Figure:
    """Loss against seconds of training; the line joins the variants that no other beats in both."""
    figure, axes = _figure(3.9)
    table = speed_table(study)
    front = table[table["pareto_front"]].sort_values(["seconds", "loss"])
    axes.plot(front["seconds"], front["loss"], color=INK, linewidth=0.8, zorder=1)
    colour_of = colours(study)
    for row in table.to_dict("records"):
        colour, size = colour_of.get(row["variant"], VERDICT_COLOURS["undecided"]), 7 if row["pareto_front"] else 5
        name = row["variant"] if row["variant"] in colour_of else None
        axes.plot(row["seconds"], row["loss"], "o", color=colour, markersize=size, label=name)
    axes.set(xlabel="seconds of training, mean of the seeds", ylabel=f"{study.metric} val/loss (nats a token)")
    axes.margins(x=0.1, y=0.1)
    _legend(figure)
    return figure


def last_diagnostics(variants: Sequence[Variant]) -> pd.DataFrame:
    """The last measurement of every layer, mean over the seeds: variant, quantity, layer, value."""
    measured = [pd.DataFrame(columns=["variant", *Measurement._fields]).astype({"value": float})]
    for variant, record in ((v, r) for v in variants for r in v.runs.values()):
        with suppress(OSError, ValueError):  # the comparison stands without it
            rows = pd.DataFrame(read_diagnostics(Run(record.path).diagnostics_path), columns=Measurement._fields)
            measured.append(rows[rows["step"] == rows["step"].max()].assign(variant=variant.label))
    keys = ["variant", "quantity", "layer"]
    return pd.concat(measured).groupby(keys, sort=False, as_index=False)["value"].mean()


def diagnostics(measured: pd.DataFrame, colour_of: dict[str, str]) -> Figure:
    """What was measured in each layer at the end of training; a panel for each quantity, a line for each variant.

    Args:
        measured: see `last_diagnostics`.
        colour_of: the variants' colours.
    """
    quantities = [q for q in UNITS if (measured["quantity"] == q).any()]
    figure = Figure(figsize=(WIDTH, 0.5 + 1.75 * len(quantities)), layout="constrained")
    for axes, quantity in zip(figure.subplots(len(quantities), 1, squeeze=False)[:, 0], quantities, strict=True):
        rows = measured[measured["quantity"] == quantity]
        table = rows.pivot(index="layer", columns="variant", values="value")
        table = table.loc[rows["layer"].unique(), rows["variant"].unique()]
        apart = table.index.str.contains("residual|norm")  # norms have a line of their own
        table = pd.concat([table[~apart], table[apart]])
        first = int((~apart).sum())
        for label in table:
            for part in (slice(first), slice(first, None)):
                axes.plot(np.arange(len(table))[part], table[label][part], ".-", color=colour_of[label], linewidth=1)
        shown = table.to_numpy()[np.isfinite(table.to_numpy())]
        if len(shown) and shown.min() > 0 and shown.max() / shown.min() > 20:
            axes.set_yscale("log")
        axes.set_title(f"{quantity} ({UNITS[quantity]})")
        every = math.ceil(len(table) / 4)
        axes.set_xticks(range(0, len(table), every), table.index[::every], fontsize=6.5)
    for label in measured["variant"].unique():
        figure.axes[0].plot([], [], ".-", color=colour_of[label], label=label)
    _legend(figure, *figure.axes[0].get_legend_handles_labels())
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, *entries: Any) -> None:
    figure.legend(*entries, loc="outside lower left", ncols=2, fontsize=8, handlelength=1.4)
