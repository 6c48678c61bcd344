"""What the runs of a study hold besides losses: measurements of their layers, and texts they wrote."""

from collections.abc import Sequence
from contextlib import suppress

import pandas as pd

from gptexp.analysis.study import Study, Variant
from gptexp.records import Measurement, read_diagnostics, read_samples
from gptexp.runs import Run


def last_diagnostics(variants: Sequence[Variant]) -> pd.DataFrame:
    """The last measurement of every layer, mean over the seeds: variant, quantity, layer, value."""
    measured = [pd.DataFrame(columns=["variant", *Measurement._fields]).astype({"value": float})]
    for variant, record in ((v, r) for v in variants for r in v.runs.values()):
        with suppress(OSError, ValueError):  # the comparison stands without it
            rows = pd.DataFrame(read_diagnostics(Run(record.path).diagnostics_path), columns=Measurement._fields)
            measured.append(rows[rows["step"] == rows["step"].max()].assign(variant=variant.label))
    keys = ["variant", "quantity", "layer"]
    return pd.concat(measured).groupby(keys, sort=False, as_index=False)["value"].mean()


def last_samples(study: Study, most: int = 12, characters: int = 600) -> tuple[int | None, dict[str, str]]:
    """The last text of each variant's run with the seed that most of them have; the seed, and the texts by variant."""
    ranked = study.ranked()[:most]
    seeds = [seed for v in ranked for seed in v.runs]
    seed = max(sorted(set(seeds)), key=seeds.count, default=None)
    texts = {}
    for variant, record in ((v, r) for v in ranked for s, r in v.runs.items() if s == seed):
        with suppress(OSError, ValueError):
            for _, body in read_samples(Run(record.path).samples_path)[-1:]:
                text = body.strip("\n")
                texts[variant.label] = text[:characters] + ("…" if len(text) > characters else "")
    return seed, texts
