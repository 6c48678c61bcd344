"""The processes that train a run together, on one machine or several.

torchrun starts them, or Slurm, or this program through torchrun's library. Each finds its place by Lightning's cluster
environments, and all meet at torch's key-value store. There the first one tells the others what to train, and the
first one that fails says so: then all end, and that one alone speaks.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from gptexp.errors import GroupFailed, Interrupted, UserError
from gptexp.orphans import at_work
from gptexp.training import ranks
from gptexp.validation import show

log = logging.getLogger("gptexp")

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that the process with the store waits for the others to end."""

GRACE = 15.0
"""Seconds that a process has to end by itself once another one has failed."""


@dataclass
class Processes:
    """The processes of a command as one of them sees them."""

    environment: ClusterEnvironment  # Lightning's view of who started them
    rank: int = 0  # of this process, 0 .. world_size - 1.
    world_size: int = 1  # their number
    nodes: int = 1  # machines
    # whether torchrun or Slurm started them, so that their number counts and not `hardware.devices`
    started: bool = False
    store: Store | None = None  # where they meet; None before they have
    leading: bool = False  # whether this process works while the others follow
    told: int = 0  # values

    @property
    def first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    @property
    def per_node(self) -> int:
        """Processes on each machine."""
        return self.world_size // self.nodes

    def tell(self, value: T) -> T:
        """What the first process says, on all of them; a plain value. The others wait for it as long as it takes.

        Raises:
            GroupFailed: when another process has failed.
        """
        if self.store is None:
            return value
        key, self.told = f"told/{self.told}", self.told + 1
        if self.first:
            self.store.set(key, json.dumps(value))
        told: T = json.loads(self._wait_for(key))
        return told

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Refuse processes that were started with different settings; the others hear of it when they are told more.

        Raises:
            UserError: in the first process, with a line for each setting that differs.
        """
        if self.store is None:
            return
        self.store.set(f"settings/{self.rank}", json.dumps(settings, default=str))
        first, *others = (json.loads(self._wait_for(f"settings/{rank}"))
                          for rank in range(self.world_size if self.first else 1))  # fmt: skip
        for rank, other in enumerate(others, 1):
            if problems := [
                f"{k}={show(other.get(k))} on rank {rank} differs from {k}={show(first.get(k))} on rank 0; "
                "start all processes with the same settings"
                for k in sorted(first.keys() | other.keys()) if first.get(k) != other.get(k)
            ]:  # fmt: skip
                raise UserError(problems)

    def lead(self, work: Callable[[], T], follow: Callable[[Any], Any]) -> T | None:
        """Let the first process do some work, in which it may `tell` the others what to do with it.

        The others call `follow` with each value that they are told. A call within such work just does the work.

        Returns:
            what `work` returns; None on the other processes.
        """
        if self.store is None or self.leading:
            return work()
        result = None
        if self.first:
            self.leading = True
            try:
                result = work()
            finally:
                self.leading = False
            self.tell(None)
        else:
            while (value := self.tell(None)) is not None:
                follow(value)
        self.part()
        return result

    def fail(self, status: int, problems: list[str]) -> GroupFailed:
        """End all processes with a status and problems, a line each.

        Returns:
            what to raise: these problems, or those of the process that failed first.
        """
        assert self.store is not None
        rank = None
        with suppress(RuntimeError):  # if the process that has the store is gone, it or what started it has said why
            mine = json.dumps([self.rank, status, problems])
            rank, status, problems = json.loads(self.store.compare_set("failed", "", mine))
        return GroupFailed(status, problems, mine=rank == self.rank)

    def part(self) -> None:
        """The last thing that a process does with the others: that with the store waits until all have been here."""
        assert self.store is not None
        deadline = time.monotonic() + PATIENCE
        with suppress(RuntimeError):
            self.store.add("parted", 1)
            while self.first and self.store.add("parted", 0) < self.world_size and time.monotonic() < deadline:
                time.sleep(0.02)

    def _wait_for(self, key: str) -> bytes:
        assert self.store is not None
        while not self.store.check([key]):
            if self.store.check(["failed"]):
                raise self.fail(1, [])
            time.sleep(0.02)
        return bytes(self.store.get(key))


def processes(cluster: str = "auto") -> Processes:
    """Those that torchrun started, or srun where `hardware.cluster=slurm` says so; else this process alone.

    Raises:
        UserError: when Slurm has not started this process, or not as many on each machine.
    """
    if ranks.met:
        return ranks.met[0]
    if TorchElasticEnvironment.detect():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        found = _of(TorchElasticEnvironment(), int(os.environ["WORLD_SIZE"]) / local)
    elif cluster == "slurm":
        if "SLURM_PROCID" not in os.environ:
            raise UserError("hardware.cluster=slurm: Slurm has not started this process; start it with srun")
        try:
            environment = SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:
            raise UserError("hardware.cluster=slurm: give srun --ntasks-per-node instead of --ntasks") from error
        found = _of(environment, int(os.environ.get("SLURM_NNODES", "1")))
    else:
        found = Processes(LightningEnvironment())
    rank_zero_only.rank = found.rank  # Lightning takes it from variables that may belong to others
    return found


def _of(environment: ClusterEnvironment, nodes: float) -> Processes:
    world = environment.world_size()
    if nodes != int(nodes) or world % nodes:
        raise UserError(f"{world} processes: start the same number on each machine")
    return Processes(environment, environment.global_rank(), world, int(nodes), started=True)


def meet(group: Processes, seconds: float) -> None:
    """Connect to the store of all processes; from then on only the first one logs to the terminal.

    Does nothing if they have met already, or if there is only one.

    Raises:
        UserError: when the others do not come within `seconds`.
    """
    if group.world_size == 1 or group.store is not None:
        return
    host, port = group.environment.main_address, group.environment.main_port
    missing = f"rank {group.rank} of {group.world_size}: not all processes came to {host}:{port} within {seconds:g} s"
    if not group.first and not _answers(host, port, seconds):  # torch itself would tell of each attempt
        raise UserError(missing)
    place = f"tcp://{host}:{port}?rank={group.rank}&world_size={group.world_size}"
    try:
        store, _, _ = next(rendezvous(place, timeout=timedelta(seconds=seconds)))
    except dist.DistStoreError as error:
        raise UserError(missing) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{host}:{port}: {str(error).splitlines()[0]}; MASTER_PORT sets another port") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # which may find the store of the one before
    group.store = PrefixStore(f"gptexp/{attempt}", store)
    ranks.met[:] = [group]
    for handler in log.handlers if not group.first else ():
        handler.setLevel(logging.CRITICAL)


def _answers(host: str, port: int, seconds: float) -> bool:
    """Whether something listens there, or begins to in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return True
        except OSError:
            time.sleep(0.1)
    return False


