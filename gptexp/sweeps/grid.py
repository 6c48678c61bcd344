"""The sweeper of a grid: every combination of the values, in a directory that can be continued and shared."""

import io
import itertools
import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptexp.config.composition import Composer, each, parse, plain, quoted
from gptexp.config.schema import Config, flatten, read_config
from gptexp.errors import RunFailed, UserError
from gptexp.processes.console import report_errors
from gptexp.processes.ending import interrupt, several
from gptexp.runs.run import FINAL
from gptexp.sweeps.sweep import Standing, Sweep, draw, job_name, summary, sweep_name
from gptexp.training.launch import together

if TYPE_CHECKING:
    from gptexp.sweeps.live_table import Scoreboard

log = logging.getLogger("gptexp")


@dataclass
class Job:
    """A combination of values."""

    overrides: list[str]  # that make it
    name: str  # of its run and directory
    error: Exception | None = None  # what is wrong with it, or what ended it
    config: Config | None = None  # None if the configuration is wrong


class Grid(Sweeper):
    """Runs the jobs of a grid that are not finished yet, through any launcher, and reports the results of all.

    Args:
        params: values by key, as on the command line, for a file of conf/ that describes a sweep.
    """

    config: DictConfig

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra has prepared, name the sweep, and make the launcher of its jobs."""
        self.hydra_context, self.config = hydra_context, config
        HydraConfig.instance().set_config(config.copy())  # for values such as ${hydra:runtime.cwd}
        self.composer = Composer(config.hydra.job.config_name, config.hydra.overrides.hydra)
        if config.sweep.name is None:  # hydra.sweep.dir, unless it is given, has it at its end
            config.sweep.name = sweep_name(parse(config.hydra.overrides.task)[0], list(self.params))
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config)  # fmt: skip

    def sweep(self, arguments: list[str]) -> list[float]:
        """Finish all jobs; of several processes of this command, rank 0 decides.

        Returns:
            the lowest validation loss of each job that has one, in their order; nothing on other ranks.

        Raises:
            SystemExit: after the messages, when there are mistakes or a job has failed.
        """
        with report_errors():  # here: of an error that passes through it, Hydra prints the traceback
            overrides, _ = parse([*(f"{k}={v}" for k, v in self.params.items()), *arguments])
            sweep = Sweep(Path(str(self.config.hydra.sweep.dir)))
            local = self.config.hydra.runtime.choices["hydra/launcher"] == "basic"
            cluster = self.config.hardware.get("cluster", "auto") if local else "auto"
            if not several() and cluster != "slurm":
                return self.run(sweep, overrides)
            if not local:
                raise UserError("hydra/launcher: torchrun or srun has started several processes, which train one job "
                                "at a time; leave it out, or start the command once")  # fmt: skip
            from gptexp.processes.group import gather  # imports Lightning

            group = gather(cluster, self.config.hardware.timeout)
            ours: Any = OmegaConf.to_container(self.config)
            del ours["hydra"]
            texts = {o.get_key_element(): str(o.input_line).partition("=")[2] for o in overrides}
            # The sweep's name is made of the overrides.
            group.check_same(flatten(ours) | {"sweep.name": None} | texts)
            return together(group, lambda: self.run(sweep, overrides)) or []

    def run(self, sweep: Sweep, overrides: Sequence[Override]) -> list[float]:
        """Finish all jobs of a sweep.

        Raises:
            UserError: when the sweep cannot begin.
            RunFailed: when a job failed.
        """
        if endless := [o for o in overrides if not each(o)]:
            raise UserError(f"{o.input_line}: values without number need a search, hydra/sweeper=optuna"
                            for o in endless)  # fmt: skip
        if self.config.sweep.get("seeds") == "auto":
            return self.until_decided(sweep, overrides)
        swept = [o.get_key_element() for o in overrides if o.is_sweep_override()]
        varied = list(dict.fromkeys([*sweep.info.get("varied", []), *swept]))
        jobs = distinct(self.prepare(list(values), varied) for values in itertools.product(*map(each, overrides)))
        self.finish(sweep, jobs, varied)
        return report(sweep, jobs)

    def until_decided(self, sweep: Sweep, overrides: Sequence[Override]) -> list[float]:
        """Finish a sweep that adds seeds as they are needed; see `gptexp.sweeps.seeds`."""
        raise UserError("sweep.seeds=auto: decides a grid; this sweeper does not")

    def finish(
        self, sweep: Sweep, jobs: Sequence[Job], varied: Sequence[str], looks: dict[str, Any] | None = None,
        note: str = "",
    ) -> None:  # fmt: skip
        """Train the jobs of a sweep that are not finished yet.

        Args:
            sweep: that they belong to.
            jobs: all of them.
            varied: the overrides that make them differ.
            looks: the plan of a sweep that adds seeds as they are needed.
            note: for the live table.
        """
        sound = [job for job in jobs if job.error is None]
        if trees := [flatten(job.config.tree()) for job in sound if job.config]:
            keys = dict.fromkeys(key for tree in trees for key in tree)
            fixed = {k: trees[0].get(k) for k in keys if all(tree.get(k) == trees[0].get(k) for tree in trees)}
            differing = [k for k in keys if k not in fixed]
            sweep.join(fixed, differing, varied, {job.name: job.config for job in sound}, sys.argv, looks)
        with show(sweep, [job.name for job in sound], note=note):
            todo = sound
            while todo := [job for job in todo if not sweep.is_final(job.name)]:
                todo = self.send(todo)
                while todo and all(sweep.is_busy(job.name) for job in todo):
                    time.sleep(1)

    def prepare(self, overrides: list[str], varied: Sequence[str]) -> Job:
        """Compose a job's configuration and name it; the job keeps a mistake as its error."""
        shown = [o for o in overrides if o.partition("=")[0] in varied]
        try:
            config = read_config(plain(self.composer.compose(overrides)))
        except (UserError, HydraException, OmegaConfBaseException) as error:
            return Job(overrides, " ".join(shown), error)
        if "seed" not in varied:
            shown.append(f"seed={config.seed}")  # another seed is another job, so every name has it
        return Job(overrides, job_name(config, "|".join(shown)), config=config)

    def send(self, jobs: Sequence[Job]) -> list[Job]:
        """Launch jobs and wait for them; returns those that another process has. A job keeps its error."""
        folder = quoted(str(self.config.hydra.sweep.dir))
        sent = [[*job.overrides, f"hydra.sweep.dir={folder}", f"sweep.job={quoted(job.name)}"] for job in jobs]
        results = self.launcher.launch(sent, initial_job_idx=0) if sent and self.launcher else []
        busy = []
        for job, result in zip(jobs, results, strict=True):
            try:
                with redirect_stderr(io.StringIO()):  # Hydra prints a line of its own; `report` has one
                    value = result.return_value
            except Exception as error:
                job.error = error
            else:
                busy += [job] if value is None else []
        return busy


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """The jobs without repetitions; where two of one name differ, their names get a digest."""
    kept: dict[str, Job] = {}
    for job in jobs:
        kept.setdefault(repr(job.config or job.name), job)
    names = Counter(job.name for job in kept.values())
    for job in kept.values():
        if names[job.name] > 1 and job.config:
            job.name += f"-{job.config.fingerprint()[:6]}"
    return list(kept.values())


