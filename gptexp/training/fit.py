"""Trains the model of a run directory, from its start or from its last checkpoint."""

import logging
import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from rich.console import Console

from gptexp.config import Config
from gptexp.console import silenced
from gptexp.data.datamodule import CharDataModule
from gptexp.data.settings import DataConfig
from gptexp.data.tokenizer import Tokenizer
from gptexp.errors import Diverged, GroupFailed, Interrupted, Stopped, UserError
from gptexp.loggers.metrics_csv import MetricsCSV
from gptexp.models.audits import Share, train_mode
from gptexp.models.language_model import LanguageModel
from gptexp.perf import mkl_kernels
from gptexp.runs import Run, Status
from gptexp.training.callbacks.checkpoints import RunCheckpoints
from gptexp.training.callbacks.diagnostics import Diagnostics
from gptexp.training.callbacks.divergence import Divergence
from gptexp.training.callbacks.early_stopping import EarlyStopping
from gptexp.training.callbacks.evaluations import Evaluations
from gptexp.training.callbacks.interruption import Interruption
from gptexp.training.callbacks.progress import ProgressReport
from gptexp.training.callbacks.pruning import Pruning, Watch
from gptexp.training.callbacks.samples import Samples
from gptexp.training.callbacks.slowdown import SlowdownWarning
from gptexp.training.callbacks.throughput import Throughput
from gptexp.training.checkpoint import read_checkpoint
from gptexp.training.hardware import describe_device, peak_flops, thread_count, trainer_arguments, world_size
from gptexp.training.loggers import close_loggers, open_loggers
from gptexp.training.module import GPTModule
from gptexp.training.objects import build
from gptexp.training.outcome import leave_results, versions
from gptexp.training.processes import Processes, connected

log = logging.getLogger("gptexp")


def fit(run: Run, processes: Processes, watch: Watch | None = None, quiet: bool = False) -> float:
    """Train a run from its start or its last checkpoint to its end, and write everything that it leaves behind.

    The function `watch` is given the step and loss of each evaluation, and may prune the run.

    Returns:
        the lowest validation loss, in nats per token; nan for a run that diverged before its first evaluation.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; the run is saved and marked "interrupted".
        UserError: for a mistake in the settings, the data or the checkpoint.
    """
    status = _status(run) if processes.first else nullcontext()
    # Lightning's and torch's remarks concern settings that the user never made.
    with silenced("lightning.pytorch", "lightning.fabric"), warnings.catch_warnings(), _log_file(run), status:
        warnings.filterwarnings("ignore", module="lightning|torch")
        with connected(processes, run.log_path):
            return _fit(run, run.config, processes, watch, quiet)


def _fit(run: Run, config: Config, processes: Processes, watch: Watch | None, quiet: bool) -> float:
    if problem := mkl_kernels.choose(config.hardware.fast_mkl):
        raise UserError(problem)
    world_size(config, processes)
    data = load_data(run, config)
    module = GPTModule(config.sized(data.vocab_size), config.optimizer, config.schedule, seed=config.seed,
                       chars_per_token=data.chars_per_token)  # fmt: skip
    before = run.info.get("device", {}).get("threads")
    torch.set_num_threads(thread_count(module.model, config, processes.per_node, before))
    if config.hardware.compile:
        # Training has one shape of batches; the last, smaller one of an evaluation must not make that dynamic.
        module.model.compile(dynamic=False, mode="reduce-overhead" if config.hardware.compile == "graphs" else None)
    resuming = _checkpoint_to_resume(run, config)
    share = train_mode(module.model.config)  # on all ranks: some norms sum over them
    if processes.first:
        _introduce(run, config, data, module.model, processes, share)
        if resuming is None:
            for path in run.growing:
                path.unlink(missing_ok=True)
    record = MetricsCSV(run.metrics_path)
    callbacks = _callbacks(run, config, processes, data, module, record, watch, quiet)
    loggers: list[Logger] = []
    status: Status | None = None
    try:
        open_loggers(run, config, module, loggers)
        loggers.append(record)  # the last: `trainer.logger` is one of the user's
        trainer = make_trainer(config, processes, loggers, callbacks, run.path)
        try:
            trainer.fit(module, data, ckpt_path=resuming, weights_only=True)
            if data.eval_windows is not None:  # so far, only some windows were evaluated
                trainer.validate(module, data, verbose=False)
            status = "pruned" if any(isinstance(c, Pruning) and c.pruned for c in callbacks) else "done"
        except Stopped as stop:
            status, number = "interrupted", stop.signal
        except Diverged:
            status = "diverged"
        except SystemExit as stop:  # what Lightning makes of a second Ctrl-C
            raise KeyboardInterrupt from stop
        if config.trainer.profiler and processes.first:
            log.info("%s", trainer.profiler.summary())
        record.flush()
        best = leave_results(run, status, trainer) if processes.first else math.nan
    finally:
        close_loggers(loggers, succeeded=status in ("done", "pruned"))
    if status == "interrupted":
        raise Interrupted(number)
    return best


