"""Train a GPT: `python -m gptexp.train [group=choice | key=value ...]`.

    python -m gptexp.train norm=rmsnorm heads=h8
    python -m gptexp.train -m norm=layernorm,rmsnorm seed=1,2,3
    python -m gptexp.train resume=outputs/runs/NAME
"""

import json
import logging
import math
import os
import re
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptexp import perf
from gptexp.console import importing, report_errors
from gptexp.errors import Interrupted, RunFailed, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from gptexp.config import Config
    from gptexp.runs import Run
    from gptexp.training.callbacks.recorder import Watch

log = logging.getLogger("gptexp")

COMMAND = "GPTEXP_COMMAND"
"""The command line as it was typed; an environment variable, for the processes in which a launcher runs the jobs."""


def command() -> list[str]:
    """The command line that this process, or the one that launched it, was started with."""
    return list(json.loads(os.environ[COMMAND])) if COMMAND in os.environ else sys.argv


def main() -> None:
    """The command line: checks it whole, then hands it to Hydra, which calls `job` once or once for each variant."""
    with report_errors():
        os.environ[COMMAND] = json.dumps(sys.argv)
        _failed.clear()
        with importing():
            args, runs = _checked()
        from hydra import main as hydra_main
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from gptexp.overrides import VERSION_BASE, conf_dir, sweep_dir

        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach report_errors, which shows one line
        try:
            if runs and args.multirun and not any(o.startswith("hydra.sweep.dir=") for o in args.overrides):
                sys.argv.append(f"hydra.sweep.dir={sweep_dir(args.overrides, args.config_dir)}")
            hydra_main(config_path=conf_dir(), config_name="config", version_base=VERSION_BASE)(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(" ".join(str(error).split("\n")[:2])) from error
        except OSError as error:  # of Hydra's own folder; a run's errors do not come this way
            what = f"cannot write {error.filename}" if error.filename else "cannot be written"
            raise UserError(f"output_dir: {what} ({error.strerror})") from error
        if _failed:
            raise _failed[0]


def _checked() -> tuple[Any, bool]:
    """The command line's arguments, and whether they ask for a run, whose settings are then free of mistakes.

    Raises:
        UserError: with a line for every mistake.
    """
    from hydra._internal.utils import get_args_parser

    from gptexp.overrides import check, register_choices

    register_choices()
    flags = [a for a in sys.argv[1:] if a in ("-m", "--multirun")]  # argparse wants flags before all settings
    sys.argv[1:] = flags + [a for a in sys.argv[1:] if a not in flags]
    args = get_args_parser().parse_args()
    # Shown by Hydra itself: help, a printed configuration, completion.
    runs = not (args.help or args.hydra_help or args.cfg or args.info or args.shell_completion)
    if runs:
        problems = check(args.overrides, args.multirun, args.config_dir)
        if problems:
            raise UserError(problems)
    return args, runs


_failed: list[Exception] = []  # what ended a single run: of one that passes through it, Hydra would print more


def job(tree: "DictConfig") -> float | None:
    """One run of a composed configuration, in a directory of its own or in the one it resumes.

    Returns:
        the lowest validation loss, in nats a token; None if another process is working on this job of a sweep.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from gptexp.config import plain, read_config

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        config = read_config(plain(tree))
        local = hydra.launcher._target_.endswith("BasicLauncher")
        name = config.sweep.job or job_name(config, hydra.job.override_dirname)
        search = dict(hydra.sweeper) if hydra.sweeper._target_.endswith(".OptunaSweeper") else None
        return sweep_job(config, Path(hydra.sweep.dir), name, alone=local, search=search)
    try:
        return single_run(read_config(plain(tree)), str(hydra.run.dir), list(hydra.overrides.task))
    except Exception as error:
        _failed.append(error)
        return math.nan


def single_run(config: "Config", folder: str, overrides: list[str]) -> float:
    """Train a configuration, or go on with the run that it names.

    Args:
        config: every setting.
        folder: the new run's directory; "." makes one of the time and the run's name.
        overrides: the command's own.

    Returns:
        the lowest validation loss, in nats a token.
    """
    run = run_to_resume(config, overrides) if config.resume else None
    if run:
        return start(run)
    name = job_name(config, "")
    path = Path(config.output_dir) / "runs" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"
    if folder != ".":  # the user named it, and Hydra has just made it
        path = Path(folder)
        with suppress(OSError):
            path.rmdir()
    return train(config, path, name)


def sweep_job(
    config: "Config", folder: Path, name: str, alone: bool, search: dict[str, Any] | None = None
) -> float | None:
    """Bring a job of a sweep to its end, or leave it to the process that has it.

    Args:
        config: the job's configuration.
        folder: the sweep's directory.
        name: the job's.
        alone: whether it has the machine's cores for itself.
        search: the settings of Optuna's sweeper, if it is a trial of a search.

    Returns:
        the lowest validation loss, in nats a token; None if another process has the job.
    """
    from gptexp.orphans import end_with_parent
    from gptexp.sweeps import Busy, Sweep

    hardware = config.hardware
    if not alone:
        end_with_parent()
    if not alone and hardware.threads in (None, "auto") and hardware.accelerator in ("auto", "cpu"):
        config = replace(config, hardware=replace(hardware, threads=1))  # jobs side by side: one core for each
    watch: Watch | None = None
    if search and search["pruner"] != "none":
        from gptexp.search import watcher

        watch = watcher(folder, search, config)
    try:
        return Sweep(folder).work(
            name, config, lambda path: train(config, path, name, folder.name, watch), lambda run: start(run, watch)
        )
    except Busy:
        return None


def train(
    config: "Config", path: Path, name: str, group: str | None = None, watch: "Watch | None" = None
) -> float:
    """Train a configuration in a new run directory.

    Args:
        config: every setting.
        path: the directory; a number is added to its name if it is taken.
        name: the run's readable name.
        group: the sweep that the run belongs to.
        watch: is given the step and loss of each evaluation, and may stop the run.

    Returns:
        the lowest validation loss, in nats a token.
    """
    from gptexp.data.batches import split_corpus
    from gptexp.data.corpora import find_corpus
    from gptexp.data.encoded import encode_corpus
    from gptexp.runs import Run, code_fingerprint

    perf.prepare()  # what is looked at below may import torch
    corpus = find_corpus(config.data)  # before the directory is made: a mistake here leaves nothing behind
    encoded = encode_corpus(corpus, config.data)
    split_corpus(encoded, config.data, config.model.block_size)
    warmup = config.schedule.warmup_steps
    if warmup >= config.max_steps:
        log.warning("schedule.warmup_steps=%d is not below max_steps=%d: the learning rate stays under its peak",
                    warmup, config.max_steps)  # fmt: skip
    if config.logger.name == "tensorboard" and find_spec("tensorboard") is None:
        raise UserError("logger=tensorboard: tensorboard is not installed; pip install 'gptexp[tensorboard]'")
    if config.hardware.accelerator in ("gpu", "mps") or config.hardware.compile == "graphs":
        from gptexp.training.hardware import device_count

        device_count(config)  # a machine without them is told before a directory is made
    info = {
        "name": name,
        "group": group,
        "variant": config.variant,
        "fingerprints": {
            "config": config.fingerprint(),
            "data": encoded.fingerprint,
            "code": code_fingerprint(config),
        },
        "data": {"corpus": corpus.name, "requested": corpus.requested, "path": str(corpus.path.absolute()),
                 "sha256": corpus.sha256, "tokens": len(encoded.ids), "documents": encoded.documents},
        "tokenizer": encoded.tokenizer.to_dict(),
        "command": command(),
    }  # fmt: skip
    return start(Run.claim(path, config, info), watch)


def run_to_resume(config: "Config", overrides: list[str]) -> "Run | None":
    """The run that `config.resume` names, or None where resume=auto finds none.

    Args:
        config: every setting.
        overrides: the command's own overrides; the run may not contradict them.

    Raises:
        UserError: when there is no such run, it is done, or its configuration differs.
    """
    from gptexp.overrides import requested
    from gptexp.runs import Run, unfinished

    if config.resume == "auto":
        run = unfinished(Path(config.output_dir), config.fingerprint())
        if run is None:
            log.info("resume=auto: no unfinished run of this configuration in %s; a new one begins", config.output_dir)
            return None
    else:
        run = Run.open(str(config.resume), key="resume")
        run.check_resumable(requested([o for o in overrides if not o.startswith("resume=")]))
    log.info("resuming %s", run.path)
    return run


def start(run: "Run", watch: "Watch | None" = None) -> float:
    """Train a claimed run, or go on with it, in this process or in one process a device.

    Returns:
        the lowest validation loss, in nats a token.
    """
    config = run.config
    if config.hardware.strategy == "auto":
        from gptexp.training.startup import import_lightning
        from gptexp.training.wandb_process import prepare

        prepare(config)
        import_lightning()
        from gptexp.training.fit import fit

        try:
            return fit(run, watch)
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # a sweep keeps the error: not with the model in its frames
            raise RunFailed(f"{type(error).__name__}: {error}; traceback in {run.log_path}") from error
    from gptexp.training.hardware import device_count
    from gptexp.training.worker import launch

    with run.lock():  # refuses a run that is being trained; the first worker takes the lock over
        run.update(error=None)
    code = launch(run, device_count(config))
    info = run.info
    if info["status"] == "interrupted" and code > 128:
        raise Interrupted(code - 128)
    if code:
        message = info.get("error") or f"a process ended with status {code}"
        if info["status"] == "running" and code != 2:  # killed before it could say so
            run.finish("failed", error=message)
        raise UserError(message) if code == 2 else RunFailed(f"{message}; see {run.log_path}")
    best = (run.result or {}).get("best_val_loss")
    return math.nan if best is None else float(best)


def job_name(config: "Config", swept: str) -> str:
    """A run's readable name: the one given or the variant's, and whatever else a sweep varies.

    Args:
        config: the job's configuration.
        swept: Hydra's override_dirname, such as `model.norm=rmsnorm|optimizer.learning_rate=0.001`.
    """
    named = {"norm", "model.norm", "placement", "model.placement", "heads", "model.n_head", "seed"}
    shown = {"experiment", "experiment/ladder"} if config.name else named
    pairs = [pair.partition("=") for pair in swept.split("|") if pair]  # a value can hold a comma
    extra = [f"s{value}" if key == "seed" else f"{key.rpartition('.')[2]}_{value}"
             for key, _, value in pairs if key not in shown]  # fmt: skip
    return re.sub(r"[^\w.+-]+", "_", "-".join([config.name or config.variant, *extra]))  # as Hydra's grammar takes it


if __name__ == "__main__":
    main()