@contextmanager
def connected(group: Processes, log_path: Path) -> Iterator[None]:
    """Around a run that the processes train together: torch.distributed is ready, and a failure of one ends all.

    Raises:
        GroupFailed: when this process or another one failed; the file `log_path` holds the traceback.
    """
    if group.store is None:
        yield
        return
    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _interrupt) if main else None  # until training looks after it
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore(f"run/{group.told}", group.store), rank=group.rank, world_size=group.world_size,
        )  # fmt: skip
        with at_work(), _watched(group.store):
            yield
    except KeyboardInterrupt as stop:  # of all processes, or of one alone
        group.fail(128 + (stop.signal if isinstance(stop, Interrupted) else signal.SIGINT), [])
        raise
    except Exception as error:
        if main:  # torchrun ends all processes once one has failed; from now on the record comes first
            previous = signal.SIG_IGN
            signal.signal(signal.SIGTERM, previous)
        raise group.fail(*_said(error, group.rank, log_path)) from error
    finally:
        if dist.is_initialized():  # others that wait for this process go on, into an error
            dist.destroy_process_group()
        if main:
            signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, _: Any) -> None:
    raise Interrupted(number)


def _said(error: Exception, rank: int, log_path: Path) -> tuple[int, list[str]]:
    """An error's exit status and lines."""
    if isinstance(error, UserError):
        return 2, error.problems
    text = " ".join(str(error).split())
    gone = isinstance(error, dist.DistError) or "third_party/gloo" in text
    what = "another process is gone" if gone else f"{type(error).__name__}: {text}"
    return 1, [f"rank {rank}: {what}; traceback in {log_path}"]


@contextmanager
def _watched(store: Store) -> Iterator[None]:
    """End this process if another one has failed and this one does not see it, as in a GPU's collective."""
    done = threading.Event()

    def failed() -> bool:
        try:
            return bool(store.check(["failed"]))
        except RuntimeError:  # the process that has the store is gone
            return True

    def watch() -> None:
        while not done.wait(1):
            if failed() and not done.wait(GRACE):
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
