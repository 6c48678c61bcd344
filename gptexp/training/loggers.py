"""The loggers of a run: opened, given its settings, and closed with its outcome."""

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.utils import get_class
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gptexp.config.schema import Config
from gptexp.loggers.media import log_settings
from gptexp.loggers.wandb import WandbLogger as OurWandbLogger
from gptexp.loggers.wandb_run import close_wandb
from gptexp.runs.run import Run
from gptexp.training.module import GPTModule
from gptexp.training.objects import IDENTITIES, build, parameters

log = logging.getLogger("gptexp")


@contextmanager
def opened_loggers(run: Run, config: Config, module: GPTModule) -> Iterator[list[Logger]]:
    """Open the loggers of the configuration and log the settings; close them at the end, with those added to the list.

    With `trainer.fast_dev_run` Lightning records nothing, so none is opened.

    Raises:
        UserError: when one refuses its arguments.
    """
    loggers: list[Logger] = []
    try:
        for name, entry in config.logger.items() if not config.trainer.fast_dev_run else ():
            _open(run, config, module, name, entry, loggers)
        yield loggers
    finally:
        succeeded = run.info["status"] in ("done", "pruned")
        for logger in loggers:  # some of which Lightning has closed before
            try:
                logger.finalize("success" if succeeded else "failed")
                if isinstance(logger, WandbLogger) and rank_zero_only.rank == 0:
                    close_wandb(logger.experiment, succeeded)
            except Exception as error:  # the run is over, and its results are written
                log.warning("%s: %s", type(logger).__name__, str(error).split("\n")[0])


def _open(
    run: Run, config: Config, module: GPTModule, name: str, entry: Mapping[str, Any], loggers: list[Logger]
) -> None:
    """Open a logger, add it to the others, and log the settings.

    W&B and MLflow keep runs of their own, each with an id. run.json holds it, so that a resumed run continues in it.
    """
    cls = get_class(entry["_target_"])
    key = next((k for k in IDENTITIES if k in parameters(cls)), None)
    given = next((entry[k] for k in ("version", *IDENTITIES) if entry.get(k)), None) if key else None
    known = given or run.info.get("loggers", {}).get(name)
    identity, options, group = known, dict(entry), run.info["group"]
    lock: AbstractContextManager[Any] = nullcontext()
    if issubclass(cls, WandbLogger):
        # A W&B agent watches the run of its own id; the jobs of a sweep of ours have theirs.
        agents = os.environ.get("WANDB_RUN_ID") if group is None else None
        identity = known or agents or uuid.uuid4().hex[:12]
        groups = (entry.get("group"), group, os.environ.get("WANDB_RUN_GROUP"), os.environ.get("WANDB_SWEEP_ID"))
        options |= {
            "name": entry.get("name") or run.info["name"], "group": next(filter(None, groups), None),
            "tags": [*config.model.tags, run.info["data"]["corpus"], *(entry.get("tags") or [])],
        }  # fmt: skip
        _keep(run, name, identity)  # before the run begins there, so that it is found again however this ends
    elif issubclass(cls, MLFlowLogger):
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".mlflow.lock")  # of two runs that make an experiment at once, one would fail
        if group:
            options["tags"] = {"group": group} | (entry.get("tags") or {})
    own = {key: identity} if key else {}
    settings = replace(config, model=module.model.config).essence()  # which knows the size of the vocabulary
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


def _keep(run: Run, name: str, identity: str) -> None:
    known = run.info.get("loggers", {})
    if rank_zero_only.rank == 0 and known.get(name) != identity:
        run.update(loggers=known | {name: identity})
