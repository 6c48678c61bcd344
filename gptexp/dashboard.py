"""A W&B workspace that compares variants: `python -m gptexp.dashboard [key=value ...]`.

Makes a saved view in a W&B project: losses over steps, tokens and time, variants side by side, speed, training,
measurements of the layers, samples. Runs are grouped by sweep and variant, so that a line is a mean over seeds.

    python -m gptexp.dashboard entity=TEAM
    python -m gptexp.dashboard spec=dashboard.json

settings (key=value):
  project=gptexp   the W&B project
  entity=NAME      the user or team that owns it; the account's default otherwise
  name=gptexp      the name of the view
  spec=FILE        write the view's specification to a JSON file instead; needs no account and no network
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptexp.errors import UserError
from gptexp.processes.console import run_command

log = logging.getLogger("gptexp")

STEP = "trainer/global_step"  # optimizer steps, as Lightning names them in W&B
LOWEST = "val/loss.min"  # the lowest validation loss, as W&B's summary names it
RATE = "optimizer.learning_rate"


@dataclass(frozen=True)
class DashboardConfig:
    """Settings of the command; see the module's text."""

    project: str = "gptexp"
    entity: str | None = None
    name: str = "gptexp"
    spec: str | None = None


def main() -> None:
    """The command line."""
    run_command(__doc__, dashboard)


def dashboard(arguments: Sequence[str]) -> None:
    """Save the workspace that a command line asks for, in W&B or as a file.

    Raises:
        UserError: with a line for every mistake, or when the file cannot be written.
    """
    from gptexp.config.settings import read, read_arguments
    from gptexp.loggers.wandb_run import has_api_key
    from gptexp.runs.run import write_atomically

    problems: list[str] = []
    values = read_arguments(arguments, problems)
    config: DashboardConfig | None = read(DashboardConfig, "", values, problems)
    if find_spec("wandb_workspaces") is None:
        problems.append("wandb-workspaces is not installed; pip install 'gptexp[dashboard]'")
    if not values.get("spec") and not has_api_key():
        problems.append("W&B has no API key; run wandb login, or write the specification to a file with spec=FILE")
    if problems or config is None:
        raise UserError(problems)
    view = workspace(config)
    if config.spec is None:
        log.info("workspace: %s", view.save().url)
        return
    try:
        write_atomically(Path(config.spec), (json.dumps(specification(view), indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"spec={config.spec}: cannot be written ({error.strerror})") from error
    log.info("specification: %s", config.spec)


def specification(value: Any) -> Any:
    """A workspace, or a part of one, as plain data: the arguments of wandb-workspaces' classes, by name."""
    if is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in fields(value) if not f.name.startswith("_")}
        return {"type": type(value).__name__, **{k: specification(v) for k, v in given.items() if v is not None}}
    return [specification(v) for v in value] if isinstance(value, list | tuple) else value


def workspace(config: DashboardConfig) -> Any:
    """The workspace, as an object of wandb-workspaces; its `save` sends it.

    Raises:
        UserError: when W&B does not allow the name.
    """
    import wandb
    from pydantic import ValidationError
    from wandb_workspaces import workspaces as ws

    from gptexp.analysis.factors import naming

    entity = config.entity or ("" if config.spec else wandb.Api().default_entity)
    panels = sections(naming())
    try:
        return ws.Workspace(
            entity=entity, project=config.project, name=config.name,
            sections=[ws.Section(name, panels=content, is_open=True) for name, content in panels.items()],
            settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=50),
            runset_settings=ws.RunsetSettings(
                filters=ws.And(ws.Metric("JobType") != "compare"),
                groupby=[ws.Metric("Group"), *map(ws.Config, naming())],
                order=[ws.Ordering(ws.Summary(LOWEST), ascending=True)],
                pinned_columns=[f"summary:{LOWEST}", "summary:tokens_per_second"],
            ),
        )  # fmt: skip
    except ValidationError as error:
        raise UserError(f"name={config.name}: {error.errors()[0]['msg']}") from error


def sections(factors: Sequence[str]) -> dict[str, list[Any]]:
    """The panels by section, for variants that differ in these settings. Lines are a group's means, with its range."""
    from wandb_workspaces.reports import v2 as wr

    from gptexp.analysis.plots import UNITS

    means = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}

    def line(y: str, x: str = STEP, **more: Any) -> Any:
        return wr.LinePlot(title=f"{y} by {'step' if x == STEP else x}", x=x, y=[y], **means, **more)

    def column(key: str, log: bool = False) -> Any:
        return wr.ParallelCoordinatesPlotColumn(wr.Config(key), display_name=key, log=log)

    lowest = wr.SummaryMetric(LOWEST)
    last = wr.ParallelCoordinatesPlotColumn(lowest, display_name="lowest val/loss", inverted=True)
    return {
        "loss": [*(line("val/loss", x) for x in (STEP, "tokens", "seconds")),
                 *map(line, ("train/loss", "val/bpc", "val/accuracy"))],
        "variants": [
            *(wr.BarPlot(title=f"lowest val/loss by {factor}", metrics=[LOWEST], groupby=wr.Config(factor), **means)
              for factor in factors),
            wr.ScatterPlot(title="learning rate and lowest val/loss", x=wr.Config(RATE), y=lowest, log_x=True),
            wr.ParallelCoordinatesPlot(title="settings and lowest val/loss",
                                       columns=[*map(column, factors), column(RATE, log=True), last]),
        ],
        "speed": [line("tokens_per_second"), line("mfu"), line("tokens", "seconds")],
        "training": [line("grad_norm", log_y=True), line("learning_rate")],
        "diagnostics": [wr.LinePlot(title=f"{quantity} ({unit})", x=STEP, metric_regex=f"diagnostics/{quantity}/.*")
                        for quantity, unit in UNITS.items()],
        "samples": [wr.WeavePanelSummaryTable(table_name="samples", layout=wr.Layout(w=24, h=12))],
    }  # fmt: skip


if __name__ == "__main__":
    main()
