"""The loggers of a run: opened, told what the run is, and closed with the right outcome."""

import logging
import os
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.utils import get_class
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gptexp.config import Config
from gptexp.loggers.media import log_settings
from gptexp.loggers.wandb import WandbLogger as OurWandbLogger
from gptexp.runs import Run
from gptexp.tracking import close_wandb
from gptexp.training.module import GPTModule
from gptexp.training.objects import IDENTITIES, build, parameters

log = logging.getLogger("gptexp")


def open_loggers(run: Run, config: Config, module: GPTModule, loggers: list[Logger]) -> None:
    """Open the loggers of the configuration, add them to `loggers`, and log the settings.

    A service that keeps runs of its own, as W&B and MLflow do, gives each an id. It is kept in run.json, so that a
    resumed run goes on in the same one. With `trainer.fast_dev_run` Lightning records nothing, so none is opened.

    Raises:
        UserError: when one refuses its arguments; those before it are in `loggers`.
    """
    settings = replace(config, model=module.model.config).essence()  # which knows the size of the vocabulary
    for name, entry in config.logger.items() if not config.trainer.fast_dev_run else ():
        cls = get_class(entry["_target_"])
        key = next((k for k in IDENTITIES if k in parameters(cls)), None)
        given = next((entry[k] for k in ("version", *IDENTITIES) if entry.get(k)), None) if key else None
        known = given or run.info.get("loggers", {}).get(name)
        identity, options = known, dict(entry)
        lock: AbstractContextManager[Any] = nullcontext()
        if issubclass(cls, WandbLogger):
            identity = known or _agents_id(run) or uuid.uuid4().hex[:12]
            options |= _wandb_options(run, config, entry)
            _keep(run, name, identity)  # before the run begins there, so that it is found again however this ends
        elif issubclass(cls, MLFlowLogger):
            folder = Path(config.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".mlflow.lock")  # of two runs that make an experiment at once, one would fail
            if run.info["group"]:
                options["tags"] = {"group": run.info["group"]} | (entry.get("tags") or {})
        own = {key: identity} if key else {}
        with lock:
            logger = build(f"logger.{name}", options, save_dir=run.path, run_name=run.info["name"], **own)
            loggers.append(logger)
            log_settings(logger, settings)
        if isinstance(logger, MLFlowLogger) and known:
            logger.experiment.update_run(logger.run_id, "RUNNING")
        if isinstance(logger, OurWandbLogger) and logger.watched:
            logger.watch(module, log=logger.watched, log_freq=config.log_interval, log_graph=False)
        if key and isinstance(logger.version, str):
            _keep(run, name, logger.version)


def close_loggers(loggers: list[Logger], succeeded: bool) -> None:
    """Close loggers, some of which Lightning has closed before, and wait until everything is where it belongs."""
    for logger in loggers:
        try:
            logger.finalize("success" if succeeded else "failed")
            if isinstance(logger, WandbLogger) and rank_zero_only.rank == 0:
                close_wandb(logger.experiment, succeeded)
        except Exception as error:  # the run is over, and its results are written
            log.warning("%s: %s", type(logger).__name__, str(error).split("\n")[0])


def _wandb_options(run: Run, config: Config, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of a W&B run leave to its run."""
    info = run.info
    groups = (entry.get("group"), info["group"], os.environ.get("WANDB_RUN_GROUP"), os.environ.get("WANDB_SWEEP_ID"))
    return {
        "name": entry.get("name") or info["name"], "group": next(filter(None, groups), None),
        "tags": [*config.model.tags, info["data"]["corpus"], *(entry.get("tags") or [])],
    }  # fmt: skip


def _agents_id(run: Run) -> str | None:
    """The id that a W&B agent, which watches it, gives a run; the jobs of a sweep of ours have ids of their own."""
    return os.environ.get("WANDB_RUN_ID") if run.info["group"] is None else None


def _keep(run: Run, name: str, identity: str) -> None:
    known = run.info.get("loggers", {})
    if rank_zero_only.rank == 0 and known.get(name) != identity:
        run.update(loggers=known | {name: identity})
