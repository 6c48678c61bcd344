"""Reads a Hydra command line before Hydra does, to report all of its mistakes at once, each in one line."""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from gptexp.config import Config, flatten, known_keys, plain, read_config
from gptexp.errors import UserError
from gptexp.groups import (
    VERSION_BASE,
    Groups,
    conf_dir,
    parse,
    quoted,
    register_choices,
    texts_of,
    values_of,
)
from gptexp.models.registry import NORMS
from gptexp.training.settings import SHORT
from gptexp.validation import Tree, nearest, show

COMPOSING = (HydraException, OmegaConfBaseException, ValueError, AssertionError)
"""What Hydra raises where it cannot compose a configuration."""

OF_SWEEPS = re.compile(r"sweep$|sweep\.|hydra[./](sweep|sweeper|launcher)\b")  # keys that only a multirun reads

FREE = {name for name, hint in get_type_hints(Config).items() if get_origin(hint) is dict}
"""Sections to which a command may add keys of its own."""

OTHER_NAMES = {
    "lr": "did you mean optimizer.learning_rate?",
    "min_lr": "did you mean schedule.min_lr_ratio?",
    "warmup": "did you mean schedule.warmup_steps?",
    "warmup_iters": "did you mean schedule.warmup_steps?",
    "lr_decay_iters": "did you mean schedule.decay_steps?",
    "steps": "did you mean max_steps?",
    "max_iters": "did you mean max_steps?",
    "epochs": "the length of training is set in optimizer steps, max_steps",
    "dataset": "did you mean data={}?",
    "device": "did you mean hardware={}?",
    "dtype": "did you mean hardware.precision?",
    "wandb": "choose with logger=wandb, logger=none or logger.wandb.mode=offline",
    "out_dir": "did you mean output_dir, or hydra.run.dir for one run?",
    "init_from": "did you mean resume?",
}
"""What to say of a key by the name that other programs give it; {} stands for its value."""

OTHER_CHOICES = {"cuda": "gpu"}

EXTRAS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit", "ray": "ray"}
"""The launchers that an extra of this package installs."""


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
        return _Check(arguments, multirun, more, config_name, shown).problems()


