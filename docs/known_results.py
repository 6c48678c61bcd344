"""Draws the figure and prints the tables of a page in this folder: `python docs/known_results.py NAME DIR ...`.

NAME is the page: norms, rmsnorm, heads, attention_scale, warmup, batchnorm, arithmetic, transfer, tokenizers,
features, makemore, ladder, fast, scale or audit. DIR is what the page's sweep left, such as
outputs/sweeps/known-heads; scale takes the two files that its benchmarks wrote, and audit the name of a norm. Each
figure is drawn twice, for light and for dark pages, into the folder figures/ beside this file.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from gptexp.analysis.collect import collect
from gptexp.analysis.figures import COLORS, VERDICT_COLORS
from gptexp.analysis.statistics import Judgement, differences, judge
from gptexp.analysis.study import Study, build_study
from gptexp.analysis.summary import VERDICTS
from gptexp.audits.influence import measure
from gptexp.config.schema import Config
from gptexp.data.datamodule import CharDataModule
from gptexp.models.gpt_settings import GPTConfig
from gptexp.models.settings import build_model
from gptexp.runs.files import read_diagnostics, read_metrics
from gptexp.runs.run import Run

Group = dict[Any, list[Run]]
Found = tuple[list[float], Judgement]  # differences by seed, and what they say
Page = tuple[list[str], Callable[[], Figure]]  # the lines of its tables, and what draws its figure

DELTA = 0.01  # nats per token; smaller differences do not matter
INK = {"light": "#2b2d33", "dark": "#d3d6de"}
STYLE: dict[str, Any] = {
    "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.fontsize": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2, "grid.linewidth": 0.6,
    "axes.linewidth": 0.6, "lines.linewidth": 1.6, "lines.markersize": 4,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "svg.hashsalt": "gptexp",
}  # fmt: skip


def figure(*heights: float) -> tuple[Figure, list[Axes]]:
    """A figure of one panel below the other, with these heights in inches; as wide as a phone can show legibly."""
    new = Figure(figsize=(5.6, sum(heights)), layout="constrained")
    return new, list(new.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])


def tone(color: str, dark: bool | None = None) -> tuple[float, ...]:
    """A color as the theme needs it: a third of the way to white on a dark page, by default the current theme's."""
    dark = mpl.rcParams["text.color"] == INK["dark"] if dark is None else dark
    return tuple(c + (1 - c) / 3 if dark else c for c in mpl.colors.to_rgb(color))


def save(draw: Callable[[], Figure], name: str) -> None:
    """Draw a figure in each theme; the same runs give the same bytes."""
    folder = Path(__file__).with_name("figures")
    folder.mkdir(exist_ok=True)
    for theme, ink in INK.items():
        inked = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
                               "ytick.color", "grid.color"), ink)  # fmt: skip
        colors = mpl.cycler(color=[tone(color, theme == "dark") for color in COLORS])
        with mpl.rc_context({**STYLE, **inked, "axes.prop_cycle": colors}):
            draw().savefig(folder / f"{name}-{theme}.svg", metadata={"Date": None})


def runs_of(folder: Path, key: Callable[[Run], Any]) -> Group:
    """The runs of a sweep by a key, each list in order of the seed."""
    groups: Group = defaultdict(list)
    for path in sorted(p for p in folder.iterdir() if (p / "run.json").exists()):
        groups[key(Run(path))].append(Run(path))
    return {k: sorted(v, key=lambda run: run.config.seed) for k, v in sorted(groups.items())}


def final(run: Run) -> float:
    """The last loss over the whole validation split, in nats per token; nan for a run that diverged."""
    result = run.result or {}
    return float(result.get("final", {}).get("val/loss", math.nan)) if result.get("status") == "done" else math.nan


def spread(values: Iterable[float], digits: int = 4) -> str:
    """Mean and standard deviation over the seeds."""
    numbers = list(values)
    return f"{mean(numbers):.{digits}f} ± {stdev(numbers):.{digits}f}"


