"""What varies among runs, and which runs can be compared at all."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptexp.analysis.collect import Record

ABSENT = "–"
"""The level of a setting that a run does not have."""


@dataclass(frozen=True)
class Factor:
    """A setting that varies among the runs.

    Attributes:
        key: its dotted key; where several settings vary together, the first of them.
        also: the keys that vary with it, one to one, and those that exist for some of its levels only and depend on
            it alone.
        name: as it is shown, such as "norm" for model.norm.
        levels: its values, in the order in which they were run.
    """

    key: str
    also: tuple[str, ...]
    name: str
    levels: tuple[str, ...]


def comparable(records: Sequence[Record]) -> tuple[list[Record], dict[str, tuple[Record, ...]]]:
    """The largest set of runs whose losses can be compared, and the others by what sets them apart."""
    kinds = [_kind(r) for r in records]
    finished = Counter(kind for kind, r in zip(kinds, records, strict=True) if r.complete)
    main = max(dict.fromkeys(kinds), key=lambda k: (finished[k], kinds.count(k)), default=())
    together: list[Record] = []
    apart: dict[str, list[Record]] = {}
    for kind, record in zip(kinds, records, strict=True):
        pairs = zip(_KIND, kind, main, strict=True)
        differing = [what for what, own, wanted in pairs if own != wanted and None not in (own, wanted)]
        if not differing:
            together.append(record)
        else:
            reason = "; ".join(f"another {what}: {_KIND[what](record)}" for what in differing)
            apart.setdefault(reason, []).append(record)
    return together, {reason: tuple(group) for reason, group in apart.items()}


def _kind(record: Record) -> tuple[Any, ...]:
    """What must agree for two losses to be comparable: corpus and tokens, validation split, precision."""
    return record.info["fingerprints"]["data"], record.split, precision(record)


def precision(record: Record) -> str | None:
    """The precision that a run computes in; None as long as it has not begun."""
    device = record.info.get("device")
    return device.get("precision") if isinstance(device, dict) else None


_KIND = {
    "corpus": lambda r: f"{r.info.get('data', {}).get('corpus')} ({r.info['fingerprints']['data'][:8]})",
    "validation split": lambda r: r.split,
    "precision": precision,
}


def is_numeric(factor: Factor) -> bool:
    """Whether every level of a factor is a number."""
    try:
        return all(math.isfinite(float(level)) for level in factor.levels)
    except ValueError:
        return False


def _by_name(records: Sequence[Record]) -> Factor | None:
    """The configurations' own names as the one factor, where each has one that stands for its settings."""
    by_name: dict[str | None, set[tuple[tuple[str, str], ...]]] = {}
    for record in records:
        by_name.setdefault(record.label, set()).add(tuple(sorted(record.settings.items())))
    distinct = set().union(*by_name.values())
    if None in by_name or len(by_name) < 2 or not len(by_name) == len(distinct) == sum(map(len, by_name.values())):
        return None
    keys = dict.fromkeys(k for r in records for k in r.settings)
    also = tuple(k for k in keys if len({r.settings.get(k, ABSENT) for r in records}) > 1)
    return Factor("name", also, "name", tuple(str(name) for name in by_name))


def find_factors(records: Sequence[Record]) -> tuple[Factor, ...]:
    """What varies among the runs."""
    name = _by_name(records)
    return _by_key(records) if name is None else (name,)


_FIRST = ("model.norm", "model.placement", "model.n_head")  # as in a run's name


def _by_key(records: Sequence[Record]) -> tuple[Factor, ...]:
    keys = dict.fromkeys(k for r in records for k in r.settings)
    columns = {k: tuple(r.settings.get(k, ABSENT) for r in records) for k in keys}
    groups: dict[tuple[int, ...], list[str]] = {}  # settings that change together, by where each level comes first
    for key, column in columns.items():
        if len(set(column)) > 1:
            groups.setdefault(tuple(column.index(level) for level in column), []).append(key)
    partial = [group for group in groups.values() if all(ABSENT in columns[key] for key in group)]
    for group in partial:
        whole = (g for g in groups.values() if g not in partial)
        leader = next((g for g in whole if _determines(columns[g[0]], columns[group[0]])), None)
        if leader is not None:
            leader += group
            group.clear()
    leading = [group for group in groups.values() if group]
    for group in leading:  # a setting that all runs have stands for those that some lack
        group.sort(key=lambda key: ABSENT in columns[key])
    leading.sort(key=lambda group: _FIRST.index(group[0]) if group[0] in _FIRST else len(_FIRST))
    shorts = Counter(group[0].rpartition(".")[2] for group in leading)
    return tuple(
        Factor(
            key=group[0], also=tuple(group[1:]), levels=tuple(dict.fromkeys(columns[group[0]])),
            name=short if shorts[short := group[0].rpartition(".")[2]] == 1 else group[0],
        )
        for group in leading
    )  # fmt: skip


def _determines(cause: Sequence[str], effect: Sequence[str]) -> bool:
    return len(set(zip(cause, effect, strict=True))) == len(set(cause))


def level_of(record: Record, factor: Factor) -> str:
    """A run's level of a factor."""
    return str(record.label) if factor.key == "name" else record.settings.get(factor.key, ABSENT)


def label(levels: Mapping[str, str]) -> str:
    """The readable name of a variant, such as "rmsnorm pre h4 learning_rate=0.001"."""
    words = {"norm": "{}", "placement": "{}", "n_head": "h{}", "name": "{}"}
    shown = {name: level for name, level in levels.items() if level != ABSENT}
    return " ".join(words.get(name, f"{name}={{}}").format(level) for name, level in shown.items()) or "the variant"
