"""Checks plain values against the typed fields of dataclasses, and says what is wrong in one line each."""

import difflib
import json
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, Predicate

Tree = dict[str, Any]
_T = TypeVar("_T")


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


def read_settings(cls: type[_T], tree: Mapping[str, Any], problems: list[str]) -> _T | None:
    """An instance of the settings dataclass cls, or None after adding a line to problems for each mistake."""
    values = read_fields(cls, "", tree, problems)
    return None if values is None else cls(**values)


def read_fields(
    cls: Callable[..., Any], prefix: str, tree: Mapping[str, Any], problems: list[str], skip: Collection[str] = ()
) -> Tree | None:
    """Check a plain tree against the dataclass cls, or against the arguments of a function.

    Args:
        cls: a dataclass whose fields, or a function whose arguments, have type hints; bounds and choices are in
            `Annotated`.
        prefix: stands before each key in a problem, such as "model.".
        tree: values by field name.
        problems: gets a line for each mistake.
        skip: fields that the tree may not set.

    Returns:
        keyword arguments for cls, or None when something was wrong.
    """
    hints = {k: h for k, h in _hints(cls).items() if k not in skip}
    before, read = len(problems), {}
    for key, value in tree.items():
        if key not in hints:
            of = f" of {prefix}name={tree['name']}" if prefix and "name" in tree else ""
            problems.append(f"{prefix}{key}={show(value)}: unknown key{of}{nearest(str(key), hints)}")
        else:
            try:
                if isinstance(value, bool) and bool not in _flat_types(hints[key]):
                    raise ValueError("pydantic would read true as the number 1")
                read[key] = _adapter(hints[key]).validate_python(value)
            except ValueError:
                hint = nearest(str(value), _choices(hints[key]))
                problems.append(f"{prefix}{key}={show(value)}: must be {describe(hints[key])}{hint}")
    return read if len(problems) == before else None


@cache  # as the next one: a comparison reads thousands of configurations
def _hints(cls: Callable[..., Any]) -> Tree:
    return typing.get_type_hints(cls, include_extras=True)


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False))


def describe(hint: Any) -> str:
    """What a field allows, in words: "an integer of at least 1 or null"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if choices := _choices(hint):
            return f"one of {', '.join(choices)}"
        return " ".join([describe(args[0]), " and ".join(_bound(meta) for meta in args[1:]).replace("and of ", "and ")])
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if origin is list:
        return f"a list with each entry {describe(args[0])}"
    if len(args) > 1:  # a union
        return " or ".join("null" if a is type(None) else describe(a) for a in args)
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _bound(meta: Any) -> str:
    match meta:
        case Ge():
            return f"of at least {meta.ge}"
        case Gt():
            return f"greater than {meta.gt}"
        case Le():
            return f"of at most {meta.le}"
        case Lt():
            return f"less than {meta.lt}"
    return ""


def _choices(hint: Any) -> list[str]:
    """The words that a field allows, where it allows only certain ones."""
    if get_origin(hint) is Literal:
        return [str(a) for a in get_args(hint)]
    words = []
    for arg in get_args(hint):
        if isinstance(arg, Predicate):  # Predicate(REGISTRY.__contains__)
            words += list(arg.func.__self__)  # type: ignore[attr-defined]
        else:
            words += _choices(arg)
    return words


def _flat_types(hint: Any) -> set[Any]:
    args = get_args(hint)
    return {hint}.union(*(_flat_types(a) for a in args)) if args else {hint}


def nearest(word: str, known: Iterable[str]) -> str:
    """"; did you mean X?" for the nearest known spelling, or nothing when none is near."""
    known = list(known)
    matches = difflib.get_close_matches(word, known, 1, 0.6)
    if not matches and "." not in word:  # a key without its group: n_head for model.n_head
        matches = [k for k in known if k.rpartition(".")[2] == word][:1]
    if not matches:
        tails = {k.rpartition(".")[2]: k for k in known}
        matches = [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], tails, 1, 0.75)]
    return f"; did you mean {matches[0]}?" if matches else ""


def show(value: Any) -> str:
    """A value as the user would type it, on one line."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)
