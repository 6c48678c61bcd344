"""The sweeper of a search by Optuna, which asks for trials and is told their losses, over any launcher."""

import logging
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from filelock import FileLock
from hydra.core.override_parser.types import Override

from gptexp.config.schema import flatten
from gptexp.errors import RunFailed, UserError
from gptexp.runs.run import FINAL
from gptexp.sweeps import search
from gptexp.sweeps.grid import Grid, Job, report, show
from gptexp.sweeps.sweep import Sweep, differences

log = logging.getLogger("gptexp")


class OptunaSearch(Grid):
    """Asks Optuna for trials and tells it their losses, until there are `n_trials`."""

    def __init__(self, params: dict[str, str] | None = None, **settings: Any) -> None:
        super().__init__(params)
        self.given = settings
        self.failed: set[int] = set()  # trials that failed in this process; the next one tries them again

    def run(self, sweep: Sweep, overrides: Sequence[Override]) -> list[float]:
        """Finish the search, from wherever it stands.

        Returns:
            the lowest validation loss of each trial.

        Raises:
            UserError: when Optuna is missing, the settings are wrong, or the search was begun over other values.
            RunFailed: when a job failed.
        """
        if self.config.sweep.get("seeds") == "auto":
            return self.until_decided(sweep, overrides)  # which a search does not
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
        wanted = int(min(self.settings.n_trials, search.combinations(space)))
        errors: dict[int, Exception] = {}
        with show(sweep, [], wanted) as board:
            while trials := self.ask(found, space, sweep, wanted):
                batch = []
                for number, values in trials.items():
                    job = self.prepare([*fixed, *(f"{k}={v}" for k, v in values.items())], [])
                    job.name = search.trial_name(number)
                    batch.append(job)
                sweep.join(settings, list(space), [], {job.name: job.config for job in batch}, sys.argv)
                board.add([job.name for job in batch])
                busy = self.send([job for job in batch if job.error is None])
                for job, number in zip(batch, trials, strict=True):
                    if job not in busy:
                        self.tell(found, number, job, sweep)
                    if job.error:
                        errors[number] = job.error
        errors_of = {t.number: t.user_attrs.get("error") for t in found.counted()}
        jobs = [Job([], search.trial_name(number), errors.get(number) or (RunFailed(error) if error else None))
                for number, error in errors_of.items()]  # fmt: skip
        if wanted < self.settings.n_trials:
            log.info("hydra.sweeper.n_trials=%d: there are no more than %d combinations", self.settings.n_trials,
                     wanted)  # fmt: skip
        try:
            return report(sweep, jobs)
        finally:
            log.info("%s", search.summary(found.study, sweep, base.config))

    def ask(
        self, found: search.Search, space: dict[str, Any], sweep: Sweep, wanted: int
    ) -> dict[int, dict[str, Any]]:
        """The parameters of up to `n_jobs` trials to work on now, by number; none once `wanted` trials are finished.

        Trials that a stopped process left come before new ones, and the trials of other processes are waited for.
        """
        from optuna.samplers import RandomSampler
        from optuna.trial import TrialState

        study, sampler = found.study, found.study.sampler
        while True:
            with FileLock(sweep.folder / ".locks" / ".search"):
                known: list[dict[str, Any]] = []  # the parameters of all trials
                for trial in found.counted():
                    # Its process may have been killed before all of them were drawn, or found to be a repetition.
                    half = trial.params.keys() != space.keys() or trial.params in known
                    if half and trial.state == TrialState.RUNNING:
                        study.tell(trial.number, state=TrialState.FAIL)
                    else:
                        known.append(trial.params)
                open_ = [t for t in found.counted() if t.state == TrialState.RUNNING and t.number not in self.failed]
                free = [t for t in open_ if not sweep.is_busy(search.trial_name(t.number))][: self.settings.n_jobs]
                taken = {t.number: t.params for t in free}
                while len(taken) < self.settings.n_jobs and len(known) < wanted:
                    asked = study.ask(space)
                    if asked.params in known:
                        study.tell(asked.number, state=TrialState.FAIL)
                        study.sampler = RandomSampler(seed=asked.number)  # the other one would insist
                    else:
                        taken[asked.number] = asked.params
                        known.append(asked.params)
                        study.sampler = sampler
            if taken or not open_:
                return taken
            time.sleep(1)

    def tell(self, found: search.Search, number: int, job: Job, sweep: Sweep) -> None:
        """Tell Optuna how a trial ended."""
        from optuna.trial import TrialState

        study, standing = found.study, sweep.standing(job.name)
        if job.error is not None or standing.state not in FINAL:
            if job.config and standing.attempts <= job.config.sweep.retries:
                self.failed.add(number)
                return
            found.trial(number).set_user_attr("error", str(job.error or standing.error))
            study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        elif standing.state == "done" and math.isfinite(standing.loss):
            study.tell(number, standing.loss, skip_if_finished=True)
        else:
            study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
