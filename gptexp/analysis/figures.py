"""Figures of a study. Drawn once, for paper and for the page: the page gives their ink its own color."""

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptexp.analysis.collect import AXES, collect
from gptexp.analysis.factors import Factor, is_numeric
from gptexp.analysis.plots import UNITS
from gptexp.analysis.study import Study, Variant, build_study, losses, mean_loss
from gptexp.analysis.tables import variants_table
from gptexp.runs.files import Measurement, read_diagnostics
from gptexp.runs.run import Run, write_atomically

INK = "#1b1b1f"
COLORS = ("#4477aa", "#ee6677", "#228833", "#c99700", "#33a9c9", "#aa3377", "#8c6d31", "#7a7a7a")  # after Tol's bright
DASHES = ("-", "--", "-.", ":")
VERDICT_COLORS = {"better": "#228833", "worse": "#d1495b", "equal": "#4477aa", "undecided": "#8a8a8a"}
MOST_LINES = 12
MOST_ROWS = 60  # of the forest plot
WIDTH = 5.0  # inches, so that a phone 390 pixels wide shows a figure at its full size
_STYLE: Any = {
    "svg.fonttype": "none", "font.size": 10.5, "axes.grid": True, "grid.alpha": 0.18, "grid.linewidth": 0.6,
    "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "grid.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "legend.frameon": False, "legend.fontsize": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left",
}  # fmt: skip


def draw(study: Study) -> dict[str, Figure]:
    """All figures that make sense for a study, by name: forest, curves by step, tokens and seconds, heat map,
    sensitivity to each numeric factor, loss against time, diagnostics."""
    ranked = study.ranked()
    if not ranked:
        return {}
    numeric = [f for f in study.factors if is_numeric(f) and len(f.levels) > 2]
    grid = sorted((f for f in study.factors if f not in numeric), key=lambda f: -len(f.levels))[:2]
    with mpl.rc_context(_STYLE):
        figures = {"forest": forest(study)} if any(c.judgement.n for c in study.comparisons) else {}
        figures |= {f"curves_{axis}": curves(study, axis) for axis in AXES}
        if len(grid) > 1 and len(ranked) > 2:
            figures["heat_map"] = heat_map(study, *grid)
        figures |= {f"sensitivity_{f.name}": sensitivity(study, f) for f in numeric}
        if len(ranked) > 1:
            figures["time"] = loss_against_time(study)
        measured = last_diagnostics(chosen(study))
        if len(measured):
            figures["diagnostics"] = diagnostics(measured, looks(study))
    return figures


def plot_runs(folder: Path, path: Path) -> bool:
    """Draw the learning curves of a sweep's variants as a PNG, if any of its runs has finished; returns whether."""
    study = build_study(collect([folder]))
    if not study.ranked():
        return False
    with mpl.rc_context(_STYLE):
        write_atomically(path, rendered(curves(study, "step"), "png", path.stem))
    return True


def rendered(figure: Figure, form: Literal["png", "svg"], name: str) -> bytes:
    """A figure as PNG, on white, or as SVG, transparent, with ids unlike those of any other name.

    The same figure gives the same bytes.
    """
    file, metadata = io.BytesIO(), {"png": {"Software": None}, "svg": {"Date": None}}[form]
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(file, format=form, dpi=200, transparent=form == "svg", metadata=metadata)
    return file.getvalue()


def chosen(study: Study) -> list[Variant]:
    """The variants that a crowded figure shows, in the order in which they were run: the baseline and the best."""
    best = [v.label for v in study.ranked() if v is not study.base][: MOST_LINES - 1]
    return [v for v in study.variants if v is study.base or v.label in best]


