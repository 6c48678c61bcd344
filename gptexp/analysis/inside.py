"""What the runs of a study hold besides losses: measurements of their layers, and texts they wrote."""

import numpy as np

from gptexp.analysis.study import Study, Variant
from gptexp.records import read_diagnostics, read_samples
from gptexp.runs import Run


def last_diagnostics(variant: Variant) -> dict[str, dict[str, float]]:
    """The last measurement of every layer, mean over the seeds, by quantity and layer; empty if none was made."""
    values: dict[str, dict[str, list[float]]] = {}
    for record in variant.runs.values():
        path = Run(record.path).diagnostics_path
        try:
            rows = read_diagnostics(path) if path.exists() else []
        except (OSError, ValueError):
            continue  # the comparison stands without it
        last = max((row.step for row in rows), default=0)
        for row in rows:
            if row.step == last:
                values.setdefault(row.quantity, {}).setdefault(row.layer, []).append(row.value)
    return {q: {layer: float(np.mean(v)) for layer, v in layers.items()} for q, layers in values.items()}


def last_samples(study: Study, most: int = 12, characters: int = 600) -> tuple[int | None, dict[str, str]]:
    """The last text of each variant's run with the seed that most of them have; the seed, and the texts by variant."""
    ranked = study.ranked()[:most]
    seeds = [seed for v in ranked for seed in v.runs]
    seed = max(sorted(set(seeds)), key=seeds.count, default=None)
    texts = {}
    for variant in ranked:
        record = variant.runs.get(seed) if seed is not None else None
        try:
            samples = read_samples(Run(record.path).samples_path) if record else []
        except (OSError, ValueError):
            samples = []
        if samples:
            text = samples[-1][1].strip("\n")
            texts[variant.label] = text[:characters] + ("…" if len(text) > characters else "")
    return seed, texts
