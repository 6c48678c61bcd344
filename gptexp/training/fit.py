"""Trains the model of a run directory, from its start or from its last checkpoint.

`_fit` shows every step in order: data, module, callbacks, loggers, trainer, result.
"""

import logging
import math
import platform
import signal
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar
from lightning.pytorch.loggers import Logger
from rich.console import Console

from gptexp.audits.influence import Share, train_mode
from gptexp.config.schema import Config
from gptexp.data.datamodule import CharDataModule
from gptexp.errors import Diverged, Interrupted, Stopped, UserError
from gptexp.loggers.metrics_csv import MetricsCSV
from gptexp.perf import mkl_kernels
from gptexp.processes.group import Processes
from gptexp.runs.files import EXACT_MATCH
from gptexp.runs.run import Run, Status
from gptexp.training.callbacks.checkpoints import RunCheckpoints
from gptexp.training.callbacks.diagnostics import Diagnostics
from gptexp.training.callbacks.divergence import Divergence
from gptexp.training.callbacks.evaluations import Evaluations
from gptexp.training.callbacks.interruption import Interruption
from gptexp.training.callbacks.progress import ProgressReport
from gptexp.training.callbacks.pruning import Pruning, Watch
from gptexp.training.callbacks.samples import Samples
from gptexp.training.callbacks.slowdown import SlowdownWarning
from gptexp.training.callbacks.throughput import Throughput
from gptexp.training.callbacks.time_budget import TimeBudget
from gptexp.training.hardware import describe_device, peak_flops, thread_count, trainer_arguments, world_size
from gptexp.training.load import load_data, read_checkpoint
from gptexp.training.loggers import opened_loggers
from gptexp.training.module import GPTModule
from gptexp.training.objects import build
from gptexp.training.recording import recorded
from gptexp.training.results import leave_results
from gptexp.training.transfer import freeze, initialize_from

log = logging.getLogger("gptexp")


def fit(run: Run, processes: Processes, watch: Watch | None = None, quiet: bool = False) -> float:
    """Train a run to its end, from its start or its last checkpoint, and write its results.

    The function `watch` is called with the step and loss of each evaluation, and may prune the run.

    Returns:
        the lowest validation loss, in nats per token; nan for a run that diverged before its first evaluation.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; the run is saved and marked "interrupted".
        UserError: for a mistake in the settings, the data or the checkpoint.
    """
    with recorded(run, processes):
        return _fit(run, run.config, processes, watch, quiet)


def _fit(run: Run, config: Config, processes: Processes, watch: Watch | None, quiet: bool) -> float:
    if problem := mkl_kernels.choose(config.hardware.fast_mkl):
        raise UserError(problem)
    world_size(config, processes)  # refuses a machine that has fewer devices than when the run began
    resuming = _checkpoint_to_resume(run, config)

    data = load_data(run, config)
    module = GPTModule(config.sized(data.vocab_size), config.optimizer, config.schedule, seed=config.seed,
                       chars_per_token=data.chars_per_token, exact_match=data.task.exact_match)  # fmt: skip
    told = ""
    if config.init_from and resuming is None:
        told = initialize_from(module.model, data.encoded.tokenizer, run.info["init_from"])
    freeze(module.model, config.trainable)
    before = run.info.get("device", {}).get("threads")
    torch.set_num_threads(thread_count(module.model, config, processes.per_node, before))
    if config.hardware.compile:
        # Training has one shape of batches; the last, smaller one of an evaluation must not make that dynamic.
        module.model.compile(dynamic=False, mode="reduce-overhead" if config.hardware.compile == "graphs" else None)
    share = train_mode(module.model.config)  # on all ranks: some norms sum over them
    if processes.first:
        _introduce(run, config, data, module, processes, share)
        if told:
            log.info("%s", told)
        for path in run.growing if resuming is None else ():
            path.unlink(missing_ok=True)

    record = MetricsCSV(run.metrics_path, *([EXACT_MATCH] if data.task.exact_match else []))
    callbacks = _callbacks(run, config, processes, data, module, record, watch, quiet)
    with opened_loggers(run, config, module) as loggers:
        loggers.append(record)  # last, so that `trainer.logger` is the user's
        trainer = make_trainer(config, processes, loggers, callbacks, run.path)
        status, stopped_by = _train(trainer, module, data, resuming)
        if config.trainer.profiler and processes.first:
            log.info("%s", trainer.profiler.summary())
        record.flush()
        best = leave_results(run, status, trainer) if processes.first else math.nan
    if stopped_by is not None:
        raise Interrupted(stopped_by)
    return best


def _train(
    trainer: Trainer, module: GPTModule, data: CharDataModule, resuming: Path | None
) -> tuple[Status, int | None]:
    """Train to the end; returns the run's status, and the signal if one interrupted it."""
    try:
        trainer.fit(module, data, ckpt_path=resuming, weights_only=True)
        if data.eval_windows is not None:  # training evaluated only some windows; now evaluate all
            trainer.validate(module, data, verbose=False)
    except Stopped as stop:
        return "interrupted", stop.signal
    except Diverged:
        return "diverged", None
    except SystemExit as stop:  # what Lightning makes of a second Ctrl-C
        raise KeyboardInterrupt from stop
    pruned = any(isinstance(callback, Pruning) and callback.pruned for callback in trainer.callbacks)
    return "pruned" if pruned else "done", None


