"""What the hardware settings mean on this machine: a Trainer's arguments, CPU threads, and the machine itself."""

import os
import platform
import re
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch.nn import functional as F

from gptexp.config.schema import Config
from gptexp.config.sections import HardwareConfig, check_batch
from gptexp.errors import UserError
from gptexp.models.gpt import Block
from gptexp.models.language_model import LanguageModel
from gptexp.perf import mkl_kernels, openmp_spin
from gptexp.processes.group import Processes
from gptexp.training.callbacks.checkpoints import DurableCheckpointIO

TORCH_THREADS = torch.get_num_threads()
"""Torch's own choice of threads, before a run of this process had another: OMP_NUM_THREADS, or the physical cores."""

FLOPS_PER_THREAD = 5e8
"""Floating-point operations of a micro-batch that are worth one more CPU thread: about 5 ms of one core's work.

With less, starting the threads and waiting for them, once for each of a step's hundreds of operations, costs more than
they gain.
"""


def accelerator(config: HardwareConfig) -> str:
    """"cpu", "cuda" or "mps": what the settings mean on this machine.

    Raises:
        UserError: when the machine lacks what is asked for.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kinds = {"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps")}.get(config.accelerator, (config.accelerator,))
    for kind in kinds:
        if there[kind]:
            return kind
    have = " and ".join(sorted(kind for kind in there if there[kind]))
    raise UserError(f"hardware.accelerator={config.accelerator}: this machine has none; allowed here: {have}")


def precision(config: HardwareConfig) -> str:
    """The precision that the settings mean on this machine, by Lightning's name.

    Raises:
        UserError: for a precision that the machine does not have.
    """
    kind = accelerator(config)
    if config.precision == "16-mixed" and kind == "cpu":
        raise UserError("hardware.precision=16-mixed: a CPU has none; allowed: 32-true, bf16-mixed, bf16-true, 64-true")
    if config.precision != "auto":
        return config.precision
    if kind != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def world_size(config: Config, processes: Processes) -> int:
    """The number of processes that train a run of these settings, one per device.

    If torchrun or Slurm started the processes of this command, their number counts.

    Raises:
        UserError: when the machine has fewer devices, or the batch cannot be shared out among them.
    """
    hardware, kind = config.hardware, accelerator(config.hardware)
    precision(hardware)
    if hardware.compile == "graphs" and kind != "cuda":
        raise UserError("hardware.compile=graphs: this machine has no NVIDIA GPU; allowed here: true, false")
    if kind == "cuda":  # what deterministic cuBLAS needs, before its first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    there = torch.cuda.device_count() if kind == "cuda" else None
    if processes.started:
        count, source = processes.world_size, f"{processes.world_size} processes"
        if there is not None and processes.per_node > there:
            raise UserError(f"{processes.per_node} processes on a machine with {there} GPUs; start one for each")
    elif hardware.num_nodes > 1:
        raise UserError(f"hardware.num_nodes={hardware.num_nodes}: this command starts processes on one machine; for "
                        "several, start it with torchrun or srun")  # fmt: skip
    else:
        count = (there or 1) if hardware.devices == "auto" else hardware.devices
        if there is not None and count > there:
            raise UserError(f"hardware.devices={count}: this machine has {there}")
        count = 1 if hardware.strategy == "auto" else count
        source = f"hardware.devices={count}"
    if problems := check_batch(config.batch_size, count, config.gradient_accumulation_steps, source):
        raise UserError(problems)
    return count


def thread_count(model: LanguageModel, config: Config, devices: int, before: int | None = None) -> int:
    """The number of CPU threads, by a rule: the same run always has the same number on this machine.

    A resumed run keeps the number that it had, `before`, since its last digits depend on it.
    """
    threads = config.hardware.threads
    if threads != "auto" or accelerator(config.hardware) != "cpu":
        return threads if isinstance(threads, int) else TORCH_THREADS
    rows = config.batch_size // config.gradient_accumulation_steps / devices
    flops = model.flops_per_token() * rows * config.model.block_size
    return before or useful_threads(flops, min(TORCH_THREADS, cpu_limit() or TORCH_THREADS) // devices)


def useful_threads(flops: float, cores: int) -> int:
    """The number of CPU threads, at most `cores`, that pay off for a micro-batch of `flops` floating-point operations.

    Up to two always: on two cores, none of eight sizes of model was slower with two threads than with one. Each
    further thread needs `FLOPS_PER_THREAD`.
    """
    return max(1, min(cores, max(2, int(flops / FLOPS_PER_THREAD))))


def cpu_limit(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Cores that a container may keep busy, rounded up, or None without a limit; torch does not look at it.

    Source: Linux's documentation of control groups, version 2: `cpu.max` holds "max" or a time, and a period.
    """
    try:
        quota, period = file.read_text().split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def trainer_arguments(config: Config, processes: Processes) -> dict[str, Any]:
    """The settings as arguments of Lightning's Trainer."""
    hardware, kind = config.hardware, accelerator(config.hardware)
    strategy: Any = "auto"
    if hardware.strategy == "fsdp":  # block by block; only to save does a process hold the whole model
        strategy = FSDPStrategy(auto_wrap_policy={Block}, state_dict_type="full")
    elif hardware.strategy == "ddp" or processes.world_size > 1:
        # Norms share their statistics themselves, so no buffer needs to be sent around.
        strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    return {
        "accelerator": "gpu" if kind == "cuda" else kind,
        "devices": processes.per_node,
        "num_nodes": processes.nodes,
        "strategy": strategy,
        "precision": precision(hardware),
        "deterministic": hardware.deterministic and kind == "cuda",
        "plugins": [processes.environment, DurableCheckpointIO()],
        "max_steps": 1 if config.model.counted else -1 if config.max_steps is None else config.max_steps,
        "max_epochs": -1,
        "accumulate_grad_batches": config.gradient_accumulation_steps,
        "gradient_clip_val": config.grad_clip or None,
        "log_every_n_steps": config.log_interval,
        "val_check_interval": config.eval_interval * config.gradient_accumulation_steps,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **{k: v for k, v in asdict(config.trainer).items() if v is not None},
    }


