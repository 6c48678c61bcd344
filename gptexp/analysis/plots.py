"""Figures of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_curves(rows: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Draw training and validation loss, in nats a token, over the steps.

    Args:
        rows: of metrics.csv; each holds the columns that have a value.
        title: the run's name.
        path: of the PNG to write.
    """
    figure, axes = _axes(title)
    _line(axes, rows, "train/loss", label="train/loss (batch)", linewidth=0.8, alpha=0.6)
    _line(axes, rows, "val/loss", label="val/loss", marker="o", markersize=4)
    _line(axes, rows, "val/loss_windows", label="val/loss (some windows)", marker=".", linestyle=":")
    _save(figure, axes, path)


def plot_runs(runs: Mapping[str, Sequence[dict[str, float]]], path: Path) -> None:
    """Draw the validation loss of several runs, in nats a token, over the steps.

    Args:
        runs: rows of metrics.csv by the run's name.
        path: of the PNG to write.
    """
    figure, axes = _axes("val/loss")
    for name, rows in runs.items():
        _line(axes, rows, "val/loss", label=name, marker="o", markersize=3)
    _save(figure, axes, path)


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _line(axes: Axes, rows: Sequence[dict[str, float]], column: str, **style: Any) -> None:
    points = [(row["step"], row[column]) for row in rows if column in row]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    if axes.lines:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
