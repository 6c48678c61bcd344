"""Reads a Hydra command line before Hydra does, to report all of its mistakes at once, each in one line."""

import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptexp.config.choices import VALUES, conf_dir
from gptexp.config.composition import VERSION_BASE, Composer, each, parse, plain, quoted, register_choices
from gptexp.config.hints import FREE, hint_of_choice, hint_of_key
from gptexp.config.schema import Config, known_keys, read_config
from gptexp.config.settings import Tree, show
from gptexp.config.trainer import SHORT
from gptexp.errors import UserError
from gptexp.registry import NORMS

COMPOSING = (HydraException, OmegaConfBaseException, ValueError, AssertionError)
"""What Hydra raises where it cannot compose a configuration."""

ONE_SETTING = (*VALUES, "heads")
"""Groups whose choices are other words for one setting."""

OF_SWEEPS = re.compile(r"sweep$|sweep\.|hydra[./](sweep|sweeper|launcher)\b")  # keys that only a multirun reads

def check(
    arguments: Sequence[str], multirun: bool, config_dir: str | None = None, config_name: str = "config",
    shown: bool = False,
) -> list[str]:  # fmt: skip
    """All that is wrong with the overrides of a command, one line a problem.

    In a multirun each value of a sweep is checked by itself; combinations are checked by each job.

    Args:
        arguments: the overrides.
        multirun: whether several values of a setting make several jobs.
        config_dir: a further folder of configuration files.
        config_name: the primary configuration.
        shown: the configuration is only shown, so its values may be wrong.
    """
    main, more = conf_dir(), config_dir
    if more and not (Path(main) / f"{config_name}.yaml").exists():  # it is looked for in one folder alone
        main, more = str(Path(more).absolute()), main
    with initialize_config_dir(main, version_base=VERSION_BASE, job_name="gptexp"):
        overrides, problems = parse(arguments)
        try:
            _Check(overrides, Composer(config_name, _search(overrides, more)), multirun, shown, problems).run()
        except COMPOSING as error:
            problems.append(one_line(error))
    return list(dict.fromkeys(problems))