def make_trainer(
    config: Config, processes: Processes, loggers: list[Logger], callbacks: list[Callback], folder: Path
) -> Trainer:
    """Lightning's Trainer by the settings.

    Raises:
        UserError: when it refuses its arguments.
    """
    try:
        return Trainer(**trainer_arguments(config, processes), logger=loggers or False, callbacks=callbacks,
                       default_root_dir=folder)  # fmt: skip
    except Exception as error:
        raise UserError(f"trainer: {str(error).strip().splitlines()[0]}") from error


def _introduce(
    run: Run, config: Config, data: CharDataModule, model: LanguageModel, processes: Processes, share: Share
) -> None:
    """Write what computes into run.json, and say it."""
    device, before = describe_device(config, processes), run.info.get("device", {}).get("devices", processes.world_size)
    if before != processes.world_size:
        log.warning("%s: trained by %d processes so far, now by %d: last digits and dropout differ from an unbroken "
                    "run's", run.path, before, processes.world_size)  # fmt: skip
    run.update(
        status="running", error=None, device=device, versions=versions(), parameters=model.n_params,
        train_loss={"sees_later_tokens": share.looks_ahead, "sees_other_sequences": share.couples},
    )  # fmt: skip
    log.info(
        "%s · %s parameters · %s, %s tokens · %s x %s, %s", run.path, f"{model.n_params:,}",
        run.info["data"]["corpus"], f"{len(data.encoded.ids):,}", processes.world_size, device["name"],
        device["precision"],
    )  # fmt: skip
    if share.looks_ahead:
        log.warning("%s: in training, this variant's loss sees the tokens that it predicts; judge it by val/loss",
                    config.model.label)  # fmt: skip


def _callbacks(
    run: Run, config: Config, processes: Processes, data: CharDataModule, module: GPTModule,
    record: MetricsCSV, watch: Watch | None, quiet: bool,
) -> list[Callback]:  # fmt: skip
    monitor = "val/loss" if config.eval_windows is None else "val/loss_windows"
    interval = config.checkpoint_interval or config.eval_interval
    checkpoints = RunCheckpoints(run, record, config.fingerprint(), monitor, interval)
    # Slurm's warning before a job's time is up; srun hands it to all processes.
    warning = [signal.SIGUSR1] if config.hardware.cluster == "slurm" else []
    folder = run.checkpoint("last").parent
    more: list[Callback] = [build(f"callbacks.{name}", entry, dirpath=folder)
                            for name, entry in config.callbacks.items()]  # fmt: skip
    if config.early_stop_patience:
        more.append(EarlyStopping(monitor, patience=config.early_stop_patience))
    sampler = _sampler(module.model, config, data.encoded.tokenizer, data.encoded.documents)
    bars = any(isinstance(callback, ProgressBar) for callback in more) or config.trainer.enable_progress_bar is False
    loss = "loss that sees later tokens" if run.sees_later_tokens else "loss"
    return [
        Evaluations(),
        *([Diagnostics(run, config.diagnostics_interval)] if config.diagnostics_interval else []),
        Throughput(record, module.model.flops_per_token(), lambda: peak_flops(config, processes.world_size)),
        SlowdownWarning(),
        Divergence(monitor, interval),
        *([Samples(run, sampler)] if sampler else []),
        *([] if bars else [ProgressReport(run.info["name"], monitor, loss, Console(quiet=quiet))]),
        *([Pruning(watch, monitor)] if watch else []),
        *more,
        checkpoints,
        Interruption(checkpoints, warning),
    ]


