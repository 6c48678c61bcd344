"""Checks plain values against the typed fields of dataclasses, and says what is wrong in one line each."""

import difflib
import json
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import is_dataclass
from functools import cache
from inspect import isfunction
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, Predicate

Tree = dict[str, Any]


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


def read(hint: Any, key: str, value: Any, problems: list[str], skip: Collection[str] = ()) -> Any:
    """A plain value as what its type hint says, or None after adding a line to problems for each mistake.

    Args:
        hint: a type that pydantic knows; a dataclass; a union of dataclasses, each with its own `name`, of which the
            value chooses one, or takes the first; or one that has in `Annotated` a function that reads the value.
        key: of the value; "" for a tree that is no part of another.
        value: read from a file or a command line.
        problems: gets a line for each mistake.
        skip: fields of dataclasses that the value may not set.
    """
    for reader in filter(isfunction, get_args(hint)):
        return reader(key, value, problems)
    choices = {getattr(cls, "name", ""): cls for cls in dataclasses_of(hint)}
    if not choices:
        try:
            if isinstance(value, bool) and bool not in (hint, *get_args(hint)):
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
        problems.append(f"{key}.name={name}: unknown{nearest(name, choices) or ';'} allowed: {', '.join(choices)}")
        return None
    before = len(problems)
    values = read_fields(choices[name], f"{key}." if key else "", value, problems, skip)
    return choices[name](**values) if len(problems) == before else None


def read_fields(
    cls: Callable[..., Any], prefix: str, tree: Mapping[str, Any], problems: list[str], skip: Collection[str] = ()
) -> Tree:
    """As `read`, the fields of a dataclass or the arguments of a function; prefix stands before each key in a problem.

    Returns:
        keyword arguments for cls; None in place of each that is wrong.
    """
    hints = {k: h for k, h in _hints(cls).items() if k not in skip}
    of = f" of {prefix}name={tree['name']}" if prefix and "name" in tree else ""
    allowed = f"; allowed: {', '.join(hints) or 'nothing'}"
    problems += [f"{prefix}{key}={show(value)}: unknown key{of}{nearest(str(key), hints) or allowed}"
                 for key, value in tree.items() if key not in hints]  # fmt: skip
    return {k: read(hints[k], f"{prefix}{k}", v, problems, skip) for k, v in tree.items() if k in hints}


def dataclasses_of(hint: Any) -> list[Any]:
    """A dataclass, or those of a union."""
    return [cls for cls in get_args(hint) or [hint] if isinstance(cls, type) and is_dataclass(cls)]


@cache  # as the next one: a comparison reads thousands of configurations
def _hints(cls: Callable[..., Any]) -> Tree:
    return typing.get_type_hints(cls, include_extras=True)


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False))


_BOUNDS = {Ge: "of at least {0.ge}", Gt: "greater than {0.gt}", Le: "of at most {0.le}", Lt: "less than {0.lt}"}


def describe(hint: Any) -> str:
    """What a field allows, in words: "an integer of at least 1 or null"."""
    origin, args, words = get_origin(hint), get_args(hint), _words(hint)
    if origin is list:
        return f"a list with each entry {describe(args[0])}"
    if origin in (Union, UnionType):
        return " or ".join("null" if a is type(None) else describe(a) for a in args)
    if words:
        return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
    if origin is Annotated:
        bounds = " and ".join(_BOUNDS[type(meta)].format(meta) for meta in args[1:])
        return f"{describe(args[0])} {bounds.replace('and of ', 'and ')}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _words(hint: Any) -> list[str]:
    """The words that a field allows, where it allows only certain ones."""
    if get_origin(hint) is Literal:
        return [str(a) for a in get_args(hint)]
    if isinstance(hint, Predicate):  # Predicate(REGISTRY.__contains__)
        return list(hint.func.__self__)  # type: ignore[attr-defined]
    return [word for arg in get_args(hint) for word in _words(arg)]


def nearest(word: str, known: Iterable[str]) -> str:
    """"; did you mean X?" for the nearest known spelling, or nothing when none is near."""
    known = list(known)
    matches = difflib.get_close_matches(word, known, 1, 0.6)
    if not matches:  # a key without its group, or with a wrong one: n_head for model.n_head
        tails = {k.rpartition(".")[2]: k for k in reversed(known)}
        matches = [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], tails, 1, 0.75)]
    return f"; did you mean {matches[0]}?" if matches else ""


def show(value: Any) -> str:
    """A value as the user would type it, on one line."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)
