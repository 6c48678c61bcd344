"""The sweeper of gptexp: every combination of the values, in a directory that can be continued and shared.

Hydra finds its plugins in the namespace package `hydra_plugins` alone.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import open_dict

from gptexp.errors import RunFailed, UserError

log = logging.getLogger("gptexp")


@dataclass
class GridSweeperConf:
    """The settings of the sweeper.

    Attributes:
        params: values by key, as on the command line, for a file of conf/ that describes a sweep.
    """

    _target_: str = "hydra_plugins.hydra_gptexp.grid.GridSweeper"
    params: dict[str, str] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridSweeperConf, provider="gptexp")


@dataclass
class Job:
    """A combination of values.

    Attributes:
        overrides: that make it.
        name: of its run and directory.
        error: what is wrong with it, or what ended it.
    """

    overrides: list[str]
    name: str = ""
    error: Exception | None = None
    tree: dict[str, Any] = field(default_factory=dict)


class GridSweeper(BasicSweeper):
    """Runs what is still to be done of a grid, through any launcher, and tells the results of all of it."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        super().__init__(max_batch_size=None, params=params)

    def sweep(self, arguments: list[str]) -> list[float]:
        """Bring all jobs to their end.

        Returns:
            the lowest validation loss of each job that has one, in their order.

        Raises:
            RunFailed: when a job failed.
        """
        from gptexp.sweeps import Sweep

        overrides = self.parse([*(f"{k}={v}" for k, v in self.params.items()), *arguments])
        assert self.config is not None
        sweep = Sweep(Path(str(self.config.hydra.sweep.dir)))
        varied = [o.get_key_element() for o in overrides if o.is_sweep_override()]
        varied = [*sweep.info.get("varied", []), *(k for k in varied if k not in sweep.info.get("varied", []))]
        jobs = [self.prepare(list(combination), varied) for combination in self.split_arguments(overrides, None)[0]]
        self.join(sweep, jobs, varied)
        self.work(sweep, jobs)
        return report(sweep, jobs)

    def parse(self, arguments: Sequence[str]) -> list[Override]:
        """The overrides of a command line; a key that comes twice has the last value."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return list({o.get_key_element(): o for o in parser.parse_overrides(list(arguments))}.values())

    def prepare(self, overrides: list[str], varied: Sequence[str]) -> Job:
        """Compose a job's configuration and name it; a mistake in it is kept with it."""
        from gptexp.config import plain, read_config
        from gptexp.train import job_name

        assert self.hydra_context is not None
        assert self.config is not None
        job = Job(overrides)
        try:
            tree = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            with open_dict(tree):
                del tree["hydra"]
            config = read_config(plain(tree))
        except UserError as error:
            job.error, job.name = error, " ".join(o for o in overrides if o.partition("=")[0] in varied)
        else:
            job.name = job_name(config, "|".join(o for o in overrides if o.partition("=")[0] in varied))
            job.tree = config.tree()
        return job

    def join(self, sweep: Any, jobs: Sequence[Job], varied: Sequence[str]) -> None:
        """Begin the sweep, or go on with it if it is the same one."""
        from gptexp.config import flatten

        trees = [flatten(job.tree) for job in jobs if job.tree]
        if trees:
            keys = dict.fromkeys(k for tree in trees for k in tree)
            fixed = {k: trees[0].get(k) for k in keys if all(t.get(k) == trees[0].get(k) for t in trees)}
            sweep.join(fixed, [k for k in keys if k not in fixed], varied, [j.name for j in jobs if j.tree], sys.argv)

    def work(self, sweep: Any, jobs: Sequence[Job]) -> None:
        """Launch what is to be done, until nothing is; a job that another process has is waited for."""
        from rich.console import Console

        from gptexp.scoreboard import Scoreboard
        from gptexp.sweeps import FINAL

        assert self.launcher is not None
        todo = [j for j in jobs if j.error is None and sweep.standing(j.name).state not in FINAL]
        with Scoreboard(sweep, [j.name for j in jobs if j.error is None], Console()), _quiet():
            while todo:
                sent = [[*job.overrides, f"sweep.job='{job.name}'"] for job in todo]
                results = self.launcher.launch(sent, initial_job_idx=0)
                busy = []
                for job, result in zip(todo, results, strict=True):
                    if result.status == JobStatus.FAILED:
                        job.error = result._return_value
                    elif is_busy(result):
                        busy.append(job)
                while busy and all(sweep.is_busy(job.name) for job in busy):
                    time.sleep(1)
                todo = [job for job in busy if sweep.standing(job.name).state not in FINAL]


def is_busy(result: JobReturn) -> bool:
    """Whether another process had the job."""
    return result.status == JobStatus.COMPLETED and result._return_value is None


def report(sweep: Any, jobs: Sequence[Job]) -> list[float]:
    """Tell how the jobs ended, best first, and draw their curves.

    Raises:
        RunFailed: when a job failed.
    """
    from gptexp.sweeps import draw, summary

    standings = [sweep.standing(job.name) for job in jobs if job.error is None]
    errors = {job.name: job.error for job in jobs if job.error is not None}
    log.info("%s", summary(standings, errors))
    draw(sweep)
    failed = [*errors.values(), *(RunFailed(s.error or "") for s in standings if s.state == "failed")]
    if len(failed) == 1 == len(jobs):
        raise failed[0]
    if failed:
        raise RunFailed(f"{len(failed)} of {len(jobs)} jobs failed")
    return [s.loss for s in standings]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the runs' own lines off the terminal; train.log has them."""
    levels = {handler: handler.level for handler in log.handlers}
    os.environ["GPTEXP_QUIET"] = "1"
    try:
        for handler in levels:
            handler.setLevel(logging.WARNING)
        yield
    finally:
        del os.environ["GPTEXP_QUIET"]
        for handler, level in levels.items():
            handler.setLevel(level)