def make_trainer(
    config: Config, processes: Processes, loggers: list[Logger], callbacks: list[Callback], folder: Path
) -> Trainer:
    """Lightning's Trainer, built from the settings.

    Raises:
        UserError: when it refuses its arguments.
    """
    try:
        return Trainer(**trainer_arguments(config, processes), logger=loggers or False, callbacks=callbacks,
                       default_root_dir=folder)  # fmt: skip
    except Exception as error:
        raise UserError(f"trainer: {str(error).strip().splitlines()[0]}") from error


def _callbacks(
    run: Run, config: Config, processes: Processes, data: CharDataModule, module: GPTModule,
    record: MetricsCSV, watch: Watch | None, quiet: bool,
) -> list[Callback]:  # fmt: skip
    """Our callbacks and the user's; those that save and interrupt come last."""
    monitor = "val/loss" if config.eval_windows is None else "val/loss_windows"
    interval = config.checkpoint_interval or config.eval_interval
    checkpoints = RunCheckpoints(run, record, config.fingerprint(), monitor, interval)
    # Slurm's warning before a job's time is up; srun hands it to all processes.
    warning = [signal.SIGUSR1] if config.hardware.cluster == "slurm" else []
    folder = checkpoints.dirpath
    own = [build(f"callbacks.{name}", entry, dirpath=folder) for name, entry in config.callbacks.items()]
    silent = any(isinstance(callback, ProgressBar) for callback in own) or config.trainer.enable_progress_bar is False
    loss = "loss that sees later tokens" if run.sees_later_tokens else "loss"

    clock = Throughput(record, module.model.flops_per_token(), lambda: peak_flops(config, processes.world_size))
    callbacks: list[Callback] = [Evaluations()]
    if config.max_seconds:
        callbacks.append(TimeBudget(config.max_seconds, clock))
    if config.diagnostics_interval:
        callbacks.append(Diagnostics(run, config.diagnostics_interval))
    callbacks += [clock, SlowdownWarning(), Divergence(monitor, interval)]
    if config.sample_tokens and config.hardware.strategy != "fsdp":  # under FSDP no process holds the whole model
        callbacks.append(Samples(run, config, data))
    if not silent:
        callbacks.append(ProgressReport(run.info["name"], monitor, loss, Console(quiet=quiet)))
    if watch:
        callbacks.append(Pruning(watch, monitor))
    if config.early_stop_patience:
        callbacks.append(EarlyStopping(monitor, patience=config.early_stop_patience))
    return [*callbacks, *own, checkpoints, Interruption(checkpoints, warning)]


def _checkpoint_to_resume(run: Run, config: Config) -> Path | None:
    """The last checkpoint; None for a run that has none, or only that of the untrained model, which begins anew."""
    last = run.checkpoint("last")
    if not last.exists() and not run.info.get("resumable"):
        return None
    checkpoint = read_checkpoint(last, f"resume={run.path}")
    if checkpoint["gptexp"]["config"] not in run.fingerprints:
        raise UserError(f"resume={run.path}: {last} belongs to another configuration than {run.path / 'config.yaml'}")
    return last if checkpoint["global_step"] else None


def _introduce(
    run: Run, config: Config, data: CharDataModule, module: GPTModule, processes: Processes, share: Share
) -> None:
    """Record and log what trains the run."""
    device, before = describe_device(config, processes), run.info.get("device", {}).get("devices", processes.world_size)
    if before != processes.world_size:
        log.warning("%s: trained by %d processes so far, now by %d: last digits and dropout differ from an unbroken "
                    "run's", run.path, before, processes.world_size)  # fmt: skip
    parameters = module.model.n_params
    versions = {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, lightning, np)}}
    run.update(
        status="running", error=None, device=device, versions=versions, parameters=parameters,
        train_loss={"sees_later_tokens": share.looks_ahead, "sees_other_sequences": share.couples},
    )  # fmt: skip
    log.info(
        "%s · %s parameters · %s · %s x %s, %s", run.path, f"{parameters:,}", _learned_from(run, data),
        processes.world_size, device["name"], device["precision"],
    )  # fmt: skip
    if run.info["data"]["corpus"] == "file":
        log.info("%s: %s", run.info["data"]["path"], data.summary())
    if share.looks_ahead:
        log.warning("%s: in training, this variant's loss sees the tokens that it predicts; judge it by val/loss",
                    config.model.label)  # fmt: skip


def _learned_from(run: Run, data: CharDataModule) -> str:
    """A few words on the data."""
    corpus, tokens = run.info["data"]["corpus"], f"{len(data.encoded.ids):,} tokens"
    return f"task={data.task.name}" if corpus == "none" else f"{corpus}, {tokens}"
