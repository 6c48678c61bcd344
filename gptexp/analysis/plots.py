"""Figures of runs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_curves(rows: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Draw training and validation loss, in nats a token, over the steps.

    Args:
        rows: of metrics.csv; each holds the columns that have a value.
        title: the run's name.
        path: of the PNG to write.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for column, label, style in (
        ("train/loss", "train/loss (batch)", {"linewidth": 0.8, "alpha": 0.6}),
        ("val/loss", "val/loss", {"marker": "o", "markersize": 4}),
        ("val/loss_windows", "val/loss (some windows)", {"marker": ".", "linestyle": ":"}),
    ):
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
