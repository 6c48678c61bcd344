"""What varies among runs, and which runs can be compared at all."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import pandas as pd

from gptexp.analysis.collect import Record
from gptexp.analysis.measures import Metric
from gptexp.config.schema import Config
from gptexp.config.settings import VARIANT, marked

ABSENT = "–"
"""The level of a setting that a run does not have."""


@cache
def naming() -> tuple[str, ...]:
    """The settings that name a variant, by dotted key, in the order in which its name has them."""
    return tuple(marked(Config, VARIANT))


@dataclass(frozen=True)
class Factor:
    """A setting that varies among the runs."""

    key: str  # its dotted key
    name: str  # a short form of the key, such as "norm" for model.norm
    levels: tuple[str, ...]  # its values, in the order in which they were run


def comparable(records: Sequence[Record], metric: Metric = "final") -> tuple[list[Record], dict[str, list[Record]]]:
    """The largest set of runs that can be compared, and the others by what is different about them.

    Losses need the same text to predict, answers only the same questions.
    """
    questions = [metric == "exact_match" and r.questions for r in records]
    kinds = [(q or r.corpus, q or r.split, precision(r), r.length)
             for q, r in zip(questions, records, strict=True)]  # fmt: skip
    finished = Counter(kind for kind, r in zip(kinds, records, strict=True) if r.complete)
    main = max(dict.fromkeys(kinds), key=lambda k: (finished[k], kinds.count(k)), default=())
    groups: dict[str, list[Record]] = {"": []}
    for kind, record in zip(kinds, records, strict=True):
        corpus = f"{record.info.get('data', {}).get('corpus')} ({record.corpus[:8]})"
        words = (f"corpus: {corpus}", f"validation split: {record.split}", f"precision: {precision(record)}",
                 f"length of training: {record.length}")  # fmt: skip
        differing = [f"another {w}" for w, own, wanted in zip(words, kind, main, strict=True)
                     if own != wanted and None not in (own, wanted)]  # fmt: skip
        groups.setdefault("; ".join(differing), []).append(record)
    return groups.pop(""), groups


def precision(record: Record) -> str | None:
    """The precision that a run computes in; None until it begins."""
    device = record.info.get("device")
    return device.get("precision") if isinstance(device, dict) else None


def vocabularies(records: Sequence[Record]) -> int:
    """How many different ones the runs have."""
    return len({r.vocabulary for r in records})


def mixtures(records: Sequence[Record]) -> list[str]:
    """What else differs between runs and may change their losses."""
    devices = [r.info["device"] for r in records if precision(r)]
    mixtures = {
        "{} versions of the code made the runs ({}); that alone can change the last digits":
            Counter(f"of {r.info['fingerprints']['code'][:8]}" for r in records),
        "the runs were made on {} devices ({}): times cannot be compared":
            Counter(f"on {d.get('name')}" for d in devices),
        "the runs had {} different numbers of threads ({}): times cannot be compared":
            Counter(f"with {d.get('threads')}" for d in devices),
    }  # fmt: skip
    notes = [note.format(len(found), ", ".join(f"{n} {value}" for value, n in found.items()))
             for note, found in mixtures.items() if len(found) > 1]  # fmt: skip
    if vocabularies(records) > 1:
        notes.append("vocabularies differ, so losses are in bits per character (val/bpc), which does not depend on how "
                     "text is cut into tokens")  # fmt: skip
    evaluations = {len(r.curve) for r in records if r.complete}
    if len(evaluations) > 1:
        notes.append(f"runs have {min(evaluations)} to {max(evaluations)} evaluations: the best of more is lower by "
                     "chance alone; metric=final does not favor them")  # fmt: skip
    return notes


def is_numeric(factor: Factor) -> bool:
    """Whether every level of a factor is a number."""
    try:
        return all(math.isfinite(float(level)) for level in factor.levels)
    except ValueError:
        return False


def find_factors(records: Sequence[Record]) -> tuple[Factor, ...]:
    """What varies among the runs.

    Of settings that change together, the first is the factor. If every configuration has a name of its own, the names
    are the only factor.
    """
    settings = pd.DataFrame([r.settings for r in records]).fillna(ABSENT)
    names = pd.Series([r.label for r in records])
    same = settings.groupby(list(settings), sort=False).ngroup() if len(records) else names
    if names.nunique() > 1 and names.notna().all() and (names.factorize()[0] == same).all():
        return (Factor("name", "name", tuple(names.unique())),)
    keys: dict[tuple[int, ...], str] = {}  # by the runs that have the same level
    lacked = (settings == ABSENT).any()
    for key in sorted(settings.columns[settings.nunique() > 1], key=lambda key: lacked[key]):
        owners = (k for k in keys.values() if not lacked[k] and settings.groupby(k)[key].nunique().max() == 1)
        if not lacked[key] or next(owners, None) is None:  # what some runs lack may follow from another setting
            keys.setdefault(tuple(settings[key].factorize()[0]), key)
    first = naming()
    leading = sorted(keys.values(), key=lambda key: first.index(key) if key in first else len(first))
    shorts = Counter(key.rpartition(".")[2] for key in leading)
    return tuple(Factor(key, short if shorts[short := key.rpartition(".")[2]] == 1 else key,
                        tuple(settings[key].unique())) for key in leading)  # fmt: skip


def level_of(record: Record, factor: Factor) -> str:
    """A run's level of a factor."""
    return str(record.label) if factor.key == "name" else record.settings.get(factor.key, ABSENT)


def label(levels: Mapping[str, str]) -> str:
    """The readable name of a variant, such as "rmsnorm pre h4 learning_rate=0.001"."""
    short = {key.rpartition(".")[2] for key in naming()}

    def word(name: str, level: str) -> str:
        if name in short and level.isdigit():
            return f"{name.removeprefix('n_')[0]}{level}"  # h4 for n_head=4
        return level if name in short or name == "name" else f"{name}={level}"

    return " ".join(word(*item) for item in levels.items() if item[1] != ABSENT) or "the variant"
