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
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptexp.console import importing, report_errors
from gptexp.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from gptexp.config import Config
    from gptexp.training.callbacks.pruning import Watch

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
        the lowest validation loss, in nats per token.
    """
    from gptexp.config import flatten
    from gptexp.overrides import requested
    from gptexp.training.launch import Train, claim, gathered, run_to_resume, train_together
    from gptexp.training.startup import prepare_torch

    prepare_torch(config.hardware.fast_mkl)

    def lead(train: Train) -> float:
        if config.resume:
            asked = requested([o for o in overrides if not o.startswith("resume=")])
            run = run_to_resume(config, asked, config.resume)
            if run:
                return train(run)
        name = job_name(config, "")
        path = Path(config.output_dir) / "runs" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"
        if folder != ".":  # the user named it, and Hydra has just made it
            path = Path(folder)
            with suppress(OSError):
                path.rmdir()
        return train(claim(config, path, name, None, command(), named=folder != "."))

    group = gathered(config)
    group.check_same(flatten(config.tree()) | {"resume": config.resume, "hydra.run.dir": folder})
    loss = train_together(group, lead)
    return math.nan if loss is None else loss


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
        the lowest validation loss, in nats per token; None if another process has the job.
    """
    from gptexp.orphans import end_with_parent
    from gptexp.sweeps import Busy, Sweep
    from gptexp.training.launch import Train, check_watch, claim, gathered, train_together
    from gptexp.training.startup import prepare_torch

    prepare_torch(config.hardware.fast_mkl)
    hardware = config.hardware
    if not alone:
        end_with_parent()
    if not alone and hardware.threads in (None, "auto") and hardware.accelerator in ("auto", "cpu"):
        config = replace(config, hardware=replace(hardware, threads=1))  # jobs side by side: one core for each
    watch: Watch | None = None
    if search and search["pruner"] != "none":
        from gptexp.search import watcher

        watch = watcher(folder, search, config)

    def lead(train: Train) -> float | None:
        try:
            return Sweep(folder).work(
                name, config, lambda path: train(claim(config, path, name, folder.name, command())), train
            )
        except Busy:
            return None

    group = gathered(config)
    if watch:
        check_watch(config, group)
    return train_together(group, lead, watch, quiet=True)


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
