"""The sections of the configuration, and the bases of those that a registered component has."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt, Predicate

from gptexp.config.settings import NEUTRAL, settings
from gptexp.registry import CORPORA, TOKENIZERS

Seed = Annotated[int, Ge(0), Lt(2**63)]


@settings
class ModelConfig:
    """Base of the settings of every model."""

    counted: ClassVar[bool] = False  # learns by counting, in one pass, and has no gradients

    name: str = ""
    """The kind of model."""
    vocab_size: Annotated[int, Ge(1)] = 65
    """Number of symbols V; taken from the tokenizer, never set by the user."""
    block_size: Annotated[int, Ge(1)] = 64
    """Positions L of a row of a batch, the most that a GPT attends over."""

    @property
    def tags(self) -> list[str]:
        """The words by which a dashboard finds this variant."""
        return [self.name]

    @property
    def components(self) -> list[type]:
        """The classes of the registered components that the model is made of."""
        return []

    @property
    def label(self) -> str:
        """The readable name of this variant, such as `rmsnorm-pre-h4`."""
        return "-".join(self.tags)

    @property
    def min_sequences(self) -> int:
        """The fewest sequences that a training batch must have."""
        return 1

    def tree(self) -> dict[str, Any]:
        """Every setting that has an effect."""
        return asdict(self)

    def problems(self) -> list[str]:
        """Problems between settings that are each valid alone; one line a problem."""
        return []


@settings
class TaskConfig:
    """Base of every task, whose fields are its settings: what is to be predicted."""

    corpus: ClassVar[bool] = True  # False for a task that makes its own problems: it needs data=none
    exact_match: ClassVar[bool] = False  # whether a row is right or wrong as a whole: val/exact_match tells the share

    name: str = ""
    """The kind of task."""

    def document_end(self, data: "DataConfig") -> str | None:
        """The symbol that ends each document of the data; None where a text has no documents."""
        return None

    def document_start(self, data: "DataConfig") -> str | None:
        """The symbol that comes before the first one of a document; None where there is none."""
        return None

    def encode(self, corpus: Any, data: "DataConfig") -> Any:
        """The ids of a corpus, `gptexp.data.encoding.Encoded`; None where they are those of its text as it is."""
        return None

    def problems(self, data: "DataConfig") -> list[str]:
        """What is wrong with the settings of the data; one line a problem."""
        if self.corpus and data.name == "none":
            return [f"data.name=none: task={self.name} needs a corpus"]
        if not self.corpus and data.name != "none":
            return [f"data.name={data.name}: has no effect with task={self.name}, which makes its own problems; "
                    "allowed: data=none"]  # fmt: skip
        return []

    def held_out(self, texts: Callable[[], Iterator[str]], data: "DataConfig") -> Iterator[tuple[str, bool]]:
        """The text in pieces, each with whether it is held out for validation: a tokenizer must not learn from that.

        Where `splits` cuts the ids in two, it cuts at the first of those that are held out, `Encoded.val_start`; by
        itself, this holds out none. It is not asked for tokenizers with a symbol for each character, nor where the
        validation split is a text of its own.

        Args:
            texts: each call reads the corpus from its beginning, in pieces.
            data: its settings.
        """
        return ((text, False) for text in texts())

    def questions(self) -> dict[str, Any] | None:
        """What decides which problems are held out, whatever else is set; None where the corpus and all settings do."""
        return None

    def splits(self, encoded: Any, data: "DataConfig", block_size: int) -> tuple[Any, Any]:
        """The training and the validation part of an encoded corpus: two of `gptexp.data.batches.Split`.

        Raises:
            UserError: too little text for these settings.
        """
        raise NotImplementedError

    def samples(self) -> int:
        """How many texts are sampled at each evaluation."""
        return 1


@settings
class DataConfig:
    """What text to learn from, and how it is cut into symbols and into two splits."""

    name: Annotated[str, Predicate(CORPORA.__contains__)] = "shakespeare"
    """The corpus."""
    path: str | None = None
    """The UTF-8 text file, folder or pattern of files, for `data=file` alone: .txt, .md, .py, .jsonl, each also with
    .gz; a file that is named may have any other ending."""
    val_path: str | None = None
    """A text of its own for validation, in the same forms, in place of `val_fraction`."""
    field: str = "text"
    """The key of the text in each line of .jsonl files."""
    tokenizer: Annotated[str, Predicate(TOKENIZERS.__contains__)] = "char"
    """What text is cut into."""
    vocab_size: Annotated[int, Ge(257)] = 512
    """Symbols that `tokenizer=bpe` learns, the 256 bytes among them."""
    val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the characters (or documents) kept for validation: the last ones."""
    offline_fallback: Literal["pydocs"] | None = "pydocs"
    """What to read when a corpus cannot be downloaded; null makes that an error."""

    def problems(self) -> list[str]:
        """The problems that no single setting shows, one line each, with full keys; empty when all is well.

        A setting that would have no effect is a problem, but for `offline_fallback=None`: a corpus that is
        never replaced keeps that promise anyway.
        """
        if self.name == "file" and not self.path:
            return ["data.path=null: data.name=file needs data.path, a UTF-8 text file or a folder of them"]
        own = {"path": (self.path, None), "val_path": (self.val_path, None), "field": (self.field, DataConfig.field)}
        problems = [f"data.{key}={value}: has no effect with data.name={self.name}; allowed: data.name=file"
                    for key, (value, default) in own.items() if self.name != "file" and value != default]  # fmt: skip
        if not TOKENIZERS[self.tokenizer].made.sized and self.vocab_size != DataConfig.vocab_size:
            problems.append(f"data.vocab_size={self.vocab_size}: has no effect with data.tokenizer={self.tokenizer}; "
                            "allowed: data.tokenizer=bpe")  # fmt: skip
        if self.val_path is not None and self.val_fraction != DataConfig.val_fraction:
            problems.append(f"data.val_fraction={self.val_fraction}: has no effect with data.val_path={self.val_path}")
        return problems

    def tree(self) -> dict[str, Any]:
        """Every setting that has an effect."""
        tree = asdict(self)
        if not TOKENIZERS[self.tokenizer].made.sized:
            del tree["vocab_size"]
        return tree