class _Check:
    """The check of one command line, while Hydra is initialized.

    Attributes:
        overrides: of the command.
        composer: of its configurations.
        shown: they are only shown.
        problems: gets a line for each mistake.
        multirun: whether several values of a setting make several jobs.
    """

    def __init__(
        self, overrides: list[Override], composer: Composer, multirun: bool, shown: bool, problems: list[str]
    ) -> None:
        self.overrides, self.composer, self.shown, self.problems = overrides, composer, shown, problems
        self.multirun = multirun or any(
            o.key_or_group == "hydra.mode" and str(o.value()).upper() == RunMode.MULTIRUN.name for o in overrides
        )
        self.groups, self.known = composer.groups, known_keys()

    @cached_property
    def declared(self) -> Tree:
        """The groups that the primary configuration has, with what it chooses."""
        return dict(self.composer.whole([]).hydra.runtime.choices)

    def run(self) -> None:
        """Check everything."""
        mistakes = [(override, self.mistakes(override)) for override in self.overrides]
        self.problems += [line for _, lines in mistakes for line in lines]
        # Which settings a misspelt choice has cannot be known, so those below it go unchecked.
        wrong = tuple(f"{o.key_or_group.replace('/', '.')}." for o, lines in mistakes if lines)
        good = [o for o, lines in mistakes if not lines and not o.key_or_group.startswith(wrong)]
        try:
            whole = self.composer.whole(firsts(good))
        except COMPOSING as error:  # something that is not ours to check, so it is left out
            self.problems.append(one_line(error))
            good = [o for o in good if self.composer.is_value(o) or self.chooses(o)]
            whole = self.composer.whole(firsts(good))
        if self.shown:  # whatever the values are, Hydra must know their keys
            compose(self.composer.config_name, [*self.composer.always, *firsts(good)])
            return
        HydraConfig.instance().set_config(whole.copy())  # for values such as ${hydra:runtime.cwd}
        filed = (whole.hydra.sweeper or {}).get("params") or {}
        params, unread = parse(f"{key}={value}" for key, value in filed.items())
        self.problems += unread
        if params and not self.multirun:
            swept = ", ".join(o.key_or_group for o in params)
            self.problems.append(f"hydra.sweeper.params: a sweep over {swept} needs --multirun (-m)")
        self.check_folder(whole.hydra)
        self.check_contradictions(params, good)
        self.check_values(whole, good, cross_check=not any(o.is_sweep_override() for o in [*good, *params]))

    def chooses(self, override: Override) -> bool:
        """Whether an override is a plain choice of a group, one of Hydra's own included."""
        plainly = override.type == OverrideType.CHANGE and override.package is None
        return plainly and override.key_or_group in self.groups

    def mistakes(self, override: Override) -> list[str]:
        """A line for each problem of an override that does not depend on the others."""
        key, line, swept = override.key_or_group, str(override.input_line), override.is_sweep_override()
        options = self.groups.options(key) if key in self.groups else []
        instead = f"allowed: {', '.join(options)}" if options else f"write {key}=VALUE"
        dropped = override.is_delete() or (bool(options) and override.value() is None)
        typed = key in self.known and key.partition(".")[0] not in FREE
        typed = typed or (override.is_delete() and key in self.declared)
        rules = {
            "needs --multirun (-m)": OF_SWEEPS.match(key) and not self.multirun and not self.shown,
            "a sweep goes on when its command is given again; leave it out": key == "resume" and self.multirun,
            "a setting of Hydra's own has one value": swept and override.is_hydra_override(),
            "several values need --multirun (-m)": swept and not self.multirun,
            f"this group has a choice already; write {line.lstrip('+')}":
                (override.is_add() or override.is_force_add()) and key in self.declared,
            "must be a run directory, or auto for the newest unfinished run of this configuration":
                key == "resume" and str(override.value()).lower() in ("true", "false", "latest", "last"),
            f"cannot be left out; {instead}": dropped and (typed or self.declared.get(key) is not None),
        }  # fmt: skip
        reasons = [reason for reason, applies in rules.items() if applies][:1]
        if reasons or not self.chooses(override):
            return [f"{line}: {reason}" for reason in reasons]
        texts = [text.partition("=")[2] for text in each(override)]
        if not texts:  # a glob that matches nothing
            return [f"{line}: names no choice; allowed: {', '.join(options)}"]
        names = [name.strip("'\" ") for text in texts for name in text.strip("[]").split(",") if name]
        unknown = [name for name in names if name not in options]
        return [f"{key}={name}: unknown{hint_of_choice(key, name, options)}" for name in unknown]

    def check_folder(self, hydra: DictConfig) -> None:
        """Hydra must be able to make the folder of the run; something must name that of a sweep."""
        if self.multirun:
            ours = str(hydra.sweeper.get("_target_")).startswith("hydra_plugins.hydra_gptexp.")
            if not ours and not any(o.key_or_group in ("sweep.name", "hydra.sweep.dir") for o in self.overrides):
                sweeper = hydra.runtime.choices.get("hydra/sweeper")
                self.problems.append(f"hydra/sweeper={sweeper}: needs sweep.name=NAME, the folder of its jobs")
            return
        folder = Path(str(hydra.run.dir)).absolute()
        try:
            there = next(path for path in (folder, *folder.parents) if path.exists())
            reason = "" if there.is_dir() and os.access(there, os.W_OK) else f"cannot write {there}"
        except OSError as error:  # a name that is too long, or a folder that cannot be read
            reason = str(error.strerror)
        if reason:
            self.problems.append(f"hydra.run.dir={hydra.run.dir}: cannot be made ({reason})")

    def check_contradictions(self, params: Sequence[Override], overrides: Sequence[Override]) -> None:
        """No setting may be set under two names, such as a group's choice and a value, or a short name and a long one.

        The overrides of the command go before those that a file of conf/ makes a sweep of, `params`.
        """
        given = {o.key_or_group for o in overrides}
        params = [o for o in params if o.key_or_group not in given]
        first: dict[str, tuple[Override, list[str]]] = {}
        for override in [*params, *overrides]:
            for key, values in self.sets(override).items():
                other, others = first.setdefault(key, (override, values))
                if other.key_or_group != override.key_or_group and set(values) != set(others):
                    advice = "leave one of them out"
                    if other in params:
                        advice = f"write {other.key_or_group}=VALUE to choose from the sweep's"
                    self.problems.append(f"{override.input_line}: {other.input_line} sets {key}, too; {advice}")

    def sets(self, override: Override) -> dict[str, list[str]]:
        """The values, as text, of the setting that a value or a group's choice is about, by dotted key.

        Of a choice with many settings, such as optimizer=adamw, that is its name.
        """
        key = override.key_or_group
        found: dict[str, list[str]] = {}
        if short := SHORT.get(key.removeprefix("trainer.")) if key.startswith("trainer.") else None:
            return {short: [str(override.input_line)]}  # even the same value is an error
        for line in each(override):
            settings = {key: parse([line])[0][0].value()}
            if key in self.groups:
                settings = self.groups.settings(key, line.partition("=")[2])
                if key not in ONE_SETTING:
                    settings = {k: v for k, v in settings.items() if k == f"{key}.name"}
            for name, value in settings.items():
                found.setdefault(name, []).append(show(value))
        return found

    def check_values(self, whole: DictConfig, overrides: Sequence[Override], cross_check: bool) -> None:
        """Settings must exist, in the whole configuration but for the values, and have values that are allowed."""
        sound = []
        of_norms = tuple(f"model.norms.{name}." for name in NORMS)  # reported with the known ones
        for override in overrides:
            key = override.key_or_group
            known = key in self.known or key.startswith(of_norms)
            there = known or OmegaConf.select(whole, key, default=_MISSING) is not _MISSING
            if self.composer.is_value(override) and not there:
                self.problems.append(f"{override.input_line}: unknown key{hint_of_key(override, whole, self.declared)}")
            else:
                sound.append(override)
        first = firsts(sound)
        self.read(first, cross_check)
        for place, override in enumerate(o for o in sound if each(o)):
            for line in each(override)[1:]:
                self.read([*first[:place], line, *first[place + 1 :]], cross_check=False)

    def read(self, lines: Sequence[str], cross_check: bool) -> None:
        """Check the configuration that overrides compose to."""
        try:
            read_config(plain(self.composer.compose(lines)), cross_check)
        except UserError as error:
            self.problems += error.problems

