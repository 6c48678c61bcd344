"""The figure of what was measured inside the layers of a study's variants."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gptexp.analysis.plots import UNITS
from gptexp.analysis.study import Variant
from gptexp.runs.files import Measurement, read_diagnostics
from gptexp.runs.run import Run


def last_diagnostics(variants: Sequence[Variant]) -> pd.DataFrame:
    """The last measurement of every layer, mean over the seeds: variant, quantity, layer, value."""
    measured = [pd.DataFrame(columns=["variant", *Measurement._fields]).astype({"value": float})]
    for variant, record in ((v, r) for v in variants for r in v.runs.values()):
        with suppress(OSError, ValueError):  # the comparison stands without it
            rows = pd.DataFrame(read_diagnostics(Run(record.path).diagnostics_path), columns=Measurement._fields)
            measured.append(rows[rows["step"] == rows["step"].max()].assign(variant=variant.label))
    keys = ["variant", "quantity", "layer"]
    return pd.concat(measured).groupby(keys, sort=False, as_index=False)["value"].mean()


def layer_kind(name: str) -> tuple[str, int]:
    """A layer's kind, by which figures line up variants whose norms are at other places, and its block; -1 for none."""
    found = re.match(r"blocks\.(\d+)(?:\.(.*))?", name)
    if not found:
        return "embedding, head, final norm", -1
    part = found[2] or "block"
    for start, kind in (("residual1", "norm of attention"), ("residual2", "norm of feed-forward"),
                        ("attn.", "norm of heads"), ("attn", "attention"), ("mlp", "feed-forward")):
        if part.startswith(start):
            return kind, int(found[1])
    return part, int(found[1])


def diagnostics(measured: pd.DataFrame, style: Mapping[str, Mapping[str, Any]], width: float) -> Figure:
    """What was measured in each layer at the end of training, by block.

    A panel for each quantity and kind of layer, a line for each variant; layers outside the blocks are dots.

    Args:
        measured: see `last_diagnostics`.
        style: color and dashes of each variant.
        width: of the figure, in inches.
    """
    kinds = measured["layer"].map(layer_kind)
    table = measured.assign(kind=kinds.str[0], block=kinds.str[1])
    panels = [(q, kind) for q in UNITS for kind in table.loc[table["quantity"] == q, "kind"].drop_duplicates()]
    columns = 2 if len(panels) > 1 else 1
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(width, 0.5 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (quantity, kind) in zip(grid, panels, strict=False):
        part = table[(table["quantity"] == quantity) & (table["kind"] == kind)]
        names = list(part["layer"].drop_duplicates())
        for label, values in part.groupby("variant", sort=False):
            if (values["block"] < 0).all():
                axes.plot([names.index(name) for name in values["layer"]], values["value"], "o", markersize=4,
                          color=style[str(label)]["color"])  # fmt: skip
            else:
                means = values.groupby("block")["value"].mean()
                axes.plot(means.index, means, marker=".", linewidth=1, **style[str(label)])
        if (part["block"] < 0).all():
            axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
            axes.margins(x=0.3)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if 0 < 20 * part["value"].min() < part["value"].max():
            axes.set_yscale("log")
        axes.set_title(f"{quantity}\n{kind}", fontsize=10)
        axes.set_ylabel(UNITS[quantity], fontsize=9.6)
        axes.tick_params(labelsize=9.6)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    names = list(measured["variant"].unique())
    figure.legend([figure.axes[0].plot([], [], marker=".", **style[name])[0] for name in names], names,
                  loc="outside lower left", ncols=2, handlelength=2.6)  # fmt: skip
    return figure
