"""Texts, pictures and final figures for the loggers that can take them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


def log_samples(logger: Logger, samples: Sequence[tuple[int, str]]) -> None:
    """Log the newest of a run's sampled texts; to W&B all of them, as one table.

    Args:
        logger: any; one that takes no text is left alone.
        samples: steps and texts, oldest first.
    """
    step, text = samples[-1]
    match logger:
        case WandbLogger():
            logger.log_text("samples", columns=["step", "text"], data=[list(row) for row in samples], step=step)
        case TensorBoardLogger():
            logger.experiment.add_text("samples", "\n".join(f"    {line}" for line in text.split("\n")), step)
        case MLFlowLogger():
            logger.experiment.log_text(logger.run_id, text, f"samples/{step:08d}.txt")


def log_figure(logger: Logger, path: Path, step: int) -> None:
    """Log a picture under the name of its file.

    Args:
        logger: any; one that takes no picture is left alone.
        path: a PNG file.
        step: optimizer steps done.
    """
    match logger:
        case WandbLogger():
            logger.log_image(path.stem, [str(path)], step=step)
        case TensorBoardLogger():
            from matplotlib.image import imread

            logger.experiment.add_image(path.stem, imread(path)[..., :3], step, dataformats="HWC")
        case MLFlowLogger():
            logger.experiment.log_artifact(logger.run_id, str(path))


def log_summary(logger: Logger, values: Mapping[str, Any]) -> None:
    """Log what stands for the whole run.

    Args:
        logger: any; one that keeps no summary is left alone.
        values: numbers and texts by name.
    """
    match logger:
        case WandbLogger():
            logger.experiment.summary.update(dict(values))
        case TensorBoardLogger():
            rows = [f"| {name} | {value} |" for name, value in values.items()]
            logger.experiment.add_text("summary", "\n".join(["| | |", "|---|---|", *rows]))
        case MLFlowLogger():
            for name, value in values.items():
                logger.experiment.set_tag(logger.run_id, name, value)
