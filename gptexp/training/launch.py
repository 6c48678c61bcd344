"""From a configuration to a trained run: claims its directory, or opens the one to resume, and trains it.

Lightning is imported only when it is needed, so that a mistake in the data or a taken directory is reported sooner.
"""

import logging
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gptexp.config.schema import Config
from gptexp.errors import GroupFailed, RunFailed, UserError, ending
from gptexp.runs.run import Run, code_fingerprint, unfinished

if TYPE_CHECKING:
    from gptexp.data.encoding import Reading
    from gptexp.processes.group import Processes
    from gptexp.training.callbacks.pruning import Watch


log = logging.getLogger("gptexp")

T = TypeVar("T")


def check_files(config: Config) -> "Reading | None":
    """Read the corpus of a new run; None if a run is to be resumed.

    Raises:
        UserError: when there is no such run, or the corpus cannot be read or cut into splits.
    """
    if config.resume not in (None, "auto"):
        Run.open(str(config.resume), key="resume")
        return None
    from gptexp.data.encoding import read_corpus

    reading = read_corpus(config.data, config.task)
    splits = reading.task.splits(reading.encoded, reading.data, config.model.block_size)
    for name, split in zip(("training", "validation"), splits, strict=True):
        if not split.n_tokens:
            raise UserError(f"task={reading.task.name}: has nothing to predict in the {name} split of "
                            f"data={reading.data.name}")  # fmt: skip
    return reading


def claim(
    config: Config, path: Path, name: str, group: str | None, command: list[str], named: bool = False,
    read: "Reading | None" = None,
) -> Run:  # fmt: skip
    """Check all that can be checked before training, and make a new run directory.

    Args:
        config: of the run.
        path: of the directory; if it is taken, a number is added to its name.
        name: of the run, for people to read.
        group: the name of its sweep, if it belongs to one.
        command: the command line.
        named: the user has named the directory, so it gets no other name.
        read: the corpus, if it was read before.

    Raises:
        UserError: for a mistake in the data, the hardware, a callback or a logger, or a directory that is taken.
    """
    reading = read or check_files(replace(config, resume=None))  # first: a mistake here leaves nothing behind
    assert reading is not None
    warmup = config.schedule.warmup_steps
    if config.max_steps is not None and warmup >= config.max_steps and not config.model.counted:
        log.warning("schedule.warmup_steps=%d is not below max_steps=%d: the learning rate stays under its peak",
                    warmup, config.max_steps)  # fmt: skip
    _check(config)
    source = _check_weights(config, reading)
    corpus, encoded = reading.corpus, reading.encoded
    info = {
        "name": name,
        "group": group,
        "variant": config.variant,
        "fingerprints": {"config": config.fingerprint(), "data": encoded.fingerprint, "code": code_fingerprint(config)},
        "data": {"corpus": corpus.name, "requested": corpus.requested, "path": str(corpus.path.absolute()),
                 "val_path": config.data.val_path and str(Path(config.data.val_path).expanduser().absolute()),
                 "sha256": corpus.sha256, "tokens": len(encoded.ids), "task": asdict(reading.task),
                 "questions": reading.task.questions(), "document_start": reading.task.document_start(reading.data),
                 "document_end": reading.task.document_end(reading.data)},
        "tokenizer": encoded.tokenizer.to_dict(),
        "command": command,
        **({"init_from": source} if source else {}),
    }  # fmt: skip
    return Run.claim(path, config, info, named, encoded.tokenizer.standard_file)


def _check_weights(config: Config, reading: "Reading") -> dict[str, Any] | None:
    """Refuse weights to start from that do not fit, and patterns of what to train that fit nothing.

    Returns:
        the lineage of the weights; None where they are new.
    """
    if config.init_from is None and config.trainable is None:
        return None
    from gptexp.models.settings import build_model
    from gptexp.training.transfer import freeze, initialize_from, lineage

    tokenizer = reading.encoded.tokenizer
    model = build_model(config.sized(tokenizer.vocab_size))
    freeze(model, config.trainable)
    if config.init_from is None:
        return None
    source = lineage(config.init_from)
    initialize_from(model, tokenizer, source)
    return source


