"""Weights & Biases without questions: online where an API key is configured, else offline. Imports no torch."""

import logging
import netrc
import os
import re
from collections.abc import Mapping
from contextlib import suppress
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
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False


def open_wandb(
    folder: Path, mode: str = "auto", settings: Mapping[str, Any] | None = None, patience: float = 60, **options: Any
) -> Any:
    """Begin a W&B run, offline where there is no key or no server.

    Args:
        folder: the run's files go to wandb/ in it.
        mode: "auto", "online" or "offline".
        settings: of `wandb.Settings`.
        patience: seconds that the end of the run waits for a server to take what is left; WANDB_FINISH_TIMEOUT goes
            first, as WANDB_INIT_TIMEOUT does at the start.
        options: of `wandb.init`, such as the project and the name.

    Returns:
        the `wandb.Run`.

    Raises:
        wandb.errors.UsageError: for options that W&B does not take.
    """
    wanted: Any = mode if mode != "auto" else os.environ.get("WANDB_MODE", "online")
    if wanted == "online" and not has_api_key():  # logging in would ask a question
        if "online" in (mode, os.environ.get("WANDB_MODE")):
            log.warning("W&B has no API key; the run is kept offline")
        wanted = "offline"
    if wanted == "offline":  # else W&B reports on itself, and waits for that where the network does not answer
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    chosen: dict[str, Any] = {
        "console": "off", "silent": True, "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT") or 30),
        "finish_timeout": float(os.environ.get("WANDB_FINISH_TIMEOUT") or patience), "finish_timeout_raises": True,
    }  # fmt: skip
    options |= {"reinit": "finish_previous", "dir": str(folder.absolute()),
                "resume": "allow",  # by which `wandb sync`, too, puts the parts of a resumed run together
                "settings": wandb.Settings(**chosen | dict(settings or {}))}  # fmt: skip
    run: Any = None
    if wanted != "offline":
        try:
            wandb.setup(wandb.Settings(silent=True))  # that it found a key is no news
            run = wandb.init(mode=wanted, **options)
        except wandb.errors.UsageError:
            raise
        except Exception as error:  # an unreachable server must not cost a run
            log.warning("W&B cannot be reached (%s); the run is kept offline", str(error).split("\n")[0])
            _end_service()  # which takes the run's id for used
    if run is None:
        try:
            run = wandb.init(mode="offline", **options)
        except ConnectionError:  # W&B's process has been killed since the last run
            _end_service()
            run = wandb.init(mode="offline", **options)
    if run.offline:
        log.info("W&B: offline; upload it later with: wandb sync %s", _folder(run, folder))
    elif not run.disabled:
        log.info("W&B: %s", run.url)
    return run


def close_wandb(run: Any, succeeded: bool) -> None:
    """End a W&B run, once everything is where it belongs or the server has had time enough.

    What is left then stays on the disk. W&B shows the run as finished or as failed.
    """
    try:
        run.finish(exit_code=0 if succeeded else 1)
    except ConnectionError:
        log.warning("W&B's process has ended; upload what it has written with: wandb sync %s", _folder(run))
        _end_service()
    except TimeoutError:
        log.warning("W&B has not taken everything in time; upload the rest with: wandb sync %s", _folder(run))
    except Exception as error:
        log.warning("W&B: %s", str(error).split("\n")[0])


def _end_service() -> None:
    """Let go of W&B's own process, so that the next run gets another."""
    import wandb

    with suppress(Exception):  # it may be gone already
        wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)  # that of the program which began this one


def _folder(run: Any, parent: Path | None = None) -> Path:
    """A W&B run's files, which `wandb sync` uploads; below `parent`, as that is written, if it is given."""
    folder = Path(run.dir).parent
    return parent / "wandb" / folder.name if parent else folder


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
    settings = next((entry for entry in loggers.values() if entry["_target_"].endswith(".WandbLogger")), {})
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
