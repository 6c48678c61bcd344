"""The processes that train a run together, on one machine or several.

torchrun starts them, or Slurm, or this program through torchrun's library. Lightning's cluster environments give each
its rank, and all meet at torch's key-value store. There rank 0 tells the others what to train, and the first process
that fails says so: then all end, and that one alone reports an error.
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

from gptexp.config.settings import show
from gptexp.errors import GroupFailed, UserError, ending
from gptexp.processes.ending import at_work, end_with_parent, interrupt, met, watched

log = logging.getLogger("gptexp")

T = TypeVar("T")

MEET_SECONDS = 10.0
"""Seconds to look for the other processes before a mistake is reported without them."""

LEAVE_SECONDS = 10.0
"""Seconds that the process with the store waits for the others to end."""


@dataclass
class Processes:
    """The processes of a command as one of them sees them."""

    environment: ClusterEnvironment  # Lightning's view of who started them
    rank: int = 0  # of this process, 0 .. world_size - 1
    world_size: int = 1  # their number
    nodes: int = 1  # machines
    started: bool = False  # by torchrun or Slurm, so that their number counts and not `hardware.devices`
    store: Store | None = None  # where they meet; None before they have
    leading: bool = False  # whether this process works while the others follow
    sent: int = 0  # values broadcast so far

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which decides and writes."""
        return self.rank == 0

    @property
    def per_node(self) -> int:
        """Processes on each machine."""
        return self.world_size // self.nodes

    def broadcast(self, value: T) -> T:
        """Send a plain value from rank 0 to all; the others wait for it as long as it takes, and return it.

        Raises:
            GroupFailed: when another process has failed.
        """
        if self.store is None:
            return value
        key, self.sent = f"sent/{self.sent}", self.sent + 1
        if self.first:
            self.store.set(key, json.dumps(value))
        received: T = json.loads(self._wait_for(key))
        return received

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Compare the settings that the processes were started with.

        Raises:
            UserError: on rank 0, with a line for each setting that differs.
        """
        if self.store is None:
            return
        self.store.set(f"settings/{self.rank}", json.dumps(settings, default=str))
        if not self.first:
            return
        mine, *others = (json.loads(self._wait_for(f"settings/{rank}")) for rank in range(self.world_size))
        for rank, other in enumerate(others, 1):
            if differing := [k for k in sorted(mine.keys() | other.keys()) if mine.get(k) != other.get(k)]:
                raise UserError(f"{k}={show(other.get(k))} on rank {rank} differs from {k}={show(mine.get(k))} on rank "
                                "0; start all processes with the same settings" for k in differing)  # fmt: skip

    def lead(self, work: Callable[[], T], follow: Callable[[Any], Any]) -> T | None:
        """Do some work on rank 0, which may `broadcast` what the others are to do; they call `follow` with it.

        A call within such work just does the work.

        Returns:
            what `work` returns; None on the other ranks.
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
            self.broadcast(None)
        else:
            while (value := self.broadcast(None)) is not None:
                follow(value)
        self.leave()
        return result

    def fail(self, status: int, problems: list[str]) -> GroupFailed:
        """End all processes with an exit status and problems, one line each.

        Returns:
            what to raise: these problems, or those of the process that failed first.
        """
        assert self.store is not None
        rank = None
        with suppress(RuntimeError):  # if the process that has the store is gone, it or what started it has said why
            mine = json.dumps([self.rank, status, problems])
            rank, status, problems = json.loads(self.store.compare_set("failed", "", mine))
        return GroupFailed(status, problems, mine=rank == self.rank)

    def leave(self) -> None:
        """Take leave of the others; rank 0, which has the store, waits until all have."""
        assert self.store is not None
        deadline = time.monotonic() + LEAVE_SECONDS
        with suppress(RuntimeError):
            self.store.add("left", 1)
            while self.first and self.store.add("left", 0) < self.world_size and time.monotonic() < deadline:
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
    if met:
        known: Processes = met[0]
        return known
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


def gather(cluster: str, seconds: float) -> Processes:
    """The processes of this command, once all have come; they end when what started them does.

    From then on only the first one logs to the terminal.

    Raises:
        UserError: when the others do not come within `seconds`, or Slurm has not started this process.
    """
    group = processes(cluster)
    if group.started:
        end_with_parent()
    if group.world_size == 1 or group.store is not None:
        return group
    host, port = group.environment.main_address, group.environment.main_port
    missing = f"rank {group.rank} of {group.world_size}: not all processes came to {host}:{port} within {seconds:g} s"
    if not group.first and not _answers(host, port, seconds):  # torch itself would print each attempt
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
    met[:] = [group]
    for handler in log.handlers if not group.first else ():
        handler.setLevel(logging.CRITICAL)
    return group


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
    """Around a run that the processes train together: torch.distributed is ready, and if one fails, all end.

    Raises:
        GroupFailed: when this process or another one failed; the file `log_path` holds the traceback.
    """
    if group.store is None:
        yield
        return
    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, interrupt) if main else None  # until training looks after it
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore(f"run/{group.sent}", group.store), rank=group.rank, world_size=group.world_size,
        )  # fmt: skip
        with at_work(), watched(group.store):
            yield
    except KeyboardInterrupt as stop:  # of all processes, or of one alone
        group.fail(*ending(stop))
        raise
    except Exception as error:
        if main:  # torchrun ends all processes once one has failed; from now on the record comes first
            previous = signal.SIG_IGN
            signal.signal(signal.SIGTERM, previous)
        status, problems = ending(error)
        if status == 1:
            gone = isinstance(error, dist.DistError) or "third_party/gloo" in str(error)
            what = "another process is gone" if gone else problems[0]
            problems = [f"rank {group.rank}: {what}; traceback in {log_path}"]
        raise group.fail(status, problems) from error
    finally:
        if dist.is_initialized():  # so that others, which wait for this process, get an error
            dist.destroy_process_group()
        if main:
            signal.signal(signal.SIGTERM, previous)


def end_together(status: int, problems: list[str]) -> GroupFailed:
    """End the other processes of this command with a status and problems, before this one ends.

    Returns:
        what ended the command first, in this process or in another one.
    """
    with suppress(UserError):  # they cannot be reached
        return gather("slurm", MEET_SECONDS).fail(status, problems)
    return GroupFailed(status, problems, mine=True)
