"""What a run leaves behind when it ends: result.json, a picture, a status and a word to the user."""

import logging
import math
import platform
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch import Trainer

from gptexp.loggers.media import log_figure, log_summary
from gptexp.records import read_diagnostics, read_metrics, read_samples
from gptexp.runs import Run, Status
from gptexp.training.callbacks.early_stopping import EarlyStopping
from gptexp.training.callbacks.throughput import Throughput

log = logging.getLogger("gptexp")


def leave_results(run: Run, status: Status, trainer: Trainer) -> float:
    """Write result.json, the pictures and the final status, tell the loggers of them, and say how the run ended.

    Returns:
        the lowest loss over the whole validation split, in nats per token; nan if there is none.
    """
    step, callbacks = trainer.global_step, trainer.callbacks
    (counts,) = (callback for callback in callbacks if isinstance(callback, Throughput))
    stopped = any(isinstance(callback, EarlyStopping) and callback.exhausted for callback in callbacks)
    rows = read_metrics(run.metrics_path)
    evaluations = [r for r in rows if math.isfinite(r.get("val/loss", math.nan))]
    final = evaluations[-1] if evaluations else {}
    best = min(evaluations, key=lambda r: r["val/loss"], default={})
    parameters = run.info["parameters"]
    result = {
        "status": status,
        "stopped_early": stopped and step < trainer.max_steps,
        "step": step,
        "best_val_loss": best.get("val/loss"),
        "best_step": int(best["step"]) if best else None,
        "final": {k: v for k, v in final.items() if k.startswith("val/") and math.isfinite(v)},
        "parameters": parameters,
        "tokens": counts.tokens,
        "seconds": counts.seconds,
        "eval_seconds": counts.eval_seconds,
        "tokens_per_second": counts.tokens / max(counts.seconds, 1e-9),
    }
    run.write_result(result)
    seen = {f"train_loss_{k}": v for k, v in run.info.get("train_loss", {}).items()}
    pictures = _draw(run, rows)
    for logger in trainer.loggers:
        try:
            log_summary(logger, {"status": status, "parameters": parameters, **seen})
            for path in pictures:
                log_figure(logger, path, step)
        except Exception as error:  # the run is whole without them
            log.warning("%s: no summary or picture (%s)", type(logger).__name__, str(error).split("\n")[0])
    run.finish(status)
    match status:
        case "interrupted":
            log.info("interrupted at step %d and saved; go on with: python -m gptexp.train resume=%s", step, run.path)
        case "pruned":
            log.info("pruned at step %d: val/loss %.4f is poor beside that of other trials", step, best["val/loss"])
        case "diverged":
            kept = run.checkpoint("last").exists() or run.checkpoint("best").exists()
            log.warning("diverged at step %d: the loss or its gradient is no longer finite%s", step,
                        "; the checkpoints before it are kept" if kept else "")  # fmt: skip
        case _ if not evaluations:
            log.info("done · nothing was evaluated · %.0f s of training", counts.seconds)
        case _:
            log.info("done · best val/loss %.4f at step %d · %.0f s of training, %.0f s of evaluation",
                     best["val/loss"], best["step"], counts.seconds, counts.eval_seconds)  # fmt: skip
            _show_sample(run)
            prompt = "" if run.info["data"]["documents"] else ' prompt="The "'
            log.info("results: %s\nsample more with: python -m gptexp.sample run=%s%s", run.path, run.path, prompt)
    if run.heat_maps_path.exists():
        log.info("picture: %s", run.heat_maps_path)
    return best.get("val/loss", math.nan)


def _draw(run: Run, rows: list[dict[str, float]]) -> list[Path]:
    """Draw the curves, and the measurements of layers if there are any; returns the pictures."""
    try:
        from gptexp.analysis.plots import plot_curves, plot_diagnostics  # here, because matplotlib is slow to import

        plot_curves(rows, run.info["name"], run.curves_path, run.sees_later_tokens)
        if run.config.diagnostics_interval:
            plot_diagnostics(read_diagnostics(run.diagnostics_path), run.info["name"], run.heat_maps_path)
        return [path for path in (run.curves_path, run.heat_maps_path) if path.exists()]
    except Exception as error:  # the run is whole without its pictures
        log.warning("%s: no picture (%s)", run.path, error)
        return []


def _show_sample(run: Run) -> None:
    samples = read_samples(run.samples_path)
    if samples:
        lines = samples[-1][1].strip("\n").split("\n")
        log.info("a sample:\n\n%s\n", "\n".join(f"    {line}" for line in lines))


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "numpy": np.__version__,
    }
