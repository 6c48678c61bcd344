"""Weights & Biases without questions: online where an API key is configured, else offline. Imports no torch."""

import logging
import math
import netrc
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

if TYPE_CHECKING:
    from gptexp.analysis.study import Study

log = logging.getLogger("gptexp")


def has_api_key() -> bool:
    """Whether W&B can log in without asking: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in places:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def open_wandb(folder: Path, mode: str = "auto", **options: Any) -> Any:
    """Begin a W&B run, offline where there is no key or no server.

    Args:
        folder: the run's files go to wandb/ in it.
        mode: "auto", "online" or "offline".
        options: of `wandb.init`, such as the project and the name.

    Returns:
        the `wandb.Run`.
    """
    wanted: Any = mode if mode != "auto" else os.environ.get("WANDB_MODE", "online")
    if wanted == "online" and not has_api_key():  # logging in would ask a question
        if "online" in (mode, os.environ.get("WANDB_MODE")):
            log.warning("W&B has no API key; the run is kept offline")
        wanted = "offline"
    if wanted == "offline":  # else W&B reports on itself, and waits for that where the network does not answer
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    patience = float(os.environ.get("WANDB_INIT_TIMEOUT") or 30)  # seconds
    options |= {
        "reinit": "finish_previous", "dir": str(folder.absolute()),
        "settings": wandb.Settings(console="off", silent=True, init_timeout=patience),
    }  # fmt: skip
    resume: dict[str, Any] = {} if wanted == "offline" else {"resume": "allow"}
    try:
        run = wandb.init(mode=wanted, **options, **resume)
    except Exception as error:  # an unreachable server must not cost a run
        log.warning("W&B cannot be reached (%s); the run is kept offline", str(error).split("\n")[0])
        wandb.teardown()  # else W&B's own process takes the run's id for used,
        os.environ.pop("WANDB_SERVICE", None)  # as does that of the program which began this one
        run = wandb.init(mode="offline", **options)
    if run.offline:
        log.info("W&B: offline; upload it later with: wandb sync %s", folder / "wandb" / Path(run.dir).parent.name)
    elif not run.disabled:
        log.info("W&B: %s", run.url)
    return run


def log_comparison(study: "Study", page: Path, title: str, command: str) -> None:
    """Log a report to a W&B run of its own: page, figures and tables, to look at and as an artifact.

    The run goes where the compared runs have gone: into the first one's project, and into the group of their sweep.

    Args:
        study: what was compared.
        page: report.html; the figures and tables lie beside it.
        title: of the page.
        command: that repeats the comparison.
    """
    import wandb

    from gptexp.analysis.conclusion import headline
    from gptexp.analysis.tables import comparisons_table, variants_table
    from gptexp.runs import Run

    loggers = Run(study.records[0].path).config.logger if study.records else {}
    settings = loggers.get("wandb", {})
    groups = {record.info.get("group") for record in study.records}
    group = settings.get("group") or (groups.pop() if len(groups) == 1 else None) or title
    config = {"command": command, "baseline": study.baseline, "metric": study.metric, "delta": study.delta,
              "alpha": study.alpha}  # fmt: skip
    run = open_wandb(
        page.parent, settings.get("mode", "auto"), project=settings.get("project", "gptexp"),
        entity=settings.get("entity"), name=f"{group} comparison"[-128:], group=group[:128], job_type="compare",
        config=config,
    )  # fmt: skip
    verdict = " ".join(headline(study))
    tables = {"variants": variants_table(study), "comparisons": comparisons_table(study)}
    figures = sorted((page.parent / "figures").glob("*.png"))
    run.log({
        "report": wandb.Html(page, inject=False),
        **{name: wandb.Table(list(table), _cells(table)) for name, table in tables.items() if len(table)},
        **{f"figures/{path.stem}": wandb.Image(str(path)) for path in figures},
    })  # fmt: skip
    label = re.sub(r"[^\w.-]+", "_", f"{group}-report", flags=re.ASCII)[-128:]  # as W&B takes it
    artifact = wandb.Artifact(label, type="report", description=verdict)
    for path in (page, *page.parent.glob("figures/*"), *page.parent.glob("tables/*")):
        artifact.add_file(str(path), path.relative_to(page.parent).as_posix())
    run.log_artifact(artifact)
    best = next((variant.label for variant in study.ranked()), None)
    run.summary.update({"headline": verdict, "best_variant": best, "runs": len(study.records)})
    run.finish(exit_code=0)


def _cells(table: Any) -> list[list[Any]]:
    """The rows of a data frame, None where there is no number."""
    rows = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    return [[None if isinstance(x, float) and not math.isfinite(x) else x for x in row] for row in rows]
