"""Train a GPT: `python -m gptexp.train [group=choice | key=value ...]`.

    python -m gptexp.train norm=rmsnorm heads=h8
    python -m gptexp.train -m norm=layernorm,rmsnorm seed=1,2,3
    python -m gptexp.train resume=outputs/runs/NAME
"""

import json
import logging
import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gptexp.console import report_errors
from gptexp.errors import Interrupted, RunFailed, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from gptexp.config import Config
    from gptexp.runs import Run

log = logging.getLogger("gptexp")


def main() -> None:
    """The command line: checks it whole, then hands it to Hydra, which calls `job` once or once for each variant."""
    with report_errors():
        from hydra import main as hydra_main
        from hydra._internal.utils import get_args_parser

        from gptexp.overrides import VERSION_BASE, check, conf_dir, parse, register_norms

        register_norms()
        flags = [a for a in sys.argv[1:] if a in ("-m", "--multirun")]  # argparse wants flags before all settings
        sys.argv[1:] = flags + [a for a in sys.argv[1:] if a not in flags]
        args = get_args_parser().parse_args()
        # Shown by Hydra itself: help, a printed configuration, completion.
        runs = not (args.help or args.hydra_help or args.cfg or args.info or args.shell_completion)
        if runs:
            problems = check(args.overrides, args.multirun, args.config_dir)
            if problems:
                raise UserError(problems)
        if args.multirun:
            # Only what varies belongs in a job's name.
            fixed = [o.key_or_group for o in parse(args.overrides)[0] if not o.is_sweep_override()]
            sys.argv.append(f"hydra.job.config.override_dirname.exclude_keys={json.dumps(fixed)}")
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach report_errors, which shows one line
        hydra_main(config_path=conf_dir(), config_name="config", version_base=VERSION_BASE)(job)()
        if args.multirun and _jobs:
            log.info("%s", summary(_jobs))
            draw_sweep(_jobs)
        failures = [job.error for job in _jobs if job.error]
        if len(failures) > 1:
            raise RunFailed(f"{len(failures)} of {len(_jobs)} jobs failed")
        if failures:
            raise failures[0]


