"""Figures of one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gptexp.runs.files import Measurement

UNITS = {
    "grad_norm": "L2 norm", "update_ratio": "|change| / |parameters|", "activation_rms": "root mean square",
    "attention_entropy": "nats", "max_attention_logit": "logit", "max_logit": "|logit|", "saturated": "fraction",
    "mean_drift": "batch deviations", "std_drift": "fraction",
}  # fmt: skip
"""Units of the quantities of diagnostics.csv, in the order in which they are drawn."""


def plot_curves(rows: Sequence[Mapping[str, float]], title: str, path: Path, sees_later_tokens: bool = False) -> None:
    """Draw training and validation loss over the steps as a PNG.

    Args:
        rows: of metrics.csv, losses in nats per token.
        title: of the figure.
        path: of the file.
        sees_later_tokens: the training loss does; the legend says so.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    what = "sees later tokens" if sees_later_tokens else "batch"
    styles: dict[str, dict[str, Any]] = {
        "train/loss": {"label": f"train/loss ({what})", "linewidth": 0.8, "alpha": 0.6},
        "val/loss": {"label": "val/loss", "marker": "o", "markersize": 4},
        "val/loss_windows": {"label": "val/loss (some windows)", "marker": ".", "linestyle": ":"},
    }
    for column, style in styles.items():
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    if axes.lines:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_influence(maps: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw how strongly each prediction depends on each token, a row of panels for each mode, as a PNG.

    By mode ("train", "eval"), the maps have "own" and "others": (L, L) arrays of |d logits_t / d x_s|, within a
    sequence and across the batch.
    """
    figure = Figure(figsize=(9, 0.9 + 4 * max(1, len(maps))), layout="constrained")
    figure.suptitle(f"{title}: |d logits(t) / d x(s)|; white is exactly 0, later tokens are above the diagonal")
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

    Layers are drawn in the order in which they appear in the rows. What is missing or not finite is gray.
    """
    measured = dict(iter(pd.DataFrame(rows, columns=Measurement._fields).groupby("quantity")))
    tables = {name: measured[name].pivot_table("value", "layer", "step", sort=False, dropna=False)
              for name in UNITS if name in measured}  # fmt: skip
    if not tables:
        return
    heights = [0.85 + max(0.8, 0.19 * len(table)) for table in tables.values()]
    figure = Figure(figsize=(8, 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        shown: Any = np.ma.masked_invalid(table.to_numpy())
        wide = shown.count() and shown.min() > 0 and shown.max() > 10 * shown.min()
        axes.set_facecolor("0.8")
        steps = table.columns.tolist()
        edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
        image = axes.pcolormesh(edges, range(len(table) + 1), shown, norm="log" if wide else "linear")
        axes.set_yticks(np.arange(len(table)) + 0.5, table.index, fontsize=7)
        axes.set(title=name, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.invert_yaxis()
        figure.colorbar(image, ax=axes, label=UNITS[name] + (" (log)" if wide else ""))
    figure.savefig(path, dpi=120)
