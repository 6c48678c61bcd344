"""Draws the figure and prints the table of a page in this folder: `python docs/known_results.py NAME SWEEP_DIR ...`.

NAME is the page: ladder, warmup, batchnorm, rmsnorm, heads, attention_scale, fast or scale; SWEEP_DIR is what the
sweep on that page left, such as `python -m gptexp.train -m experiment=known/NAME hydra.sweep.dir=SWEEP_DIR`; scale
takes the two files that its benchmarks have written.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gptexp.records import read_diagnostics, read_metrics
from gptexp.runs import Run

Group = dict[Any, list[Run]]
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t, two-sided 95 %, by the number of values."""
AXES = ("model.n_layer", "model.n_embd", "model.block_size", "batch_size")


def runs_of(folder: Path, key: Callable[[Run], Any]) -> Group:
    """The runs of a sweep by a key, each list in order of the seed."""
    groups: Group = defaultdict(list)
    for path in sorted(p for p in folder.iterdir() if (p / "run.json").exists()):
        groups[key(Run(path))].append(Run(path))
    return {k: sorted(v, key=lambda run: run.config.seed) for k, v in sorted(groups.items())}


def final(run: Run) -> float:
    """The last loss over the whole validation split, in nats a token; nan for a run that diverged."""
    result = run.result or {}
    return float(result.get("final", {}).get("val/loss", math.nan)) if result.get("status") == "done" else math.nan


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over the seeds."""
    numbers = list(values)
    return f"{mean(numbers):.4f} ± {stdev(numbers):.4f}"


def step_time(run: Run) -> float:
    """The median time of a training step, in milliseconds: moments at which the machine was busy do not count."""
    rows = [row for row in read_metrics(run.metrics_path) if "train/loss" in row]
    return 1000 * median((b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(rows))


def at_start(run: Run, quantity: str) -> list[float]:
    """What was measured in each layer before the first step, in the order of the layers."""
    return [m.value for m in read_diagnostics(run.diagnostics_path) if m.quantity == quantity and m.step == 0]


def gradients(run: Run, part: str) -> list[float]:
    """The norm of the first gradient of one part, block by block."""
    rows = read_diagnostics(run.diagnostics_path)
    return [m.value for m in rows if m.quantity == "grad_norm" and m.step == 0 and m.layer.endswith(part)]


def figure(columns: int) -> tuple[Figure, Any]:
    """A figure with a row of panels."""
    new = Figure(figsize=(5.2 * columns, 3.8), layout="constrained")
    FigureCanvasAgg(new)
    panels = new.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
    return new, panels


def curve(axes: Any, runs: list[Run], column: str, **style: Any) -> None:
    """The mean over the seeds of a column of metrics.csv."""
    points: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        for row in read_metrics(run.metrics_path):
            if column in row:
                points[row["step"]].append(row[column])
    axes.plot(list(points), [mean(v) for v in points.values()], **style)


def warmup(folder: Path, gradient_folder: Path) -> tuple[list[str], Figure]:
    """Gradients at initialisation, and what warm-up does, in pre- and post-norm."""
    new, (left, right) = figure(2)
    lines = ["| placement | first gradient of the feed-forward layers, first to last block | last / first |",
             "|---|---|---|"]  # fmt: skip
    for placement, runs in runs_of(gradient_folder, lambda r: r.config.model.placement).items():
        profile = [mean(block) for block in zip(*(gradients(r, ".mlp") for r in runs), strict=True)]
        lines.append(f"| {placement} | {profile[0]:.3f} ... {profile[-1]:.3f} | {profile[-1] / profile[0]:.1f} |")
        left.plot(range(1, len(profile) + 1), profile, marker="o", label=placement)
    lines += ["", "| placement | warm-up steps | val/loss |", "|---|---|---|"]
    for (placement, steps), runs in runs_of(folder, _placement_and_warmup).items():
        lines.append(f"| {placement} | {steps} | {spread(map(final, runs))} |")
        curve(right, runs, "val/loss_windows", marker=".", label=f"{placement}, warm-up {steps}")
    left.set(xlabel="block", ylabel="gradient norm of the feed-forward layer", yscale="log")
    left.set_title("before the first step")
    right.set(xlabel="step", ylabel="val/loss (nats a token)", title="training")
    left.legend()
    right.legend()
    return lines, new


def _placement_and_warmup(run: Run) -> tuple[str, int]:
    return run.config.model.placement, run.config.schedule.warmup_steps


def batchnorm(folder: Path) -> tuple[list[str], Figure]:
    """Training and validation loss of batch norm and its relatives."""
    groups = runs_of(folder, lambda r: (r.config.batch_size, r.config.model.norm))
    sizes = sorted({size for size, _ in groups})
    new, panels = figure(len(sizes))
    lines = ["| batch_size | norm | train/loss, last 100 steps | val/loss | val - train | largest drift of deviations"
             " |", "|---|---|---|---|---|---|"]  # fmt: skip
    for i, ((size, norm), runs) in enumerate(groups.items()):
        train = [mean([row["train/loss"] for row in read_metrics(run.metrics_path) if "train/loss" in row][-10:])
             for run in runs]  # fmt: skip
        val = [final(run) for run in runs]
        measured = [m for run in runs for m in read_diagnostics(run.diagnostics_path) if m.quantity == "std_drift"]
        drifts = [m.value for m in measured if m.step == max(m.step for m in measured)]
        gap = spread(v - t for v, t in zip(val, train, strict=True))
        ahead = " (sees later tokens)" if runs[0].sees_later_tokens else ""
        lines.append(f"| {size} | {norm} | {mean(train):.3f}{ahead} | {spread(val)} | {gap} |"
                     f" {f'{max(drifts):.2f}' if drifts else '-'} |")  # fmt: skip
        axes, color = panels[sizes.index(size)], f"C{i % (len(groups) // len(sizes))}"
        curve(axes, runs, "train/loss", color=color, alpha=0.35, linewidth=0.8)
        curve(axes, runs, "val/loss_windows", color=color, marker="o", markersize=4, label=norm)
        axes.set(xlabel="step", ylabel="nats a token", ylim=(1.8, 4.5))
        axes.set_title(f"batch_size {size}: val (dots), train (thin)")
    panels[0].legend()
    return lines, new


def rmsnorm(folder: Path) -> tuple[list[str], Figure]:
    """The paired difference between RMS norm and layer norm, and the time of each."""
    groups = runs_of(folder, lambda r: r.config.model.norm)
    pairs = list(zip(map(final, groups["rmsnorm"]), map(final, groups["layernorm"]), strict=True))
    differences = [rms - layer for rms, layer in pairs]
    half = T95[len(differences)] * stdev(differences) / math.sqrt(len(differences))
    new, (left,) = figure(1)
    left.plot(differences, "o", label="one seed")
    left.axhspan(mean(differences) - half, mean(differences) + half, alpha=0.2, label="mean, 95 % interval")
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="seed", ylabel="val/loss, RMS norm - layer norm", xticks=range(len(differences)),
             xticklabels=[r.config.seed for r in groups["rmsnorm"]])  # fmt: skip
    left.legend()
    lines = ["| norm | val/loss | ms a step, median (range of the seeds) |", "|---|---|---|"]
    for norm, runs in groups.items():
        times = [step_time(r) for r in runs]
        time = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        lines.append(f"| {norm} | {spread(map(final, runs))} | {time} |")
    n = len(differences)
    return [*lines, "", f"Paired difference: {mean(differences):+.4f} ± {half:.4f} (95 %, {n} seeds)."], new


def heads(folder: Path) -> tuple[list[str], Figure]:
    """The validation loss by the number of heads."""
    groups = runs_of(folder, lambda r: r.config.model.n_head)
    new, (left,) = figure(1)
    for n, runs in groups.items():
        left.plot([n] * len(runs), [final(r) for r in runs], "o", color="C0", alpha=0.6)
    left.plot(list(groups), [mean(map(final, runs)) for runs in groups.values()], color="C0", label="mean over seeds")
    left.set(xlabel="heads", ylabel="val/loss (nats a token)", xscale="log")
    left.set_xticks(list(groups), list(groups))
    left.minorticks_off()
    left.legend()
    rows = [f"| {n} | {runs[0].config.model.head_dim} | {spread(map(final, runs))} |" for n, runs in groups.items()]
    return ["| heads | head size | val/loss |", "|---|---|---|", *rows], new


def attention_scale(folder: Path) -> tuple[list[str], Figure]:
    """The entropy of attention before the first step, and the loss, with and without the scale."""
    groups = runs_of(folder, lambda r: (r.config.model.attention_scale, r.config.model.head_dim))
    length = next(iter(groups.values()))[0].config.model.block_size
    uniform = mean(math.log(t) for t in range(1, length + 1))
    new, (left, right) = figure(2)
    lines = ["| divided by the root | head size | entropy before the first step (nats) | val/loss |",
             "|---|---|---|---|"]  # fmt: skip
    for scaled in (True, False):
        points = {d: runs for (s, d), runs in groups.items() if s == scaled}
        entropy = {d: mean(mean(at_start(r, "attention_entropy")) for r in runs) for d, runs in points.items()}
        label = "divided by the root of the head size" if scaled else "not divided"
        left.plot(list(entropy), list(entropy.values()), marker="o", label=label)
        right.plot(list(points), [mean(map(final, runs)) for runs in points.values()], marker="o", label=label)
        lines += [f"| {'yes' if scaled else 'no'} | {d} | {entropy[d]:.3f} | {spread(map(final, runs))} |"
                  for d, runs in points.items()]  # fmt: skip
    left.axhline(uniform, color="black", linewidth=0.8, linestyle=":", label="uniform attention")
    for axes in (left, right):
        axes.set(xlabel="head size", xscale="log", xticks=list(points), xticklabels=list(points))
        axes.minorticks_off()
    left.set(ylabel="entropy of attention (nats)", title="before the first step")
    right.set(ylabel="val/loss (nats a token)", title="after 300 steps")
    left.legend(fontsize="small")
    return [*lines, "", f"Uniform attention: {uniform:.3f} nats."], new


PUBLISHED = {
    "ladder-1-bigram": 2.5, "ladder-2-head": 2.4, "ladder-3-heads": 2.28, "ladder-4-feed-forward": 2.24,
    "ladder-5-blocks": 2.08, "ladder-6-layernorm": 2.06, "ladder-7-scaled": 1.48,
}  # fmt: skip


def ladder(folder: Path) -> tuple[list[str], Figure]:
    """The validation loss of each rung beside the published one."""
    groups = runs_of(folder, lambda r: r.config.name)
    new, (left,) = figure(1)
    lines = ["| rung | parameters | published | ours | difference | seconds of training |", "|---|---|---|---|---|---|"]
    for name, runs in groups.items():
        losses, results = [final(r) for r in runs], [r.result or {} for r in runs]
        lines.append(f"| {name.removeprefix('ladder-')} | {results[0]['parameters']:,} | {PUBLISHED[name]} |"
                     f" {spread(losses)} | {mean(losses) - PUBLISHED[name]:+.3f} |"
                     f" {mean(r['seconds'] for r in results):.0f} |")  # fmt: skip
        curve(left, runs, "val/loss", marker=".", label=f"{name.removeprefix('ladder-')}: {mean(losses):.3f}")
    left.set(xlabel="step", ylabel="val/loss (nats a token)", ylim=(1.95, 3.0))
    left.legend(fontsize="small")
    return lines, new


def fast(folder: Path) -> tuple[list[str], Figure]:
    """What each single change of the recipe of `fast_recipe` does, in the sweeps `fast_*` of a folder."""
    (recipe,) = runs_of(folder / "fast_recipe", lambda r: "").values()
    before = {run.config.seed: final(run) for run in recipe}
    rows = []
    for sweep in sorted(folder.glob("fast_*")):
        if sweep.name == "fast_recipe":
            continue
        for label, runs in runs_of(sweep, lambda r: _changes(recipe[0], r)).items():
            differences = [final(r) - before[r.config.seed] for r in runs]
            half = T95[len(differences)] * stdev(differences) / math.sqrt(len(differences))
            rows.append((mean(differences), half, label, spread(map(final, runs))))
    rows.sort()
    lines = ["| change | val/loss | difference (95 %) |", "|---|---|---|", f"| none | {spread(before.values())} | |"]
    lines += [f"| `{label}` | {losses} | {d:+.4f} ± {half:.4f} |" for d, half, label, losses in rows]
    new, (left,) = figure(1)
    new.set_size_inches(7.5, 0.3 * len(rows) + 1)
    near = [i for i, (d, *_) in enumerate(rows) if abs(d) <= 0.2]
    left.errorbar([rows[i][0] for i in near], near, xerr=[rows[i][1] for i in near], fmt="o", capsize=3)
    far = [i for i, (d, *_) in enumerate(rows) if d > 0.2]
    left.plot([0.2] * len(far), far, ">", color="C0")  # beyond the edge: the label says how far
    left.set_yticks(range(len(rows)), [f"{label}  (+{d:.2f})" if d > 0.2 else label for d, _, label, *_ in rows])
    left.axvline(0, color="black", linewidth=0.8)
    left.invert_yaxis()
    left.set(xlabel="val/loss, changed - fast_cpu (nats a token)", xlim=(-0.1, 0.21))
    return lines, new


def scale(times: Path, peaks: Path) -> tuple[list[str], Figure]:
    """What a step costs and needs beside the fits, from the files of benchmarks.scaling and benchmarks.memory."""
    time, memory = (json.loads(path.read_text()) for path in (times, peaks))
    base = time["points"][0]
    lines = ["| changed | GFLOP | ms a step | fitted | GFLOP/s | peak MiB | fitted |", "|---|---|---|---|---|---|---|"]
    new, (left, right) = figure(2)
    groups: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for row, held in zip(time["points"], memory["points"], strict=True):
        changed = next((key for key in AXES if row[key] != base[key]), "")
        size, taken, peak = row["gigaflop"], row["milliseconds"], held["MiB"]
        fit = time["fit"]
        fitted = fit["step_ms"] + fit["layer_ms"] * row["model.n_layer"] + 1000 * size / fit["gflops"]
        fit = memory["fit"]
        expected = fit["process_MiB"] + fit["state"] * held["state"] + fit["activations"] * held["activations"]
        groups[changed.removeprefix("model.")].append((fitted, taken, expected, peak))
        label = f"`{changed}={row[changed]}`" if changed else "none"
        lines.append(f"| {label} | {size:.2f} | {taken:.1f} | {fitted:.1f} | {1000 * size / taken:.0f} | {peak:.0f} "
                     f"| {expected:.0f} |")  # fmt: skip
    for label, points in groups.items():
        fitted_ms, ms, fitted_mib, mib = zip(*points, strict=True)
        left.plot(fitted_ms, ms, "o", label=label or "none changed")
        right.plot(fitted_mib, mib, "o", label=label or "none changed")
    for axes, what in ((left, "ms a step"), (right, "peak memory (MiB)")):
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="black", linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log", xlabel=f"{what}, fitted", ylabel=f"{what}, measured")
    left.legend(fontsize="small")
    return lines, new


def _changes(recipe: Run, run: Run) -> str:
    """The settings by which a run differs from the recipe, as on the command line; of another optimizer, its rate."""
    ours, theirs = (dict(_flat(r.config.tree())) for r in (recipe, run))
    minor = ("seed", "optimizer.beta", "optimizer.eps", "optimizer.weight_decay", "schedule.min_lr_ratio")
    changed = [k for k in ours if k in theirs and ours[k] != theirs[k] and not k.startswith(minor)]
    return " ".join(f"{k}={str(theirs[k]).lower()}".replace(".name=", "=") for k in changed)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


PAGES: dict[str, Callable[..., tuple[list[str], Figure]]] = {
    f.__name__: f for f in (warmup, batchnorm, rmsnorm, heads, attention_scale, ladder, fast, scale)
}

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in PAGES:
        sys.exit(str(__doc__))
    table, picture = PAGES[sys.argv[1]](*map(Path, sys.argv[2:]))
    print("\n".join(table))
    picture.savefig(Path(__file__).with_name(f"{sys.argv[1]}.png"), dpi=110)
