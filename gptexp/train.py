"""Train a GPT: `python -m gptexp.train [group=choice | key=value ...]`.

    python -m gptexp.train norm=rmsnorm heads=h8
    python -m gptexp.train -m norm=layernorm,rmsnorm seed=1,2,3
    python -m gptexp.train resume=outputs/runs/NAME
"""

import logging
import math
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gptexp import perf
from gptexp.console import report_errors
from gptexp.errors import UserError

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

    from gptexp.config import Config

log = logging.getLogger("gptexp")


def main() -> None:
    """The command line: checks it whole, then hands it to Hydra, which calls `job` once or once for each variant."""
    with report_errors():
        from gptexp.arguments import read_arguments

        args, problems = read_arguments(sys.argv[1:])
        from hydra import main as hydra_main

        from gptexp.groups import VERSION_BASE, conf_dir, register_choices
        from gptexp.overrides import COMPOSING, check, told

        register_choices()
        shows = bool(args.help or args.cfg or args.info)
        elsewhere = args.hydra_help or args.shell_completion or args.experimental_rerun or args.config_path
        if not elsewhere and (args.overrides or not shows):
            problems += check(args.overrides, args.multirun, args.config_dir, args.config_name, shows)
        if problems:
            raise UserError(problems)
        try:
            hydra_main(config_path=conf_dir(), config_name="config", version_base=VERSION_BASE)(job)()
        except COMPOSING as error:
            raise UserError(told(error)) from error


def job(tree: "DictConfig") -> float | None:
    """One run of a composed configuration, in a directory of its own or in the one it resumes.

    Returns:
        the lowest validation loss, in nats per token; None if another process is working on this job of a sweep.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from gptexp.config import plain, read_config

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return sweep_job(read_config(plain(tree)), hydra)
    with report_errors():  # here: of an error that passes through it, Hydra prints the traceback
        return single_run(read_config(plain(tree)), str(hydra.run.dir), list(hydra.overrides.task))


def single_run(config: "Config", folder: str, overrides: list[str]) -> float:
    """Train a configuration, or go on with the run that it names.

    The new run's directory is `folder`; "." makes one of the time and the run's name.

    Returns:
        the lowest validation loss, in nats per token.
    """
    from gptexp.config import flatten
    from gptexp.overrides import requested
    from gptexp.sweeps import job_name
    from gptexp.training.launch import Train, check_files, claim, gathered, run_to_resume, train_together
    from gptexp.training.ranks import several

    def unmake() -> None:
        if folder != ".":  # the user named it, and Hydra has just made it
            with suppress(OSError):
                Path(folder).rmdir()

    read = None
    if not several():  # of several processes the first one will tell
        unmake()
        read = check_files(config)  # a mistake is told before torch is imported, which takes a while
    perf.prepare()  # before torch is imported

    def lead(train: Train) -> float:
        if config.resume:
            asked = requested([o for o in overrides if not o.startswith("resume=")])
            run = run_to_resume(config, asked, config.resume)
            if run:
                return train(run)
        name = job_name(config, "")
        own = Path(config.output_dir) / "runs" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"
        path = own if folder == "." else Path(folder)
        return train(claim(config, path, name, None, sys.argv, named=folder != ".", read=read))

    group = gathered(config)
    unmake()  # once Hydra is done in every process
    group.check_same(flatten(config.tree()) | {"resume": config.resume, "hydra.run.dir": folder})
    loss = train_together(group, lead)
    return math.nan if loss is None else loss


def sweep_job(config: "Config", hydra: "HydraConf") -> float | None:
    """Bring a job of a sweep to its end, or leave it to the process that has it.

    Returns:
        the lowest validation loss, in nats per token; None if another process has the job.
    """
    from gptexp.orphans import end_with_parent
    from gptexp.search import watcher
    from gptexp.sweeps import Busy, Sweep, job_name
    from gptexp.training.launch import Train, claim, gathered, job_together

    perf.prepare()  # before torch is imported
    hardware = config.hardware
    if hydra.runtime.choices["hydra/launcher"] != "basic":
        end_with_parent()
        if hardware.threads in (None, "auto") and hardware.accelerator in ("auto", "cpu"):
            config = replace(config, hardware=replace(hardware, threads=1))  # jobs side by side: one core for each
    folder = Path(hydra.sweep.dir)
    name = config.sweep.job or f"{hydra.job.num}-{job_name(config, '')}"  # another sweeper than ours names none
    searches = hydra.sweeper._target_.endswith(".OptunaSweeper")
    watch = watcher(folder, hydra.sweeper, config) if searches else None

    def lead(train: Train) -> float | None:
        sweep = Sweep(folder)
        command = sweep.info.get("command", sys.argv)  # a launcher starts this process with another one
        try:
            return sweep.work(name, config, lambda path: claim(config, path, name, folder.name, command), train)
        except Busy:
            return None

    return job_together(gathered(config), lead, watch)


if __name__ == "__main__":
    main()
