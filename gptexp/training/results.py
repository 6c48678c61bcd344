"""What a run leaves behind when it ends: result.json, pictures, its final status and a message."""

import logging
import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from gptexp.config.schema import Config
from gptexp.data.tokenizers import tokenizer_from_dict
from gptexp.errors import UserError
from gptexp.loggers.media import log_figure, log_summary
from gptexp.runs.files import EXACT_MATCH, read_diagnostics, read_metrics, read_samples
from gptexp.runs.run import Run, Status
from gptexp.training.callbacks.samples import Samples
from gptexp.training.callbacks.throughput import Throughput

log = logging.getLogger("gptexp")


def leave_results(run: Run, status: Status, trainer: Trainer) -> float:
    """Write result.json, the pictures and the final status, also to the loggers, and log how the run ended.

    Returns:
        the lowest loss over the whole validation split, in nats per token; nan if there is none.
    """
    step, parameters = trainer.global_step, run.info["parameters"]
    (counts,) = (callback for callback in trainer.callbacks if isinstance(callback, Throughput))
    written = next((c for c in trainer.callbacks if isinstance(c, Samples) and c.tokens), None)
    rows = read_metrics(run.metrics_path)
    evaluations = [r for r in rows if math.isfinite(r.get("val/loss", math.nan))]
    final = evaluations[-1] if evaluations else {}
    best = min(evaluations, key=lambda r: r["val/loss"], default={})
    result = {
        "status": status,
        "stopped_early": status == "done" and trainer.should_stop and run.config.share_done(step, counts.seconds) < 1,
        "step": step,
        "best_val_loss": best.get("val/loss"),
        "best_val_bpc": best.get("val/bpc"),
        "best_step": int(best["step"]) if best else None,
        "final": {k: v for k, v in final.items() if k.startswith("val/") and math.isfinite(v)},
        "parameters": parameters,
        "tokens": counts.tokens,
        "seconds": counts.seconds,
        "eval_seconds": counts.eval_seconds,
        "tokens_per_second": counts.tokens / max(counts.seconds, 1e-9),
        "sampled_per_second": written.tokens / max(written.seconds, 1e-9) if written else None,
        "kv_cache_bytes": trainer.lightning_module.model.cache_bytes,
    }
    run.write_result(result)
    if run.config.max_seconds and status == "done" and step == trainer.max_steps:
        log.warning("max_steps=%d ended training after %.0f of max_seconds=%g seconds; max_steps=null lets it use them "
                    "all", step, counts.seconds, run.config.max_seconds)  # fmt: skip
    seen = {f"train_loss_{k}": v for k, v in run.info.get("train_loss", {}).items()}
    pictures = _draw(run, rows)
    for logger in trainer.loggers:
        try:
            log_summary(logger, {"status": status, "parameters": parameters, **seen})
            for path in pictures:
                log_figure(logger, path, step)
        except Exception as error:  # the run is whole without them
            log.warning("%s: no summary or picture (%s)", type(logger).__name__, str(error).split("\n")[0])
    if status == "diverged":
        run.finish(status, error=_advice(run, run.config, step))
    else:
        run.finish(status)
    _tell(run, result, best)
    return best.get("val/loss", math.nan)


def _tell(run: Run, result: dict[str, Any], best: dict[str, float]) -> None:
    """Log how the run ended. That it diverged is an error, which the command reports."""
    step, seconds = result["step"], result["seconds"]
    match result["status"]:
        case "diverged":
            log.debug("%s", run.info["error"])
        case "interrupted":
            log.info("interrupted at step %d and saved; go on with: python -m gptexp.train resume=%s", step, run.path)
        case "pruned":
            log.info("pruned at step %d: val/loss %.4f is poor beside that of other trials", step, best["val/loss"])
        case _ if not best:
            log.info("done · nothing was evaluated · %.0f s of training", seconds)
        case _:
            right = result["final"].get(EXACT_MATCH)
            log.info("done · best val/loss %.4f at step %d%s · %.0f s of training, %.0f s of evaluation",
                     best["val/loss"], best["step"], "" if right is None else f" · {right:.1%} right at the end",
                     seconds, result["eval_seconds"])  # fmt: skip
            if samples := read_samples(run.samples_path):
                lines = samples[-1][1].strip("\n").split("\n")
                log.info("a sample:\n\n%s\n", "\n".join(f"    {line}" for line in lines))
            data = run.info["data"]
            problem = data["document_end"] and not data.get("document_start", data["document_end"])
            prompt = ' prompt="..."' if problem or not _knows(run, "The ") else ' prompt="The "'
            prompt = "" if data["document_end"] and not problem else prompt
            plugins = f"GPTEXP_IMPORT={named} " if (named := os.environ.get("GPTEXP_IMPORT")) else ""
            log.info("results: %s\nsample more with: %spython -m gptexp.sample run=%s%s", run.path, plugins, run.path,
                     prompt)  # fmt: skip
    if run.heat_maps_path.exists():
        log.info("picture: %s", run.heat_maps_path)


def _knows(run: Run, text: str) -> bool:
    """Whether the run's vocabulary has all symbols of a text."""
    try:
        tokenizer_from_dict(run.info["tokenizer"]).encode(text)
    except UserError:
        return False
    return True


def _advice(run: Run, config: Config, step: int) -> str:
    clip = "lower grad_clip" if config.grad_clip else "set grad_clip=1"
    kept = run.checkpoint("last").exists() or run.checkpoint("best").exists()
    return (f"{run.path}: diverged at step {step}: the loss or its gradient is no longer finite; lower "
            f"optimizer.learning_rate, raise schedule.warmup_steps, or {clip}"
            f"{'; the checkpoints before it are kept' if kept else ''}")  # fmt: skip


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
