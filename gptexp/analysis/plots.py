"""Figures of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

Rows = Sequence[dict[str, float]]  # of metrics.csv


def plot_curves(rows: Rows, title: str, path: Path, sees_later_tokens: bool = False) -> None:
    """Draw training and validation loss, in nats a token, over the steps.

    Args:
        rows: of metrics.csv; each holds the columns that have a value.
        title: the run's name.
        path: of the PNG to write.
        sees_later_tokens: say so of the training loss.
    """
    what = "sees later tokens" if sees_later_tokens else "batch"
    _draw(title, path, [
        (rows, "train/loss", {"label": f"train/loss ({what})", "linewidth": 0.8, "alpha": 0.6}),
        (rows, "val/loss", {"label": "val/loss", "marker": "o", "markersize": 4}),
        (rows, "val/loss_windows", {"label": "val/loss (some windows)", "marker": ".", "linestyle": ":"}),
    ])  # fmt: skip


def plot_runs(runs: Mapping[str, Rows], path: Path) -> None:
    """Draw the validation loss of several runs, in nats a token, over the steps.

    Args:
        runs: rows of metrics.csv by the run's name.
        path: of the PNG to write.
    """
    style = {"marker": "o", "markersize": 3}
    _draw("val/loss", path, [(rows, "val/loss", {"label": name, **style}) for name, rows in runs.items()])


def plot_influence(maps: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw how strongly each prediction depends on each token, a row of panels for each mode.

    Args:
        maps: by mode ("train", "eval"), "own" and "others": (L, L) arrays of |d logits_t / d x_s|, within a sequence
            and across the batch.
        title: the variant's name.
        path: of the PNG to write.
    """
    figure = Figure(figsize=(9, 0.9 + 4 * max(1, len(maps))), layout="constrained")
    FigureCanvasAgg(figure)
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


def _draw(title: str, path: Path, lines: Sequence[tuple[Rows, str, dict[str, Any]]]) -> None:
    """Draw a column of each of some tables over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
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
