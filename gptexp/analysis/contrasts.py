"""What of a study's variants is compared with what."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from gptexp.analysis.factors import Factor
from gptexp.analysis.statistics import Array

Kind = Literal["variant", "factor", "interaction"]


class Contrast(NamedTuple):
    """A comparison, as weights of the variants that add up to 0."""

    kind: Kind
    factor: str  # the factor's name, or both names; "" for a variant
    this: str  # the variant's label, the factor's level, or both levels
    that: str  # what it is compared with
    weights: Array  # (variants,)


def contrasts_of(
    levels: Sequence[tuple[str, ...]], done: Sequence[bool], base: int, factors: Sequence[Factor], labels: Sequence[str]
) -> list[Contrast]:
    """Each variant against the baseline, then main effects, then interactions.

    A main effect is that of a factor's level against the baseline's, averaged over every combination of the other
    factors that has both. Interactions are compared where two factors vary.

    Args:
        levels: of each variant, one for each factor.
        done: whether a variant has a run that is done.
        base: the baseline's number.
        factors: what varies.
        labels: of the variants.
    """
    rows = {of: row for row, of in enumerate(levels)}
    own = levels[base]

    def weighed(*parts: tuple[float, tuple[str, ...]]) -> Array:
        weights = np.zeros(len(levels))
        for weight, of in parts:
            weights[rows[of]] += weight
        return weights

    def there(*wanted: tuple[str, ...]) -> bool:
        return all(of in rows and done[rows[of]] for of in wanted)

    def main_effects() -> Iterator[Contrast]:
        for place, factor in enumerate(factors):
            for this in factor.levels:
                pairs = [(of, (*of[:place], own[place], *of[place + 1 :])) for of in levels
                         if of[place] == this != own[place]]  # fmt: skip
                pairs = [pair for pair in pairs if there(*pair)]
                if len(pairs) > 1:  # one pair alone is a comparison of variants
                    share = 1 / len(pairs)
                    parts = [part for of, partner in pairs for part in ((share, of), (-share, partner))]
                    yield Contrast("factor", factor.name, this, own[place], weighed(*parts))

    def interactions() -> Iterator[Contrast]:
        first, second = factors
        for a, b in itertools.product(first.levels, second.levels):
            corners = [(1.0, (a, b)), (-1.0, (a, own[1])), (-1.0, (own[0], b)), (1.0, own)]
            if a != own[0] and b != own[1] and there(*(of for _, of in corners)):
                name = f"{first.name} x {second.name}"
                yield Contrast("interaction", name, f"{a} x {b}", f"{own[0]} x {own[1]}", weighed(*corners))

    variants = [Contrast("variant", "", label, labels[base], weighed((1, of), (-1, own)))
                for of, label in zip(levels, labels, strict=True) if of != own]  # fmt: skip
    return [*variants, *main_effects(), *(interactions() if len(factors) == 2 else ())]
