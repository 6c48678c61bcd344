"""The settings that models with norms share, and the building of any model from its settings."""

from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Annotated, Any

from annotated_types import Predicate

from gptexp.config.sections import ModelConfig
from gptexp.config.settings import VARIANT, nearest, read, settings, show
from gptexp.models.norms import NormSettings, NormSite
from gptexp.registry import MODELS, NORMS, Kind


def table_of(kind: Kind) -> Any:
    """The type of a table of components' settings, by name; each entry is checked by its component's own dataclass."""

    def reader(key: str, table: Any, problems: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = kind.defaults()
        if not isinstance(table, Mapping):
            problems.append(f"{key}={show(table)}: must be a table of settings by {kind.name}")
            return found
        for name, entry in table.items():
            if name in kind:
                settings = read(kind[name].settings, f"{key}.{name}", entry, problems)
                found[name] = asdict(settings) if settings else {}
            else:
                hint = nearest(str(name), kind) or ";"
                problems.append(f"{key}.{name}: unknown {kind.name}{hint} allowed: {', '.join(kind)}")
        return found

    return Annotated[dict[str, Any], reader]


NormName = Annotated[str, Predicate(NORMS.__contains__)]
"""A key of `NORMS`."""


@settings
class NormedConfig(ModelConfig):
    """Base of the settings of models that have norms."""

    norm: Annotated[NormName, VARIANT] = "layernorm"
    """The norm."""
    norms: table_of(NORMS) = field(default_factory=NORMS.defaults)  # type: ignore[valid-type]
    """Settings of each norm, by its name; only those of the norms in use have an effect."""

    def norm_settings(self, name: str) -> NormSettings:
        """The settings of the norm `name`."""
        return NORMS[name].settings(**self.norms.get(name, {}))  # type: ignore[no-any-return]

    @property
    def used_norms(self) -> dict[str, NormSite]:
        """The norms in use, each with the first of its sites."""
        raise NotImplementedError

    @property
    def components(self) -> list[type]:
        """The classes of the norms and other registered parts."""
        return [NORMS[name].made for name in self.used_norms]

    @property
    def min_sequences(self) -> int:
        """The fewest sequences that a training batch must have."""
        return max(self.norm_settings(name).min_sequences(self.block_size) for name in self.used_norms)

    def tree(self) -> dict[str, Any]:
        """Every setting that has an effect."""
        return asdict(self) | {"norms": {name: self.norms.get(name, {}) for name in sorted(self.used_norms)}}

    def problems(self) -> list[str]:
        """Those of the used norms, and of any other whose settings are not the default ones."""
        changed = [name for name in NORMS if self.norm_settings(name) != NORMS.settings(name)]
        anywhere = list(self.used_norms.values())[-1]
        sites = dict.fromkeys(changed, anywhere) | self.used_norms
        return [f"model.norms.{name}.{problem}" for name, site in sites.items()
                for problem in self.norm_settings(name).problems(site)]  # fmt: skip


def build_model(config: ModelConfig, seed: int = 0) -> Any:
    """A new model; its initial weights are a function of the seed and of each parameter's name and shape."""
    return MODELS[config.name].made(config, seed)
