"""Where metrics go besides metrics.csv: Weights & Biases, TensorBoard, or nowhere."""

import logging
import netrc
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from gptexp.config import Config
from gptexp.runs import Run
from gptexp.training.settings import TensorBoardConfig, WandbConfig

log = logging.getLogger("gptexp")


def build_loggers(run: Run, config: Config, name: str, group: str | None) -> list[Logger]:
    """The chosen logger, opened; an empty list for logger=none.

    Args:
        run: keeps the id of its W&B run, so that a resumed run goes on in the same one.
        config: the run's configuration.
        name: the run's readable name.
        group: the sweep that the run belongs to, or None.
    """
    match config.logger:
        case WandbConfig():
            return [_wandb(run, config, config.logger, name, group)]
        case TensorBoardConfig():
            return [TensorBoardLogger(run.path, name="", version="tensorboard")]
    return []


def close_loggers(loggers: list[Logger], succeeded: bool) -> None:
    """End the W&B run of this process, if there is one, with the right exit code."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish(exit_code=0 if succeeded else 1)


def summarise(loggers: list[Logger], values: dict[str, Any]) -> None:
    """Add values to the summary of the W&B run."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(values)


class Samples:
    """The sampled texts as one W&B table that grows through the run."""

    def __init__(self, loggers: list[Logger], before: list[tuple[int, str]]) -> None:
        """`before` holds the steps and texts from before the run was resumed."""
        self._loggers = [x for x in loggers if isinstance(x, WandbLogger)]
        self._rows: list[tuple[int, str]] = list(before)

    def add(self, step: int, text: str) -> None:
        """Log the texts so far, this one included."""
        if self._loggers:
            import wandb

            self._rows = [row for row in self._rows if row[0] < step] + [(step, text)]
            for logger in self._loggers:
                table = wandb.Table(columns=["step", "text"], data=self._rows)
                logger.experiment.log({"samples": table, "step": step, "trainer/global_step": step})


def has_api_key() -> bool:
    """Whether W&B can log in without asking: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in places:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _wandb(run: Run, config: Config, settings: WandbConfig, name: str, group: str | None) -> WandbLogger:
    import wandb

    mode: Any = settings.mode if settings.mode != "auto" else os.environ.get("WANDB_MODE", "online")
    if mode == "online" and not has_api_key():  # logging in would ask a question
        if "online" in (settings.mode, os.environ.get("WANDB_MODE")):
            log.warning("W&B has no API key; the run is kept offline")
        mode = "offline"
    identity = run.info.get("wandb_id") or uuid.uuid4().hex[:12]
    run.update(wandb_id=identity)
    options: dict[str, Any] = {
        "project": settings.project,
        "entity": settings.entity,
        "name": name,
        "id": identity,
        "group": settings.group or group,
        "job_type": settings.job_type,
        "notes": settings.notes,
        "tags": [*config.model.tags, run.info["data"]["corpus"], *settings.tags],
        "config": config.tree(),
        "dir": str(run.path),
        "reinit": "finish_previous",
        "settings": wandb.Settings(console="off", silent=True, init_timeout=30),
    }
    if mode != "offline":
        options["resume"] = "allow"
    try:
        experiment = wandb.init(mode=mode, **options)
    except Exception as error:  # an unreachable server must not cost a run
        log.warning("W&B cannot be reached (%s); the run is kept offline", str(error).split("\n")[0])
        options.pop("resume", None)
        experiment = wandb.init(mode="offline", **options)
    experiment.define_metric("step")
    experiment.define_metric("tokens")
    experiment.define_metric("*", step_metric="step")
    for metric in ("loss", "perplexity", "bpc"):
        experiment.define_metric(f"val/{metric}", step_metric="step", summary="min,last")
    experiment.define_metric("val/accuracy", step_metric="step", summary="max,last")
    if experiment.offline:
        log.info("W&B: offline; upload it later with: wandb sync %s", Path(experiment.dir).parent)
    elif not experiment.disabled:
        log.info("W&B: %s", experiment.url)
    return WandbLogger(experiment=experiment, save_dir=str(run.path))
