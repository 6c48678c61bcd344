"""A sweeper that searches instead of trying everything: Optuna's ask and tell, over any launcher."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.core.config_store import ConfigStore

from gptexp.errors import RunFailed, UserError
from hydra_plugins.hydra_gptexp.grid import GridSweeper, Job, report, show

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from gptexp.sweeps import Sweep

log = logging.getLogger("gptexp")


@dataclass
class OptunaSweeperConf:
    """The settings of the search.

    Attributes:
        params: values by key, as on the command line, for a file of conf/ that describes a search.
        n_trials: in all, those of earlier commands included.
        n_jobs: trials at a time; more than one needs a launcher that runs them side by side, such as joblib.
        sampler: tpe, random, gp or qmc.
        pruner: median, hyperband or none.
        startup_trials: drawn at random, and not pruned by the median, before the sampler and the pruner begin.
        seed: of the sampler.
        storage: a database's URL; null is a SQLite file in the sweep's directory.
    """

    _target_: str = "hydra_plugins.hydra_gptexp.optuna.OptunaSweeper"
    params: dict[str, str] | None = None
    n_trials: int = 20
    n_jobs: int = 1
    sampler: str = "tpe"
    pruner: str = "median"
    startup_trials: int = 5
    seed: int = 0
    storage: str | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="gptexp")

PATIENCE = 100  # trials in a row that repeat an earlier one before the space counts as used up


class OptunaSweeper(GridSweeper):
    """Asks Optuna for trials and tells it their losses, until there are `n_trials`."""

    def __init__(self, params: dict[str, str] | None = None, **settings: Any) -> None:
        super().__init__(params)
        self.settings = settings
        self.failed: set[int] = set()  # trials that failed in this process; the next one tries them again

    def run(self, arguments: list[str]) -> list[float]:
        """Bring the search to its end, from wherever it stands.

        Returns:
            the lowest validation loss of each trial.

        Raises:
            UserError: when Optuna is missing, or the settings are wrong.
            RunFailed: when a job failed.
        """
        from gptexp import search
        from gptexp.config import flatten
        from gptexp.sweeps import Sweep
        from gptexp.train import command

        overrides = self.parse([*(f"{k}={v}" for k, v in self.params.items()), *arguments])
        swept = [o for o in overrides if o.is_sweep_override()]
        problems = search.problems(self.settings, swept)
        if problems:
            raise UserError(problems)
        assert self.config is not None
        sweep, space = Sweep(Path(str(self.config.hydra.sweep.dir))), search.space(swept)
        fixed = [f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in overrides if o not in swept]
        base = self.prepare(fixed, [])
        if base.config is None:
            raise base.error or RuntimeError("a job without a configuration")
        search.check_pruner(self.settings, base.config)
        settings = flatten(base.config.tree())
        sweep.join(settings, [], [], {}, command())
        study = search.open_study(sweep.folder, self.settings, base.config)
        search.check_space(study, space, {o.get_key_element(): str(o.input_line).partition("=")[2] for o in swept})
        wanted = min(self.settings["n_trials"], search.combinations(space))
        jobs: dict[str, Job] = {}
        with show(sweep, [], wanted) as board:
            while trials := self.ask(study, space, sweep, wanted):
                batch = []
                for trial in trials:
                    job = self.prepare([*fixed, *(f"{k}={v}" for k, v in trial.params.items())], [])
                    job.name = search.trial_name(trial.number)
                    batch.append(job)
                sweep.join(settings, list(space), [], {job.name: job.config for job in batch}, command())
                board.add([job.name for job in batch])
                busy = self.send([job for job in batch if job.error is None])
                for job, trial in zip(batch, trials, strict=True):
                    if job not in busy:
                        jobs[job.name] = job
                        self.tell(study, trial, job, sweep)
        for trial in counted(study):
            name, error = search.trial_name(trial.number), trial.user_attrs.get("error")
            jobs.setdefault(name, Job([], name, RunFailed(error) if error else None))
        if wanted < self.settings["n_trials"]:
            log.info("hydra.sweeper.n_trials=%d: there are no more than %d combinations", self.settings["n_trials"],
                     wanted)  # fmt: skip
        try:
            return report(sweep, [jobs[name] for name in sorted(jobs)])
        finally:
            log.info("%s", search.summary(study, sweep, base.config))

    def ask(self, study: "Study", space: dict[str, Any], sweep: "Sweep", wanted: int) -> "list[FrozenTrial]":
        """The trials to work on now: those that a stopped process left, then new ones, `n_jobs` in all, up to `wanted`.

        Waits for the trials of other processes before it says that there are none.
        """
        from optuna.samplers import RandomSampler
        from optuna.trial import TrialState

        from gptexp.search import trial_name

        sampler = study.sampler
        while True:
            with FileLock(sweep.folder / ".locks" / ".search"):
                drop_half_asked(study, space)
                open_ = [t for t in counted(study) if t.state == TrialState.RUNNING and t.number not in self.failed]
                taken = [t for t in open_ if not sweep.is_busy(trial_name(t.number))][: self.settings["n_jobs"]]
                repeats = 0
                while len(taken) < self.settings["n_jobs"] and len(counted(study)) < wanted and repeats < PATIENCE:
                    trial = study.ask(space)
                    if any(t.params == trial.params for t in counted(study) if t.number != trial.number):
                        void(study, trial.number)
                        repeats += 1
                        study.sampler = RandomSampler(seed=trial.number)  # the other one would insist
                    else:
                        taken.append(next(t for t in counted(study) if t.number == trial.number))
                        repeats, study.sampler = 0, sampler
            if taken or not open_:
                return taken
            time.sleep(1)

    def tell(self, study: "Study", trial: "FrozenTrial", job: Job, sweep: "Sweep") -> None:
        """Tell Optuna how a trial ended."""
        from optuna.trial import Trial, TrialState

        from gptexp.sweeps import FINAL

        standing = sweep.standing(job.name)
        if job.error is not None or standing.state not in FINAL:
            if job.config and standing.attempts <= job.config.sweep.retries:
                self.failed.add(trial.number)
                return
            Trial(study, trial._trial_id).set_user_attr("error", str(job.error or standing.error))
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        elif standing.state == "done" and math.isfinite(standing.loss):
            study.tell(trial.number, standing.loss, skip_if_finished=True)
        else:
            study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)


def drop_half_asked(study: "Study", space: dict[str, Any]) -> None:
    """Void the trials whose process was killed before all their parameters were drawn, or found to be a repetition."""
    from optuna.trial import TrialState

    known: list[dict[str, Any]] = []
    for trial in counted(study):
        if trial.state == TrialState.RUNNING and (trial.params.keys() != space.keys() or trial.params in known):
            void(study, trial.number)
        known.append(trial.params)


def void(study: "Study", number: int) -> None:
    """Count a trial no more."""
    from optuna.trial import Trial, TrialState

    (trial,) = (t for t in study.get_trials(deepcopy=False) if t.number == number)
    Trial(study, trial._trial_id).set_user_attr("repeats", True)
    study.tell(number, state=TrialState.FAIL)


def counted(study: "Study") -> "list[FrozenTrial]":
    """The trials of a study but for those that are void, which are never run."""
    return [t for t in study.get_trials(deepcopy=False) if "repeats" not in t.user_attrs]
