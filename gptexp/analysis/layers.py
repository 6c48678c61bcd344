"""Figures of what was measured inside a model: layers by steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gptexp.records import Measurement

UNITS = {
    "grad_norm": "L2 norm", "update_ratio": "|change| / |parameters|", "activation_rms": "root mean square",
    "attention_entropy": "nats", "max_attention_logit": "logit", "max_logit": "|logit|", "saturated": "fraction",
    "mean_drift": "batch deviations", "std_drift": "fraction",
}  # fmt: skip
"""Units of the quantities of diagnostics.csv, in the order in which they are drawn."""

DECADES = 1.0
"""Values that span more of them are drawn on a logarithmic scale."""


def plot_diagnostics(rows: Sequence[Measurement], title: str, path: Path) -> None:
    """Draw a heat map of layers by steps for each quantity.

    Args:
        rows: of diagnostics.csv; layers are drawn in the order in which they appear there.
        title: the run's name.
        path: of the PNG to write; without rows none is written.
    """
    measured = pd.DataFrame(rows, columns=Measurement._fields)
    columns: list[list[tuple[str, pd.DataFrame]]] = [[], []]
    for name in UNITS:
        of_it = measured[measured["quantity"] == name]
        if len(of_it):
            table = of_it.pivot(index="layer", columns="step", values="value").loc[of_it["layer"].unique()]
            min(columns, key=_height).append((name, table))  # into the shorter column
    columns = [column for column in columns if column]
    if not columns:
        return
    figure = Figure(figsize=(7 * len(columns), 0.5 + max(map(_height, columns))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column in zip(parts, columns, strict=True):
        heights = [_height([panel]) for panel in column]
        for axes, panel in zip(part.subplots(len(column), 1, height_ratios=heights, squeeze=False)[:, 0], column,
                               strict=True):  # fmt: skip
            _heat_map(axes, *panel)
    figure.savefig(path, dpi=120)


def _height(column: Sequence[tuple[str, pd.DataFrame]]) -> float:
    """Of some panels, one above the other, in inches."""
    return sum(max(0.8, 0.19 * len(table)) + 0.85 for _, table in column)


def _heat_map(axes: Axes, name: str, table: pd.DataFrame) -> None:
    steps = table.columns.tolist()
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    edges = [*steps, steps[-1] + width]  # a measurement stands from its step to the next one's
    shown: Any = np.ma.masked_invalid(table.to_numpy())
    norm = _scale(shown)
    axes.set_facecolor("0.8")  # what is missing, or not finite
    image = axes.pcolormesh(edges, np.arange(len(table) + 1), shown, norm=norm, cmap="viridis")
    axes.set(yticks=np.arange(len(table)) + 0.5, yticklabels=table.index)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("step", fontsize=8, labelpad=1)
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    ticks = sorted({float(t) for t in norm.inverse(np.array([0.0, 0.5, 1.0]))})
    labels = next(words for n in range(2, 18) if len(set(words := [f"{t:.{n}g}" for t in ticks])) == len(ticks))
    bar = axes.figure.colorbar(image, ax=axes, ticks=ticks, fraction=0.03, pad=0.02)
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels(labels, fontsize=7)
    bar.set_label(UNITS[name] + (" (log)" if isinstance(norm, LogNorm) else ""), fontsize=8)


def _scale(values: Any) -> Normalize:
    if not values.count():
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    return LogNorm(low, high) if low > 0 and np.log10(high / low) > DECADES else Normalize(low, high)
