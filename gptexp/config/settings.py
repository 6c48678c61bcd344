"""How a section of the configuration is declared, and how plain values are read into it, with a line for each mistake.

A section is a class under `@settings`: its fields hold the defaults, the bounds and, in the string below each, what the
setting means. `--help` and docs/settings.md show these.
"""

import difflib
import json
import os.path
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from inspect import isfunction
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, Predicate
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass

from gptexp.registry import Kind

Tree = dict[str, Any]
T = TypeVar("T")

_CONFIG = ConfigDict(use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False)


@typing.dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass whose values pydantic checks, and whose fields are documented by the strings below them."""
    return pydantic_dataclass(cls, frozen=True, config=_CONFIG)  # type: ignore[return-value]


@dataclass(frozen=True)
class Mark:
    """Something to know of a setting, said in `Annotated` beside its type."""

    meaning: str


NEUTRAL = Mark("changes no result")
VARIANT = Mark("names the variant")


def marked(cls: Any, mark: Mark, prefix: str = "") -> list[str]:
    """The dotted keys of the settings of a section, and of the sections in it, that have a mark."""
    found = []
    for name, hint in hints_of(cls).items():
        if mark in get_args(hint):
            found.append(f"{prefix}{name}")
        for section in dataclasses_of(hint):
            found += marked(section, mark, f"{prefix}{name}.")
    return list(dict.fromkeys(found))


def documentation(cls: Any) -> dict[str, str]:
    """What each setting of a section means, by its name, in one line."""
    described = [getattr(base, "__pydantic_fields__", {}) for base in cls.__mro__]  # a base's field has its text there
    found = {f.name: [d[f.name].description for d in described if f.name in d] for f in fields(cls)}
    return {name: " ".join(next(filter(None, texts), "").split()) for name, texts in found.items()}


def read(hint: Any, key: str, value: Any, problems: list[str], skip: Collection[str] = ()) -> Any:
    """A plain value as what its type hint says, or None after adding a line to problems for each mistake.

    Args:
        hint: a type that pydantic knows; a section; a kind of components, each with a section of its own, of which the
            value's `name` chooses one; or one that has in `Annotated` a function that reads the value.
        key: of the value; "" for a tree that is no part of another.
        value: read from a file or a command line.
        problems: gets a line for each mistake.
        skip: settings that the value may not name, by dotted key.
    """
    for reader in filter(isfunction, get_args(hint)):
        return reader(key, value, problems)
    choices = {getattr(cls, "name", ""): cls for cls in dataclasses_of(hint)}
    if not choices:
        try:
            if isinstance(value, bool) and not _takes(hint, bool):
                raise ValueError("pydantic would read true as the number 1")
            return _adapter(hint).validate_python(value)
        except ValueError:
            problems.append(f"{key}={show(value)}: must be {describe(hint)}{nearest(str(value), _words(hint))}")
            return None
    if not isinstance(value, Mapping):
        allowed = f"a group choice: {', '.join(choices)}" if len(choices) > 1 else "a group of settings"
        problems.append(f"{key}={show(value)}: must be {allowed}")
        return None
    name = show(value["name"]) if len(choices) > 1 and "name" in value else next(iter(choices))
    if name not in choices:
        problems.append(f"{key}.name={name}: unknown{instead(name, choices)}")
        return None
    before = len(problems)
    values = read_fields(choices[name], f"{key}." if key else "", value, problems, skip)
    return choices[name](**values) if len(problems) == before else None


def read_fields(
    cls: Callable[..., Any], prefix: str, tree: Mapping[str, Any], problems: list[str], skip: Collection[str] = ()
) -> Tree:
    """As `read`, the fields of a section or the arguments of a function; prefix stands before each key in a problem.

    Returns:
        keyword arguments for cls; None in place of each that is wrong.
    """
    hints = {k: h for k, h in hints_of(cls).items() if f"{prefix}{k}" not in skip}
    of = f" of {prefix}name={tree['name']}" if prefix and "name" in tree else ""
    allowed = f"; allowed: {', '.join(hints) or 'nothing'}"
    problems += [f"{prefix}{key}={show(value)}: unknown key{of}{nearest(str(key), hints) or allowed}"
                 for key, value in tree.items() if key not in hints]  # fmt: skip
    return {k: read(hints[k], f"{prefix}{k}", v, problems, skip) for k, v in tree.items() if k in hints}


def dataclasses_of(hint: Any) -> list[Any]:
    """The section that a hint names, or those that the components of a kind have."""
    if kinds := [kind for kind in get_args(hint) if isinstance(kind, Kind)]:
        return [component.settings for component in kinds[0].values()]
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return [bare] if isinstance(bare, type) and is_dataclass(bare) else []


@cache  # as the next one: a comparison reads thousands of configurations
def hints_of(cls: Callable[..., Any]) -> Tree:
    """The types of a section's settings, or of a function's arguments, with what `Annotated` adds to them."""
    return typing.get_type_hints(cls, include_extras=True)


def _takes(hint: Any, kind: type) -> bool:
    return hint is kind or any(_takes(arg, kind) for arg in get_args(hint))


@cache
def _adapter(hint: Any) -> Any:
    return TypeAdapter(hint, config=_CONFIG)


_BOUNDS = {Ge: "of at least {0.ge}", Gt: "greater than {0.gt}", Le: "of at most {0.le}", Lt: "less than {0.lt}"}


def describe(hint: Any) -> str:
    """What a setting allows, in words: "an integer of at least 1 or null"."""
    origin, args, words = get_origin(hint), get_args(hint), _words(hint)
    if origin is list:
        return f"a list with each entry {describe(args[0])}"
    if origin in (Union, UnionType):
        return " or ".join("null" if a is type(None) else describe(a) for a in args)
    if words:
        return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
    if origin is Annotated:
        bounds = " and ".join(_BOUNDS[type(meta)].format(meta) for meta in args[1:] if type(meta) in _BOUNDS)
        return f"{describe(args[0])} {bounds.replace('and of ', 'and ')}".strip()
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _words(hint: Any) -> list[str]:
    """The words that a setting allows, where it allows only certain ones."""
    if get_origin(hint) is Literal:
        return [str(a) for a in get_args(hint)]
    if isinstance(hint, Predicate):  # Predicate(KIND.__contains__)
        return list(hint.func.__self__)  # type: ignore[attr-defined]
    return [word for arg in get_args(hint) for word in _words(arg)]


def nearest(word: str, known: Iterable[str]) -> str:
    """The nearest known spelling, as "; did you mean X?", or nothing when none is near."""
    known = list(known)
    matches = difflib.get_close_matches(word, known, 1, 0.6)
    if not matches and len(word) > 2:  # a beginning: temp for temperature
        matches = [k for k in known if k.startswith(word)]
    if not matches:  # a key without its group, or with a wrong one: n_head for model.n_head
        tails = {k.rpartition(".")[2]: k for k in reversed(known)}
        matches = [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], tails, 1, 0.75)]
    return f"; did you mean {matches[0]}?" if matches else ""


def instead(word: str, known: Collection[str]) -> str:
    """What to say after a word that is none of the known ones: "; did you mean X? allowed: X, Y"."""
    return f"{nearest(word, known) or ';'} allowed: {', '.join(known)}"


def show(value: Any) -> str:
    """A value as the user would type it, on one line."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)


def named_directories(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """The directories that a command line names, each by itself or as run=DIR, and its other arguments."""
    named, others = [], []
    for argument in arguments:
        if os.path.exists(argument) or ("=" not in argument and argument[:1] not in "~-"):  # a name may hold an =
            named.append(argument)
        elif argument.startswith("run="):
            named.append(argument.removeprefix("run="))
        else:
            others.append(argument)
    return named, others


def read_arguments(arguments: Iterable[str], problems: list[str]) -> Tree:
    """Values by key of a command line of key=value; what follows the first = is taken as it stands, but for null.

    Adds a line to problems for each argument that is not of that form, or comes twice.
    """
    values: Tree = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            problems.append(f"{argument}: cannot be read as a setting; a setting is written key=value")
        elif key in values:
            problems.append(f"{argument}: {key} is set twice")
        else:
            values[key] = None if value == "null" else value
    return values
