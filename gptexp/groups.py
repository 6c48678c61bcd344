"""What the configuration files have to choose from, and what an override of Hydra's grammar says."""

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

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


def parse(arguments: Iterable[str], loader: ConfigLoader | None = None) -> tuple[list[Override], list[str]]:
    """The overrides among the arguments, and a line for each that is not well-formed.

    Args:
        arguments: of a command line.
        loader: knows the choices that a glob stands for.
    """
    overrides, problems, parser = [], [], OverridesParser.create(config_loader=loader)
    for argument in arguments:
        try:
            overrides += parser.parse_overrides([argument])
        except HydraException:
            hint = "quote special characters"
            if "=" not in argument:
                hint = "a setting is written key=value"
                if Path(argument).is_dir():
                    hint += f"; did you mean resume={argument}?"
            elif argument.endswith(","):
                hint = "a list of values ends without a comma"
            problems.append(f"{argument}: cannot be read as a setting; {hint}")
    return overrides, problems


def values_of(override: Override) -> list[Any]:
    """The values of an override: one, or all that a sweep over it takes."""
    if override.is_discrete_sweep():
        return [OverridesParser.create().parse_override(f"key={text}").value() for text in texts_of(override)]
    return [override.value()] if not override.is_sweep_override() else []


def texts_of(override: Override) -> list[str]:
    """The values of an override as Hydra's grammar writes them."""
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()] if not override.is_sweep_override() else []


class Groups:
    """The groups of a configuration and their choices.

    Args:
        loader: of Hydra.
        search: the override of `hydra.searchpath`, if there is one.
    """

    def __init__(self, loader: ConfigLoader, search: Sequence[str] = ()) -> None:
        self._loader, self._search = loader, list(search)
        self._names = set(loader.get_group_options("", ObjectType.GROUP, overrides=self._search))

    def __contains__(self, key: str) -> bool:
        """Whether a key names a group."""
        return key.partition("/")[0] in self._names and "." not in key

    def options(self, group: str) -> list[str]:
        """The choices of a group, those in folders below it included."""
        folders = self._loader.get_group_options(group, ObjectType.GROUP, overrides=self._search)
        below = [f"{folder}/{option}" for folder in folders for option in self.options(f"{group}/{folder}")]
        return [*self._loader.get_group_options(group, overrides=self._search), *below]

    def load(self, path: str) -> ConfigResult | None:
        """A file of the configuration, or None where there is none, or only the search path names its folder."""
        return next((s.load_config(path) for s in self._loader.get_sources() if s.is_config(path)), None)

    def settings(self, group: str, choice: str) -> Tree:
        """What a choice sets by itself, by dotted key."""
        file = self.load(f"{group}/{choice}")
        if file is None:
            return {}
        prefix = "" if file.header.get("package") == "_global_" else f"{group}."
        tree: Any = OmegaConf.to_container(file.config)  # interpolations as they stand
        return {f"{prefix}{k}": v for k, v in flatten(tree).items() if k != "defaults"}

    def defaults(self, path: str) -> list[tuple[str, Any]]:
        """The defaults list of a file: what stands before each colon, and the choice."""
        file = self.load(path)
        tree: Any = OmegaConf.to_container(file.config) if file else {}
        return [(str(k), v) for entry in tree.get("defaults", []) if isinstance(entry, dict) for k, v in entry.items()]

    def all_keys(self, group: str, choice: str) -> set[str]:
        """The dotted keys that a choice sets, itself or through the other choices that it makes."""
        keys = set(self.settings(group, choice))
        for name, other in self.defaults(f"{group}/{choice}"):
            if name.startswith("override "):
                keys |= self.all_keys(name.rpartition(" ")[2].lstrip("/"), str(other))
        return keys
