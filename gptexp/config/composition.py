"""What the configuration files have to choose from, what an override says, and what both compose to."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptexp.config.choices import HEADS, SECTIONS, VALUES
from gptexp.config.schema import Config, first_line, flatten
from gptexp.config.sections import ModelConfig
from gptexp.config.settings import Tree
from gptexp.config.trainer import SHORT
from gptexp.errors import UserError
from gptexp.registry import CORPORA, TASKS

VERSION_BASE = "1.3"


def register_choices(chosen: Config | None = None) -> None:
    """Give Hydra the defaults of all settings, and the choices of the groups that have no files in conf/.

    The defaults are those of the schema, or of a configuration.
    """
    store, chosen = ConfigStore.instance().store, chosen or Config()
    for group, kind in SECTIONS.items():
        default = getattr(chosen, group)
        for name in kind:
            store(group=group, name=name, node=_defaults(default if name == default.name else kind.settings(name)))
    for name, corpus in CORPORA.items():
        task = [{"override /task": corpus.made.task}] if corpus.made.task != TASKS.default else []
        node = {"defaults": [*task, "_self_"], "data": _defaults(chosen.data) | {"name": name}}
        store(group="data", name=name, node=node, package="_global_")
    for group, (section, kind) in VALUES.items():
        for name in kind:
            store(group=group, name=name, node={section: {group: name}}, package="_global_")
    for name, (n_head, n_kv_head) in HEADS.items():
        counts = {"n_head": n_head} | ({"n_kv_head": n_kv_head} if n_kv_head else {})
        store(group="heads", name=name, node={"model": counts}, package="_global_")
    sections = {*SECTIONS, "data"}
    choices = [{section: getattr(chosen, section).name} for section in (*SECTIONS, "data")]
    own = {f.name: getattr(chosen, f.name) for f in fields(Config) if f.name not in sections}
    tree = {name: _defaults(value) if is_dataclass(value) else value for name, value in own.items()}
    tree["trainer"] |= dict.fromkeys(SHORT)
    store(name="settings", node={"defaults": [*choices, "_self_"], **tree})


def _defaults(section: Any) -> Tree:
    tree = asdict(section)
    if isinstance(section, ModelConfig):
        del tree["vocab_size"]  # the tokenizer says it
    return tree


def plain(config: DictConfig) -> Tree:
    """A composed Hydra configuration as plain dictionaries, interpolations resolved.

    Raises:
        UserError: when an interpolation cannot be resolved or a value is missing.
    """
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from error
    return cast(Tree, tree)


def quoted(text: str) -> str:
    """A text as the value of an override."""
    return QuotedString(text, Quote.single).with_quotes()


def parse(arguments: Iterable[str]) -> tuple[list[Override], list[str]]:
    """The overrides among the arguments, and a line for each that is not well-formed. Hydra must be initialized.

    Of a key that comes twice, the last override counts.
    """
    overrides: dict[str, Override] = {}
    problems = []
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # which a glob asks
    for argument in arguments:
        try:
            overrides |= {override.get_key_element(): override for override in parser.parse_overrides([argument])}
        except HydraException:
            hint = "quote special characters"
            if "=" not in argument:
                hint = "a setting is written key=value"
                if Path(argument).is_dir():
                    hint += f"; did you mean resume={argument}?"
            elif argument.endswith(","):
                hint = "a list of values ends without a comma"
            problems.append(f"{argument}: cannot be read as a setting; {hint}")
    return list(overrides.values()), problems


def each(override: Override) -> list[str]:
    """An override with each of its values by itself; none for an interval, whose values have no number."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    texts = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
    return [f"{override.get_key_element()}={text}" for text in texts]


