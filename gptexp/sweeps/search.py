"""A search by Optuna: its settings, its space, its study, and when a poor trial is stopped."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from annotated_types import Ge
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from gptexp.config.schema import Config
from gptexp.config.settings import read_fields, settings
from gptexp.errors import UserError
from gptexp.processes.ending import several
from gptexp.runs.run import Run
from gptexp.sweeps.sweep import Sweep

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial


@settings
class SearchConfig:
    """The settings of a search, `hydra.sweeper`."""

    n_trials: Annotated[int, Ge(1)] = 20
    """Trials in all, those of earlier commands included."""
    n_jobs: Annotated[int, Ge(1)] = 1
    """Trials at a time; more than one needs a launcher that runs them side by side, such as joblib."""
    sampler: Literal["tpe", "random", "gp", "qmc"] = "tpe"
    """How the values of a trial are drawn."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """How a poor trial is recognized."""
    startup_trials: Annotated[int, Ge(0)] = 5
    """Trials drawn at random, and not pruned by the median, before the sampler and the pruner begin."""
    seed: Annotated[int, Ge(0)] = 0
    """The seed of the sampler."""
    storage: str | None = None
    """A database's URL; null is a SQLite file in the sweep's directory."""


def space(overrides: Sequence[Override]) -> dict[str, "BaseDistribution"]:
    """The distribution of each setting that a command line leaves open, by dotted key.

    `a,b` and choice(...) are categories; interval(...) is a number, int(interval(...)) a whole one, range(...) one
    of its values; on a logarithmic scale where tag(log, ...) says so.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for override in overrides:
        value, key = override.value(), override.get_key_element()
        if not isinstance(value, IntervalSweep | RangeSweep):
            found[key] = CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))
            continue
        log, low, step = "log" in value.tags, cast(Any, value.start), cast(Any, getattr(value, "step", None))
        high: Any = value.end if isinstance(value, IntervalSweep) else value.stop
        if step:  # as in Python's range, the end is not in it
            high = low + (math.ceil((high - low) / step) - 1) * step
        if isinstance(low, int) and isinstance(high, int):
            found[key] = IntDistribution(low, high, log=log, step=step or 1)
        else:
            found[key] = FloatDistribution(low, high, log=log, step=step)
    return found


def read_search(settings: Mapping[str, Any], swept: Sequence[Override], config: Config) -> SearchConfig:
    """Check the settings of the sweeper, the overrides that leave a setting open, and what all trials share.

    Raises:
        UserError: with a line for everything that keeps the search from beginning.
    """
    if find_spec("optuna") is None:
        raise UserError("hydra/sweeper=optuna: optuna is not installed; pip install 'gptexp[optuna]'")
    problems: list[str] = []
    if not swept:
        problems.append("hydra/sweeper=optuna: there is nothing to search; leave a setting open, as in "
                        "'optimizer.learning_rate=tag(log,interval(1e-4,1e-2))'")  # fmt: skip
    problems += [f"{o.input_line}: losses per token of different vocabularies cannot be compared; leave one to search "
                 "with, or train a grid of them and compare" for o in swept
                 if o.key_or_group in ("tokenizer", "data.tokenizer", "data.vocab_size")]  # fmt: skip
    values = read_fields(SearchConfig, "hydra.sweeper.", settings, problems)
    if problems:
        raise UserError(problems)
    made = SearchConfig(**values)
    if made.pruner == "hyperband" and config.max_steps is None:
        raise UserError("hydra.sweeper.pruner=hyperband: needs max_steps, by which it plans; allowed: none, median")
    if made.pruner != "none" and config.hardware.strategy != "auto" and not several():
        raise UserError(f"hydra.sweeper.pruner={made.pruner}: a trial of hardware.strategy={config.hardware.strategy} "
                        "cannot be pruned; allowed: none")  # fmt: skip
    return made


