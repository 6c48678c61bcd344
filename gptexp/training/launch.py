"""From a configuration to a trained run: claims its directory, or opens the one to go on with, and trains it.

Nothing here imports torch before it is needed: a mistake in the data or a directory that is taken is told sooner.
"""

import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptexp import perf
from gptexp.config import Config, flatten
from gptexp.console import silenced
from gptexp.errors import GroupFailed, Interrupted, RunFailed, UserError
from gptexp.orphans import end_with_parent
from gptexp.runs import Run, code_fingerprint, unfinished
from gptexp.training.ranks import several
from gptexp.training.settings import HardwareConfig

if TYPE_CHECKING:
    from gptexp.data.corpora import Corpus
    from gptexp.data.encoded import Encoded
    from gptexp.training.callbacks.pruning import Watch
    from gptexp.training.processes import Processes

    Read = tuple[Corpus, Encoded]

log = logging.getLogger("gptexp")

Train = Callable[[Run], float]
"""Trains a run directory to its end; returns the lowest validation loss, in nats per token."""


def check_files(config: Config) -> "Read | None":
    """Refuse a run to resume that is not there, or a corpus that cannot be had or cut into splits.

    Returns:
        what was read of a new run's corpus.

    Raises:
        UserError: for either.
    """
    if config.resume in (None, "auto"):
        return _read_corpus(config)
    Run.open(str(config.resume), key="resume")
    return None


def _read_corpus(config: Config) -> "Read":
    from gptexp.data.batches import split_corpus
    from gptexp.data.corpora import find_corpus
    from gptexp.data.encoded import encode_corpus

    corpus = find_corpus(config.data)
    encoded = encode_corpus(corpus, config.data)
    split_corpus(encoded, config.data, config.model.block_size)
    return corpus, encoded


def claim(
    config: Config, path: Path, name: str, group: str | None, command: list[str], named: bool = False,
    read: "Read | None" = None,
) -> Run:  # fmt: skip
    """A new run directory, once everything that can be checked before training is right.

    The run gets a readable name, the group of its sweep and the command line. If the directory is taken, a number is
    added to its name, unless the user has named it. A corpus that was read before is not looked for again.

    Raises:
        UserError: for a mistake in the data, the hardware, a callback or a logger, or a directory that is taken.
    """
    corpus, encoded = read or _read_corpus(config)  # before the directory is made: a mistake here leaves nothing behind
    warmup = config.schedule.warmup_steps
    if warmup >= config.max_steps:
        log.warning("schedule.warmup_steps=%d is not below max_steps=%d: the learning rate stays under its peak",
                    warmup, config.max_steps)  # fmt: skip
    check(config)
    info = {
        "name": name,
        "group": group,
        "variant": config.variant,
        "fingerprints": {"config": config.fingerprint(), "data": encoded.fingerprint, "code": code_fingerprint(config)},
        "data": {"corpus": corpus.name, "requested": corpus.requested, "path": str(corpus.path.absolute()),
                 "sha256": corpus.sha256, "tokens": len(encoded.ids), "documents": encoded.documents},
        "tokenizer": encoded.tokenizer.to_dict(),
        "command": command,
    }  # fmt: skip
    return Run.claim(path, config, info, named)


def check(config: Config) -> None:
    """Refuse hardware that is not there, and callbacks, loggers and Trainer arguments that Lightning would refuse.

    Raises:
        UserError: with a line for every mistake.
    """
    from dataclasses import replace

    from lightning.fabric.plugins.environments import LightningEnvironment

    from gptexp.training.fit import make_trainer
    from gptexp.training.hardware import world_size
    from gptexp.training.objects import check_objects
    from gptexp.training.processes import Processes, processes

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
    cluster = config.hardware.cluster
    if config.resume and config.resume != "auto":  # a run that Slurm's processes began needs them again
        with suppress(UserError):  # which is told later
            cluster = Run.open(config.resume).config.hardware.cluster
    return _gather(cluster, config.hardware.timeout)


def _gather(cluster: str, timeout: float) -> "Processes":
    perf.prepare()  # before torch is imported
    from gptexp.training.processes import meet, processes

    group = processes(cluster)
    meet(group, timeout)
    if group.started:
        end_with_parent()
    return group


