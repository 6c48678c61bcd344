"""The processes that train a run together, on one machine or several.

torchrun starts them, or Slurm, or this program through torchrun's library. Each finds its place by Lightning's cluster
environments, and all meet at a key-value store. There the first one tells the others what to train, and the first one
that fails says so: then all end, and that one alone speaks.
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
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from gptexp.errors import GroupFailed, Interrupted, UserError
from gptexp.orphans import at_work
from gptexp.training import ranks
from gptexp.validation import show

log = logging.getLogger("gptexp")

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that a process which ends waits for the others to hear of it."""

GRACE = 15.0
"""Seconds that a process has to end by itself once another one has failed."""


@dataclass
class Processes:
    """The processes of a command as one of them sees them.

    Attributes:
        environment: Lightning's view of who started them.
        rank: of this process, 0 .. world_size - 1.
        world_size: their number.
        nodes: machines.
        started: whether torchrun or Slurm started them, so that their number counts and not `hardware.devices`.
        store: where they meet; None before they have.
        runs: that they have trained.
        leading: whether this process works while the others follow.
    """

    environment: ClusterEnvironment
    rank: int = 0
    world_size: int = 1
    nodes: int = 1
    started: bool = False
    store: Store | None = None
    leading: bool = False
    _told: int = 0  # values
    runs: int = 0
    _hurried: bool = False  # asked to end while it fails

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
            GroupFailed: when another process has failed, or is gone.
        """
        if self.store is None:
            return value
        key, self._told = f"told/{self._told}", self._told + 1
        if self.first:
            self.store.set(key, json.dumps(value))
            return value
        told: T = json.loads(self._wait_for(key))
        return told

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Refuse processes that were started with different settings.

        Args:
            settings: plain values by dotted key.

        Raises:
            UserError: with a line for each setting that differs.
        """
        if self.store is None:
            return
        self.store.set(f"settings/{self.rank}", json.dumps(settings, default=str))
        problems: list[str] = []
        for rank in range(1, self.world_size) if self.first else ():
            first = json.loads(self._wait_for("settings/0"))
            other = json.loads(self._wait_for(f"settings/{rank}"))
            problems = problems or [
                f"{k}={show(other.get(k))} on rank {rank} differs from {k}={show(first.get(k))} on rank 0; "
                "start all processes with the same settings"
                for k in sorted(first.keys() | other.keys()) if first.get(k) != other.get(k)
            ]  # fmt: skip
        if problems := self.tell(problems):
            raise UserError(problems)

    def lead(self, work: Callable[[], T], follow: Callable[[Any], Any]) -> T | None:
        """Let the first process do some work, in which it may `tell` the others what to do with it.

        Inside such work this does further work at once.

        Args:
            work: for the first process.
            follow: what the others do with each value that they are told.

        Returns:
            what `work` returns; None on the other processes.
        """
        if self.store is None or self.leading:
            return work()
        if not self.first:
            while (value := self.tell(None)) is not None:
                follow(value)
            self.store.add("left", 1)
            return None
        self.leading = True
        try:
            result = work()
            self.tell(None)
            self._wait_for_all("left", PATIENCE)  # the store may be in this process
        finally:
            self.leading = False
        return result

    def fail(self, status: int, problems: list[str]) -> GroupFailed:
        """End all processes.

        Args:
            status: to exit with.
            problems: what to say, a line each.

        Returns:
            what to raise: these problems, or those of the process that failed first.
        """
        assert self.store is not None
        mine = json.dumps({"rank": self.rank, "status": status, "problems": problems})
        try:
            first = json.loads(self.store.compare_set("failed", "", mine))
        except RuntimeError:  # the process that has the store is gone
            first = json.loads(mine)
        return GroupFailed(first["status"], first["problems"], mine=first["rank"] == self.rank)

    def part(self, failed: GroupFailed) -> None:
        """Before a process ends after a failure: the one that failed waits until the others have heard of it."""
        assert self.store is not None
        with suppress(RuntimeError):
            if failed.mine:
                self._wait_for_all("heard", PATIENCE)
            else:
                self.store.add("heard", 1)

    def failure(self) -> GroupFailed | None:
        """What ended another process, if anything did."""
        assert self.store is not None
        try:
            if not self.store.check(["failed"]):
                return None
            first = json.loads(self.store.get("failed"))
        except RuntimeError:
            return GroupFailed(1, [f"rank {self.rank}: another process is gone"], mine=True)
        return GroupFailed(first["status"], first["problems"], mine=first["rank"] == self.rank)

    def _wait_for(self, key: str) -> bytes:
        assert self.store is not None
        while True:
            if failed := self.failure():
                raise failed
            try:
                if self.store.check([key]):
                    return bytes(self.store.get(key))
            except RuntimeError:
                continue  # `failure` says it
            time.sleep(0.02)

    def _wait_for_all(self, key: str, seconds: float) -> None:
        """Wait until all others have counted themselves."""
        assert self.store is not None
        deadline = time.monotonic() + seconds
        while self.store.add(key, 0) < self.world_size - 1:
            if time.monotonic() > deadline or self._hurried:
                return
            time.sleep(0.02)

    def hurry(self, *_: Any) -> None:
        """A signal's handler: a failing process completes its record, but waits for nobody."""
        self._hurried = True


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


