"""Figures of what was measured inside a model: layers by steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from gptexp.records import Measurement

UNITS = {
    "grad_norm": "L2 norm", "update_ratio": "|change| / |parameters|", "activation_rms": "root mean square",
    "attention_entropy": "nats", "max_attention_logit": "logit", "max_logit": "|logit|", "saturated": "fraction",
    "mean_drift": "batch deviations", "std_drift": "fraction",
}  # fmt: skip
"""Units of the quantities of diagnostics.csv, in the order in which they are drawn."""

DECADES = 1.0
"""Values that span more of them are drawn on a logarithmic scale."""

ROW, LEAST, GAP, TOP = 0.19, 0.8, 0.85, 0.65  # inches: a layer, a panel, between panels, above the first


def plot_diagnostics(rows: Sequence[Measurement], title: str, path: Path) -> None:
    """Draw a heat map of layers by steps for each quantity.

    Args:
        rows: of diagnostics.csv; layers are drawn in the order in which they appear there.
        title: the run's name.
        path: of the PNG to write; without rows none is written.
    """
    tables = {name: _table([row for row in rows if row.quantity == name]) for name in UNITS}
    columns: list[list[str]] = [[], []]
    heights = [0.0, 0.0]
    for name, (layers, _, _) in tables.items():  # each into the shorter column
        if layers:
            shorter = heights.index(min(heights))
            columns[shorter].append(name)
            heights[shorter] += _height(layers) + GAP
    if not any(columns):
        return
    columns = [names for names in columns if names]
    total = TOP + max(heights) - 0.3
    figure = Figure(figsize=(7 * len(columns), total))
    FigureCanvasAgg(figure)
    figure.suptitle(title, y=1 - 0.1 / total, va="top")
    for column, names in enumerate(columns):
        top = total - TOP
        for name in names:
            height = _height(tables[name][0])
            box = ((column + 0.24) / len(columns), (top - height) / total, 0.6 / len(columns), height / total)
            _heat_map(figure.add_axes(box), name, *tables[name])
            top -= height + GAP
    figure.savefig(path, dpi=120)


def _height(layers: list[str]) -> float:
    return max(LEAST, ROW * len(layers))


def _table(rows: Sequence[Measurement]) -> tuple[list[str], list[int], NDArray[np.float64]]:
    """Layers, steps, and their values: (layers, steps), nan where nothing was measured."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    steps = sorted({row.step for row in rows})
    places = {layer: i for i, layer in enumerate(layers)}, {step: i for i, step in enumerate(steps)}
    values = np.full((len(layers), len(steps)), np.nan)
    for row in rows:
        values[places[0][row.layer], places[1][row.step]] = row.value
    return layers, steps, values


def _heat_map(axes: Axes, name: str, layers: list[str], steps: list[int], values: NDArray[np.float64]) -> None:
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    edges = [*steps, steps[-1] + width]  # a measurement stands from its step to the next one's
    shown: Any = np.ma.masked_invalid(values)
    norm = _scale(shown)
    axes.set_facecolor("0.8")  # what is missing, or not finite
    image = axes.pcolormesh(edges, np.arange(len(layers) + 1), shown, norm=norm, cmap="viridis")
    axes.set(yticks=np.arange(len(layers)) + 0.5, yticklabels=layers)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("step", fontsize=8, labelpad=1)
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    assert axes.figure is not None
    x, y, w, h = axes.get_position().bounds
    bar = axes.figure.add_axes((x + w * 1.03, y, w * 0.03, h))
    ticks = sorted({float(t) for t in norm.inverse(np.array([0.0, 0.5, 1.0]))})
    labels = next(words for n in range(2, 18) if len(set(words := [f"{t:.{n}g}" for t in ticks])) == len(ticks))
    axes.figure.colorbar(image, cax=bar, ticks=ticks)
    bar.minorticks_off()
    bar.set_yticklabels(labels, fontsize=7)
    bar.set_ylabel(UNITS[name] + (" (log)" if isinstance(norm, LogNorm) else ""), fontsize=8)


def _scale(values: Any) -> Normalize:
    if not values.count():
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    return LogNorm(low, high) if low > 0 and np.log10(high / low) > DECADES else Normalize(low, high)
