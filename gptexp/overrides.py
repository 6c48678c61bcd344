"""Reads a Hydra command line before Hydra does, to report all of its mistakes at once, each in one line."""

import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptexp.config import Config, flatten, known_keys, norm_hint, plain, read_config
from gptexp.errors import UserError
from gptexp.models.registry import NORMS, PLACEMENTS, default_norms
from gptexp.validation import Tree, nearest, show

VERSION_BASE = "1.3"

OF_SWEEPS = re.compile(r"sweep$|sweep\.|hydra[./](sweep|sweeper|launcher)\b")  # keys that only a multirun reads


def conf_dir() -> str:
    """The folder of the configuration files: beside the package in a checkout, inside it once installed."""
    package = Path(str(files("gptexp")))
    inside, beside = package / "conf", package.parent / "conf"
    return str(inside if inside.is_dir() else beside)


def register_choices() -> None:
    """Give Hydra the table of all norms' settings, and a choice for each norm and placement without a file in conf/."""
    store = ConfigStore.instance()
    # Hydra copies it whenever it composes or looks up a group, a hundred times for --help, and only reads the copy.
    ConfigStore.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]
    Hydra.get_mode = _mode  # type: ignore[assignment, method-assign]
    store.store(group="norms", name="defaults", node=default_norms())
    for group, names in (("norm", NORMS), ("placement", PLACEMENTS)):
        for name in names:
            if not (Path(conf_dir()) / group / f"{name}.yaml").exists():
                store.store(group=group, name=name, node={"model": {group: name}}, package="_global_")


_composed_mode = Hydra.get_mode


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """The mode that the configuration sets, for which Hydra composes it once more; here the flag -m alone does it."""
    places = hydra.config_loader.get_search_path().get_path()
    if any(o.startswith("hydra.mode") for o in overrides) or any(p.provider == "command-line" for p in places):
        return _composed_mode(hydra, config_name, overrides)
    return None


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
    problems += [f"{o.input_line}: a sweep goes on when its command is given again; leave it out"
                 for o in overrides if multirun and o.key_or_group == "resume"]  # fmt: skip
    problems += [f"{o.input_line}: needs --multirun (-m)"
                 for o in overrides if not multirun and OF_SWEEPS.match(o.key_or_group)]  # fmt: skip
    with initialize_config_dir(conf_dir(), version_base=VERSION_BASE, job_name="gptexp"):
        search = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
        kinds: dict[str, list[Override]] = {kind: [] for kind in ("group", "wrong", "value", "passed", "")}
        for override in overrides:
            kind, found = _sort(override, multirun, bool(config_dir))
            kinds[kind].append(override)
            problems += found
        groups, passed = kinds["group"], [o.input_line or "" for o in kinds["passed"]]
        # Which settings a misspelt choice has cannot be known, so those below it go unchecked.
        wrong = {o.key_or_group for o in kinds["wrong"]}
        values = [v for v in kinds["value"] if v.key_or_group.partition(".")[0] not in wrong]
        chosen = [f"{g.key_or_group}={_texts(g)[0]}" for g in groups]
        try:
            base = compose("config", [*search, *chosen, *passed])
        except (HydraException, OmegaConfBaseException) as error:
            return [*problems, " ".join(str(error).split("\n")[:2])]
        swept = any(override.is_sweep_override() for override in overrides)
        problems += _check_values(base, values, cross_check=not swept)
        for group in groups:  # further choices of a swept group
            for text in _texts(group)[1:]:
                others = [c for c in chosen if not c.startswith(f"{group.key_or_group}=")]
                try:
                    tree = plain(compose("config", [*search, *others, f"{group.key_or_group}={text}", *passed]))
                    read_config(tree, cross_check=False)
                except UserError as error:
                    problems += error.problems
    return _unique(problems)


def _sort(override: Override, multirun: bool, more_folders: bool) -> tuple[str, list[str]]:
    """What an override is, and what is wrong with it.

    Returns:
        "group" or "value"; "wrong" for a choice that its group does not have; "passed" where Hydra takes it as it is;
        "" for what is no setting of ours or cannot be one; and a line for each problem.
    """
    key, line = override.key_or_group, override.input_line or ""
    kind, problems = "value", []
    if key.partition(".")[0].partition("/")[0] == "hydra":
        kind = ""
    elif override.is_sweep_override() and not multirun:
        kind, problems = "", [f"{line}: several values need --multirun (-m)"]
    elif override.is_delete():
        kind = "passed"
    elif is_group(key) and override.is_add():
        kind, problems = "", [f"{line}: this group has a choice already; write {line.lstrip('+')}"]
    elif is_group(key):
        problems = _check_group(override, more_folders)
        kind = "wrong" if problems else "group"
    elif override.is_add() or override.is_force_add():
        kind = "" if override.is_sweep_override() else "passed"
    return kind, problems


