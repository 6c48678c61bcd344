#!/usr/bin/env python3
"""As much of Slurm as submitit asks for, on this machine: sbatch, srun and sacct are links to this file."""

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
        variables = {
            "SLURM_JOB_ID": 4712 + index, "SLURM_ARRAY_JOB_ID": 4711, "SLURM_ARRAY_TASK_ID": index, "MASTER_PORT": port,
            "SLURM_NTASKS": nodes * per_node, "SLURM_NTASKS_PER_NODE": per_node, "SLURM_NNODES": nodes,
            "SLURM_JOB_NUM_NODES": nodes, "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1",
        }  # fmt: skip
        if "array" not in options:
            variables["SLURM_JOB_ID"] = 4711
            del variables["SLURM_ARRAY_JOB_ID"], variables["SLURM_ARRAY_TASK_ID"]
        environment = os.environ | {k: str(v) for k, v in variables.items()}
        subprocess.Popen(["bash", str(script)], env=environment, stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
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


def srun(arguments: list[str]) -> int:
    """Run a command in as many processes as the job has tasks."""
    command = arguments[next(i for i, a in enumerate(arguments) if Path(a).name.startswith("python")) :]
    per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node}
        tasks.append(subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in own.items()}))
    return max(task.wait() for task in tasks)


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    if name == "sacct":
        print("JobID|State|NodeList")
    sys.exit(sbatch(Path(sys.argv[-1])) if name == "sbatch" else srun(sys.argv[1:]) if name == "srun" else 0)