def load_data(run: Run, config: Config) -> CharDataModule:
    """The data of the corpus that the run was begun with, which may be the fallback of the one that it asked for.

    Raises:
        UserError: when that corpus is gone or has changed.
    """
    known = run.info["data"]
    settings = replace(config.data, name=known["corpus"], offline_fallback=None)
    if not known["documents"]:  # the fallback is running text, whatever was asked for
        unused = {name: getattr(DataConfig, name) for name in ("terminator", "split_seed")}
        settings = replace(settings, documents=False, **unused)
    if settings.name == "file":
        settings = replace(settings, path=known["path"])
    data = CharDataModule(
        settings,
        block_size=config.model.block_size,
        batch_size=config.batch_size,
        accumulate=config.gradient_accumulation_steps,
        eval_batch_size=config.eval_batch_size,
        eval_windows=config.eval_windows,
        seed=config.seed,
    )
    data.setup()
    if data.encoded.fingerprint != run.info["fingerprints"]["data"]:
        raise UserError(f"resume={run.path}: {known['path']} has changed since the run began")
    return data


def _sampler(
    model: LanguageModel, config: Config, tokenizer: Tokenizer, documents: bool
) -> Callable[[GPTModule], str] | None:
    """A function that samples a text: one long one, or ten documents.

    None where none is wanted, or where no process holds the whole model; then `gptexp.sample` reads a checkpoint.
    """
    if not config.sample_tokens or config.hardware.strategy == "fsdp":
        return None
    opening = [0]
    with suppress(UserError):  # a corpus without a newline
        opening = tokenizer.encode("\n").tolist()
    prompts = [opening] * (10 if documents else 1)
    stop = opening if documents else []

    def sample(module: GPTModule) -> str:
        with module.trainer.precision_plugin.forward_context():
            rows = model.generate(prompts, config.sample_tokens, stop=stop, seed=config.seed)
        if documents:
            return "\n".join(tokenizer.decode(r[:-1] if r[-1:] == stop else r) for r in rows)
        return tokenizer.decode(rows[0])

    return sample


def _checkpoint_to_resume(run: Run, config: Config) -> Path | None:
    """The last checkpoint; None for a run that has none, or only that of the untrained model, which begins anew."""
    last = run.checkpoint("last")
    if not last.exists() and not run.info.get("resumable"):
        return None
    checkpoint = read_checkpoint(last, f"resume={run.path}", weights=False)
    if checkpoint["gptexp"]["config"] not in run.fingerprints:
        raise UserError(f"resume={run.path}: {last} belongs to another configuration than {run.path / 'config.yaml'}")
    return last if checkpoint["global_step"] else None


@contextmanager
def _log_file(run: Run) -> Iterator[None]:
    """Copy all messages, and the traceback of an error, to train.log."""
    handler = logging.FileHandler(run.log_path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    loggers = (log, logging.getLogger("lightning.pytorch"))
    for logger in loggers:
        logger.addHandler(handler)
    try:
        log.debug("started: %s", " ".join(sys.argv))
        yield
    except (Exception, GroupFailed):
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
        except BaseException as error:
            try:
                _record(run, error)
            except OSError:  # a full disk: the error itself is what the user must see
                log.warning("%s: cannot write run.json", run.path)
            raise


def _record(run: Run, error: BaseException) -> None:
    """Write what ended a run; GroupFailed is what ended another of its processes."""
    status = error.status if isinstance(error, GroupFailed) else 2 if isinstance(error, UserError) else 1
    text = str(error) if isinstance(error, UserError | GroupFailed) else f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt) or status > 128:
        if run.info["status"] == "running":  # else it was saved, and its results are written
            run.finish("interrupted")
    elif status == 2 and run.info.get("resumable"):  # a mistake that is found before training can be corrected
        run.update(error=text)
    else:
        run.finish("failed", error=text)
