"""The settings of optimizers, schedules, hardware and the Trainer. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

Fraction = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW, fused where the device has it; weight decay on matrices only (Loshchilov, Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99
    eps: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.1


@dataclass(frozen=True)
class SGDConfig:
    """Stochastic gradient descent with momentum; weight decay on matrices only."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Annotated[float, Gt(0)] = 0.1
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Ge(0)] = 0.0


@dataclass(frozen=True)
class MuonConfig:
    """Muon for the matrices of hidden layers (Jordan et al. 2024), AdamW for everything else."""

    name: Literal["muon"] = "muon"
    learning_rate: Annotated[float, Gt(0)] = 0.02  # of the matrices; the schedule moves both alike
    adam_learning_rate: Annotated[float, Gt(0)] = 0.01  # of the others
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95  # of the matrices
    iterations: Annotated[int, Ge(1)] = 5  # of Newton and Schulz, that make an update orthogonal
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.8
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    eps: Annotated[float, Gt(0)] = 1e-10
    weight_decay: Annotated[float, Ge(0)] = 0.0  # of the matrices of hidden layers


@dataclass(frozen=True)
class ConstantConfig:
    """The learning rate stays at its peak after `warmup_steps`."""

    name: Literal["constant"] = "constant"
    warmup_steps: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class _Decaying:
    warmup_steps: Annotated[int, Ge(0)] = 100
    decay_steps: Annotated[int, Ge(1)] | None = None
    min_lr_ratio: Fraction = 0.1


@dataclass(frozen=True)
class LinearConfig(_Decaying):
    """Falls in a line to `min_lr_ratio` of the peak at step `decay_steps` (None: `max_steps`)."""

    name: Literal["linear"] = "linear"


@dataclass(frozen=True)
class CosineConfig(_Decaying):
    """Falls in half a cosine to `min_lr_ratio` of the peak at step `decay_steps` (None: `max_steps`)."""

    name: Literal["cosine"] = "cosine"


@dataclass(frozen=True)
class WSDConfig:
    """Warm-up, stable, decay: falls in a line over the last `decay_fraction` of `max_steps` (Hu et al. 2024)."""

    name: Literal["wsd"] = "wsd"
    warmup_steps: Annotated[int, Ge(0)] = 100
    decay_fraction: Annotated[float, Gt(0), Le(1)] = 0.2
    min_lr_ratio: Fraction = 0.0


@dataclass(frozen=True)
class HardwareConfig:
    """Where a run computes, and how."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"  # "auto" takes a GPU if there is one
    # processes on each machine, one per device; "auto" is all GPUs, or one CPU process. Where torchrun or Slurm starts
    # the processes, their number counts instead.
    devices: Annotated[int, Ge(1)] | Literal["auto"] = 1
    num_nodes: Annotated[int, Ge(1)] = 1  # machines
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"  # how several devices share the work
    # who starts the processes of several devices: "auto" is torchrun if it started this command, else this command
    # itself; "slurm" is srun
    cluster: Literal["auto", "slurm"] = "auto"
    timeout: Annotated[float, Gt(0)] = 300  # seconds to wait for the processes of other machines
    # "auto" is bf16-mixed on a GPU that has it, 16-mixed on older ones, else 32-true
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "auto"
    # compile the model with torch.compile; "graphs" also has a GPU repeat its work as CUDA graphs, which spares a small
    # model the time of starting each kernel
    compile: bool | Literal["graphs"] = False
    # CPU threads of each process; None is torch's own choice, "auto" at most that: as many as a step of this size can
    # use
    threads: Annotated[int, Ge(1)] | Literal["auto"] | None = "auto"
    fast_mkl: bool = True  # under Linux, have Intel's MKL use its fastest kernels on other makers' processors, too
    deterministic: bool = True  # use only deterministic algorithms on a GPU

    def problems(self, batch_size: int, accumulation: int) -> list[str]:
        """Problems between these settings, and with the batch that the devices share; one line a problem."""
        no_gpu, graphs = self.accelerator in ("cpu", "mps"), self.compile == "graphs"
        rules = {
            f"hardware.devices={self.devices}: hardware.accelerator=mps has one device":
                self.accelerator == "mps" and self.devices not in (1, "auto"),
            f"hardware.strategy=fsdp: needs GPUs, not hardware.accelerator={self.accelerator}":
                self.strategy == "fsdp" and no_gpu,
            f"hardware.compile=graphs: needs a GPU, not hardware.accelerator={self.accelerator}": graphs and no_gpu,
            f"hardware.compile=graphs: needs hardware.strategy=auto, not {self.strategy}":
                graphs and self.strategy != "auto",
            # A graph's gradients lie where the next micro-batch's will.
            f"hardware.compile=graphs: needs gradient_accumulation_steps=1, not {accumulation}":
                graphs and accumulation > 1,
            f"hardware.devices={self.devices}: needs hardware.strategy=ddp or fsdp":
                self.strategy == "auto" and self.devices not in (1, "auto"),
        }  # fmt: skip
        problems = [problem for problem, applies in rules.items() if applies]
        return problems + (check_batch(batch_size, self.devices, accumulation) if self.devices != "auto" else [])


@dataclass(frozen=True)
class SweepConfig:
    """How a multirun's jobs belong together."""

    name: str | None = None  # of the sweep's directory; None makes one from what varies
    # a failed job is run again this many times, once each time that the command is given
    retries: Annotated[int, Ge(0)] = 2
    job: str | None = None  # the job's name; the sweeper sets it