def looks(study: Study) -> dict[str, dict[str, Any]]:
    """Color and dashes of each chosen variant by its label, the same in every figure. They do not follow its rank.

    No two look alike.
    """
    return {variant.label: {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[(i + i // len(COLORS)) % len(DASHES)]}
            for i, variant in enumerate(chosen(study))}  # fmt: skip


def curves(study: Study, axis: str) -> Figure:
    """Validation loss: the mean over each variant's seeds, and a band from the lowest to the highest.

    The axis is a key of `AXES`. No line hides another: each is thinner than those below it. The loss axis leaves out
    the first fifth of training, which would flatten what matters.
    """
    shown, style = chosen(study), looks(study)
    figure, axes = _figure(3.3 + 0.11 * len(shown))
    windows = all(len(run.windows) > len(run.curve) for variant in shown for run in variant.runs.values())
    heights = []
    for variant, width in zip(shown, np.linspace(2.4, 1.2, len(shown)), strict=True):
        x, mean, low, high = band(variant, axis, windows)
        look = style[variant.label]
        axes.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)
        axes.plot(x, mean, **look, label=variant.label, linewidth=width, marker="." if len(x) < 3 else "")
        heights.append(mean[min(max(1, len(x) // 5), len(x) - 1) :])
    low, high = min(y.min() for y in heights), max(y.max() for y in heights)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    seeds, others = max(len(v.runs) for v in shown), len(study.ranked()) - 1
    titles = [f"mean and range of {seeds} seeds"] if seeds > 1 else []
    titles += [f"{study.baseline} and the best {len(shown) - 1} of {others} others"] if others >= len(shown) else []
    ylabel = f"val/loss{' of some windows' if windows else ''}\n(nats per token)"
    axes.set(xlabel=AXES[axis], ylabel=ylabel, title="\n".join(titles))
    _legend(figure)
    return figure


def band(variant: Variant, axis: str, windows: bool = False, points: int = 150) -> tuple[Any, Any, Any, Any]:
    """Mean, lowest and highest loss over a variant's seeds, at up to `points` points of an axis that all of them reach.

    The losses are those of the whole split, or of some windows.

    Returns:
        x, mean, lowest and highest, each (points,).
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
    """Every comparison's mean difference with its interval; differences within the shaded ±delta count as none."""
    paired = [c for c in study.comparisons if c.judgement.n]
    rows = sorted((c for c in paired if c.kind == "variant"), key=lambda c: c.judgement.mean)
    rows = [*rows, *(c for c in paired if c.kind == "factor")][:MOST_ROWS]
    figure, axes = _figure(1.3 + 0.3 * len(rows))
    axes.axvspan(-study.delta, study.delta, color=VERDICT_COLORS["equal"], alpha=0.12, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    for y, comparison in enumerate(rows):
        j, color = comparison.judgement, VERDICT_COLORS[comparison.judgement.verdict]
        axes.plot(list(comparison.differences.values()), [y] * j.n, "|", color=color, alpha=0.55, markersize=7)
        axes.plot([j.low, j.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(j.mean, y, "o" if comparison.kind == "variant" else "s", color=color, markersize=5.5)
    names = [f"{c.factor}: {c.this} – {c.that}" if c.kind == "factor" else c.this for c in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    largest = max(abs(x) for c in rows for x in c.differences.values())
    if largest > 20 * study.delta and len(rows) > 1:  # a variant that hardly learned must not hide the others
        axes.set_xscale("symlog", linthresh=study.delta)
        axes.minorticks_off()
        top = 10.0 ** math.floor(math.log10(largest))
        axes.set_xticks(ticks := [-top, -study.delta, 0, study.delta, top], [f"{x:g}" for x in ticks])
    figure.supxlabel(f"{study.metric} val/loss minus that of {study.baseline}\n(nats per token): ← better · worse →",
                     fontsize="medium")  # fmt: skip
    return figure


def heat_map(study: Study, rows: Factor, columns: Factor) -> Figure:
    """The mean loss of every pair of levels, averaged over any other factors."""
    table = variants_table(study).pivot_table("loss", rows.name, columns.name)
    table = table.reindex(rows.levels, columns=columns.levels)
    values = table.to_numpy()
    finite = values[np.isfinite(values)]
    # A variant that hardly learned must not flatten the colors of the others.
    low, high = finite.min(), min(finite.max(), finite.min() + 6 * (np.median(finite) - finite.min() + 1e-9))
    figure, axes = _figure(1.3 + 0.38 * len(table), max(WIDTH, 2.1 + 0.66 * len(table.columns)))
    image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis_r", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            ink = "#ffffff" if value > low + 0.5 * (high - low) else "#000000"  # viridis_r ends dark
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(table.columns)), table.columns)
    axes.set_yticks(range(len(table)), table.index)
    axes.set(xlabel=columns.name, ylabel=rows.name)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    beyond = "max" if high < finite.max() else "neither"
    figure.colorbar(image, ax=axes, label=f"{study.metric} val/loss", extend=beyond)
    return figure


def sensitivity(study: Study, factor: Factor) -> Figure:
    """Loss over a numeric setting, such as the learning rate: each seed, and a line through the means for each
    combination of the other factors."""
    figure, axes = _figure(3.8)
    lines: dict[str, list[Variant]] = {}
    for variant in sorted((v for v in study.variants if v.runs), key=lambda v: float(v.levels[factor.name])):
        others = " ".join(f"{k}={v}" for k, v in variant.levels.items() if k != factor.name)
        lines.setdefault(others, []).append(variant)
    for (name, variants), color in zip(lines.items(), COLORS, strict=False):
        x = [float(v.levels[factor.name]) for v in variants]
        axes.plot(x, [mean_loss(v, study.metric) for v in variants], color=color, label=name)
        for at, variant in zip(x, variants, strict=True):
            axes.plot([at] * len(variant.runs), losses(variant, study.metric), ".", color=color)
    levels = sorted(float(level) for level in factor.levels)
    if levels[0] > 0 and levels[-1] / levels[0] >= 8:
        axes.set_xscale("log")
    if len(levels) <= 8:
        axes.set_xticks(levels, [f"{level:g}" for level in levels])
        axes.minorticks_off()
    axes.set(xlabel=factor.name, ylabel=f"{study.metric} val/loss (nats per token)")
    if any(lines):
        _legend(figure)
    return figure


def loss_against_time(study: Study) -> Figure:
    """Loss against seconds of training, a point for each run of the chosen variants."""
    figure, axes = _figure(3.7)
    for variant, look in zip(chosen(study), looks(study).values(), strict=True):
        seconds = [run.result.get("seconds", math.nan) for run in variant.runs.values()]
        axes.plot(seconds, losses(variant, study.metric), "o", color=look["color"], label=variant.label, alpha=0.8)
    axes.set(xlabel="seconds of training", ylabel=f"{study.metric} val/loss (nats per token)")
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


def diagnostics(measured: pd.DataFrame, style: Mapping[str, Mapping[str, Any]]) -> Figure:
    """What was measured in each layer at the end of training; a panel for each quantity, a line for each variant.

    Args:
        measured: see `last_diagnostics`.
        style: see `looks`.
    """
    quantities = [q for q in UNITS if (measured["quantity"] == q).any()]
    figure = Figure(figsize=(WIDTH, 0.5 + 2.3 * len(quantities)), layout="constrained")
    for axes, quantity in zip(figure.subplots(len(quantities), 1, squeeze=False)[:, 0], quantities, strict=True):
        table = measured[measured["quantity"] == quantity].pivot_table("value", "layer", "variant", sort=False)
        norms = table.index.str.contains("residual|norm")  # which have lines of their own
        positions = pd.Series(range(len(table)), pd.concat([table[~norms], table[norms]]).index)
        for label, values in table.items():
            for part in (values[~norms], values[norms]):
                axes.plot(positions[part.index], part, marker=".", linewidth=1, **style[str(label)])
        if 0 < 20 * table.min().min() < table.max().max():
            axes.set_yscale("log")
        axes.set_title(f"{quantity} ({UNITS[quantity]})")
        ticks = positions[:: math.ceil(len(table) / 6)]
        axes.set_xticks(ticks, [name.removeprefix("blocks.") for name in ticks.index], rotation=30, ha="right")
    names = measured["variant"].unique()
    _legend(figure, [figure.axes[0].plot([], [], ".-", color=style[name]["color"])[0] for name in names], names)
    return figure


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, *entries: Any) -> None:
    figure.legend(*entries, loc="outside lower left", ncols=2, handlelength=2.6)