def compose_config(arguments: Sequence[str]) -> Config:
    """The configuration that a command line of overrides stands for.

    Raises:
        UserError: with a line for every mistake.
    """
    register_choices()
    if problems := check(arguments, multirun=False):
        raise UserError(problems)
    with initialize_config_dir(conf_dir(), version_base=VERSION_BASE, job_name="gptexp"):
        return read_config(plain(Composer("config").compose(arguments)))


_MISSING = object()


def firsts(overrides: Iterable[Override]) -> list[str]:
    """The overrides with the first value of each that has several, without those whose values have no number."""
    return [lines[0] for lines in map(each, overrides) if lines]


def one_line(error: Exception) -> str:
    """What Hydra or OmegaConf says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    if isinstance(error.__cause__, OmegaConfBaseException) and len(lines) < 2:
        lines.append(str(error.__cause__).splitlines()[0])
    return " ".join(lines) or type(error).__name__


def _search(overrides: Iterable[Override], config_dir: str | None) -> list[str]:
    """The override of `hydra.searchpath` that has the folder `config_dir` among the others."""
    paths = [f"file://{Path(config_dir).absolute()}"] if config_dir else []
    for override in overrides:
        value = override.value()
        if override.key_or_group == "hydra.searchpath" and isinstance(value, list):
            paths += map(str, value)
    return [f"hydra.searchpath=[{','.join(map(quoted, paths))}]"] if paths else []