@dataclass(frozen=True)
class TrainerConfig:
    """The arguments of Lightning's Trainer that have no other name here; null leaves each to Lightning.

    Not here are those that take objects, which have groups of their own (`callbacks`, `logger`), and `plugins` and
    `default_root_dir`, which belong to the run.
    """

    fast_dev_run: bool | int | None = None
    max_epochs: int | None = None
    min_epochs: int | None = None
    min_steps: int | None = None
    max_time: str | None = None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    limit_predict_batches: int | float | None = None
    overfit_batches: int | float | None = None
    check_val_every_n_epoch: int | None = None
    num_sanity_val_steps: int | None = None
    enable_checkpointing: bool | None = None
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    benchmark: bool | None = None
    inference_mode: bool | None = None
    use_distributed_sampler: bool | None = None
    profiler: Literal["simple", "advanced", "pytorch", "xla"] | None = None
    detect_anomaly: bool | None = None
    barebones: bool | None = None
    sync_batchnorm: bool | None = None
    reload_dataloaders_every_n_epochs: int | None = None
    enable_autolog_hparams: bool | None = None
    model_registry: str | None = None


SHORT = {
    "max_steps": "max_steps",
    "gradient_clip_val": "grad_clip",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "val_check_interval": "eval_interval",
    "log_every_n_steps": "log_interval",
    "accelerator": "hardware.accelerator",
    "devices": "hardware.devices",
    "num_nodes": "hardware.num_nodes",
    "strategy": "hardware.strategy",
    "precision": "hardware.precision",
    "deterministic": "hardware.deterministic",
}
"""Arguments of the Trainer that have a shorter name here. Both names set the same setting, so only one may be used."""

OBSERVING = ("profiler", "detect_anomaly", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams")
"""Arguments of the Trainer that change no result."""


OptimizerConfig = AdamWConfig | SGDConfig | MuonConfig
ScheduleConfig = CosineConfig | LinearConfig | ConstantConfig | WSDConfig
"""Of each the first is the default."""


def check_batch(batch_size: int, devices: int, accumulation: int, source: str | None = None) -> list[str]:
    """A problem if a step's sequences cannot be shared out evenly among devices and `accumulation` micro-batches.

    The line names `source`, or else the setting, for what says how many devices there are.
    """
    if batch_size % (devices * accumulation) == 0:
        return []
    return [
        f"batch_size={batch_size}: must be a multiple of {source or f'hardware.devices={devices}'} * "
        f"gradient_accumulation_steps={accumulation} = {devices * accumulation}"
    ]