@settings
class OptimizerConfig:
    """Base of every optimizer, whose fields are its settings."""

    name: str = ""
    """The kind of optimizer."""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """The peak, which the schedule comes down from."""

    def build(self, parameters: Any, peak: float, fused: bool) -> Any:
        """A new optimizer of torch's.

        Args:
            parameters: of the model, `gptexp.training.optimizers.Parameters`.
            peak: the learning rate, instead of the setting.
            fused: update all parameters in one kernel.
        """
        raise NotImplementedError

    def problems(self, model: ModelConfig | None, hardware: "HardwareConfig | None") -> list[str]:
        """What is wrong with the settings of the model and of the hardware, of which either may be None."""
        return []


@settings
class ScheduleConfig:
    """Base of every learning-rate schedule, whose fields are its settings; by itself, the peak after the warmup."""

    name: str = ""
    """The kind of schedule."""
    warmup_steps: Annotated[int, Ge(0)] = 100
    """Steps in which the learning rate climbs in a straight line to its peak."""
    weight_decay_ratio: Annotated[float, Ge(0)] = 1.0
    """The weight decay at the end, as a multiple of the optimizer's; half a cosine leads there (Caron et al. 2021)."""

    def weight_decay(self, step: int, max_steps: int) -> float:
        """The weight decay of a step, from 0 on, as a multiple of the optimizer's."""
        done = min(1.0, step / max_steps)
        return self.weight_decay_ratio + (1 - self.weight_decay_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    def factor(self, step: int, max_steps: int) -> float:
        """The learning rate of a step, from 0 on, as a fraction of the peak.

        Warmup reaches the peak at step `warmup_steps`: (step + 1) / (warmup_steps + 1).
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.after_warmup(step, max_steps)

    def after_warmup(self, step: int, max_steps: int) -> float:
        """The same from step `warmup_steps` on."""
        return 1.0


@settings
class HardwareConfig:
    """Where a run computes, and how."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """`auto` takes a GPU if there is one."""
    devices: Annotated[int, Ge(1)] | Literal["auto"] = 1
    """Processes on each machine, one per device; `auto` is all GPUs, or one CPU process. Where torchrun or Slurm starts
    the processes, their number counts instead."""
    num_nodes: Annotated[int, Ge(1)] = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work."""
    cluster: Literal["auto", "slurm"] = "auto"
    """Who starts the processes of several devices: `auto` is torchrun if it started this command, else this command
    itself; `slurm` is srun."""
    timeout: Annotated[float, Gt(0), NEUTRAL] = 300
    """Seconds to wait for the processes of other machines."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "auto"
    """`auto` is bf16-mixed on a GPU that has it, 16-mixed on older ones, else 32-true."""
    compile: bool | Literal["graphs"] = False
    """Compile the model with torch.compile; `graphs` also has a GPU repeat its work as CUDA graphs, which spares a
    small model the time of starting each kernel."""
    threads: Annotated[int, Ge(1)] | Literal["auto"] | None = "auto"
    """CPU threads of each process; null is torch's own choice, `auto` at most that: as many as a step of this size can
    use."""
    fast_mkl: bool = True
    """Under Linux, have Intel's MKL use its fastest kernels on other makers' processors, too."""
    deterministic: bool = True
    """Use only deterministic algorithms on a GPU."""

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


@settings
class SweepConfig:
    """How a multirun's jobs belong together."""

    name: str | None = None
    """The name of the sweep's directory; null makes one from what varies."""
    retries: Annotated[int, Ge(0)] = 2
    """A failed job is run again this many times, once each time that the command is given."""
    seeds: Literal["auto"] | None = None
    """`auto` trains three seeds of all variants, from `seed` on, and further ones only of those that need them for a
    verdict; null trains the seeds that the command names."""
    max_seeds: Annotated[int, Ge(3)] = 12
    """The most seeds of a variant with `seeds=auto`."""
    job: str | None = None
    """The job's name; the sweeper sets it."""
