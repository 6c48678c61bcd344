"""What an experiment can choose from: the components of each kind, by name.

A component's class, its settings and its name stand together, where it is defined:

    @NORMS.register("half", HalfNormSettings)
    class HalfNorm(nn.Module): ...

Hydra's groups, the check of settings, `--help`, labels, the audit, the report and the tests of a kind read the
registry, so nothing else changes. Another package's components come in through an entry point whose module registers
them, of the group `gptexp.norms` for norms; or from a module that the environment variable GPTEXP_IMPORT names.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from gptexp.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class NoSettings:
    """The settings of a component that has none."""


@dataclass(frozen=True)
class Component:
    """A registered component."""

    made: Any  # a class; the module of its kind says what it is called with
    settings: Any  # the dataclass of its settings, which may be the class itself

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring, on one line."""
        return " ".join((self.made.__doc__ or "").strip().split("\n\n")[0].split())


class Kind(Mapping[str, Component]):
    """The components of one kind, by name. Those of this package and of others are imported at the first look.

    Args:
        name: of the kind, as in `norm=rmsnorm`.
        modules: those of this package that register its components.
        default: the name of the component that is taken where none is chosen; it comes first.
        plural: names its group of entry points; the name and an s by default.
    """

    def __init__(self, name: str, *modules: str, default: str = "", plural: str | None = None) -> None:
        self.name, self.modules, self.default, self.plural = name, modules, default, plural or f"{name}s"
        self.base: type = NoSettings  # the settings of a component that has none of its own
        self._components: dict[str, tuple[Any, Any]] = {}  # classes and their settings, None for the base
        self._loaded = False

    def register(self, name: str, settings: type | None = None) -> Callable[[T], T]:
        """A decorator that registers a class under a name.

        Without a dataclass of settings, the class is its own if it is a dataclass, and has none otherwise.

        Raises:
            UserError: when another component has that name.
        """

        def add(made: T) -> T:
            old, _ = self._components.get(name, (made, None))
            if _place(old) != _place(made):  # a notebook's cell may run again
                raise UserError(f"{self.name}={name}: is {_place(old)} already; {_place(made)} needs another name")
            self._components[name] = made, settings or (made if is_dataclass(made) else None)
            return made

        return add

    def __getitem__(self, name: str) -> Component:
        self._load()
        made, settings = self._components[name]
        return Component(made, settings or self.base)

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._components, key=lambda name: (name != self.default, name)))

    def __len__(self) -> int:
        self._load()
        return len(self._components)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def settings(self, name: str = "") -> Any:
        """The default settings of a component, which may be the default one.

        Raises:
            UserError: when they cannot be built, for every setting needs a default.
        """
        name = name or self.default
        component = self[name]
        try:
            return component.settings()
        except UserError:  # of a component that this one looks for
            raise
        except Exception as error:
            raise UserError(f"{self.name}={name}: the settings of {_place(component.made)} cannot be built "
                            f"({' '.join(str(error).split())}); each needs a default") from error  # fmt: skip

    def defaults(self) -> dict[str, dict[str, Any]]:
        """The default settings of every component that has any."""
        tables = {name: asdict(self.settings(name)) for name in self}
        return {name: table for name, table in tables.items() if table}

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # first: what is imported may look here, too
        for module in self.modules:
            import_module(module)
        for entry in entry_points(group=f"gptexp.{self.plural}"):
            package = f" of {entry.dist.name}" if entry.dist else ""
            _import(entry.load, f"{self.name}={entry.name}: {entry.value}{package}")
        _import_named()


def foreign_source(made: Any) -> str:
    """The source of a class's module, where that is another package's; "" where it is this one's, or a notebook's."""
    if made.__module__.startswith("gptexp."):
        return ""
    try:
        return inspect.getsource(sys.modules[made.__module__])
    except (OSError, TypeError):  # there is no file
        return ""


def _place(made: Any) -> str:
    return f"{made.__module__}.{made.__qualname__}"


@cache
def _import_named() -> None:
    """Import the modules that the user names."""
    for name in filter(None, os.environ.get("GPTEXP_IMPORT", "").split(",")):
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        _import(partial(import_module, name.strip()), f"GPTEXP_IMPORT={name}:")


def _import(load: Callable[[], Any], what: str) -> None:
    try:
        load()
    except UserError:  # a name that is taken
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be imported ({error})") from error


NORMS = Kind("norm", "gptexp.models")
PLACEMENTS = Kind("placement", "gptexp.models")
POSITIONS = Kind("position", "gptexp.models")
ACTIVATIONS = Kind("activation", "gptexp.models")
MODELS = Kind("model", "gptexp.models", default="gpt")
TASKS = Kind("task", "gptexp.tasks.text", "gptexp.tasks.problems", "gptexp.tasks.arithmetic", default="text")
CORPORA = Kind("corpus", "gptexp.data.corpora", plural="corpora")
TOKENIZERS = Kind("tokenizer", "gptexp.data.tokenizers", "gptexp.data.bpe")
OPTIMIZERS = Kind("optimizer", "gptexp.training.optimizers", "gptexp.training.muon", default="adamw")
SCHEDULES = Kind("schedule", "gptexp.training.schedules", default="cosine")

KINDS = (NORMS, PLACEMENTS, POSITIONS, ACTIVATIONS, MODELS, TASKS, CORPORA, TOKENIZERS, OPTIMIZERS, SCHEDULES)
