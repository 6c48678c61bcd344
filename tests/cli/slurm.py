#!/usr/bin/env python3
"""As much of Slurm as the tests need, on this machine: sbatch, srun and sacct are links to this file."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path


def sbatch(script: Path) -> int:
    """Run a batch script in the background, once for each index of its array."""
    text = script.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    last = re.match(r"0-(\d+)", options.get("array", "0-0"))
    count = int(last.group(1)) + 1 if last else 1
    for index, port in enumerate(free_ports(count)):
        own = {"SLURM_JOB_ID": 4711}
        if "array" in options:
            own = {"SLURM_JOB_ID": 4712 + index, "SLURM_ARRAY_JOB_ID": 4711, "SLURM_ARRAY_TASK_ID": index}
        subprocess.Popen(["bash", str(script)], env=environment(own | variables(nodes, per_node, port)),
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                         start_new_session=True)  # fmt: skip
    print("Submitted batch job 4711")
    return 0


def free_ports(count: int) -> list[int]:
    """Different ones that the system gives."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def variables(nodes: int, per_node: int, port: int) -> dict[str, object]:
    """What every process of a job sees."""
    return {
        "SLURM_NTASKS": nodes * per_node, "SLURM_NTASKS_PER_NODE": per_node, "SLURM_NNODES": nodes,
        "SLURM_JOB_NUM_NODES": nodes, "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1",
        "MASTER_PORT": port,
    }  # fmt: skip


def environment(more: dict[str, object]) -> dict[str, str]:
    """This process's variables, and more."""
    return os.environ | {k: str(v) for k, v in more.items()}


def srun(arguments: list[str]) -> int:
    """Run a command in as many processes as the job has tasks, or the arguments ask for."""
    start = next(i for i, a in enumerate(arguments) if Path(a).name.startswith("python"))
    shared: dict[str, object] = dict(os.environ)
    if "SLURM_NTASKS" not in os.environ:
        asked = dict(re.findall(r"--([\w-]+)[= ](\d+)", " ".join(arguments[:start])))
        (port,) = free_ports(1)
        shared |= {"SLURM_JOB_ID": 4711} | variables(int(asked["nodes"]), int(asked["ntasks-per-node"]), port)
    per_node = int(str(shared["SLURM_NTASKS_PER_NODE"]))
    tasks = []
    for rank in range(int(str(shared["SLURM_NTASKS"]))):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node}
        tasks.append(subprocess.Popen(arguments[start:], env=environment(shared | own)))
    return max(task.wait() for task in tasks)


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    if name == "sacct":
        print("JobID|State|NodeList")
    sys.exit(sbatch(Path(sys.argv[-1])) if name == "sbatch" else srun(sys.argv[1:]) if name == "srun" else 0)
