"""Figures of a study. Drawn once, for paper and for the page: the page gives their ink its own color."""

import io
import math
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gptexp.analysis.collect import AXES, collect
from gptexp.analysis.factors import Factor, is_numeric
from gptexp.analysis.layers import diagnostics, last_diagnostics
from gptexp.analysis.study import Comparison, Study, Variant, build_study, losses, mean_loss
from gptexp.analysis.tables import variants_table
from gptexp.runs.run import write_atomically

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
            figures["diagnostics"] = diagnostics(measured, looks(study), WIDTH)
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

    Where two factors vary, the color is the level of the one with more levels, and the dashes that of the other one.
    Otherwise no two variants look alike.
    """
    shown = chosen(study)
    two = sorted(study.factors, key=lambda f: -len(f.levels)) if len(study.factors) == 2 else []
    if two and len(two[0].levels) <= len(COLORS) and len(two[1].levels) <= len(DASHES):
        color, dashes = two
        return {v.label: {"color": COLORS[color.levels.index(v.levels[color.name])],
                          "linestyle": DASHES[dashes.levels.index(v.levels[dashes.name])]} for v in shown}
    return {variant.label: {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[(i + i // len(COLORS)) % len(DASHES)]}
            for i, variant in enumerate(shown)}  # fmt: skip


def curves(study: Study, axis: str) -> Figure:
    """Validation loss: the mean over each variant's seeds, and a band from the lowest to the highest.

    The axis is a key of `AXES`. No line hides another: each is thinner than those below it. Both axes leave out the
    first fifth of training, which would flatten what matters; the title says so.
    """
    shown, style = chosen(study), looks(study)
    figure, axes = _figure(3.3 + 0.11 * len(shown))
    windows = all(len(run.windows) > len(run.curve) for variant in shown for run in variant.runs.values())
    heights, starts, cut = [], list[float](), False
    for variant, width in zip(shown, np.linspace(2.4, 1.2, len(shown)), strict=True):
        x, mean, low, high = band(variant, axis, windows)
        look = style[variant.label]
        axes.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)
        axes.plot(x, mean, **look, label=variant.label, linewidth=width, marker="." if len(x) < 3 else "")
        first = min(max(1, len(x) // 5), len(x) - 1) if len(x) > 2 else 0
        heights.append(np.concatenate([mean[first:], high[first:], low[first:]]))
        starts, cut = [*starts, x[first]], cut or first > 0
    low, high = min(y.min() for y in heights), max(y.max() for y in heights)
    if cut:
        axes.set_xlim(left=min(starts) - 0.02 * (axes.dataLim.x1 - min(starts)))
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    seeds, others = max(len(v.runs) for v in shown), len(study.ranked()) - 1
    titles = [f"mean and range of {seeds} seeds"] if seeds > 1 else []
    titles += [f"from {AXES[axis]} {min(starts):,.4g} on" if axis == "step" else
               f"without the first {min(starts):,.4g} {AXES[axis]}"] if cut else []  # fmt: skip
    titles += [f"{study.baseline} and the best {len(shown) - 1} of {others} others"] if others >= len(shown) else []
    what, of = ("val/bpc", "bits per character") if study.bits else ("val/loss", "nats per token")
    ylabel = f"{what}{' of some windows' if windows else ''}\n({of})"
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
    """Every comparison's mean difference with its interval; differences within the shaded ±delta count as none.

    A panel for each factor, one for interactions and one for the variants; what is undecided comes last in each.
    """
    panels: dict[str, list[Comparison]] = {}
    for c in study.comparisons:
        if c.judgement.n:
            panels.setdefault(c.factor if c.kind != "variant" else "variants", []).append(c)
    panels = {name: panels[name] for name in sorted(panels, key=lambda name: (name == "variants", " x " in name))}
    for name, rows in panels.items():
        panels[name] = sorted(rows, key=lambda c: (c.judgement.verdict == "undecided", c.judgement.mean))[:MOST_ROWS]
    titles = ["\n".join(wrap(f"{name}, against {rows[0].that}" if len({c.that for c in rows}) == 1 else name, 34))
              for name, rows in panels.items()]  # fmt: skip
    heights = [0.45 + 0.2 * title.count("\n") + 0.3 * len(rows)
               for title, rows in zip(titles, panels.values(), strict=True)]  # fmt: skip
    figure = Figure(figsize=(WIDTH, 0.9 + sum(heights)), layout="constrained")
    everything = [c for rows in panels.values() for c in rows]
    largest = max(abs(x) for c in everything for x in c.differences.values())
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, title, rows in zip(grid, titles, panels.values(), strict=True):
        axes.axvspan(-study.delta, study.delta, color=VERDICT_COLORS["equal"], alpha=0.12, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        for y, c in enumerate(rows):
            j, color = c.judgement, VERDICT_COLORS[c.judgement.verdict]
            seeds = list(c.differences.values())
            axes.plot(seeds, [y] * len(seeds), "|", color=color, alpha=0.55, markersize=7)
            axes.plot([j.low, j.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot(j.mean, y, "o" if c.kind == "variant" else "s", color=color, markersize=5.5)
        axes.set_yticks(range(len(rows)), [c.this for c in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(title)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    if largest > 20 * study.delta and len(everything) > 1:  # a variant that hardly learned must not hide the others
        axes.set_xscale("symlog", linthresh=study.delta)
        axes.minorticks_off()
        top = 10.0 ** math.floor(math.log10(largest))
        axes.set_xticks(ticks := [-top, -study.delta, 0, study.delta, top], [f"{x:g}" for x in ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    low, high = (edge(x for c in everything for x in (*c.differences.values(), c.judgement.low, c.judgement.high)
                      if math.isfinite(x)) for edge in (min, max))  # fmt: skip
    room = 1.15 if axes.get_xscale() == "symlog" else 1.05  # markers are drawn whole
    axes.set_xlim(min(low * room, -1.2 * study.delta), max(high * room, 1.2 * study.delta))
    figure.supxlabel(f"difference in {study.measure.axis}\n← better · worse →", fontsize="medium")
    return figure


def heat_map(study: Study, rows: Factor, columns: Factor) -> Figure:
    """The mean loss of every pair of levels, averaged over any other factors."""
    table = variants_table(study).pivot_table(study.measure.column, rows.name, columns.name)
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
    figure.colorbar(image, ax=axes, label=study.measure.title, extend=beyond)
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
    axes.set(xlabel=factor.name, ylabel=study.measure.axis)
    if any(lines):
        _legend(figure)
    return figure


def loss_against_time(study: Study) -> Figure:
    """Loss against seconds of training: the mean of each chosen variant, with the standard deviations of both."""
    figure, axes = _figure(3.7)
    for variant, look in zip(chosen(study), looks(study).values(), strict=True):
        seconds = np.array([run.result.get("seconds", math.nan) for run in variant.runs.values()])
        values = np.array(losses(variant, study.metric))
        errors = (seconds.std(ddof=1), values.std(ddof=1)) if len(values) > 1 else (0.0, 0.0)
        axes.errorbar(seconds.mean(), values.mean(), errors[1], errors[0], "o", color=look["color"],
                      label=variant.label, capsize=2, fillstyle="full" if look["linestyle"] == "-" else "none")
    axes.set(xlabel="seconds of training", ylabel=study.measure.axis,
             title="mean and standard deviation of the seeds")  # fmt: skip
    _legend(figure)
    return figure


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, *entries: Any) -> None:
    figure.legend(*entries, loc="outside lower left", ncols=2, handlelength=2.6)
