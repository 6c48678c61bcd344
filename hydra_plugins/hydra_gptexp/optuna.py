"""A sweeper that searches instead of trying everything: Optuna's ask and tell, over any launcher."""

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override

from gptexp import search
from gptexp.config import flatten
from gptexp.errors import RunFailed, UserError
from gptexp.sweeps import FINAL, Sweep, differences
from hydra_plugins.hydra_gptexp.grid import GridSweeper, Job, report, show

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


log = logging.getLogger("gptexp")


TARGET = {"_target_": "hydra_plugins.hydra_gptexp.optuna.OptunaSweeper", "params": None}
ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=TARGET | asdict(search.SearchConfig()),
                             provider="gptexp")  # fmt: skip


class OptunaSweeper(GridSweeper):
    """Asks Optuna for trials and tells it their losses, until there are `n_trials`."""

    def __init__(self, params: dict[str, str] | None = None, **settings: Any) -> None:
        super().__init__(params)
        self.given = settings
        self.failed: set[int] = set()  # trials that failed in this process; the next one tries them again

    def run(self, sweep: Sweep, overrides: Sequence[Override]) -> list[float]:
        """Bring the search to its end, from wherever it stands.

        Returns:
            the lowest validation loss of each trial.

        Raises:
            UserError: when Optuna is missing, the settings are wrong, or the search was begun over other values.
            RunFailed: when a job failed.
        """
        swept = [o for o in overrides if o.is_sweep_override()]
        fixed = [f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in overrides if o not in swept]
        base = self.prepare(fixed, [])
        if base.config is None:
            raise base.error or RuntimeError("a job without a configuration")
        self.settings = search.read_search(self.given, swept, base.config)
        space = search.space(swept)
        settings = flatten(base.config.tree())
        sweep.join(settings, [], [], {}, sys.argv)
        found = search.open_search(sweep.folder, self.settings, base.config)
        words = {o.get_key_element(): str(o.input_line).partition("=")[2] for o in swept}
        known = found.study.user_attrs.get("space", words)
        old, new = (dict.fromkeys([*known, *words], "(nothing)") | one for one in (known, words))
        if different := differences(old, new, "the search's"):
            raise UserError(f"sweep.name={sweep.folder.name}: {difference}; leave it as it was, or give the new search "
                            "another name" for difference in different)  # fmt: skip
        found.study.set_user_attr("space", words)
        wanted = min(self.settings.n_trials, search.combinations(space))
        errors: dict[int, Exception] = {}
        with show(sweep, [], wanted) as board:
            while trials := self.ask(found, space, sweep, wanted):
                batch = []
                for trial in trials:
                    job = self.prepare([*fixed, *(f"{k}={v}" for k, v in trial.params.items())], [])
                    job.name = search.trial_name(trial.number)
                    batch.append(job)
                sweep.join(settings, list(space), [], {job.name: job.config for job in batch}, sys.argv)
                board.add([job.name for job in batch])
                busy = self.send([job for job in batch if job.error is None])
                for job, trial in zip(batch, trials, strict=True):
                    if job not in busy:
                        self.tell(found, trial, job, sweep)
                    if job.error:
                        errors[trial.number] = job.error
        told = {t.number: t.user_attrs.get("error") for t in found.counted()}
        jobs = [Job([], search.trial_name(number), errors.get(number) or (RunFailed(error) if error else None))
                for number, error in told.items()]  # fmt: skip
        if wanted < self.settings.n_trials:
            log.info("hydra.sweeper.n_trials=%d: there are no more than %d combinations", self.settings.n_trials,
                     wanted)  # fmt: skip
        try:
            return report(sweep, jobs)
        finally:
            log.info("%s", search.summary(found.study, sweep, base.config))

    def ask(
        self, found: search.Search, space: dict[str, Any], sweep: Sweep, wanted: int
    ) -> "list[FrozenTrial]":
        """The trials to work on now: those that a stopped process left, then new ones, `n_jobs` in all, up to `wanted`.

        Waits for the trials of other processes before it says that there are none.
        """
        from optuna.samplers import RandomSampler
        from optuna.trial import TrialState

        study, sampler = found.study, found.study.sampler
        while True:
            with FileLock(sweep.folder / ".locks" / ".search"):
                drop_half_asked(found, space)
                open_ = [t for t in found.counted() if t.state == TrialState.RUNNING and t.number not in self.failed]
                taken = [t for t in open_ if not sweep.is_busy(search.trial_name(t.number))][: self.settings.n_jobs]
                while len(taken) < self.settings.n_jobs and len(found.counted()) < wanted:
                    trial = study.ask(space)
                    if any(t.params == trial.params for t in found.counted() if t.number != trial.number):
                        study.tell(trial.number, state=TrialState.FAIL)
                        study.sampler = RandomSampler(seed=trial.number)  # the other one would insist
                    else:
                        taken.append(next(t for t in found.counted() if t.number == trial.number))
                        study.sampler = sampler
            if taken or not open_:
                return taken
            time.sleep(1)

    def tell(self, found: search.Search, trial: "FrozenTrial", job: Job, sweep: Sweep) -> None:
        """Tell Optuna how a trial ended."""
        from optuna.trial import TrialState

        study, standing = found.study, sweep.standing(job.name)
        if job.error is not None or standing.state not in FINAL:
            if job.config and standing.attempts <= job.config.sweep.retries:
                self.failed.add(trial.number)
                return
            found.trial(trial.number).set_user_attr("error", str(job.error or standing.error))
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        elif standing.state == "done" and math.isfinite(standing.loss):
            study.tell(trial.number, standing.loss, skip_if_finished=True)
        else:
            study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)


def drop_half_asked(found: search.Search, space: dict[str, Any]) -> None:
    """Void the trials whose process was killed before all their parameters were drawn, or found to be a repetition."""
    from optuna.trial import TrialState

    known: list[dict[str, Any]] = []
    for trial in found.counted():
        if trial.state == TrialState.RUNNING and (trial.params.keys() != space.keys() or trial.params in known):
            found.study.tell(trial.number, state=TrialState.FAIL)
        known.append(trial.params)
