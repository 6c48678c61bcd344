"""A comparison as a W&B run of its own."""

import re
from pathlib import Path
from typing import Any

import wandb

from gptexp.analysis.study import Study
from gptexp.analysis.summary import headline
from gptexp.analysis.tables import comparisons_table, variants_table
from gptexp.loggers.wandb_run import close_wandb, open_wandb
from gptexp.runs.run import Run


def log_comparison(study: Study, page: Path, title: str, command: str) -> None:
    """Log a report to a W&B run of its own: page, figures and tables, to look at and as an artifact.

    The run goes into the first compared run's project, and into the group of their sweep.

    Args:
        study: what was compared.
        page: report.html; the figures and tables are beside it.
        title: of the page.
        command: repeats the comparison.
    """
    loggers: dict[str, Any] = Run(study.records[0].path).config.logger if study.records else {}
    own = (entry for entry in loggers.values() if entry["_target_"].endswith(".WandbLogger"))
    settings: dict[str, Any] = next(own, {})
    groups = {record.info.get("group") for record in study.records}
    group = settings.get("group") or (groups.pop() if len(groups) == 1 else None) or title
    config = {"command": command, "baseline": study.baseline, "metric": study.metric, "delta": study.delta,
              "alpha": study.alpha}  # fmt: skip
    mode = settings.get("mode", "offline" if settings.get("offline") else "auto")
    run = open_wandb(
        page.parent, mode, project=settings.get("project", "gptexp"), entity=settings.get("entity"),
        name=f"{group} comparison"[-128:], group=group[:128], job_type="compare", config=config,
    )  # fmt: skip
    verdict = " ".join(headline(study))
    tables = {"variants": variants_table(study), "comparisons": comparisons_table(study)}
    cells = {name: table.astype(object).where(table.notna(), None) for name, table in tables.items() if len(table)}
    figures = sorted((page.parent / "figures").glob("*.png"))
    run.log({
        "report": wandb.Html(page, inject=False),
        **{name: wandb.Table(list(table), table.to_numpy().tolist()) for name, table in cells.items()},
        **{f"figures/{path.stem}": wandb.Image(str(path)) for path in figures},
    })  # fmt: skip
    label = re.sub(r"[^\w.-]+", "_", f"{group}-report", flags=re.ASCII)[-128:]  # as W&B takes it
    artifact = wandb.Artifact(label, type="report", description=verdict)
    for path in (page, *page.parent.glob("figures/*"), *page.parent.glob("tables/*")):
        artifact.add_file(str(path), path.relative_to(page.parent).as_posix())
    run.log_artifact(artifact)
    best = next((variant.label for variant in study.ranked()), None)
    run.summary.update({"headline": verdict, "best_variant": best, "runs": len(study.records)})
    close_wandb(run, succeeded=True)