class _Check:
    """The check of one command line, while Hydra is initialized.

    Attributes:
        groups: of the configuration.
        declared: those that the primary configuration has, with what it chooses.
        settings: of Hydra itself, the choices of its groups included, by key.
        choices: overrides of our groups, by group, whose choices all exist.
        values: overrides of our settings.
        passed: overrides that Hydra takes as they are.
        wrong: groups of which a choice does not exist.
    """

    def __init__(
        self, arguments: Sequence[str], multirun: bool, config_dir: str | None, config_name: str, shown: bool
    ) -> None:
        self.loader = GlobalHydra.instance().config_loader()
        self.overrides, self.unread = parse(arguments, self.loader)
        self.config_name, self.shown = config_name, shown
        self.multirun = multirun or any(
            o.key_or_group == "hydra.mode" and str(o.value()).upper() == RunMode.MULTIRUN.name for o in self.overrides
        )
        self.search = _search(self.overrides, config_dir)
        self.groups = Groups(self.loader, self.search)
        self.declared = {k: v for k, v in self.groups.defaults(config_name) if " " not in k}  # not "override hydra/..."
        if config_name != "config":  # whose defaults may be in any folder
            with suppress(*COMPOSING):
                choices = compose(config_name, self.search, return_hydra_config=True).hydra.runtime.choices
                self.declared = {k: v for k, v in choices.items() if not k.startswith("hydra/")}
        self.known = known_keys()
        self.settings: dict[str, str] = {}
        self.choices: dict[str, Override] = {}
        self.values: list[Override] = []
        self.passed: list[str] = []
        self.wrong: set[str] = set()

    def problems(self) -> list[str]:
        """A line for each."""
        lines = [*self.unread]
        for override in self.overrides:
            lines += self.sort(override)
        chosen = {group: f"{group}={texts_of(choice)[0]}" for group, choice in self.choices.items()}
        tree, hydra, problems = self.compose(chosen.values())
        lines += problems
        if tree is None or hydra is None or self.shown:
            return _unique(lines)
        swept_by_file = (hydra.sweeper or {}).get("params") or {}
        params, unread = parse((f"{k}={v}" for k, v in swept_by_file.items()), self.loader)
        lines += unread
        if params and not self.multirun:
            lines.append(f"{self.source_of_sweep()}: is a sweep over {', '.join(o.key_or_group for o in params)}; "
                         "needs --multirun (-m)")  # fmt: skip
        lines += self.check_folder(hydra)
        lines += self.contradictions(params)
        # Which settings a misspelt choice has cannot be known, so those below it go unchecked.
        values = [v for v in self.values if v.key_or_group.partition(".")[0] not in self.wrong]
        swept = any(override.is_sweep_override() for override in [*self.overrides, *params])
        lines += self.check_values(tree, values, cross_check=not swept)
        for group, choice in self.choices.items():  # further choices of a swept group
            for text in texts_of(choice)[1:]:
                other, _, problems = self.compose((chosen | {group: f"{group}={text}"}).values())
                lines += [*problems, *(_problems(other, cross_check=False) if other is not None else [])]
        return _unique(lines)

    def sort(self, override: Override) -> list[str]:
        """Put an override where it belongs; returns a line for each problem of it."""
        key, hydra = override.key_or_group, override.is_hydra_override()
        if reason := self.refuse(override):
            return [f"{override.input_line}: {reason}"]
        plainly = override.type == OverrideType.CHANGE and override.package is None
        chooses = plainly and ("/" in key if hydra else key in self.groups)
        if chooses and (problems := self.check_choice(override)):
            self.wrong.add(key.replace("/", "."))
            self.choices.pop(key, None)
            return problems
        if hydra:
            self.settings |= {} if key == "hydra.searchpath" else {key: str(override.input_line)}
        elif chooses:
            self.choices[key] = override
        elif plainly and not self.shown:
            self.values.append(override)
        else:
            texts = texts_of(override)  # of several values the first
            self.passed.append(f"{override.get_key_element()}={texts[0]}" if texts else str(override.input_line))
        return []

    def refuse(self, override: Override) -> str:
        """Why an override cannot be, whatever its value; empty if it can."""
        key, swept = override.key_or_group, override.is_sweep_override()
        typed = key in self.declared or (key in self.known and key.partition(".")[0] not in FREE)
        added = override.is_add() or override.is_force_add()
        rules = {
            "needs --multirun (-m)": OF_SWEEPS.match(key) and not self.multirun and not self.shown,
            "a sweep goes on when its command is given again; leave it out": key == "resume" and self.multirun,
            "a setting of Hydra's own has one value": swept and override.is_hydra_override(),
            "several values need --multirun (-m)": swept and not self.multirun,
            f"this group has a choice already; write {str(override.input_line).lstrip('+')}":
                added and key in self.declared,
            "must be a run directory, or auto for the newest unfinished run of this configuration":
                key == "resume" and str(override.value()).lower() in ("true", "false", "latest", "last"),
        }
        if override.is_delete() and typed:
            return f"cannot be left out; {self.instead(key)}"
        return next((reason for reason, applies in rules.items() if applies), "")

    def compose(self, chosen: Iterable[str]) -> tuple[DictConfig | None, DictConfig | None, list[str]]:
        """The configuration with these choices, that of Hydra, and what Hydra says of settings not ours to check."""
        problems: list[str] = []
        wrong = tuple(f"{group}." for group in self.wrong)
        settings = [line for key, line in self.settings.items() if not key.startswith(wrong)]
        for more in ([*self.passed, *settings], []):
            try:
                tree = compose(self.config_name, [*self.search, *chosen, *more], return_hydra_config=True)
            except COMPOSING as error:
                problems.append(_told(error))
                continue
            HydraConfig.instance().set_config(tree.copy())  # for values such as ${hydra:runtime.cwd}
            hydra = tree.hydra
            with open_dict(tree):
                del tree["hydra"]
            return tree, hydra, problems
        return None, None, problems[:1]

    def check_choice(self, override: Override) -> list[str]:
        """A line for each choice that its group does not have."""
        group, texts, options = override.key_or_group, texts_of(override), self.groups.options(override.key_or_group)
        if not texts:  # a glob that matches nothing
            return [f"{override.input_line}: names no choice; allowed: {', '.join(options)}"]
        names = [name.strip("'\" ") for text in texts for name in text.strip("[]").split(",") if name]
        return [
            f"{group}=null: cannot be left out; {self.instead(group)}" if name == "null"
            else f"{group}={name}: unknown{self.hint_of_choice(group, name, options)}"
            for name in names if name not in options
        ]  # fmt: skip

    def instead(self, key: str) -> str:
        """What to write for a group or a setting that cannot be left out."""
        options = self.groups.options(key) if key in self.groups else []
        if "none" in options:
            return f"write {key}=none"
        if key in self.declared and self.declared[key] is None:
            return f"without {key} there is none"
        return f"allowed: {', '.join(options)}" if options else f"write {key}=VALUE"

    def hint_of_choice(self, group: str, name: str, options: list[str]) -> str:
        """What stands after "unknown" in the line of a choice that there is not."""
        if group == "hydra/launcher" and name in EXTRAS:
            return f"; pip install 'gptexp[{EXTRAS[name]}]'"
        word = re.sub(r"[_-]", "", name.lower())
        hint = nearest(OTHER_CHOICES.get(word, word), options)
        if group == "data" and ("." in name or "/" in name):
            hint = f"; did you mean data=file data.path={name}?"
        elif not hint and options and name.isdigit():  # heads=3
            keys = self.groups.settings(group, options[0])
            hint = f"; did you mean {next(iter(keys))}={name}?" if len(keys) == 1 else ""
        return f"{hint or ';'} allowed: {', '.join(options)}"

    def source_of_sweep(self) -> str:
        """The override that makes the command a sweep."""
        for group, choice in self.choices.items():
            if any(k.startswith("hydra.sweeper.params.") for k in self.groups.settings(group, texts_of(choice)[0])):
                return str(choice.input_line)
        return "hydra.sweeper.params"

    def check_folder(self, hydra: DictConfig) -> list[str]:
        """A line if Hydra could not make the folder of the run, or if nothing names that of a sweep."""
        if self.multirun:
            ours = str(hydra.sweeper.get("_target_")).startswith("hydra_plugins.hydra_gptexp.")
            given = any(o.key_or_group in ("sweep.name", "hydra.sweep.dir") for o in self.overrides)
            sweeper = f"hydra/sweeper={hydra.runtime.choices.get('hydra/sweeper')}"
            return [] if ours or given else [f"{sweeper}: needs sweep.name=NAME, the folder of its jobs"]
        try:
            reason = _cannot_make(Path(str(hydra.run.dir)))
        except COMPOSING as error:
            return [_told(error)]
        return [f"hydra.run.dir={hydra.run.dir}: cannot be made ({reason})"] if reason else []

    def contradictions(self, params: Sequence[Override]) -> list[str]:
        """A line for each setting that is set under two names: as a group's choice and as a value, or by a short name.

        Args:
            params: the overrides that a file of conf/ makes a sweep of.
        """
        named = {o.key_or_group: o.input_line for o in self.overrides}
        lines = [f"{named[f'trainer.{argument}']}: {named[short]} sets the same; leave one of them out"
                 for argument, short in SHORT.items() if {f"trainer.{argument}", short} <= named.keys()]  # fmt: skip
        filed = {o.key_or_group: o for o in params if o.key_or_group not in named}
        by_key = filed | {o.key_or_group: o for o in self.values}
        for group, choice in (filed | self.choices).items():
            for key, values in (self.stands_for(choice) if group in self.groups else {}).items():
                value = by_key.get(key)
                if value is None or set(map(show, values)) == set(map(show, values_of(value))):
                    continue
                if group in filed or key in filed:
                    ours, theirs = (value, choice) if group in filed else (choice, value)
                    lines.append(f"{ours.input_line}: the sweep sets {theirs.input_line}; write "
                                 f"{theirs.key_or_group}=VALUE to choose from it")  # fmt: skip
                else:
                    lines.append(f"{value.input_line}: {choice.input_line} sets {key}={','.join(map(show, values))}; "
                                 "leave one of them out")  # fmt: skip
        return lines

    def stands_for(self, choice: Override) -> dict[str, list[Any]]:
        """The setting that a group's choices are other words for, with its values: norm=rmsnorm, or optimizer=sgd."""
        found: dict[str, list[Any]] = {}
        group = choice.key_or_group
        for text in texts_of(choice):
            settings = self.groups.settings(group, text)
            alone = len(settings) == 1 and not next(iter(settings)).startswith(f"{group}.")
            for key in settings if alone else settings.keys() & {f"{group}.name"}:
                found.setdefault(key, []).append(settings[key])
        return found

    def check_values(self, base: DictConfig, values: list[Override], cross_check: bool) -> list[str]:
        """A line for each mistake in the values of settings, with the others as `base` has them."""
        problems = []
        OmegaConf.set_struct(base, False)
        settable = []
        of_norms = tuple(f"model.norms.{name}." for name in NORMS)  # an unknown one is told with those that there are
        for override in values:
            key = override.key_or_group
            known = key in self.known or key.startswith(of_norms)
            if known or OmegaConf.select(base, key, default=_MISSING) is not _MISSING:
                settable.append(override)
            else:
                problems.append(f"{override.input_line}: unknown key{self.hint_of_key(override, base)}")
        absent = [o for o in settable if OmegaConf.select(base, o.key_or_group, default=_MISSING) is _MISSING]
        for override in settable:
            for value in values_of(override)[:1]:
                OmegaConf.update(base, override.key_or_group, value, merge=False)
        problems += _problems(base, cross_check)
        problems += [f"{o.input_line}: is no setting of conf/; to add it, write +{o.input_line}" for o in absent
                     if not any(line.startswith(f"{o.key_or_group}=") for line in problems)]  # fmt: skip
        for override in settable:
            for value in values_of(override)[1:]:
                changed = base.copy()
                OmegaConf.update(changed, override.key_or_group, value, merge=False)
                problems += _problems(changed, cross_check=False)
        return problems

    def hint_of_key(self, override: Override, base: DictConfig) -> str:
        """What to say after "unknown key"."""
        key, value = override.key_or_group, override.get_value_string()
        value = OTHER_CHOICES.get(value, value)
        section, _, tail = key.rpartition(".")
        if key.partition(".")[0] in FREE:
            tree: Any = OmegaConf.to_container(base)
            return nearest(key, flatten(tree)) or f"; to add it, write +{override.input_line}"
        if tail in OTHER_NAMES:
            return "; " + OTHER_NAMES[tail].format(value)
        names = {k.rpartition(".")[2]: k for k in self.known if not section or k.startswith(f"{section}.")}
        if not section:
            names |= {group: f"{group}={value}" for group in self.declared}  # optimiser=muon
        near = get_close_matches(tail, names, 1)
        return f"; did you mean {names[near[0]]}?" if near else nearest(tail if names else key, self.known)