def sweep_dir(arguments: Sequence[str], config_dir: str | None = None) -> Path:
    """The directory of a multirun's sweep: named by `sweep.name`, or else by what varies and a digest of the command.

    So the same command finds its sweep again; how and where it runs does not change the name.
    """
    overrides, _ = parse(arguments)
    search = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    fixed = [o.input_line or "" for o in overrides if not o.is_sweep_override()]
    with initialize_config_dir(conf_dir(), version_base=VERSION_BASE, job_name="gptexp"):
        tree = compose("config", [*search, *fixed], return_hydra_config=True)
    params = tree.hydra.sweeper.get("params") or {}
    elsewhere = ("hydra", "logger", "output_dir", "sweep.")
    asked = sorted({str(o.input_line) for o in overrides if not o.key_or_group.startswith(elsewhere)})
    varied = [*params, *(o.key_or_group for o in overrides if o.is_sweep_override())]
    words = dict.fromkeys(key.rpartition(".")[2].replace("/", "-") for key in varied)
    digest = hashlib.sha256("\n".join(asked).encode()).hexdigest()[:6]
    return Path(str(tree.output_dir)) / "sweeps" / str(tree.sweep.name or "-".join([*words, digest]))


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
    """The settings that a command line asks for: those that it names, and those that its group choices set."""
    overrides, _ = parse(arguments)
    lines = [o.input_line or "" for o in overrides if not o.key_or_group.startswith("hydra")]
    running = GlobalHydra.instance().hydra  # there can be one at a time, and a job runs inside one
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(conf_dir(), version_base=VERSION_BASE, job_name="gptexp"):
            composed = flatten(plain(compose("config", lines)))
            keys: set[str] = set()
            for override in overrides:
                key = override.key_or_group
                keys |= _keys_of(key, str(override.value())) if is_group(key) else {key}
    finally:
        GlobalHydra.instance().hydra = running
    return {k: v for k, v in composed.items() if k in keys}


def is_group(key: str) -> bool:
    """Whether an override's key names a group of conf/, in a running Hydra."""
    return bool(_repository().group_exists(key))


def _repository() -> Any:
    return GlobalHydra.instance().config_loader().repository  # type: ignore[attr-defined]


def _keys_of(group: str, choice: str) -> set[str]:
    """The dotted keys that a group's choice sets, itself or through the other choices that it makes."""
    file = _repository().load_config(f"{group}/{choice}")
    if file is None:
        return set()
    prefix = "" if file.header.get("package") == "_global_" else f"{group}."
    keys = {f"{prefix}{key}" for key in flatten(dict(file.config)) if key != "defaults"}
    for default in file.defaults_list or []:
        if getattr(default, "override", False):
            keys |= _keys_of(default.group.lstrip("/"), default.value)
    return keys


def _check_group(override: Override, more_folders: bool) -> list[str]:
    """A problem for each choice that its group does not have."""
    group = override.key_or_group
    wrong = [t for t in _texts(override)
             if t != "null" and not more_folders and not _repository().config_exists(f"{group}/{t}")]  # fmt: skip
    if not wrong:  # the options are slow to find
        return []
    loader = GlobalHydra.instance().config_loader()
    options = [o for o in loader.get_group_options(group) if o != "defaults"]
    for folder in loader.get_group_options(group, results_filter=ObjectType.GROUP):
        options += [f"{folder}/{o}" for o in loader.get_group_options(f"{group}/{folder}")]
    return [f"{group}={text}: unknown{nearest(text, options)} allowed: {', '.join(options)}" for text in wrong]


def _check_values(base: DictConfig, values: list[Override], cross_check: bool) -> list[str]:
    problems, known = [], known_keys()
    OmegaConf.set_struct(base, False)
    settable = []
    for override in values:
        key = override.key_or_group
        if key not in known and OmegaConf.select(base, key, default=_MISSING) is _MISSING:
            problems.append(f"{override.input_line}: unknown key{norm_hint(key) or nearest(key, known)}")
        else:
            settable.append(override)
    for override in settable:
        for value in _values(override)[:1]:
            OmegaConf.update(base, override.key_or_group, value, merge=False)
    problems += _problems(base, cross_check)
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
    if isinstance(override._value, Glob):
        options = GlobalHydra.instance().config_loader().get_group_options(override.key_or_group)
        return override._value.filter(options) or ["null"]
    return [show(v) for v in _values(override)]


def _unique(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))
