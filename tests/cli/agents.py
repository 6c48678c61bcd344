"""Starts a command as torchrun and srun start it: several processes on the loopback address."""

import os
import socket
import subprocess
from pathlib import Path

from tests.cli.test_sweep_processes import alive, children
from tests.conftest import TINY, spawn

SLURM = [*(o for o in TINY if o != "hardware=cpu"), "hardware=slurm"]
"""Overrides of a tiny run whose processes Slurm has started."""


def free_port() -> int:
    """One that the system gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(*arguments: list[str], cwd: Path) -> list[subprocess.Popen[str]]:
    """Agents of torchrun, one for each list of arguments, which they give to gptexp.train."""
    flags = [
        "--nnodes", str(len(arguments)), "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1", "-m", "gptexp.train",
    ]  # fmt: skip
    return [spawn(*flags, *each, cwd=cwd, module="torch.distributed.run") for each in arguments]


def srun(*arguments: list[str], cwd: Path, only: int | None = None) -> list[subprocess.Popen[str]]:
    """Tasks of srun, one for each list of arguments, which they give to gptexp.train; of them, `only` one may come."""
    count = len(arguments)
    slurm = {
        "SLURM_JOB_ID": 4711, "SLURM_NTASKS": count, "SLURM_NTASKS_PER_NODE": 1, "SLURM_NNODES": count,
        "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": 0, "MASTER_PORT": free_port(),
    }  # fmt: skip
    tasks = []
    for rank, each in enumerate(arguments):
        if only in (None, rank):
            own = {k: str(v) for k, v in (slurm | {"SLURM_PROCID": rank, "SLURM_NODEID": rank}).items()}
            tasks.append(spawn(*each, cwd=cwd, env=os.environ | own))
    return tasks


def finish_all(processes: list[subprocess.Popen[str]], timeout: float = 300) -> tuple[list[int], str, str]:
    """Exit statuses, and what all printed on standard output and standard error."""
    ended = [process.communicate(timeout=timeout) for process in processes]
    return [p.returncode for p in processes], "".join(out for out, _ in ended), "".join(err for _, err in ended)


def errors(text: str) -> list[str]:
    """The lines of this program among what torchrun prints, too."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


def kill_all(processes: list[subprocess.Popen[str]]) -> None:
    """Kill processes and those that they have started."""
    everyone = [(process, children(process.pid)) for process in processes]
    for process, workers in everyone:
        process.kill()
        for worker in workers:
            os.kill(worker, 9)
    for process, workers in everyone:
        process.communicate()
        while any(map(alive, workers)):
            pass