@dataclass(frozen=True)
class Search:
    """A study of Optuna, and the storage that knows its trials by their numbers."""

    study: "Study"
    storage: "RDBStorage"

    def trial(self, number: int) -> "Trial":
        """A trial that may be another process's, to report to and to set attributes of."""
        from optuna.trial import Trial

        study = self.storage.get_study_id_from_name(self.study.study_name)
        return Trial(self.study, self.storage.get_trial_id_from_study_id_trial_number(study, number))

    def counted(self) -> "list[FrozenTrial]":
        """The trials but for void ones, which are never run: they have failed without an error."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        return [t for t in trials if t.state != TrialState.FAIL or "error" in t.user_attrs]


def combinations(space: Mapping[str, "BaseDistribution"]) -> float:
    """The number of different trials in a space; infinite if a parameter is continuous."""
    from optuna.distributions import CategoricalDistribution

    count: float = 1
    for value in space.values():
        if isinstance(value, CategoricalDistribution):
            count *= len(value.choices)
        elif (numbers := cast(Any, value)).step:
            count *= round((numbers.high - numbers.low) / numbers.step) + 1
        else:
            return math.inf
    return count


def open_search(folder: Path, settings: SearchConfig, config: Config) -> Search:
    """Begin or continue the search of a sweep, in the sweep's directory unless the settings name another storage.

    Raises:
        UserError: when the storage cannot be opened.
    """
    import optuna
    from optuna import pruners, samplers

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    startup, steps = settings.startup_trials, config.max_steps or 1
    make_sampler: dict[str, Callable[..., samplers.BaseSampler]] = {
        "tpe": partial(samplers.TPESampler, n_startup_trials=startup, multivariate=True, constant_liar=True),
        "random": samplers.RandomSampler,
        "gp": partial(samplers.GPSampler, n_startup_trials=startup),
        "qmc": samplers.QMCSampler,
    }
    make_pruner: dict[str, Callable[[], pruners.BasePruner]] = {
        "none": pruners.NopPruner,
        "median": partial(pruners.MedianPruner, n_startup_trials=startup),
        "hyperband": partial(pruners.HyperbandPruner, min(config.eval_interval, steps), steps),
    }
    url = settings.storage or f"sqlite:///{folder.absolute() / 'optuna.db'}"
    try:
        storage = optuna.storages.RDBStorage(url)
        study = optuna.create_study(
            study_name=folder.name, storage=storage, load_if_exists=True, direction="minimize",
            pruner=make_pruner[settings.pruner](),
        )  # fmt: skip
    except Exception as error:  # whatever the database's driver raises
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"hydra.sweeper.storage={url}: cannot be opened ({reason})") from error
    # A process that continues a study must not draw again what the one before it drew; qmc's sequence goes on itself.
    drawn = 0 if settings.sampler == "qmc" else len(study.get_trials(deepcopy=False))
    study.sampler = make_sampler[settings.sampler](seed=settings.seed + drawn)
    return Search(study, storage)


def summary(study: "Study", sweep: Sweep, config: Config) -> str:
    """The best trial, and what pruning saved of the steps."""
    from optuna.trial import TrialState

    trials, lines = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)), []
    with suppress(ValueError):  # no trial is complete
        best = study.best_trial
        words = " ".join(f"{key}={value}" for key, value in best.params.items())
        lines.append(f"best: val/loss {best.value:.4f} with {words}")
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    if pruned and config.max_steps:
        done = [(Run(sweep.folder / trial_name(t.number)).result or {}).get("step", config.max_steps) for t in trials]
        saved = 1 - sum(done) / (len(trials) * config.max_steps)
        lines.append(f"pruned: {len(pruned)} of {len(trials)} trials, which saved {saved:.0%} of all steps")
    return "\n".join(lines)


def trial_name(number: int) -> str:
    """The name of a trial's job."""
    return f"trial-{number:04d}"


def watcher(folder: Path, sweeper: Mapping[str, Any], config: Config) -> Callable[[int, float], bool] | None:
    """A function that reports a trial's evaluation, and returns whether to stop it; None if nothing is pruned."""
    settings = SearchConfig(**{f.name: sweeper[f.name] for f in fields(SearchConfig)})
    if settings.pruner == "none":
        return None
    number = int(str(config.sweep.job).rpartition("-")[2])
    search = open_search(folder, settings, config)
    trial = search.trial(number)
    before = next(t for t in search.study.get_trials(deepcopy=False) if t.number == number)
    known = set(before.intermediate_values)  # by the process that began the trial, if it was stopped

    def watch(step: int, loss: float) -> bool:
        if step == 0 or not math.isfinite(loss):
            return False
        if step not in known:
            trial.report(loss, step)
        return bool(trial.should_prune())

    return watch
