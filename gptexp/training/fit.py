"""Trains the model of a run directory, from its start or from its last checkpoint."""

import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.console import Console

from gptexp.config import Config
from gptexp.console import LogFile
from gptexp.data.batches import split_corpus
from gptexp.data.corpora import find_corpus
from gptexp.data.datamodule import CharDataModule
from gptexp.data.encoded import Encoded, encode_corpus
from gptexp.data.tokenizer import Tokenizer
from gptexp.errors import Interrupted, UserError
from gptexp.models.influence import train_mode
from gptexp.models.language_model import LanguageModel
from gptexp.models.settings import build_model
from gptexp.perf import mkl_kernels
from gptexp.records import read_samples
from gptexp.runs import Run
from gptexp.training.callbacks.checkpoints import Checkpoints, Interruption
from gptexp.training.callbacks.diagnostics import Diagnostics
from gptexp.training.callbacks.progress import ProgressReport
from gptexp.training.callbacks.recorder import Recorder, Watch
from gptexp.training.checkpoint import read_checkpoint
from gptexp.training.hardware import describe_device, device_count, peak_flops, thread_count, trainer_arguments
from gptexp.training.loggers import Samples, build_loggers, close_loggers
from gptexp.training.module import GPTModule
from gptexp.training.outcome import leave_results, versions

log = logging.getLogger("gptexp")


def fit(run: Run, watch: Watch | None = None) -> float:
    """Train the run to its end and write everything that it leaves behind.

    Args:
        run: a claimed run directory, new or stopped before its end.
        watch: is given the step and loss of each evaluation, and may prune the run.

    Returns:
        the lowest validation loss, in nats a token; nan for a run that diverged before its first evaluation.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; the run is saved and marked "interrupted".
        UserError: for a mistake in the settings, the data or the checkpoint.
    """
    first = "GPTEXP_WORKER" not in os.environ or os.environ["RANK"] == "0"
    with _quiet(), _log_file(run), _status(run) if first else nullcontext():
        return _fit(run, run.config, first, watch)


def _fit(run: Run, config: Config, first: bool, watch: Watch | None) -> float:
    if problem := mkl_kernels.choose(config.hardware.fast_mkl):
        raise UserError(problem)
    encoded = load_data(run, config)
    train, val = split_corpus(encoded, config.data, config.model.block_size)
    devices = device_count(config)
    resuming = _checkpoint_to_resume(run, config)

    model: LanguageModel = build_model(config.sized(encoded.tokenizer.vocab_size), config.seed)
    torch.set_num_threads(thread_count(model, config, devices, run.info.get("device", {}).get("threads")))
    module = GPTModule(model, config, val.chars_per_token)
    if config.hardware.compile:
        model.compile(mode="reduce-overhead" if config.hardware.compile == "graphs" else None)
    data = CharDataModule(
        train,
        val,
        seed=config.seed,
        batch_size=config.batch_size,
        accumulate=config.gradient_accumulation_steps,
        eval_batch_size=config.eval_batch_size,
        eval_windows=config.eval_windows,
    )
    device = describe_device(config, devices)
    name = run.info["name"]
    if first:
        share = train_mode(model.config)
        run.update(
            status="running", error=None, device=device, versions=versions(), parameters=model.n_params,
            train_loss={"sees_later_tokens": share.looks_ahead, "sees_other_sequences": share.couples},
        )  # fmt: skip
        log.info(
            "%s · %s parameters · %s, %s tokens · %s x %s, %s", run.path, f"{model.n_params:,}",
            run.info["data"]["corpus"], f"{len(encoded.ids):,}", devices, device["name"], device["precision"],
        )  # fmt: skip
        if share.looks_ahead:
            log.warning("%s: in training, this variant's loss sees the tokens that it predicts; judge it by val/loss",
                        config.model.label)  # fmt: skip
    loggers = build_loggers(run, config, name, run.info["group"]) if first else []
    samples = Samples(loggers, read_samples(run.samples_path))
    recorder = Recorder(
        run,
        config,
        val_batches=data.val_dataloader,
        sample=_sampler(model, config, encoded.tokenizer, encoded.documents),
        show_sample=samples.add,
        flops_per_token=model.flops_per_token(),
        peak_flops=lambda: peak_flops(config, devices) if first else math.inf,
        watch=watch,
    )
    interruption = Interruption(config)
    checkpoints = Checkpoints(run, config, recorder)
    inside = [Diagnostics(run, config.diagnostics_interval)] if config.diagnostics_interval else []
    succeeded, best = False, math.nan
    try:
        trainer = Trainer(
            **trainer_arguments(config, devices),
            max_steps=config.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=config.gradient_accumulation_steps,
            logger=loggers or False,
            callbacks=[
                *inside, recorder, interruption, checkpoints,
                ProgressReport(name, config, recorder, Console(quiet="GPTEXP_QUIET" in os.environ)),
            ],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=run.path,
        )
        try:
            trainer.fit(module, datamodule=data, ckpt_path=resuming, weights_only=True)
        except SystemExit as stop:  # what Lightning makes of a second Ctrl-C
            raise KeyboardInterrupt from stop
        succeeded = module.state.status in ("running", "stopped_early", "pruned")
        if first:
            best = leave_results(run, module, trainer.global_step, model.n_params, encoded.documents)
    finally:
        if first:
            close_loggers(loggers, succeeded)
    if module.state.status == "interrupted":
        raise Interrupted(interruption.signal or signal.SIGTERM)
    return best