def job(tree: "DictConfig") -> float:
    """One run of a composed configuration, in a directory of its own or in the one it resumes.

    Returns:
        the lowest validation loss, in nats a token.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from gptexp.config import plain, read_config

    hydra = HydraConfig.get()
    sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
    name = str(hydra.job.override_dirname)
    try:
        config = read_config(plain(tree))
        name = config.name or config.variant
        if sweep is not None:
            name = job_name(config, hydra.job.override_dirname)
            log.info("--- job %s: %s", hydra.job.num, name)
        if config.resume:
            loss = resume(config, list(hydra.overrides.task))
        elif sweep is not None:
            loss = train(config, sweep / name, name, sweep.name)
        elif hydra.run.dir != ".":  # the user named the directory, and Hydra has just made it
            with suppress(OSError):
                Path(hydra.run.dir).rmdir()
            loss = train(config, Path(hydra.run.dir), name)
        else:
            loss = train(config, single_run(config), name)
        _jobs.append(Job(name, loss, folder=sweep))
        return loss
    except Exception as error:
        if not hydra.launcher._target_.endswith("BasicLauncher"):
            raise  # the job runs elsewhere, and only an exception tells the launcher of its failure
        if sweep is not None:
            log.error("job %s failed: %s", name, error)
        _jobs.append(Job(name, error=error))
        return float("nan")


@dataclass(frozen=True)
class Job:
    """How a job of this process ended.

    Attributes:
        name: the run's name.
        loss: its lowest validation loss; nan if it failed or diverged.
        error: what ended it early, or None.
        folder: of its sweep, or None.
    """

    name: str
    loss: float = math.nan
    error: Exception | None = None
    folder: Path | None = None


_jobs: list[Job] = []  # a job that fails does not stop those after it


def train(config: "Config", path: Path, name: str, group: str | None = None) -> float:
    """Train a configuration in a new run directory.

    Args:
        config: every setting.
        path: the directory; a number is added to its name if it is taken.
        name: the run's readable name.
        group: the sweep that the run belongs to.

    Returns:
        the lowest validation loss, in nats a token.
    """
    from gptexp.data.batches import split_corpus
    from gptexp.data.corpora import find_corpus
    from gptexp.data.encoded import encode_corpus
    from gptexp.runs import Run, code_fingerprint

    corpus = find_corpus(config.data)  # before the directory is made: a mistake here leaves nothing behind
    encoded = encode_corpus(corpus, config.data)
    split_corpus(encoded, config.data, config.model.block_size)
    warmup = config.schedule.warmup_steps
    if warmup >= config.max_steps:
        log.warning("schedule.warmup_steps=%d is not below max_steps=%d: the learning rate stays under its peak",
                    warmup, config.max_steps)  # fmt: skip
    info = {
        "name": name,
        "variant": config.variant,
        "fingerprints": {
            "config": config.fingerprint(),
            "data": encoded.fingerprint,
            "code": code_fingerprint(),
        },
        "data": {"corpus": corpus.name, "requested": corpus.requested, "path": str(corpus.path.absolute()),
                 "sha256": corpus.sha256, "tokens": len(encoded.ids), "documents": encoded.documents},
        "tokenizer": encoded.tokenizer.to_dict(),
        "command": sys.argv,
    }  # fmt: skip
    return start(Run.claim(path, config, info), group)


def resume(config: "Config", overrides: list[str]) -> float:
    """Go on with the run that `config.resume` names; see `Run.check_resumable`."""
    from gptexp.overrides import requested
    from gptexp.runs import Run, unfinished

    if config.resume == "auto":
        folder = Path(config.output_dir)
        found = unfinished(folder, config.fingerprint())
        if found is None:
            log.info("resume=auto: no unfinished run of this configuration in %s; starting a new one", folder)
            return train(config, single_run(config), config.name or config.variant)
        run = found
    else:
        run = Run.open(str(config.resume), key="resume")
        run.check_resumable(requested([o for o in overrides if not o.startswith("resume=")]))
    log.info("resuming %s", run.path)
    return start(run, run.info.get("group"))


def start(run: "Run", group: str | None) -> float:
    """Train a claimed run in this process, or in one process a device."""
    run.update(group=group)
    config = run.config
    if config.hardware.strategy == "auto":
        from gptexp.training.fit import fit

        try:
            return fit(run, group)
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise RunFailed(f"{type(error).__name__}: {error}; traceback in {run.log_path}") from error
    from gptexp.training.hardware import device_count
    from gptexp.training.worker import launch

    code = launch(run, device_count(config), group)
    if run.info["status"] == "interrupted":
        raise Interrupted(code - 128 if code > 128 else 15)
    result = run.result
    if code or result is None:
        run.finish("failed")
        raise RunFailed(f"a process ended with status {code}; see {run.log_path}")
    return float("nan") if result["best_val_loss"] is None else float(result["best_val_loss"])


def single_run(config: "Config") -> Path:
    """The directory of a run that belongs to no sweep: the time and the name."""
    return Path(config.output_dir) / "runs" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{config.name or config.variant}"


def summary(jobs: list[Job]) -> str:
    """The jobs of a multirun with their lowest validation loss, best first; failed ones last."""
    ended = sorted(jobs, key=lambda j: (j.error is not None, math.inf if math.isnan(j.loss) else j.loss))
    words = ["failed" if j.error else "diverged" if math.isnan(j.loss) else f"{j.loss:.4f}" for j in ended]
    lines = [f"  {word:>8}  {job.name}" for word, job in zip(words, ended, strict=True)]
    return "\n".join([f"--- {len(jobs)} jobs, best val/loss first", *lines])


def draw_sweep(jobs: list[Job]) -> None:
    """Draw the validation loss of a multirun's jobs into its folder."""
    from gptexp.analysis.plots import plot_runs
    from gptexp.runs import Run, read_metrics

    for folder in {job.folder for job in jobs if job.folder}:
        runs = [Run(path) for path in sorted(folder.iterdir()) if Run(path).metrics_path.exists()]
        plot_runs({run.path.name: read_metrics(run.metrics_path) for run in runs}, folder / "curves.png")
        log.info("picture: %s", folder / "curves.png")


def job_name(config: "Config", swept: str) -> str:
    """A sweep's directory for one job: the variant, and whatever else the sweep varies.

    Args:
        config: the job's configuration.
        swept: Hydra's override_dirname, such as `model.norm=rmsnorm,optimizer.learning_rate=0.001`.
    """
    shown = {"norm", "model.norm", "placement", "model.placement", "heads", "model.n_head", "seed"}
    pairs = [pair.partition("=") for pair in swept.split(",") if pair]
    extra = [f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs if key not in shown]
    return "-".join([config.name or config.variant, *extra]).replace("/", "_")


if __name__ == "__main__":
    main()
