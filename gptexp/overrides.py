"""Reads a Hydra command line before Hydra does, to report all of its mistakes at once, each in one line."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptexp.config import flatten, known_keys, plain, read_config
from gptexp.errors import UserError
from gptexp.models.settings import NORMS, default_norms
from gptexp.validation import Tree, nearest, show

VERSION_BASE = "1.3"


def conf_dir() -> str:
    """The folder of the configuration files: beside the package in a checkout, inside it once installed."""
    package = Path(str(files("gptexp")))
    inside, beside = package / "conf", package.parent / "conf"
    return str(inside if inside.is_dir() else beside)


def register_norms() -> None:
    """Give Hydra the table of every norm's settings, and a choice norm=NAME for norms without a file in conf/."""
    store = ConfigStore.instance()
    store.store(group="norms", name="defaults", node=default_norms())
    for name in NORMS:
        if not (Path(conf_dir()) / "norm" / f"{name}.yaml").exists():
            store.store(group="norm", name=name, node={"model": {"norm": name}}, package="_global_")


def parse(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides among the arguments, and a line for each that is not well-formed."""
    overrides, problems, parser = [], [], OverridesParser.create()
    for argument in arguments:
        try:
            overrides += parser.parse_overrides([argument])
        except HydraException:
            hint = "" if "=" in argument else "; a setting is written key=value"
            problems.append(f"{argument}: cannot be read as a setting{hint or '; quote special characters'}")
    return overrides, problems


def check(arguments: Sequence[str], multirun: bool, config_dir: str | None = None) -> list[str]:
    """All that is wrong with the overrides of a command, one line a problem.

    In a multirun each value of a sweep is checked by itself; combinations are checked by each job.
    """
    overrides, problems = parse(arguments)
    with initialize_config_dir(conf_dir(), version_base=VERSION_BASE, job_name="gptexp"):
        search = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
        groups, values, passed = [], [], []
        for override in overrides:
            if override.key_or_group.partition(".")[0].partition("/")[0] == "hydra":
                continue
            if override.is_sweep_override() and not multirun:
                problems.append(f"{override.input_line}: several values need --multirun (-m)")
            elif _is_group(override.key_or_group):
                problems += _check_group(override, bool(config_dir))
                groups.append(override)
            elif override.is_add() or override.is_delete() or override.is_force_add():
                passed.append(override.input_line or "")
            else:
                values.append(override)
        # Which settings a misspelt choice has cannot be known, so those below it go unchecked.
        wrong = {g.key_or_group for g in groups if _check_group(g, bool(config_dir))}
        groups = [g for g in groups if g.key_or_group not in wrong]
        values = [v for v in values if v.key_or_group.partition(".")[0] not in wrong]
        chosen = [f"{g.key_or_group}={_texts(g)[0]}" for g in groups]
        try:
            base = compose("config", [*search, *chosen, *passed])
        except (HydraException, OmegaConfBaseException) as error:
            return [*problems, " ".join(str(error).split("\n")[:2])]
        problems += _check_values(base, values, multirun)
        for group in groups:  # further choices of a swept group
            for text in _texts(group)[1:]:
                others = [c for c in chosen if not c.startswith(f"{group.key_or_group}=")]
                try:
                    tree = plain(compose("config", [*search, *others, f"{group.key_or_group}={text}", *passed]))
                    read_config(tree, cross_check=False)
                except UserError as error:
                    problems += error.problems
    return _unique(problems)


def requested(arguments: Sequence[str]) -> Tree:
    """The settings that a command line asks for: those it names, and those that its group choices change."""
    overrides, _ = parse(arguments)
    lines = [o.input_line or "" for o in overrides if not o.key_or_group.startswith("hydra")]
    running = GlobalHydra.instance().hydra  # there can be one at a time, and a job runs inside one
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base=VERSION_BASE, job_name="gptexp"):
        default = flatten(plain(compose("config")))
        composed = flatten(plain(compose("config", lines)))
        named = {o.key_or_group for o in overrides if not _is_group(o.key_or_group)}
    GlobalHydra.instance().hydra = running
    return {k: v for k, v in composed.items() if k in named or k not in default or default[k] != v}


def _is_group(key: str) -> bool:
    return bool(GlobalHydra.instance().config_loader().repository.group_exists(key))  # type: ignore[attr-defined]


def _check_group(override: Override, more_folders: bool) -> list[str]:
    """A problem for each choice that its group does not have."""
    group = override.key_or_group
    options = [o for o in GlobalHydra.instance().config_loader().get_group_options(group) if o != "defaults"]
    problems = []
    for text in _texts(override):
        if text not in options and text != "null" and not more_folders:
            problems.append(f"{group}={text}: unknown{nearest(text, options)} allowed: {', '.join(options)}")
    return problems


def _check_values(base: DictConfig, values: list[Override], multirun: bool) -> list[str]:
    problems, known = [], known_keys()
    OmegaConf.set_struct(base, False)
    settable = []
    for override in values:
        key = override.key_or_group
        if key not in known and OmegaConf.select(base, key, default=_MISSING) is _MISSING:
            problems.append(f"{override.input_line}: unknown key{nearest(key, known)}")
        else:
            settable.append(override)
    for override in settable:
        for value in _values(override)[:1]:
            OmegaConf.update(base, override.key_or_group, value, merge=False)
    problems += _problems(base, cross_check=not any(o.is_sweep_override() for o in values))
    for override in settable:
        for value in _values(override)[1:]:
            changed = base.copy()
            OmegaConf.update(changed, override.key_or_group, value, merge=False)
            problems += _problems(changed, cross_check=False)
    return problems


_MISSING = object()


def _problems(config: DictConfig, cross_check: bool) -> list[str]:
    try:
        read_config(plain(config), cross_check)
    except UserError as error:
        return error.problems
    return []


def _values(override: Override) -> list[Any]:
    """The values of an override: one, or all that a sweep over it takes."""
    if override.is_discrete_sweep():
        texts = override.sweep_string_iterator()
        return [OverridesParser.create().parse_override(f"{override.key_or_group}={t}").value() for t in texts]
    return [override.value()] if not override.is_sweep_override() else []


def _texts(override: Override) -> list[str]:
    """The choices of a group override, as text."""
    if override.is_sweep_override() and not override.is_discrete_sweep():  # glob(...): Hydra knows what it matches
        return ["null"]
    return [show(v) for v in _values(override)]


def _unique(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))
