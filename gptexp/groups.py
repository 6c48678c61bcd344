"""What the configuration files have to choose from, what an override says, and what both compose to."""

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from gptexp.config import flatten
from gptexp.models.registry import NORMS, PLACEMENTS, default_norms
from gptexp.validation import Tree

VERSION_BASE = "1.3"


def conf_dir() -> str:
    """The folder of the configuration files: beside the package in a checkout, inside it once installed."""
    package = Path(str(files("gptexp")))
    inside, beside = package / "conf", package.parent / "conf"
    return str(inside if inside.is_dir() else beside)


def register_choices() -> None:
    """Give Hydra the table of all norms' settings, and a choice for each norm and placement without a file in conf/."""
    store = ConfigStore.instance()
    store.store(group="norms", name="defaults", node=default_norms())
    for group, names in (("norm", NORMS), ("placement", PLACEMENTS)):
        for name in names:
            if not (Path(conf_dir()) / group / f"{name}.yaml").exists():
                store.store(group=group, name=name, node={"model": {group: name}}, package="_global_")


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
        self._names = set(self._loader.get_group_options("", ObjectType.GROUP, overrides=self._search))

    def __contains__(self, key: str) -> bool:
        """Whether a key names a group."""
        return key.partition("/")[0] in self._names and "." not in key

    def options(self, group: str) -> list[str]:
        """The choices of a group, those in folders below it included."""
        folders = self._loader.get_group_options(group, ObjectType.GROUP, overrides=self._search)
        below = [f"{folder}/{option}" for folder in folders for option in self.options(f"{group}/{folder}")]
        return [*self._loader.get_group_options(group, overrides=self._search), *below]

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
