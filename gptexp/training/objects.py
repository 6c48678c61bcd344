"""Callbacks and loggers of a configuration, built from their `_target_`s."""

import inspect
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger

from gptexp.config.schema import Config
from gptexp.config.settings import nearest, read_fields, show
from gptexp.errors import UserError

KINDS = {"callbacks": Callback, "logger": Logger}

SUPPLIED = {"callbacks": ("dirpath",), "logger": ("save_dir", "run_name")}
"""Arguments that a run adds if a class has them and its entry leaves them out."""

IDENTITIES = ("id", "run_id")
"""Arguments by which a logger continues a run of its service, such as W&B's."""

PACKAGES: dict[type, tuple[tuple[str, ...], str]] = {
    TensorBoardLogger: (("tensorboard",), "tensorboard"),
    MLFlowLogger: (("mlflow", "sqlalchemy", "alembic"), "mlflow"),
}
"""Packages that Lightning's loggers import only when they are built, and the extra that installs them."""


def check_objects(config: Config) -> None:
    """Refuse callbacks and loggers that cannot be built.

    Raises:
        UserError: with a line for each whose class cannot be imported, is of another kind, or takes other arguments.
    """
    problems: list[str] = []
    for section, kind in KINDS.items():
        for name, entry in getattr(config, section).items():
            problems += _problems(section, f"{section}.{name}", kind, entry)
    if problems:
        raise UserError(problems)


def _problems(section: str, key: str, kind: type, entry: Mapping[str, Any]) -> list[str]:
    target = entry["_target_"]
    try:
        cls = get_class(target)
    except Exception as error:  # whatever importing it raises
        reason = str(error.__cause__ or error).split("\n")[0]
        return [f"{key}._target_={target}: cannot be imported ({reason})"]
    if not issubclass(cls, kind):
        return [f"{key}._target_={target}: is no {kind.__name__} of Lightning"]
    for needing, (packages, extra) in PACKAGES.items():
        missing = [p for p in packages if find_spec(p) is None] if issubclass(cls, needing) else []
        if missing:
            return [f"{key}: {' and '.join(missing)} cannot be imported; pip install 'gptexp[{extra}]'"]
    given = {k: v for k, v in entry.items() if k not in ("_target_", "_convert_", "_recursive_", "_partial_", "_args_")}
    known = parameters(cls)
    named = [p.name for p in known.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind == p.VAR_KEYWORD for p in known.values()):
        unknown = [k for k in given if k not in named]
        if unknown:
            return [f"{key}.{k}={show(given[k])}: {target} takes no such argument{nearest(k, named)}; allowed: "
                    f"{', '.join(named) or 'none'}" for k in unknown]  # fmt: skip
    required = [n for n in named if known[n].default is inspect.Parameter.empty and n not in SUPPLIED[section]]
    problems = [f"{key}.{n}: is missing; {target} needs it" for n in required if n not in given]
    if section == "logger" and cls.__module__.startswith("gptexp."):  # whose arguments have exact types
        read_fields(cls.__init__, f"{key}.", {k: v for k, v in given.items() if k in named}, problems, skip=["return"])
    return problems


def parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """The arguments that a class takes, by name."""
    return inspect.signature(cls).parameters


def build(key: str, entry: Mapping[str, Any], **defaults: Any) -> Any:
    """Build an object from its `_target_` and arguments; `defaults` fill in what the class has and the entry lacks.

    Raises:
        UserError: when the class refuses its arguments; the line begins with key.
    """
    known = parameters(get_class(entry["_target_"]))
    named = {k: v for k, v in defaults.items() if k in known and k not in entry}
    try:
        return instantiate(dict(entry), _convert_="all", **named)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise UserError(f"{key}: {str(cause).strip().splitlines()[0]}") from error


def targets(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Key and value of every `_target_` of nested settings."""
    for key, value in tree.items():
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, Mapping):
            yield from targets(inner, f"{prefix}{key}.")
        elif key == "_target_":
            yield f"{prefix}{key}", str(value)


def check_trust(config: Config, requested: Mapping[str, Any], key: str) -> None:
    """Refuse to build what a stored configuration names beyond the callbacks and loggers of Lightning and gptexp.

    Raises:
        UserError: with a line for each class that is neither of these nor among the settings that the command requests.
    """
    strange = []
    for section, kind in KINDS.items():
        for name, entry in getattr(config, section).items():
            for place, target in targets({name: entry}, f"{section}."):
                own = target.startswith(("lightning.pytorch.", "gptexp.")) and place == f"{section}.{name}._target_"
                if requested.get(place) != target and not (own and issubclass(get_class(target), kind)):
                    strange.append(f"{place}={show(target)}")
    if strange:
        raise UserError(f"{key}: its config.yaml names {setting}, which would be run; to allow it, add +{setting} to "
                        "the command" for setting in strange)  # fmt: skip
