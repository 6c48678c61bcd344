"""The processes that train a run together, on one machine or several.

They are started by torchrun, by Slurm, or by this program through torchrun's library. Each finds its place by
Lightning's cluster environments. The first one decides what is to be done, and the others are told.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
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

from gptexp.config import Config, flatten
from gptexp.errors import UserError
from gptexp.validation import show

log = logging.getLogger("gptexp")

T = TypeVar("T")

PATIENCE = 300
"""Seconds to wait for the other processes."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run as one of them sees them.

    Attributes:
        environment: Lightning's view of who started them.
        rank: of this process, 0 .. world_size - 1.
        world_size: their number.
        nodes: machines.
    """

    environment: ClusterEnvironment
    rank: int = 0
    world_size: int = 1
    nodes: int = 1

    @property
    def first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    @property
    def per_node(self) -> int:
        """Processes on each machine."""
        return self.world_size // self.nodes


def processes(cluster: str = "auto") -> Processes:
    """Those that torchrun started, or srun where `hardware.cluster=slurm` says so; else this process alone.

    Raises:
        UserError: when Slurm has not started this process.
    """
    if TorchElasticEnvironment.detect():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return _of(TorchElasticEnvironment(), int(os.environ["WORLD_SIZE"]) // local)
    if cluster == "slurm":
        if "SLURM_PROCID" not in os.environ:
            raise UserError("hardware.cluster=slurm: Slurm has not started this process; start it with srun")
        return _of(SLURMEnvironment(auto_requeue=False), int(os.environ.get("SLURM_NNODES", "1")))
    return Processes(LightningEnvironment())


def _of(environment: ClusterEnvironment, nodes: int) -> Processes:
    return Processes(environment, environment.global_rank(), environment.world_size(), nodes)


@contextmanager
def joined(group: Processes) -> Iterator[None]:
    """Around everything that the processes do together; may be nested.

    Args:
        group: the processes.

    Raises:
        UserError: when the others do not come.
    """
    if group.world_size == 1 or dist.is_initialized():
        yield
        return
    os.environ["MASTER_ADDR"] = group.environment.main_address  # where torch looks for them
    os.environ["MASTER_PORT"] = str(group.environment.main_port)
    rank_zero_only.rank = group.rank
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", rank=group.rank, world_size=group.world_size,
            timeout=timedelta(seconds=PATIENCE),
        )  # fmt: skip
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {group.rank} of {group.world_size}: not all processes came to {where} within {PATIENCE} s "
            f"({str(error).splitlines()[0]})"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def tell(group: Processes, value: T) -> T:
    """What the first process says, on all of them.

    Args:
        group: the processes.
        value: of the first one; those of the others are left aside.
    """
    if group.world_size == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told)
    return told[0]


def check_same(group: Processes, config: Config) -> None:
    """Refuse processes that were started with different settings.

    Raises:
        UserError: with a line for each setting that differs.
    """
    if group.world_size == 1:
        return
    every: list[Any] = [None] * group.world_size
    dist.all_gather_object(every, flatten(config.essence()))
    first = every[0]
    for rank, other in enumerate(every):
        different = [k for k in sorted(first.keys() | other.keys()) if first.get(k) != other.get(k)]
        if different:
            raise UserError(
                f"{k}={show(other.get(k))} on rank {rank} differs from {k}={show(first.get(k))} on rank 0; "
                "start all processes with the same settings" for k in different
            )
