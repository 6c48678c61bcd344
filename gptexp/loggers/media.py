"""Settings, texts, pictures and final figures for the loggers that can take them.

Lightning's interface covers metrics and settings only, so that each logger takes the rest in its own way. A logger of
another package gets texts and pictures if it has the methods of `MediaLogger`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


@runtime_checkable
class MediaLogger(Protocol):
    """A logger that takes tables of texts, and pictures, as Lightning's WandbLogger does."""

    def log_text(self, key: str, columns: list[str], data: list[list[Any]], *, step: int) -> None:
        """Log a table by its name, its column names and its rows, after `step` optimizer steps."""

    def log_image(self, key: str, images: list[Any], *, step: int) -> None:
        """Log picture files by name and paths, after `step` optimizer steps."""


def log_settings(logger: Logger, values: Mapping[str, Any]) -> None:
    """Log a run's settings, nested, by name. In MLflow a resumed run keeps those it had."""
    if isinstance(logger, MLFlowLogger) and logger.experiment.get_run(logger.run_id).data.params:
        return
    logger.log_hyperparams(dict(values))


def log_samples(logger: Logger, samples: Sequence[tuple[int, str]]) -> None:
    """Log the newest of a run's sampled texts, or all of them if a logger takes a table; does nothing if it takes none.

    The samples are pairs of step and text, oldest first.
    """
    step, text = samples[-1]
    match logger:
        case TensorBoardLogger():
            logger.experiment.add_text("samples", "\n".join(f"    {line}" for line in text.split("\n")), step)
        case MLFlowLogger():
            logger.experiment.log_text(logger.run_id, text, f"samples/{step:08d}.txt")
        case MediaLogger():
            logger.log_text("samples", ["step", "text"], [list(row) for row in samples], step=step)


def log_figure(logger: Logger, path: Path, step: int) -> None:
    """Log a PNG file under its name, after `step` optimizer steps, if the logger takes pictures."""
    match logger:
        case TensorBoardLogger():
            from matplotlib.image import imread

            logger.experiment.add_image(path.stem, imread(path)[..., :3], step, dataformats="HWC")
        case MLFlowLogger():
            logger.experiment.log_artifact(logger.run_id, str(path))
        case MediaLogger():
            logger.log_image(path.stem, [str(path)], step=step)


def log_summary(logger: Logger, values: Mapping[str, Any]) -> None:
    """Log numbers and texts by name that describe the whole run, if the logger keeps a summary."""
    match logger:
        case TensorBoardLogger():
            rows = [f"| {name} | {value} |" for name, value in values.items()]
            logger.experiment.add_text("summary", "\n".join(["| | |", "|---|---|", *rows]))
        case MLFlowLogger():
            for name, value in values.items():
                logger.experiment.set_tag(logger.run_id, name, value)
        case WandbLogger():
            logger.experiment.summary.update(dict(values))