def compose_config(arguments: Sequence[str]) -> Config:
    """The configuration that a command line of overrides stands for.

    Raises:
        UserError: with a line for every mistake.
    """
    register_choices()
    problems = check(arguments, multirun=False)
    if problems:
        raise UserError(problems)
    with initialize_config_dir(conf_dir(), version_base=VERSION_BASE, job_name="gptexp"):
        return read_config(plain(compose("config", list(arguments))))


def requested(arguments: Sequence[str]) -> Tree:
    """The settings that a run's overrides ask for: those that they name, and those that their group choices set.

    To be called in a job of Hydra, whose configuration files it reads.
    """
    overrides, _ = parse(arguments)
    groups = Groups(GlobalHydra.instance().config_loader())
    composed = flatten(plain(compose(HydraConfig.get().job.config_name, [o.input_line or "" for o in overrides])))
    keys: set[str] = set()
    for override in overrides:
        key = override.key_or_group
        keys |= groups.all_keys(key, str(override.value())) if key in groups else {key}
    return {k: v for k, v in composed.items() if k in keys}


_MISSING = object()


def _search(overrides: Iterable[Override], config_dir: str | None) -> list[str]:
    """The override of `hydra.searchpath` that has the folder `config_dir` among the others."""
    paths = [f"file://{Path(config_dir).absolute()}"] if config_dir else []
    for override in overrides:
        value = override.value()
        if override.key_or_group == "hydra.searchpath" and isinstance(value, list):
            paths += map(str, value)
    return [f"hydra.searchpath=[{','.join(map(quoted, paths))}]"] if paths else []


def _told(error: Exception) -> str:
    """What Hydra or OmegaConf says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    if isinstance(error.__cause__, OmegaConfBaseException) and len(lines) < 2:
        lines.append(str(error.__cause__).splitlines()[0])
    return " ".join(lines) or type(error).__name__


def _cannot_make(folder: Path) -> str:
    """Why a folder cannot be made; empty if it can."""
    for path in (folder.absolute(), *folder.absolute().parents):
        try:
            if path.exists():
                return "" if path.is_dir() and os.access(path, os.W_OK) else f"cannot write {path}"
        except OSError as error:  # a name that is too long, or a folder that cannot be read
            return str(error.strerror)
    return ""


def _problems(config: DictConfig, cross_check: bool) -> list[str]:
    try:
        read_config(plain(config), cross_check)
    except UserError as error:
        return error.problems
    return []


def _unique(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))
