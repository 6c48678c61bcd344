"""What varies among runs, and which runs can be compared at all."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from gptexp.analysis.collect import Record

ABSENT = "–"
"""The level of a setting that a run does not have."""


@dataclass(frozen=True)
class Factor:
    """A setting that varies among the runs."""

    key: str  # its dotted key; where several settings vary together, the first of them
    # the keys that vary with it, one to one, and those that exist for some of its levels only and depend on it alone
    also: tuple[str, ...]
    name: str  # as it is shown, such as "norm" for model.norm
    levels: tuple[str, ...]  # its values, in the order in which they were run


def comparable(records: Sequence[Record]) -> tuple[list[Record], dict[str, list[Record]]]:
    """The largest set of runs whose losses can be compared, and the others by what sets them apart."""
    kinds = [(r.info["fingerprints"]["data"], r.split, precision(r)) for r in records]
    finished = Counter(kind for kind, r in zip(kinds, records, strict=True) if r.complete)
    main = max(dict.fromkeys(kinds), key=lambda k: (finished[k], kinds.count(k)), default=())
    groups: dict[str, list[Record]] = {"": []}
    for kind, record in zip(kinds, records, strict=True):
        corpus = f"{record.info.get('data', {}).get('corpus')} ({record.info['fingerprints']['data'][:8]})"
        words = (f"corpus: {corpus}", f"validation split: {record.split}", f"precision: {precision(record)}")
        differing = [w for w, own, wanted in zip(words, kind, main, strict=True)
                     if own != wanted and None not in (own, wanted)]  # fmt: skip
        groups.setdefault("; ".join(f"another {word}" for word in differing), []).append(record)
    return groups.pop(""), groups


def precision(record: Record) -> str | None:
    """The precision that a run computes in; None as long as it has not begun."""
    device = record.info.get("device")
    return device.get("precision") if isinstance(device, dict) else None


def is_numeric(factor: Factor) -> bool:
    """Whether every level of a factor is a number."""
    try:
        return all(math.isfinite(float(level)) for level in factor.levels)
    except ValueError:
        return False


_FIRST = ("model.norm", "model.placement", "model.n_head")  # as in a run's name


def find_factors(records: Sequence[Record]) -> tuple[Factor, ...]:
    """What varies among the runs.

    Where each configuration has a name of its own, which stands for its settings, the names are the one factor.
    """
    settings = pd.DataFrame([r.settings for r in records]).fillna(ABSENT)
    columns = {key: tuple(column) for key, column in settings.items() if column.nunique() > 1}
    names = pd.Series([r.label for r in records])
    same = settings.groupby(list(settings), sort=False).ngroup() if len(records) else names
    if names.nunique() > 1 and names.notna().all() and (names.factorize()[0] == same).all():
        return (Factor("name", tuple(columns), "name", tuple(names.unique())),)
    groups: dict[tuple[int, ...], list[str]] = {}  # settings that change together, by where each level comes first
    for key, column in columns.items():
        groups.setdefault(tuple(column.index(level) for level in column), []).append(key)
    partial = [group for group in groups.values() if all(ABSENT in columns[key] for key in group)]
    for group in partial:
        whole = (g for g in groups.values() if g not in partial)
        leader = next((g for g in whole if settings.groupby(g[0])[group[0]].nunique().max() == 1), None)
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
            key=key, also=tuple(also), levels=tuple(dict.fromkeys(columns[key])),
            name=short if shorts[short := key.rpartition(".")[2]] == 1 else key,
        )
        for key, *also in leading
    )  # fmt: skip


def level_of(record: Record, factor: Factor) -> str:
    """A run's level of a factor."""
    return str(record.label) if factor.key == "name" else record.settings.get(factor.key, ABSENT)


def label(levels: Mapping[str, str]) -> str:
    """The readable name of a variant, such as "rmsnorm pre h4 learning_rate=0.001"."""
    words = {"norm": "{}", "placement": "{}", "n_head": "h{}", "name": "{}"}
    shown = {name: level for name, level in levels.items() if level != ABSENT}
    return " ".join(words.get(name, f"{name}={{}}").format(level) for name, level in shown.items()) or "the variant"
