"""What does a variant's loss see? `python -m gptexp.audit norm=batchnorm`, or `python -m gptexp.audit DIR`.

Measures, in train mode and in eval mode, by gradients through the real model in float64: whether a prediction depends
on later tokens or on other sequences of the batch, by how much and in which layers; and how much the two modes differ.
Prints a table and writes audit.json and audit.png, for a run into its own directory.

    any settings of gptexp.train     audit a new model of this configuration, or
    DIR checkpoint=best|last         audit a trained one
    audit_dir=DIR                    where the files go instead
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptexp.errors import UserError
from gptexp.perf import mkl_kernels
from gptexp.processes.console import run_command

if TYPE_CHECKING:
    from gptexp.config.schema import Config

log = logging.getLogger("gptexp")

SEQUENCES, POSITIONS = 4, 64  # of the batch on which gradients are measured
BATCHES = 4  # of batch_size rows, on which losses are measured


def main() -> None:
    """The command line."""
    run_command(__doc__, audit)


def audit(arguments: Sequence[str]) -> dict[str, Any]:
    """Audit what the arguments name: print the table, write the files and return the contents of audit.json.

    Raises:
        UserError: with a line for every mistake.
    """
    config, run, checkpoint, folder = _parse(arguments)
    from gptexp.analysis.plots import plot_influence
    from gptexp.runs.run import write_atomically

    report, maps = _measure(config, run, checkpoint)
    _show(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "audit.json", (json.dumps(report, indent=2) + "\n").encode())
        plot_influence(maps, report["model"], folder / "audit.png")
    except OSError as error:
        raise UserError(f"audit_dir={folder}: cannot be written ({error.strerror})") from error
    log.info("\n%s\npicture: %s", folder / "audit.json", folder / "audit.png")
    return report


def _parse(arguments: Sequence[str]) -> tuple["Config", Any, str, Path]:
    from gptexp.config.command_line import compose_config
    from gptexp.config.settings import named_directories
    from gptexp.runs.run import Run, checkpoint_named

    named, rest = named_directories(arguments)
    own = {k: v for k, _, v in (a.partition("=") for a in rest) if k in ("checkpoint", "audit_dir")}
    others = [a for a in rest if a.partition("=")[0] not in own]
    if named:
        own["run"] = named[0]
    problems = [f"{name}: cannot be read as a setting; the run directory is {named[0]}" for name in named[1:]]
    if "run" in own:
        problems += [f"{a}: has no effect with run={own['run']}, whose configuration is complete" for a in others]
    elif "checkpoint" in own:
        problems.append(f"checkpoint={own['checkpoint']}: has no effect without run=DIR")
    checkpoint = own.get("checkpoint", checkpoint_named(own.get("run", "")))
    if checkpoint not in ("best", "last"):
        problems.append(f"checkpoint={checkpoint}: must be one of best, last")
    if problems:
        raise UserError(problems)
    if "run" in own:
        run = Run.open(own["run"])
        return run.config, run, checkpoint, Path(own.get("audit_dir", run.path))
    config = compose_config(others)
    folder = Path(own.get("audit_dir", Path(config.output_dir) / "audits" / config.variant))
    return config, None, checkpoint, folder


def _measure(config: "Config", run: Any, checkpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of audit.json, and the maps to draw, by mode."""
    mkl_kernels.choose(config.hardware.fast_mkl)
    import numpy as np
    import torch

    from gptexp.audits.influence import measure
    from gptexp.audits.modes import between_modes
    from gptexp.data.datamodule import CharDataModule
    from gptexp.models.settings import build_model

    if run is None:
        data = CharDataModule(config.data, config.task, block_size=config.model.block_size)
        model = build_model(config.sized(data.vocab_size), config.seed)
    else:
        from gptexp.training.load import load_data, load_model

        data = load_data(run, config)
        model = load_model(run, checkpoint, data.vocab_size)  # type: ignore[arg-type]
    split, device = data.val, next(model.parameters()).device
    n_batches = min(BATCHES, split.n_rows // config.batch_size) or 1
    data.eval_batch_size, data.eval_windows = config.batch_size, n_batches * config.batch_size
    batches: list[Any] = [
        tuple(None if part is None else part.to(device) for part in (batch.x, batch.y, batch.mask))
        for batch in data.val_dataloader(whole=False)
    ]
    probe = torch.from_numpy(split.rows(np.arange(SEQUENCES) * split.n_rows // SEQUENCES).x)[:, :POSITIONS].to(device)
    report: dict[str, Any] = {
        "model": config.model.label, "run": str(run.path) if run else None, "batch": list(probe.shape), "modes": {},
    }  # fmt: skip
    maps: dict[str, Any] = {}
    for mode in ("train", "eval"):
        try:
            found = measure(model, probe, mode == "train")
        except ValueError as error:
            report["modes"][mode] = {"impossible": str(error)}
            continue
        layers = [asdict(layer) for layer in found.layers if layer.looks_ahead or layer.couples]
        report["modes"][mode] = {
            "looks_ahead": found.model.looks_ahead, "future": found.model.future,
            "couples": found.model.couples, "others": found.model.others, "layers": layers,
        }  # fmt: skip
        maps[mode] = {"own": found.map.numpy(), "others": found.others.numpy()}
    report |= between_modes(model, batches, prompt=probe[:, :16])
    return report, maps


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "train mode", "eval mode", title=f"{report['model']}: what a prediction depends on")

    def row(title: str, found: dict[str, Any], words: Callable[[Any], str]) -> None:  # a string says why not
        table.add_row(title, *(value if isinstance(value, str) else words(value) for value in found.values()))

    modes = {mode: found.get("impossible", found) for mode, found in report["modes"].items()}
    row("later tokens", modes,
        lambda m: f"YES, {m['future']:.2%} of the gradient" if m["looks_ahead"] else "no (causal)")  # fmt: skip
    row("other sequences", modes, lambda m: f"YES, {m['others']:.2%} of the gradient" if m["couples"] else "no")
    row("layers where this happens", modes,
        lambda m: f"{len(m['layers'])}: {_span(m['layers'])}" if m["layers"] else "none")  # fmt: skip
    row("loss, nats per token", report["loss"], "{:.4f}".format)
    row("greedy text alone and in a batch", report["generation"],
        lambda first: "the same" if first is None else f"differ from token {first + 1}")  # fmt: skip
    if report["discrepancy"] and report["run"]:  # a new model has no running averages yet
        worst = max(report["discrepancy"], key=lambda d: max(d.get("mean_drift", 0.0), d["std_drift"]))
        mean = f"mean {worst['mean_drift']:.3f}, " if "mean_drift" in worst else ""
        table.add_row("largest drift of running statistics",
                      f"{mean}deviation {worst['std_drift']:.3f} in {worst['layer']}", "")  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _span(layers: list[dict[str, Any]]) -> str:
    names = [layer["layer"] for layer in layers]
    return ", ".join(names) if len(names) < 3 else f"{names[0]} ... {names[-1]}"


if __name__ == "__main__":
    main()