def wrong(run: Run) -> float:
    """The share of answers that are wrong at the end."""
    return 1 - float((run.result or {})["final"]["val/exact_match"])


def compared(pairs: Sequence[tuple[list[Run], list[Run]]], of: Callable[[Run], float] = final) -> list[Found]:
    """The final losses of runs against those of others, paired by seed; corrected for the number of comparisons."""
    groups = list({id(runs): runs for pair in pairs for runs in pair}.values())
    by_seed = [{run.config.seed: of(run) for run in runs} for runs in groups]
    seeds = sorted(set().union(*by_seed))
    losses = np.array([[group.get(seed, math.nan) for seed in seeds] for group in by_seed])
    contrasts = np.zeros((len(pairs), len(groups)))
    for row, (this, that) in enumerate(pairs):
        contrasts[row, [groups.index(this), groups.index(that)]] = 1, -1
    found = zip((differences(losses, contrast) for contrast in contrasts), judge(losses, contrasts, DELTA), strict=True)
    return [([float(d) for d in values if math.isfinite(d)], judgement) for values, judgement in found]


def verdict(found: Found) -> str:
    """The cells of a table that say what a comparison found: difference, interval and verdict."""
    j = found[1]
    interval = f"{j.low:+.4f} to {j.high:+.4f}" if math.isfinite(j.low) else "–"
    return f"{j.mean:+.4f} | {interval} | {VERDICTS[j.verdict]}"


VERDICT_COLUMNS = "difference | 95 % interval | verdict"


