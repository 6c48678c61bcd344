"""Run directories with made-up losses, for tests of what reads runs, and for benchmarks of it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptexp.config.schema import read_config
from gptexp.runs import files as records
from gptexp.runs.run import Run


def write_run(
    path: Path, settings: Mapping[str, Any], losses: Sequence[float], *, rows: int = 0, status: str = "done",
    data: str = "d" * 64, precision: str = "32-true", chars_per_token: float = 1.0, **info: Any,
) -> Run:  # fmt: skip
    """Write the directory of a run that never was.

    Args:
        path: the directory to make.
        settings: of its configuration, nested; the rest are the defaults.
        losses: of its evaluations, nats a token, evenly spaced over its rows.
        rows: of metrics.csv; at least one an evaluation.
        status: how it ended.
        data: fingerprint of its corpus.
        precision: that it computed in.
        chars_per_token: of the text, for bits per character.
        info: further entries of run.json.
    """
    config = read_config(settings)
    run = Run.claim(path, config, {
        "name": path.name, "group": path.parent.name, "variant": config.variant,
        "fingerprints": {"config": config.fingerprint(), "data": data, "code": "c" * 64},
        "data": {"corpus": "shakespeare"}, "command": ["gptexp/train.py", "-m", "seed=1,2"], "error": None,
        "device": {"accelerator": "cpu", "name": "none", "precision": precision},
        "train_loss": {"sees_later_tokens": config.model.norm == "batchnorm", "sees_other_sequences": False}, **info,
    })  # fmt: skip
    rows = max(rows, len(losses))
    evaluations = dict(zip(np.linspace(0, rows - 1, len(losses)).astype(int).tolist(), losses, strict=True))
    records.append_rows(run.metrics_path, records.METRICS, (
        {"step": step, "tokens": step * 768, "train/loss": 2.5, "learning_rate": 1e-3, "seconds": step / 100}
        | ({"val/loss": evaluations[step], "val/bpc": evaluations[step] / math.log(2) / chars_per_token}
           if step in evaluations else {}) for step in range(rows)
    ))  # fmt: skip
    if status in ("done", "diverged", "interrupted"):
        best = min(filter(math.isfinite, losses), default=None)
        bits = None if best is None else best / math.log(2) / chars_per_token
        run.write_result({"status": status, "best_val_loss": best, "best_val_bpc": bits, "parameters": 1000,
                          "seconds": rows / 100, "tokens_per_second": 76800.0})  # fmt: skip
    run.finish(status)  # type: ignore[arg-type]
    return run