def _check(config: Config) -> None:
    """Refuse hardware that is not there, and callbacks, loggers and Trainer arguments that Lightning would refuse."""
    from lightning.fabric.plugins.environments import LightningEnvironment

    from gptexp.processes.group import Processes, processes
    from gptexp.training.fit import make_trainer
    from gptexp.training.hardware import world_size
    from gptexp.training.objects import check_objects

    world_size(config, processes(config.hardware.cluster))
    check_objects(config)
    if any(v is not None for v in vars(config.trainer).values()):
        alone = replace(config, hardware=replace(config.hardware, strategy="auto"))
        make_trainer(alone, Processes(LightningEnvironment()), [], [], Path())


def gathered(config: Config) -> "Processes":
    """The processes of this command, once all of them are there.

    Raises:
        UserError: when they do not come, or Slurm has not started them.
    """
    from gptexp.processes.group import gather

    cluster = config.hardware.cluster
    if config.resume and config.resume != "auto":  # a run that Slurm's processes began needs them again
        with suppress(UserError):  # which is reported later
            cluster = Run.open(config.resume).config.hardware.cluster
    return gather(cluster, config.hardware.timeout)


def run_to_resume(config: Config, requested: Mapping[str, Any], key: str) -> Run | None:
    """The run to resume, or None where resume=auto finds none.

    Args:
        config: of the command.
        requested: the settings that the command names, which the run's may not contradict.
        key: what `config.resume` is.

    Raises:
        UserError: when there is no such run, it is done, its configuration differs, or it names classes of other
            packages that the command does not name again.
    """
    if key == "auto":
        run = unfinished(Path(config.output_dir), config.fingerprint())
        if run is None:
            log.info("resume=auto: no unfinished run of this configuration in %s; a new one begins", config.output_dir)
            return None
    else:
        run = Run.open(key, key="resume")
        extended = run.check_resumable(requested)
        if run.config.callbacks or run.config.logger:
            from gptexp.training.objects import check_trust  # imports Lightning

            check_trust(run.config, requested, f"resume={run.path}")
        run.extend(extended)
    log.info("resuming %s", run.path)
    return run


def start(run: Run, processes: "Processes", watch: "Watch | None" = None, quiet: bool = False) -> float:
    """Train a claimed run, or continue it, in these processes; if there is one alone, in one process per device.

    Returns:
        the lowest validation loss, in nats per token.

    Raises:
        RunFailed: for an error that is no mistake of the user's.
        GroupFailed: for any error, if torchrun or Slurm started several processes.
    """
    from gptexp.training.fit import fit
    from gptexp.training.hardware import world_size

    count = world_size(run.config, processes)
    if not processes.started and count > 1:
        from gptexp.training.workers import start_workers

        return start_workers(run, count, quiet)
    processes.broadcast({"run": str(run.path), "prunes": watch is not None})
    try:
        return fit(run, processes, watch, quiet)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # a sweep keeps the error: not with the model in its frames
        raise RunFailed(f"{type(error).__name__}: {error}; traceback in {run.log_path}") from error


def together(processes: "Processes", work: Callable[[], T]) -> T | None:
    """Do some work on rank 0, such as a sweep; all processes train the runs that it starts.

    Returns:
        what `work` returns; None on the other ranks.
    """
    return processes.lead(work, partial(_follow, processes))


def _follow(processes: "Processes", order: Mapping[str, Any]) -> None:
    from gptexp.training.fit import fit

    fit(Run.open(order["run"]), processes, (lambda *_: False) if order["prunes"] else None, quiet=True)


def job_together(processes: "Processes", work: Callable[[], T]) -> T | None:
    """As `together`, for a job that a launcher may have sent to several processes of Slurm's.

    Raises:
        RunFailed: when one of these failed; the sweep continues without them.
    """
    try:
        return together(processes, work)
    except (Exception, GroupFailed) as error:
        if processes.store is None or processes.leading:  # one process, or those of the whole sweep
            raise
        failed = error if isinstance(error, GroupFailed) else processes.fail(*ending(error))
        processes.leave()
        raise RunFailed(str(failed)) from error