def forest(axes: Axes, rows: Mapping[str, Found], baseline: str, loss: str = "val/loss", of: str = "nats per token"
           ) -> None:  # fmt: skip
    """Differences from a baseline: a tick for each seed, the mean with its interval, the band that does not matter."""
    axes.axvspan(-DELTA, DELTA, color=VERDICT_COLORS["equal"], alpha=0.15, linewidth=0)
    axes.axvline(0, color=mpl.rcParams["axes.edgecolor"], linewidth=0.8)
    for y, (values, j) in enumerate(rows.values()):
        color = tone(VERDICT_COLORS[j.verdict])
        axes.plot(values, [y] * len(values), "|", color=color, alpha=0.6, markersize=9)
        if math.isfinite(j.low):
            axes.plot([j.low, j.high], [y, y], color=color, linewidth=2.4)
        axes.plot(j.mean, y, "o", color=color, markersize=6)
        text = f"{j.mean:+.3f} {VERDICTS[j.verdict]}"
        axes.text(1.02, y, text, color=color, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{loss} minus that of {baseline} ({of})\n← better · worse →")


def norms(folder: Path) -> Page:
    """Three norms in two placements: each variant, and each factor over the other."""
    study = build_study(collect([folder]))
    words = {"variant": "", "factor": ", on average", "interaction": ", beyond the sum of both"}
    ordered = sorted(study.comparisons, key=lambda c: (list(words).index(c.kind), c.judgement.mean))
    rows = {c.this + words[c.kind]: (list(c.differences.values()), c.judgement) for c in ordered}
    lines = ["| variant | seeds | val/loss |", "|---|---|---|"]
    lines += [f"| {v.label} | {len(v.runs)} | {spread(r.final for r in v.runs.values())} |" for v in study.ranked()]
    lines += ["", f"| compared | with | {VERDICT_COLUMNS} |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {c.that} | {verdict(found)} |"
              for c, (name, found) in zip(ordered, rows.items(), strict=True)]  # fmt: skip

    def draw() -> Figure:
        new, (axes,) = figure(0.9 + 0.32 * len(rows))
        forest(axes, rows, study.baseline)
        return new

    return lines, draw


def ranked(*folders: Path) -> tuple[list[str], dict[str, Found], Study]:
    """The variants of some sweeps, the best first: lines of a table, and each one's differences from the first one."""
    study = build_study(collect(folders))
    against = {c.this: (list(c.differences.values()), c.judgement) for c in study.comparisons if c.kind == "variant"}
    lines = [f"| variant | {study.measure.title.removeprefix('final ')} | {VERDICT_COLUMNS} |", "|---|---|---|---|---|"]
    for v in study.ranked():
        said = verdict(against[v.label]) if v.label in against else "– | – | baseline"
        lines.append(f"| {v.label} | {spread(r.final for r in v.runs.values())} | {said} |")
    return lines, {v.label: against[v.label] for v in study.ranked() if v.label in against}, study


def forests(*parts: tuple[str, dict[str, Found], Study]) -> Figure:
    """A panel of differences for each study, under its title."""
    new, panels = figure(*(1.1 + 0.3 * len(rows) for _, rows, _ in parts))
    for axes, (title, rows, study) in zip(panels, parts, strict=True):
        loss = study.measure.title.removeprefix("final ")
        forest(axes, rows, study.baseline, loss, study.measure.of)
        axes.set_title(title)
    return new


def features(folder: Path) -> Page:
    """One feature more than the baseline has."""
    lines, rows, study = ranked(folder)
    return lines, lambda: forests(("", rows, study))


def tokenizers(steps: Path, seconds: Path) -> Page:
    """Characters, bytes and byte pairs, after equal steps and after equal seconds."""
    parts, lines = [], list[str]()
    for title, folder in (("Equal steps", steps), ("Equal seconds", seconds)):
        table, rows, study = ranked(folder)
        lines += [f"{title}:", "", *table, ""]
        parts.append((title, rows, study))
    return lines, lambda: forests(*parts)


def transfer(tuned: Path, scratch: Path) -> Page:
    """Models that start from another text's, against models that do not, after as many steps on the text or in all."""
    groups = {("from the pretrained", steps): runs for steps, runs in by_steps(tuned).items()}
    groups |= {("from scratch", steps): runs for steps, runs in by_steps(scratch).items()}
    lines = ["| start | steps on the text | val/loss |", "|---|---|---|"]
    lines += [f"| {start} | {steps:,} | {spread(map(final, runs))} |" for (start, steps), runs in groups.items()]
    pairs = {f"{steps:,} steps from the pretrained, {other:,} from scratch":
             (groups["from the pretrained", steps], groups["from scratch", other])
             for start, steps in groups if start == "from the pretrained"
             for kind, other in groups if kind == "from scratch" and other >= steps}  # fmt: skip
    found = dict(zip(pairs, compared(list(pairs.values())), strict=True))
    lines += ["", f"| compared | {VERDICT_COLUMNS} |", "|---|---|---|---|"]
    lines += [f"| {name} | {verdict(pair)} |" for name, pair in found.items()]

    def draw() -> Figure:
        new, (axes,) = figure(2.8)
        for (start, steps), runs in groups.items():
            curves = [{r["step"]: r["val/loss"] for r in read_metrics(run.metrics_path) if "val/loss" in r}
                      for run in runs]  # fmt: skip
            means = {step: mean(curve[step] for curve in curves) for step in curves[0]}
            pretrained = start == "from the pretrained"
            axes.plot(list(means), list(means.values()), color=f"C{int(pretrained)}", label=f"{start}, {steps:,} steps",
                      linestyle="-" if pretrained else "--", marker=".")  # fmt: skip
        axes.set(xlabel="steps on the text", ylabel="val/loss (nats per token)", xscale="symlog")
        axes.legend()
        return new

    return lines, draw


def by_steps(folder: Path) -> Group:
    """The runs of a sweep by their number of steps."""
    return runs_of(folder, lambda r: r.config.max_steps)


def rmsnorm(folder: Path) -> Page:
    """RMSNorm against LayerNorm."""
    groups = runs_of(folder, lambda r: r.config.model.norm)
    (found,) = compared([(groups["rmsnorm"], groups["layernorm"])])
    lines = ["| norm | val/loss |", "|---|---|"]
    lines += [f"| {norm} | {spread(map(final, runs))} |" for norm, runs in groups.items()]
    lines += ["", f"| compared with layernorm | {VERDICT_COLUMNS} |", "|---|---|---|---|"]
    lines += [f"| rmsnorm | {verdict(found)} |"]

    def draw() -> Figure:
        new, (axes,) = figure(1.4)
        forest(axes, {"rmsnorm": found}, "layernorm")
        return new

    return lines, draw


def heads(folder: Path) -> Page:
    """The validation loss by the number of heads, against one head."""
    groups = runs_of(folder, lambda r: r.config.model.n_head)
    one, *others = groups
    found = dict(zip(others, compared([(groups[n], groups[one]) for n in others]), strict=True))
    lines = [f"| heads | head size | val/loss | {VERDICT_COLUMNS} |", "|---|---|---|---|---|---|"]
    for n, runs in groups.items():
        said = verdict(found[n]) if n in found else "– | – | baseline"
        lines.append(f"| {n} | {runs[0].config.model.head_size} | {spread(map(final, runs))} | {said} |")

    def draw() -> Figure:
        new, (axes,) = figure(2.0)
        forest(axes, {f"{n} heads": pair for n, pair in found.items()}, "one head")
        return new

    return lines, draw


def attention_scale(folder: Path) -> Page:
    """The entropy of attention before the first step, and the loss, with and without the scale."""
    groups = runs_of(folder, lambda r: (r.config.model.attention_scale, r.config.model.head_size))
    sizes = sorted({size for _, size in groups})
    length = next(iter(groups.values()))[0].config.model.block_size
    uniform = mean(math.log(t) for t in range(1, length + 1))
    entropy = {key: mean(mean(at_start(r, "attention_entropy")) for r in runs) for key, runs in groups.items()}
    found = compared([(groups[False, size], groups[True, size]) for size in sizes])
    rows = {f"head size {size}": pair for size, pair in zip(sizes, found, strict=True)}
    lines = ["| head size | entropy, divided | not divided | val/loss, divided | not divided |",
             "|---|---|---|---|---|"]  # fmt: skip
    lines += [f"| {s} | {entropy[True, s]:.3f} | {entropy[False, s]:.3f} | {spread(map(final, groups[True, s]))} | "
              f"{spread(map(final, groups[False, s]))} |" for s in sizes]  # fmt: skip
    lines += ["", f"| not divided, against divided | {VERDICT_COLUMNS} |", "|---|---|---|---|"]
    lines += [f"| {name} | {verdict(pair)} |" for name, pair in rows.items()]
    lines += ["", f"Uniform attention: {uniform:.3f} nats."]

    def draw() -> Figure:
        new, (top, bottom) = figure(2.6, 2.4)
        for scaled, label in ((True, "divided by the root of the head size"), (False, "not divided")):
            top.plot(sizes, [entropy[scaled, s] for s in sizes], marker="o", label=label)
        top.axhline(uniform, color=mpl.rcParams["axes.edgecolor"], linewidth=0.8, linestyle=":", label="uniform")
        top.set(xscale="log", xlabel="head size", ylabel="entropy (nats)", ylim=(0, None))
        top.set_title("Attention before the first step")
        top.set_xticks(sizes, list(map(str, sizes)))
        top.minorticks_off()
        top.legend(loc="lower left")
        forest(bottom, rows, "divided attention")
        bottom.set_title("After training, without the division")
        return new

    return lines, draw


def at_start(run: Run, quantity: str) -> list[float]:
    """What was measured in each layer before the first step, in the order of the layers."""
    return [m.value for m in read_diagnostics(run.diagnostics_path) if m.quantity == quantity and m.step == 0]


def warmup(folder: Path, gradient_folder: Path) -> Page:
    """Gradients at initialization, and what warmup does, in pre- and post-norm."""
    profiles = {
        placement: [mean(block) for block in zip(*(gradients(r, ".mlp") for r in runs), strict=True)]
        for placement, runs in runs_of(gradient_folder, lambda r: r.config.model.placement).items()
    }
    groups = runs_of(folder, lambda r: (r.config.model.placement, r.config.schedule.warmup_steps))
    without, with_ = sorted({steps for _, steps in groups})
    pairs = {f"{p}-norm, {with_} steps of warmup against none": (groups[p, with_], groups[p, without])
             for p in profiles}  # fmt: skip
    pairs[f"post-norm against pre-norm, both with {with_} steps"] = (groups["post", with_], groups["pre", with_])
    lines = ["| placement | first gradient of the MLPs, first to last block | last / first |", "|---|---|---|"]
    lines += [f"| {p} | {v[0]:.3f} to {v[-1]:.3f} | {v[-1] / v[0]:.1f} |" for p, v in profiles.items()]
    lines += ["", "| placement | warmup steps | val/loss, each seed | mean ± sd |", "|---|---|---|---|"]
    lines += [f"| {p} | {s} | {' '.join(f'{final(r):.2f}' for r in runs)} | {spread(map(final, runs))} |"
              for (p, s), runs in groups.items()]  # fmt: skip
    lines += ["", f"| compared | {VERDICT_COLUMNS} |", "|---|---|---|---|"]
    lines += [f"| {name} | {verdict(found)} |"
              for name, found in zip(pairs, compared(list(pairs.values())), strict=True)]  # fmt: skip

    def draw() -> Figure:
        new, (top, bottom) = figure(2.6, 2.8)
        for placement, profile in profiles.items():
            top.plot(range(1, len(profile) + 1), profile, marker="o", label=f"{placement}-norm")
        top.set(xlabel="block", ylabel="gradient norm of the MLP", ylim=(0, None))
        top.set_title("Before the first step")
        top.legend()
        for i, ((placement, steps), runs) in enumerate(groups.items()):
            for run in runs:
                label = f"{placement}-norm, warmup {steps}" if run is runs[0] else None
                rows = [r for r in read_metrics(run.metrics_path) if "val/loss_windows" in r]
                bottom.plot([r["step"] for r in rows], [r["val/loss_windows"] for r in rows], color=f"C{i}",
                            linewidth=1, alpha=0.8, label=label)  # fmt: skip
        bottom.set(xlabel="step", ylabel="val/loss (nats per token)")
        bottom.set_title("Training, a line for each seed")
        bottom.legend()
        return new

    return lines, draw


def gradients(run: Run, part: str) -> list[float]:
    """The norm of the first gradient of one part, block by block."""
    rows = read_diagnostics(run.diagnostics_path)
    return [m.value for m in rows if m.quantity == "grad_norm" and m.step == 0 and m.layer.endswith(part)]


def batchnorm(folder: Path) -> Page:
    """Training and validation loss of batch norm and its relatives, by the size of the batch."""
    groups = runs_of(folder, lambda r: (r.config.batch_size, r.config.model.norm))
    lines = ["| batch_size | norm | train/loss, last 100 steps | val/loss | largest drift of deviations |",
             "|---|---|---|---|---|"]  # fmt: skip
    ends: dict[int, dict[str, tuple[float, list[float]]]] = defaultdict(dict)
    for (size, norm), runs in groups.items():
        train = mean(mean([r["train/loss"] for r in read_metrics(run.metrics_path) if "train/loss" in r][-10:])
                     for run in runs)  # fmt: skip
        ends[size][norm] = train, [final(run) for run in runs]
        measured = [m for run in runs for m in read_diagnostics(run.diagnostics_path) if m.quantity == "std_drift"]
        drifts = [m.value for m in measured if m.step == max(m.step for m in measured)]
        ahead = " (sees later tokens)" if runs[0].sees_later_tokens else ""
        lines.append(f"| {size} | {norm} | {train:.3f}{ahead} | {spread(ends[size][norm][1])} | "
                     f"{f'{max(drifts):.2f}' if drifts else '–'} |")  # fmt: skip
    return lines, lambda: gaps(ends)


def gaps(ends: Mapping[int, Mapping[str, tuple[float, Sequence[float]]]]) -> Figure:
    """Training and validation losses at the end, by batch size and norm."""
    new, panels = figure(*[1.7] * len(ends))
    for axes, (size, norms) in zip(panels, ends.items(), strict=True):
        rows = range(len(norms))
        for y, (train, losses) in enumerate(norms.values()):
            axes.plot([train, mean(losses)], [y, y], color=mpl.rcParams["axes.edgecolor"], linewidth=0.8)
            axes.errorbar(mean(losses), y, xerr=stdev(losses), fmt="o", color="C0", capsize=3,
                          label=None if y else "validation, mean ± sd")  # fmt: skip
            axes.plot(train, y, "o", color="C1", fillstyle="none", markersize=7, label=None if y else "training")
        axes.set_yticks(rows, list(norms))
        axes.set_ylim(len(norms) - 0.5, -0.5)
        axes.set_title(f"batch_size={size}")
    panels[-1].set_xlabel("loss after training (nats per token)")
    panels[0].legend(loc="lower right")
    return new


def arithmetic(folder: Path) -> Page:
    """The share of right answers, by how numbers and answers are written."""
    groups = runs_of(folder, lambda r: (r.config.task.zero_padding, r.config.task.reverse))
    names = {key: f"{'padded' if key[0] else 'not padded'}, {'reversed' if key[1] else 'plain'}" for key in groups}
    lines = ["| numbers, answer | right answers in 1,000, each seed | val/loss |", "|---|---|---|"]
    lines += [f"| {names[key]} | {' '.join(f'{1000 * (1 - wrong(r)):.0f}' for r in runs)} | "
              f"{spread(map(final, runs))} |" for key, runs in groups.items()]  # fmt: skip
    pairs = {f"{names[padded, False]} against reversed": (groups[padded, False], groups[padded, True])
             for padded in (True, False)}  # fmt: skip
    lines += ["", f"| wrong answers compared | {VERDICT_COLUMNS} |", "|---|---|---|---|"]
    lines += [f"| {name} | {verdict(found)} |"
              for name, found in zip(pairs, compared(list(pairs.values()), wrong), strict=True)]  # fmt: skip

    def draw() -> Figure:
        new, (axes,) = figure(3.2)
        for (padded, reverse), runs in groups.items():
            curves = [{r["step"]: r["val/exact_match"] for r in read_metrics(run.metrics_path)
                       if "val/exact_match" in r} for run in runs]  # fmt: skip
            means = {step: mean(curve[step] for curve in curves) for step in curves[0]}
            axes.plot(list(means), list(means.values()), color=f"C{int(padded)}", label=names[padded, reverse],
                      linestyle="-" if reverse else "--")  # fmt: skip
        axes.set(xlabel="step", ylabel="right answers", ylim=(0, 1.02))
        axes.set_title("Means of the seeds")
        axes.legend()
        return new

    return lines, draw


PUBLISHED = {
    "ladder-1-bigram": 2.5, "ladder-2-head": 2.4, "ladder-3-heads": 2.28, "ladder-4-feed-forward": 2.24,
    "ladder-5-blocks": 2.08, "ladder-6-layernorm": 2.06, "ladder-7-scaled": 1.48,
    "makemore-1-original": 2.1682, "makemore-2-softmax": 2.13, "makemore-3-tanh": 2.1027, "makemore-4-kaiming": 2.1070,
    "makemore-5-batchnorm": 2.1048,
}  # fmt: skip


def ladder(folder: Path) -> Page:
    """The validation loss of each rung of the lecture's ladder beside the published one."""
    return beside_published(folder, "rung")


def makemore(folder: Path) -> Page:
    """The validation loss of each step of the lecture on initial values beside the published one."""
    return beside_published(folder, "step")


def beside_published(folder: Path, what: str) -> Page:
    """The validation loss of each named run beside the published one."""
    groups = runs_of(folder, lambda r: r.config.name)
    lines = [f"| {what} | parameters | published | ours | difference | seconds of training |"]
    lines.append("|---|---|---|---|---|---|")
    for name, runs in groups.items():
        losses, results = [final(r) for r in runs], [r.result or {} for r in runs]
        lines.append(f"| {name.partition('-')[2]} | {results[0]['parameters']:,} | {PUBLISHED[name]} |"
                     f" {spread(losses)} | {mean(losses) - PUBLISHED[name]:+.3f} |"
                     f" {mean(r['seconds'] for r in results):.0f} |")  # fmt: skip

    names = [name.partition("-")[2] for name in groups]
    ours = [[final(r) for r in runs] for runs in groups.values()]
    return lines, lambda: rungs(names, [PUBLISHED[name] for name in groups], ours)


def rungs(names: Sequence[str], published: Sequence[float], ours: Sequence[Sequence[float]]) -> Figure:
    """Each rung's published loss, and ours over the seeds."""
    new, (axes,) = figure(2.4)
    rows = range(len(names))
    axes.plot(published, rows, "o", color="C1", markersize=11, fillstyle="none", label="published, an estimate")
    spreads = [stdev(losses) if len(losses) > 1 else 0.0 for losses in ours]
    axes.errorbar(list(map(mean, ours)), rows, xerr=spreads, fmt=".", color="C0", capsize=3, label="ours, mean ± sd")
    axes.set_yticks(rows, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(xlabel="val/loss (nats per token)")
    axes.legend(loc="lower right")
    return new


def fast(folder: Path) -> Page:
    """What each single change of the recipe of `fast_recipe` does, in the sweeps `fast_*` of a folder."""
    (recipe,) = runs_of(folder / "fast_recipe", lambda r: "").values()
    before = {run.config.seed: final(run) for run in recipe}
    rows = []
    for sweep in sorted(folder.glob("fast_*")):
        if sweep.name == "fast_recipe":
            continue
        for label, runs in runs_of(sweep, lambda r: _changes(recipe[0], r)).items():
            differences = [final(r) - before[r.config.seed] for r in runs]
            n = len(differences)
            half = float(student.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)
            rows.append((mean(differences), half, label, spread(map(final, runs))))
    rows.sort()
    lines = ["| change | val/loss | difference (95 %) |", "|---|---|---|", f"| none | {spread(before.values())} | |"]
    lines += [f"| `{label}` | {losses} | {d:+.4f} ± {half:.4f} |" for d, half, label, losses in rows]
    return lines, lambda: changes(rows)


def changes(rows: Sequence[tuple[float, float, str, str]]) -> Figure:
    """Changes of the recipe by what they do: difference, half the interval, label."""
    new, (axes,) = figure(0.9 + 0.24 * len(rows))
    shown = {y: row for y, row in enumerate(rows) if row[0] <= 0.2}
    axes.axvline(0, color=mpl.rcParams["axes.edgecolor"], linewidth=0.8)
    axes.errorbar([r[0] for r in shown.values()], list(shown), xerr=[r[1] for r in shown.values()], fmt="o", capsize=2)
    far = {y: row for y, row in enumerate(rows) if row[0] > 0.2}  # beyond the edge: the label says how far
    axes.plot([0.2] * len(far), list(far), ">", color="C0", clip_on=False)
    names = [label.replace("optimizer.learning_rate", "lr").replace("model.", "") for _, _, label, *_ in rows]
    axes.set_yticks(range(len(rows)), [f"{name}  (+{row[0]:.2f})" if row[0] > 0.2 else name
                                       for name, row in zip(names, rows, strict=True)])  # fmt: skip
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set(xlabel="val/loss minus that of fast_cpu\n(nats per token) ← better · worse →", xlim=(-0.1, 0.21))
    return new


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


AXES = ("model.n_layer", "model.n_embd", "model.block_size", "batch_size")


def scale(times: Path, peaks: Path) -> Page:
    """What a step costs and needs beside the fits, from the files of benchmarks.scaling and benchmarks.memory."""
    time, memory = (json.loads(path.read_text()) for path in (times, peaks))
    base, fit, held_fit = time["points"][0], time["fit"], memory["fit"]
    lines = ["| changed | GFLOP | ms per step | fitted | GFLOP/s | peak MiB | fitted |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    groups: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for row, held in zip(time["points"], memory["points"], strict=True):
        changed = next((key for key in AXES if row[key] != base[key]), "")
        size, taken, peak = row["gigaflop"], row["milliseconds"], held["MiB"]
        fitted = fit["step_ms"] + fit["layer_ms"] * row["model.n_layer"] + 1000 * size / fit["gflops"]
        expected = (held_fit["process_MiB"] + held_fit["state"] * held["state"]
                    + held_fit["activations"] * held["activations"])  # fmt: skip
        groups[changed.removeprefix("model.")].append((fitted, taken, expected, peak))
        label = f"`{changed}={row[changed]}`" if changed else "none"
        lines.append(f"| {label} | {size:.2f} | {taken:.1f} | {fitted:.1f} | {1000 * size / taken:.0f} | {peak:.0f} "
                     f"| {expected:.0f} |")  # fmt: skip
    return lines, lambda: fits(groups)


def fits(groups: dict[str, list[tuple[float, ...]]]) -> Figure:
    """Measured against fitted times and memory, by the setting that was changed."""
    new, panels = figure(3.0, 3.0)
    for label, points in groups.items():
        fitted_ms, ms, fitted_mib, mib = zip(*points, strict=True)
        panels[0].plot(fitted_ms, ms, "o", label=label or "none changed")
        panels[1].plot(fitted_mib, mib, "o", label=label or "none changed")
    of = {"ms per step": [10, 20, 50, 100, 200, 500], "peak memory (MiB)": [300, 400, 600, 800]}
    for axes, (what, ticks) in zip(panels, of.items(), strict=True):
        ends = axes.get_xlim()
        axes.plot(ends, ends, color=mpl.rcParams["axes.edgecolor"], linewidth=0.8, zorder=0, label="perfect fit")
        axes.set(xscale="log", yscale="log", xlabel=f"{what}, fitted", ylabel=f"{what}, measured")
        axes.minorticks_off()
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.set_yticks(ticks, list(map(str, ticks)))
    panels[0].legend()
    return new


def audit(norm: Path) -> Page:
    """How strongly each prediction depends on each token of its sequence, in a new model with this norm."""
    config = Config(model=GPTConfig(norm=norm.name))
    data = CharDataModule(config.data, config.task, block_size=config.model.block_size)
    model = build_model(config.sized(data.vocab_size), config.seed)
    probe = torch.from_numpy(data.val.rows(np.arange(4) * data.val.n_rows // 4).x)
    modes = {mode: measure(model, probe, training=mode == "train") for mode in ("train", "eval")}
    top = max(float(found.map.max()) for found in modes.values())

    def draw() -> Figure:
        new = Figure(figsize=(5.6, 2.9), layout="constrained")
        panels = new.subplots(1, 2, sharey=True)
        for axes, (mode, found) in zip(panels, modes.items(), strict=True):
            shown = np.ma.masked_equal(found.map.numpy(), 0)  # nothing is drawn where there is no influence at all
            image = axes.imshow(shown, norm="log", vmin=top * 1e-6, vmax=top, cmap="viridis")
            axes.grid(visible=False)
            axes.set(xlabel="token", title=f"{mode} mode")
        panels[0].set_ylabel("prediction")
        new.colorbar(image, ax=panels, shrink=0.8, label="|gradient|")
        return new

    lines = ["| mode | of the gradient, on later tokens | on other sequences |", "|---|---|---|"]
    lines += [f"| {mode} | {m.model.future:.2%} | {m.model.others:.2%} |" for mode, m in modes.items()]
    return lines, draw


PAGES: dict[str, Callable[..., Page]] = {
    f.__name__: f for f in (norms, audit, rmsnorm, heads, attention_scale, warmup, batchnorm, arithmetic, transfer,
                            tokenizers, features, makemore, ladder, fast, scale)
}

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in PAGES:
        sys.exit(str(__doc__))
    tables, draw_figure = PAGES[sys.argv[1]](*map(Path, sys.argv[2:]))
    print("\n".join(tables))
    save(draw_figure, sys.argv[1])