def load_data(run: Run, config: Config) -> Encoded:
    """The corpus that the run was begun with, which may be the fallback of the one that it asked for.

    Raises:
        UserError: when that corpus is gone or has changed.
    """
    known = run.info["data"]
    settings = replace(config.data, name=known["corpus"], documents=known["documents"], offline_fallback=None)
    if settings.name == "file":
        settings = replace(settings, path=known["path"])
    encoded = encode_corpus(find_corpus(settings), settings)
    if encoded.fingerprint != run.info["fingerprints"]["data"]:
        raise UserError(f"resume={run.path}: {known['path']} has changed since the run began")
    return encoded


def _sampler(
    model: LanguageModel, config: Config, tokenizer: Tokenizer, documents: bool
) -> Callable[[GPTModule], str] | None:
    """A function that samples a text: one long one, or ten documents."""
    if not config.sample_tokens:
        return None
    opening = tokenizer.encode("\n").tolist() if documents or _knows(tokenizer, "\n") else [0]
    prompts = [opening] * (10 if documents else 1)
    stop = opening if documents else []

    def sample(module: GPTModule) -> str:
        with module.whole_weights(), module.trainer.precision_plugin.forward_context():
            rows = model.generate(prompts, config.sample_tokens, stop=stop, seed=config.seed)
        if documents:
            return "\n".join(tokenizer.decode(r[:-1] if r[-1:] == stop else r) for r in rows)
        return tokenizer.decode(rows[0])

    return sample


def _knows(tokenizer: Tokenizer, symbol: str) -> bool:
    try:
        tokenizer.encode(symbol)
    except UserError:
        return False
    return True


def _checkpoint_to_resume(run: Run, config: Config) -> Path | None:
    last = run.checkpoint("last")
    if not last.exists() and not run.info.get("resumable"):
        return None  # new, or stopped before its first checkpoint
    checkpoint = read_checkpoint(last, f"resume={run.path}")
    if checkpoint["gptexp"]["config"] != config.fingerprint():
        raise UserError(f"resume={run.path}: {last} belongs to another configuration than {run.path / 'config.yaml'}")
    return last


@contextmanager
def _log_file(run: Run) -> Iterator[None]:
    """Copy all messages, and the traceback of an error, to train.log."""
    handler = LogFile(run.log_path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    loggers = (log, logging.getLogger("lightning.pytorch"))
    for logger in loggers:
        logger.addHandler(handler)
    try:
        log.debug("started: %s", " ".join(sys.argv))
        yield
    except Exception:
        log.debug("failed", exc_info=True)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


@contextmanager
def _status(run: Run) -> Iterator[None]:
    """Hold the run's lock, and leave the right status behind whatever happens."""
    with run.lock():
        try:
            yield
        except KeyboardInterrupt as stop:
            if not isinstance(stop, Interrupted):
                run.finish("interrupted")
            raise
        except BaseException as error:
            _try_to_finish(run, error)
            raise


def _try_to_finish(run: Run, error: BaseException) -> None:
    try:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        # A mistake that is found before training leaves a run that can be resumed as it was.
        if isinstance(error, UserError) and run.info.get("resumable"):
            run.update(error=text)
        else:
            run.finish("failed", error=text)
    except OSError:  # a full disk: the error itself is what the user must see
        log.warning("%s: cannot write run.json", run.path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks off the terminal; they concern settings that the user never made."""
    import warnings

    logger = logging.getLogger("lightning.pytorch")
    propagate, level = logger.propagate, logger.level
    handlers = logger.handlers[:]
    logger.propagate, logger.handlers = False, [logging.NullHandler()]
    fabric = logging.getLogger("lightning.fabric")
    fabric_handlers = fabric.handlers[:]
    fabric.handlers, fabric.propagate = [logging.NullHandler()], False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", module="torch")
        try:
            yield
        finally:
            logger.propagate, logger.handlers, logger.level = propagate, handlers, level
            fabric.handlers, fabric.propagate = fabric_handlers, True