@contextmanager
def show(sweep: Sweep, names: Sequence[str], total: int | None = None, note: str = "") -> Iterator["Scoreboard"]:
    """Show the progress of the sweep; the messages of its runs are in train.log alone."""
    from rich.console import Console

    from gptexp.sweeps.live_table import Scoreboard

    # A run looks after signals itself; between runs, and while a launcher waits for its workers, this does.
    previous = signal.signal(signal.SIGTERM, interrupt)
    levels = {handler: handler.level for handler in log.handlers}
    try:
        for handler in levels:
            handler.setLevel(logging.WARNING)
        with Scoreboard(sweep, names, Console(), total, note) as board:
            yield board
    except KeyboardInterrupt:
        log.warning("%s: stopped; the same command goes on with it", sweep.folder)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        for handler, level in levels.items():
            handler.setLevel(level)


def report(sweep: Sweep, jobs: Sequence[Job]) -> list[float]:
    """Log how the jobs ended, best first, and draw their curves.

    Raises:
        RunFailed: when a job failed.
    """
    standings = [Standing(job.name, "failed", error=str(job.error)) if job.error else sweep.standing(job.name)
                 for job in jobs]  # fmt: skip
    log.info("%s", summary(standings, sweep.measure))
    draw(sweep)
    failed = [s for s in standings if s.state not in FINAL]
    if len(failed) == 1 == len(jobs):
        (s,) = failed
        raise jobs[0].error or RunFailed(s.error or f"{s.name} is {s.state}: the same command goes on with it")
    if failed:
        raise RunFailed(f"{len(failed)} of {len(jobs)} jobs failed")
    return [s.loss for s in standings]
