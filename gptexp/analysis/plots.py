"""Figures of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gptexp.records import Measurement

Rows = Sequence[dict[str, float]]  # of metrics.csv

UNITS = {
    "grad_norm": "L2 norm", "update_ratio": "|change| / |parameters|", "activation_rms": "root mean square",
    "attention_entropy": "nats", "max_attention_logit": "logit", "max_logit": "|logit|", "saturated": "fraction",
    "mean_drift": "batch deviations", "std_drift": "fraction",
}  # fmt: skip
"""Units of the quantities of diagnostics.csv, in the order in which they are drawn."""


def plot_curves(rows: Rows, title: str, path: Path, sees_later_tokens: bool = False) -> None:
    """Draw training and validation loss, in nats per token, over the steps, as a PNG.

    With `sees_later_tokens` the legend says so of the training loss.
    """
    what = "sees later tokens" if sees_later_tokens else "batch"
    _draw(title, path, [
        (rows, "train/loss", {"label": f"train/loss ({what})", "linewidth": 0.8, "alpha": 0.6}),
        (rows, "val/loss", {"label": "val/loss", "marker": "o", "markersize": 4}),
        (rows, "val/loss_windows", {"label": "val/loss (some windows)", "marker": ".", "linestyle": ":"}),
    ])  # fmt: skip


def plot_runs(runs: Mapping[str, Rows], path: Path) -> None:
    """Draw the validation loss of several runs by name, in nats per token, over the steps, as a PNG."""
    _draw("val/loss", path, [(rows, "val/loss", {"label": name, "marker": "o", "markersize": 3})
                             for name, rows in runs.items()])  # fmt: skip


def _draw(title: str, path: Path, lines: Sequence[tuple[Rows, str, dict[str, Any]]]) -> None:
    """Draw a column of each of some tables over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    for rows, column, style in lines:
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    if 0 < len(axes.lines) <= 12:  # more names than that would leave no room for the lines
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_influence(maps: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw how strongly each prediction depends on each token, a row of panels for each mode, as a PNG.

    By mode ("train", "eval"), the maps have "own" and "others": (L, L) arrays of |d logits_t / d x_s|, within a
    sequence and across the batch.
    """
    figure = Figure(figsize=(9, 0.9 + 4 * max(1, len(maps))), layout="constrained")
    figure.suptitle(f"{title}: |d logits(t) / d x(s)|; white is exactly 0, above the diagonal lies the future")
    top = max((float(m.max()) for pair in maps.values() for m in pair.values()), default=1.0) or 1.0
    panels: Any = figure.subplots(len(maps), 2, squeeze=False) if maps else []
    kinds = (("own", "the same sequence"), ("others", "the other sequences"))
    for row, (mode, pair) in zip(panels, maps.items(), strict=True):
        for axes, (kind, words) in zip(row, kinds, strict=True):
            image = axes.imshow(pair[kind], norm=LogNorm(top * 1e-6, top, clip=False), cmap="viridis")
            axes.set(title=f"{mode} mode, {words}", xlabel="token s", ylabel="prediction t")
        figure.colorbar(image, ax=row, shrink=0.7)
    figure.savefig(path, dpi=100)


def plot_diagnostics(rows: Sequence[Measurement], title: str, path: Path) -> None:
    """Draw a heat map of layers by steps for each quantity, as a PNG; without rows none is written.

    Layers are drawn in the order in which they appear in the rows.
    """
    measured = dict(iter(pd.DataFrame(rows, columns=Measurement._fields).groupby("quantity")))
    names = [name for name in UNITS if name in measured]
    if not names:
        return
    tables = [measured[n].pivot(index="layer", columns="step", values="value").loc[measured[n]["layer"].unique()]
              for n in names]  # fmt: skip
    heights = [0.85 + max(0.8, 0.19 * max(map(len, tables[i : i + 2]))) for i in range(0, len(tables), 2)]
    figure = Figure(figsize=(14, 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(heights), 2, height_ratios=heights, squeeze=False).flatten()
    for axes, name, table in zip(panels, names, tables, strict=False):
        _heat_map(axes, name, table)
    for axes in panels[len(tables) :]:
        axes.remove()
    figure.savefig(path, dpi=120)


def _heat_map(axes: Axes, name: str, table: pd.DataFrame) -> None:
    steps = table.columns.tolist()
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    edges = [*steps, steps[-1] + width]  # a measurement stands from its step to the next one's
    shown: Any = np.ma.masked_invalid(table.to_numpy())
    wide = shown.count() and shown.min() > 0 and shown.max() > 10 * shown.min()
    axes.set_facecolor("0.8")  # what is missing, or not finite
    image = axes.pcolormesh(edges, range(len(table) + 1), shown, norm="log" if wide else "linear", cmap="viridis")
    axes.set_yticks(np.arange(len(table)) + 0.5, table.index)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("step", fontsize=8, labelpad=1)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.ax.tick_params(which="both", labelsize=7)
    bar.set_label(UNITS[name] + (" (log)" if wide else ""), fontsize=8)