def meet(group: Processes, seconds: float, wait: bool = True) -> None:
    """Connect to the store of all processes; from then on only the first one logs to the terminal.

    Args:
        group: the processes; nothing happens if they have met, or are one.
        seconds: to wait for the others.
        wait: until all are there.

    Raises:
        UserError: when they do not come.
        GroupFailed: when one of them has failed.
    """
    if group.world_size == 1 or group.store is not None:
        return
    host, port = group.environment.main_address, group.environment.main_port
    missing = f"rank {group.rank} of {group.world_size}: not all processes came to {host}:{port} within {seconds:g} s"
    deadline = time.monotonic() + seconds
    # Where torchrun's agents met each other, the store is one of theirs.
    serves = group.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves and not _answers(host, port, deadline):  # torch itself would tell of each attempt
        raise UserError(missing)
    try:
        store = TCPStore(host, port, is_master=serves, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{host}:{port}: {str(error).splitlines()[0]}; MASTER_PORT sets another port") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    group.store = PrefixStore(f"gptexp/{attempt}", store)
    ranks.met[:] = [group]
    if not group.first:
        for handler in log.handlers:
            handler.setLevel(logging.CRITICAL)
        group.store.add("here", 1)
    while wait and group.store.add("here", 0) < group.world_size - 1:
        if failed := group.failure():
            raise failed
        if time.monotonic() > deadline:
            raise UserError(missing)
        time.sleep(0.02)


def _answers(host: str, port: int, deadline: float) -> bool:
    """Whether something listens there, or begins to before the deadline."""
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

    Args:
        group: the processes, which have met.
        log_path: the file that holds the traceback.

    Raises:
        GroupFailed: when this process or another one failed.
    """
    if group.store is None:
        yield
        return
    run, group.runs = group.runs, group.runs + 1
    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _interrupt) if main else None  # until training looks after it
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore(f"run/{run}", group.store), rank=group.rank, world_size=group.world_size,
        )  # fmt: skip
        with at_work(), _watched(group):
            yield
    except KeyboardInterrupt as stop:  # of all processes, or of one alone
        group.fail(128 + (stop.signal if isinstance(stop, Interrupted) else signal.SIGINT), [])
        raise
    except Exception as error:
        if main:
            previous = group.hurry
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
    if isinstance(error, dist.DistError) or "third_party/gloo" in text:
        return 1, [f"rank {rank}: another process is gone; traceback in {log_path}"]
    return 1, [f"rank {rank}: {type(error).__name__}: {text}; traceback in {log_path}"]


@contextmanager
def _watched(group: Processes) -> Iterator[None]:
    """End this process if another one has failed and this one does not see it, as in a GPU's collective."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1):
            if (failed := group.failure()) and not done.wait(GRACE):
                os._exit(failed.status)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