def peak_flops(config: Config, devices: int) -> float:
    """Floating-point operations per second that all devices can reach together.

    A GPU's figure is its data sheet's, where Lightning knows it; elsewhere a square matrix product is timed.
    """
    kind, name = accelerator(config.hardware), precision(config.hardware)
    dtypes = (("bf16", torch.bfloat16), ("16", torch.float16), ("64", torch.float64))
    dtype = next((d for part, d in dtypes if part in name), torch.float32)
    if kind == "cuda" and (known := get_available_flops(torch.device("cuda", 0), dtype)):
        return float(known) * devices
    return _timed_flops(kind, dtype) * devices * (torch.get_num_threads() if kind == "cpu" else 1)


@cache
def _timed_flops(kind: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a GPU, or of one CPU thread: the best of many square matrix products.

    On a CPU each takes about a millisecond and a single thread, so that some of them run undisturbed even on a busy
    machine. Products of 1024 rows on all threads seldom do: their best was half of this, and less than training itself.
    """
    size, threads = {"cuda": 8192, "mps": 4096, "cpu": 384}[kind], torch.get_num_threads()
    a = torch.ones(size, size, device=kind, dtype=dtype)  # not random: a run's random numbers go on undisturbed
    best, end = float("inf"), time.perf_counter() + 0.2
    torch.set_num_threads(1)
    try:
        while time.perf_counter() < end or best == float("inf"):
            start = time.perf_counter()
            float(F.linear(a, a)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / best


def describe_device(config: Config, processes: Processes) -> dict[str, Any]:
    """What run.json says of the machine."""
    kind = accelerator(config.hardware)
    found = re.search(r"^model name\s*: (.+)", mkl_kernels.first_processor(), re.MULTILINE)
    processor = found[1] if found else platform.processor() or platform.machine()
    return {
        "accelerator": kind,
        "name": torch.cuda.get_device_name(0) if kind == "cuda" else processor,
        "devices": processes.world_size,
        "nodes": processes.nodes,
        "precision": precision(config.hardware),
        "threads": torch.get_num_threads(),
        "fast_mkl": mkl_kernels.active(),
        "spin_count": openmp_spin.active(),
    }
