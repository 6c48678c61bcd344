"""Train a GPT: `python -m gptexp.train [group=choice | key=value ...]`.

    python -m gptexp.train norm=rmsnorm heads=h8
    python -m gptexp.train -m norm=layernorm,rmsnorm seed=1,2,3
    python -m gptexp.train resume=outputs/runs/NAME
"""

import logging
import math
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gptexp.errors import RunFailed, UserError
from gptexp.processes.console import report_errors

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

    from gptexp.config.schema import Config

log = logging.getLogger("gptexp")


def main() -> None:
    """Validate the whole command line, then hand it to Hydra, which calls `job` once, or once per variant."""
    with report_errors():
        from gptexp.config.arguments import read_arguments

        args, problems = read_arguments(sys.argv[1:])
        if args.help:
            from gptexp.config.reference import help_text

            print(help_text(shutil.get_terminal_size((110, 0)).columns))
            return
        from hydra import main as hydra_main

        from gptexp.config.choices import conf_dir
        from gptexp.config.command_line import COMPOSING, check, one_line
        from gptexp.config.composition import VERSION_BASE, register_choices

        register_choices()
        shows = bool(args.cfg or args.info)
        elsewhere = args.hydra_help or args.shell_completion or args.experimental_rerun or args.config_path
        if not elsewhere and (args.overrides or not shows):
            problems += check(args.overrides, args.multirun, args.config_dir, args.config_name, shows)
        if problems:
            raise UserError(problems)
        try:
            hydra_main(config_path=conf_dir(), config_name="config", version_base=VERSION_BASE)(job)()
        except COMPOSING as error:
            raise UserError(one_line(error)) from error


def job(tree: "DictConfig") -> float | None:
    """One run of a composed configuration, in a directory of its own or in the one it resumes.

    Returns:
        the lowest validation loss, in nats per token; None if another process is working on this job of a sweep.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from gptexp.config.composition import plain
    from gptexp.config.schema import read_config

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return sweep_job(read_config(plain(tree)), hydra)
    with report_errors():  # caught here, because Hydra would print a traceback
        return single_run(read_config(plain(tree)), str(hydra.run.dir), list(hydra.overrides.task))


def single_run(config: "Config", folder: str, overrides: list[str]) -> float:
    """Train a configuration, or resume the run in `config.resume`.

    The new run's directory is `folder`; "." makes one of the time and the run's name.

    Returns:
        the lowest validation loss, in nats per token.

    Raises:
        RunFailed: when it diverged.
    """
    from gptexp.config.composition import requested
    from gptexp.config.schema import flatten
    from gptexp.processes.ending import several
    from gptexp.sweeps.sweep import job_name
    from gptexp.training.launch import check_files, claim, gathered, run_to_resume, start, together

    def unmake() -> None:
        if folder != ".":  # Hydra has made the folder that the user named; `claim` makes it again
            with suppress(OSError):
                Path(folder).rmdir()

    read = None
    if not several():  # with several processes, rank 0 reports it later
        unmake()
        read = check_files(config)  # a mistake is reported before Lightning is imported, which takes a while

    def lead() -> float:
        run = None
        if config.resume:
            asked = requested([o for o in overrides if not o.startswith("resume=")])
            run = run_to_resume(config, asked, config.resume)
        if run is None:
            name = job_name(config, "")
            own = Path(config.output_dir) / "runs" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"
            path = own if folder == "." else Path(folder)
            run = claim(config, path, name, None, sys.argv, named=folder != ".", read=read)
        loss = start(run, group)
        if run.info["status"] == "diverged":
            raise RunFailed(run.info["error"])
        return loss

    group = gathered(config)
    unmake()  # once Hydra is done in every process
    group.check_same(flatten(config.tree()) | {"resume": config.resume, "hydra.run.dir": folder})
    loss = together(group, lead)
    return math.nan if loss is None else loss


def sweep_job(config: "Config", hydra: "HydraConf") -> float | None:
    """Run a job of a sweep, unless another process has it.

    Returns:
        the lowest validation loss, in nats per token; None if another process has the job.
    """
    from gptexp.processes.ending import end_with_parent
    from gptexp.sweeps.search import watcher
    from gptexp.sweeps.sweep import Busy, Sweep, job_name
    from gptexp.training.launch import claim, gathered, job_together, start

    hardware = config.hardware
    if hydra.runtime.choices["hydra/launcher"] != "basic":
        end_with_parent()
        if hardware.threads in (None, "auto") and hardware.accelerator in ("auto", "cpu"):
            config = replace(config, hardware=replace(hardware, threads=1))  # jobs side by side: one core for each
    folder = Path(hydra.sweep.dir)
    name = config.sweep.job or f"{hydra.job.num}-{job_name(config, '')}"  # other sweepers do not set a job name
    searches = hydra.sweeper._target_.endswith(".OptunaSweeper")
    watch = watcher(folder, hydra.sweeper, config) if searches else None

    def lead() -> float | None:
        sweep = Sweep(folder)
        command = sweep.info.get("command", sys.argv)  # a launcher's argv is not the user's command
        try:
            return sweep.work(name, config, lambda path: claim(config, path, name, folder.name, command),
                              lambda run: start(run, group, watch, quiet=True))  # fmt: skip
        except Busy:
            return None

    group = gathered(config)
    return job_together(group, lead)


if __name__ == "__main__":
    main()