def run_to_resume(config: Config, requested: Mapping[str, Any], key: str) -> Run | None:
    """The run that `config.resume` names, as `key`, or None where resume=auto finds none.

    It may not contradict the settings that the command names, `requested`.

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


def train_together(
    processes: "Processes", lead: Callable[[Train], float | None], watch: "Watch | None" = None, quiet: bool = False
) -> float | None:
    """Let the first process find or make a run, and train it with all of them, which have met.

    Args:
        processes: of this command, this one among them.
        lead: called in the first process; gets the function that trains, and calls it with a run at most once.
        watch: see `fit`.
        quiet: show no progress.

    Returns:
        what `lead` returns; None on the other processes.
    """
    return processes.lead(lambda: lead(lambda run: start(run, processes, watch, quiet)), partial(follow, processes))


def follow(processes: "Processes", told: Mapping[str, Any]) -> None:
    """What a process does that is told to train a run with the first one."""
    from gptexp.training.fit import fit

    fit(Run.open(told["run"]), processes, (lambda *_: False) if told["prunes"] else None, quiet=True)


def job_together(
    processes: "Processes", lead: Callable[[Train], float | None], watch: "Watch | None" = None
) -> float | None:
    """`train_together` for a job of a sweep, which a launcher may have sent to several processes of Slurm's.

    Raises:
        RunFailed: when one of these failed; what called this goes on without them.
    """
    try:
        return train_together(processes, lead, watch, quiet=True)
    except (Exception, GroupFailed) as error:
        if processes.store is None or processes.leading:  # one process, or those of the whole sweep
            raise
        if not isinstance(error, GroupFailed):
            problems = error.problems if isinstance(error, UserError) else [str(error)]
            error = processes.fail(2 if isinstance(error, UserError) else 1, problems)
        processes.part()
        raise RunFailed(str(error)) from error


def sweep_together(
    config: Mapping[str, Any], overrides: Mapping[str, str], local: bool, work: Callable[[], list[float]]
) -> list[float]:
    """Let the first of the processes of this command work through a sweep, and all of them train its jobs.

    Args:
        config: what the jobs share, as plain settings.
        overrides: of the command line, values by key.
        local: whether the jobs run in this process, rather than where a launcher sends them.
        work: the sweep.

    Returns:
        what `work` returns; nothing on the other processes.

    Raises:
        UserError: when the processes were given different commands, or a launcher that starts more of them.
    """
    hardware = config["hardware"]
    cluster = hardware.get("cluster") if local else "auto"
    if not several() and cluster != "slurm":
        return work()
    if not local:
        raise UserError("hydra/launcher: torchrun or srun has started several processes, which train one job at a "
                        "time; leave it out, or start the command once")  # fmt: skip
    group = _gather(cluster, hardware.get("timeout", HardwareConfig.timeout))
    group.check_same(flatten(config) | {"sweep.name": None} | dict(overrides))  # the name is made of the overrides
    return group.lead(work, partial(follow, group)) or []


def start(run: Run, processes: "Processes", watch: "Watch | None" = None, quiet: bool = False) -> float:
    """Train a claimed run, or go on with it, in these processes or, where they are one, in one per device.

    Returns:
        the lowest validation loss, in nats per token.

    Raises:
        RunFailed: for an error that is no mistake of the user's.
        GroupFailed: for any error, if torchrun or Slurm started several processes.
    """
    from gptexp.training.hardware import world_size

    count = world_size(run.config, processes)
    if not processes.started and count > 1:
        return start_workers(run, count, quiet)
    from gptexp.training.fit import fit

    processes.tell({"run": str(run.path), "prunes": watch is not None})
    try:
        return fit(run, processes, watch, quiet)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # a sweep keeps the error: not with the model in its frames
        raise RunFailed(f"{type(error).__name__}: {error}; traceback in {run.log_path}") from error


def start_workers(run: Run, count: int, quiet: bool = False) -> float:
    """Train a run in processes on this machine, which torchrun's library starts and ends together.

    Returns:
        the lowest validation loss, in nats per token.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM.
        UserError: for a mistake that a process found.
        RunFailed: when one failed or was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with run.lock():  # refuses a run that is being trained; the first worker takes the lock over
        run.update(error=None)
    plan = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=run.path.name, rdzv_backend="c10d",
                        rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=0)  # fmt: skip
    command = ("-m", "gptexp.training.worker", str(run.path), str(os.getpid()), "quiet" if quiet else "loud")
    main = threading.current_thread() is threading.main_thread()
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if main else ()
    handlers = {number: signal.getsignal(number) for number in taken}
    try:
        with silenced("torch.distributed.elastic"):
            elastic_launch(plan, sys.executable)(*command)
    except SignalException as stop:
        raise Interrupted(int(stop.sigval)) from stop
    except ChildFailedError as failed:
        raise _worker_error(run, {rank: f.exitcode for rank, f in failed.failures.items()}) from failed
    finally:
        for number, handler in handlers.items():  # which torchrun's library has replaced
            signal.signal(number, handler)
    best = (run.result or {}).get("best_val_loss")
    return math.nan if best is None else float(best)


def _worker_error(run: Run, codes: Mapping[int, int]) -> Exception:
    """What ended a run's processes, by their exit statuses; completes run.json if they could not."""
    killed = [f"rank {rank} was killed ({signal.Signals(-code).name}); see {run.log_path}"
              for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM]  # fmt: skip
    code = next(iter(codes.values()))
    told = [*killed, run.info.get("error"), f"a process ended with status {code}; see {run.log_path}"]
    message = next(filter(None, told))
    if code == 2 and not killed:
        return UserError(message.split("; "))
    if killed or run.info["status"] == "running":
        run.finish("failed", error=message)
    return RunFailed(message)