class Groups:
    """The groups of a configuration and their choices. Hydra must be initialized."""

    def __init__(self, search: Sequence[str] = ()) -> None:
        self._loader, self._search = GlobalHydra.instance().config_loader(), list(search)
        self._names = set(self._list("", ObjectType.GROUP))

    def __contains__(self, key: str) -> bool:
        """Whether a key names a group."""
        return key.partition("/")[0] in self._names and "." not in key

    def options(self, group: str) -> list[str]:
        """The choices of a group, those in folders below it included."""
        folders = self._list(group, ObjectType.GROUP)
        below = [f"{folder}/{option}" for folder in folders for option in self.options(f"{group}/{folder}")]
        return [*self._list(group, ObjectType.CONFIG), *below]

    def _list(self, group: str, kind: ObjectType) -> list[str]:
        if self._search:  # for which Hydra copies all of its sources, so that it takes a while
            return self._loader.get_group_options(group, kind, overrides=self._search)
        sources = [source for source in self._loader.get_sources() if source.is_group(group)]
        return sorted({name for source in sources for name in source.list(group, kind)})

    def _load(self, path: str) -> ConfigResult | None:
        """A file of the configuration, or None where there is none, or only the search path names its folder."""
        return next((s.load_config(path) for s in self._loader.get_sources() if s.is_config(path)), None)

    def settings(self, group: str, choice: str) -> Tree:
        """What a choice sets by itself, by dotted key."""
        file = self._load(f"{group}/{choice}")
        if file is None:
            return {}
        prefix = "" if file.header.get("package") == "_global_" else f"{group}."
        tree: Any = OmegaConf.to_container(file.config)  # interpolations as they stand
        return {f"{prefix}{k}": v for k, v in flatten(tree).items() if k != "defaults"}

    def all_keys(self, group: str, choice: str) -> set[str]:
        """The dotted keys that a choice sets, itself or through the other choices that it makes."""
        keys, file = set(self.settings(group, choice)), self._load(f"{group}/{choice}")
        tree: Any = OmegaConf.to_container(file.config) if file else {}
        for entry in tree.get("defaults", []):
            for name, other in entry.items() if isinstance(entry, dict) else ():
                if name.startswith("override "):
                    keys |= self.all_keys(name.rpartition(" ")[2].lstrip("/"), str(other))
        return keys


class Composer:
    """Composes the configurations of one command. Hydra must be initialized.

    Those that differ in values alone share what Hydra, far slower, makes of everything else.

    Args:
        config_name: the primary configuration.
        always: overrides that all of them have.

    Attributes:
        groups: what can be chosen from.
        composed: what Hydra has made, its own settings included, by the overrides that it was given.
    """

    def __init__(self, config_name: str, always: Sequence[str] = ()) -> None:
        self.config_name, self.always = config_name, list(always)
        self.groups = Groups([line for line in always if line.startswith("hydra.searchpath=")])
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    def is_value(self, override: Override) -> bool:
        """Whether an override gives a value to a setting of ours."""
        named = override.is_hydra_override() or override.key_or_group in self.groups
        return override.type == OverrideType.CHANGE and override.package is None and not named

    def whole(self, lines: Iterable[str]) -> DictConfig:
        """What Hydra makes of overrides but for the values, its own settings included. Not to be changed."""
        key = tuple(str(o.input_line) for o in parse(lines)[0] if not self.is_value(o))
        if key not in self.composed:
            self.composed[key] = compose(self.config_name, [*self.always, *key], return_hydra_config=True)
        return self.composed[key]

    def compose(self, lines: Sequence[str]) -> DictConfig:
        """The settings that overrides stand for, without Hydra's own; a value may have a key that is none."""
        whole = self.whole(lines)
        tree = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        OmegaConf.set_struct(tree, False)
        for override in filter(self.is_value, parse(lines)[0]):
            OmegaConf.update(tree, override.key_or_group, override.value(), merge=True)
        return tree


def requested(arguments: Sequence[str]) -> Tree:
    """The settings that a run's overrides ask for: those that they name, and those that their group choices set.

    To be called in a job of Hydra, whose configuration files it reads.
    """
    composer, keys = Composer(str(HydraConfig.get().job.config_name)), set[str]()
    for override in parse(arguments)[0]:
        key, groups = override.key_or_group, composer.groups
        keys |= groups.all_keys(key, str(override.value())) if key in groups else {key}
    return {k: v for k, v in flatten(plain(composer.compose(arguments))).items() if k in keys}
