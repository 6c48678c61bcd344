"""Every setting of a run.

A plain tree of settings goes in; a `Config` comes out, or one `UserError` with a line for every problem.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import yaml
from annotated_types import Ge, Gt

from gptexp.config.choices import CHOSEN
from gptexp.config.sections import (
    DataConfig,
    HardwareConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    Seed,
    SweepConfig,
    TaskConfig,
)
from gptexp.config.settings import NEUTRAL, Tree, dataclasses_of, hints_of, marked, read, read_fields, settings, show
from gptexp.config.trainer import SHORT, TrainerConfig
from gptexp.errors import UserError
from gptexp.registry import MODELS, OPTIMIZERS, SCHEDULES, TASKS

Count = Annotated[int, Ge(1)]


def _read_objects(section: str, table: Any, problems: list[str]) -> dict[str, Tree]:
    """A section of objects by name. Whether each can be built is seen once Lightning is imported."""
    if not isinstance(table, Mapping | None):
        problems.append(f"{section}={show(table)}: must be a table of objects by name, each with its _target_")
        return {}
    entries = {str(name): entry for name, entry in (table or {}).items() if entry is not None}  # null: switched off
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("_target_"), str):
            problems.append(f"{section}.{name}: lacks _target_, the class to build; "
                            f"set {section}.{name}._target_=package.Class")  # fmt: skip
    return entries


_Objects = Annotated[dict[str, Any], _read_objects]


@settings
class Config:
    """Every setting of a run."""

    model: Annotated[ModelConfig, MODELS] = field(default_factory=MODELS.settings)
    data: DataConfig = field(default_factory=DataConfig)
    task: Annotated[TaskConfig, TASKS] = field(default_factory=TASKS.settings)
    optimizer: Annotated[OptimizerConfig, OPTIMIZERS] = field(default_factory=OPTIMIZERS.settings)
    schedule: Annotated[ScheduleConfig, SCHEDULES] = field(default_factory=SCHEDULES.settings)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sweep: Annotated[SweepConfig, NEUTRAL] = field(default_factory=SweepConfig)
    callbacks: _Objects = field(default_factory=dict)
    """Lightning callbacks by a name of your choice, each with its `_target_` and arguments."""
    logger: Annotated[_Objects, NEUTRAL] = field(default_factory=dict)
    """Lightning loggers, in the same way; metrics.csv is always written."""
    seed: Seed = 1337
    """Fixes the initial weights, the order of batches and dropout."""
    max_steps: Count | None = 2000
    """Optimizer steps; null sets no limit, with `max_seconds`."""
    max_seconds: Annotated[float, Gt(0)] | None = None
    """Seconds of training, evaluations left out, after which it ends, if `max_steps` does not end it before; the
    learning rate's schedule follows the seconds."""
    batch_size: Count = 12
    """Sequences of one optimizer step, over all devices and micro-batches."""
    batch_warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps in which the sequences of a step grow in a straight line to `batch_size` (Brown et al. 2020, "GPT-3")."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches into which a step's batch is cut, to save memory."""
    grad_clip: Annotated[float, Ge(0)] = 1.0
    """The gradient's norm is scaled down to this; 0 turns it off."""
    eval_interval: Count = 250
    """Steps between evaluations of the validation split."""
    eval_windows: Count | None = None
    """Evaluate on this many evenly spaced windows instead of all, but for the last time."""
    eval_batch_size: Count = 64
    """Sequences of an evaluation batch on each device."""
    log_interval: Count = 10
    """Steps between rows of training metrics."""
    diagnostics_interval: Annotated[Count | None, NEUTRAL] = None
    """Steps between measurements of every layer; null measures none."""
    checkpoint_interval: Count | None = None
    """Steps between checkpoints; null is `eval_interval`."""
    early_stop_patience: Count | None = None
    """Stop after this many evaluations without a lower val/loss; null never stops."""
    sample_tokens: Annotated[int, Ge(0)] = 200
    """Length of the text sampled at each evaluation; 0 samples none."""
    init_from: str | None = None
    """A run whose weights to start from: its directory, for the best checkpoint, or its `last.ckpt`."""
    trainable: list[str] | None = None
    """Train only the parameters whose names fit one of these patterns, such as `head*`; null trains all."""
    output_dir: Annotated[str, NEUTRAL] = "outputs"
    """The folder of `runs/` and `sweeps/`."""
    name: Annotated[str | None, NEUTRAL] = None
    """The run's name; null makes one from the variant."""
    resume: Annotated[str | None, NEUTRAL] = None
    """A run directory to continue, or `auto`: the newest unfinished run of this configuration. Never stored."""

    @property
    def variant(self) -> str:
        """The readable name of this variant and seed, such as `rmsnorm-pre-h4-s1337`."""
        return f"{self.model.label}-s{self.seed}"

    def share_done(self, step: float, seconds: float) -> float:
        """How much of training is done, in 0..1."""
        return min(1.0, max(step / (self.max_steps or math.inf), seconds / (self.max_seconds or math.inf)))

    def sized(self, vocab_size: int) -> ModelConfig:
        """The model's configuration for a tokenizer of `vocab_size` symbols."""
        return replace(self.model, vocab_size=vocab_size)

    def tree(self) -> Tree:
        """The configuration as plain nested dictionaries, as it is stored with a run."""
        tree: Tree = asdict(self)
        del tree["resume"], tree["sweep"], tree["model"]["vocab_size"]
        tree["trainer"] = {k: v for k, v in tree["trainer"].items() if v is not None}
        return tree

    def essence(self) -> Tree:
        """Every setting that can change a result."""
        neutral = marked(Config, NEUTRAL)
        tree = self.tree() | {"model": self.model.tree(), "data": self.data.tree()}
        for key in neutral:
            section, _, name = key.rpartition(".")
            (tree.get(section, {}) if section else tree).pop(name, None)
        return tree

    def fingerprint(self) -> str:
        """SHA-256 over `essence`."""
        return hashlib.sha256(json.dumps(self.essence(), sort_keys=True).encode()).hexdigest()


_SECTIONS = {f.name for f in fields(Config) if f.default is MISSING} - {"sweep"}
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it


def read_config(tree: Mapping[str, Any], cross_check: bool = True) -> Config:
    """Build a `Config` from a plain tree of settings; a missing key takes its default.

    The settings are checked against each other, too, if `cross_check`.

    Raises:
        UserError: with one line for every problem, all of them together.
    """
    problems: list[str] = []
    tree = _by_short_names(tree, problems)
    values = read_fields(Config, "", tree, problems, skip=("model.vocab_size",))  # the tokenizer says vocab_size
    task, data = values.get("task"), values.get("data", DataConfig())
    if task and not task.corpus and data and data.name == DataConfig.name:
        values["data"] = replace(data, name="none")  # the default corpus, which this task does not read
    sweep = values.get("sweep")
    name = sweep.name if sweep else None
    if name is not None and not re.fullmatch(r"[\w+-][\w.+-]*", name):
        problems.append(f"sweep.name={show(name)}: names a directory; allowed: letters, digits, and any of _ . + -")
    if cross_check:
        defaults = {f.name: f.default for f in fields(Config)} if values.keys() >= _SECTIONS else vars(Config())
        problems += _cross_check(SimpleNamespace(**defaults | values))
        if tree.get("max_steps", 1) is None and tree.get("max_seconds") is None:  # a wrong value is None by now, too
            problems.append("max_steps=null: needs max_seconds; allowed: an integer of at least 1")
    if problems:
        raise UserError(problems)
    return Config(**values)


def load_config(path: Path) -> Config:
    """Read a stored `config.yaml`.

    Raises:
        UserError: when the file is missing or is not a valid configuration.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a configuration ({first_line(error)})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no configuration")
    try:
        return read_config(tree)
    except UserError as error:
        foreign = "; GPTEXP_IMPORT=MODULE finds another package's"
        raise UserError(f"{path}: {p}{foreign if p.partition('=')[0] in CHOSEN else ''}"
                        for p in error.problems) from error  # fmt: skip


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """Nested settings as one dictionary with dotted keys."""
    flat: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def read_section(name: str, given: Any) -> Any:
    """One section by itself, such as "model", from a plain tree or from its dataclass; None is the default.

    A model's `vocab_size` may be set, too.

    Raises:
        UserError: with one line for every problem.
    """
    hint = hints_of(Config)[name]
    problems: list[str] = []
    known = type(given) in dataclasses_of(hint)
    section = given if known else read(hint, name, {} if given is None else given, problems)
    if isinstance(section, ModelConfig | DataConfig):
        problems += section.problems()
    if problems:
        raise UserError(problems)
    return section


def _by_short_names(tree: Mapping[str, Any], problems: list[str]) -> Tree:
    """The tree with those arguments of the Trainer that have a shorter name under that name."""
    trainer = tree.get("trainer")
    if not isinstance(trainer, Mapping):
        return dict(tree)
    tree = {**tree, "trainer": {k: v for k, v in trainer.items() if k not in SHORT}}
    given = {SHORT[k]: v for k, v in trainer.items() if k in SHORT and v is not None}
    if "eval_interval" in given:  # counts optimizer steps, Lightning batches
        interval = given.pop("eval_interval")
        batches = {**tree, **given}.get("gradient_accumulation_steps", 1)
        if isinstance(interval, int) and isinstance(batches, int) and batches and interval % batches == 0:
            given["eval_interval"] = interval // batches
        else:
            problems.append(f"trainer.val_check_interval={show(interval)}: must be a number of batches, a multiple of "
                            f"gradient_accumulation_steps={show(batches)}")  # fmt: skip
    hardware = {k.removeprefix("hardware."): given.pop(k) for k in list(given) if k.startswith("hardware.")}
    if hardware and isinstance(tree.get("hardware", {}), Mapping):
        given["hardware"] = {**tree.get("hardware", {}), **hardware}
    return tree | given


def _cross_check(config: SimpleNamespace) -> list[str]:
    """Problems between settings, as far as the settings involved are themselves valid; the others are None."""
    model, data, hardware, interval = config.model, config.data, config.hardware, config.diagnostics_interval
    batch_size, accumulation = config.batch_size, config.gradient_accumulation_steps
    problems = [problem for section in (model, data) if section for problem in section.problems()]
    if config.task and data:
        problems += config.task.problems(data)
    if hardware and batch_size and accumulation:
        problems += hardware.problems(batch_size, accumulation)
    if config.optimizer:
        problems += config.optimizer.problems(model, hardware)
    ratio = config.schedule.weight_decay_ratio if config.schedule else 1
    if config.optimizer and ratio != 1 and not getattr(config.optimizer, "weight_decay", 0):
        problems.append(f"schedule.weight_decay_ratio={ratio}: has no effect without optimizer.weight_decay")
    if config.batch_warmup_steps and hardware and hardware.compile:
        problems.append(f"batch_warmup_steps={config.batch_warmup_steps}: changes the shape of a batch, for which "
                        f"hardware.compile={str(hardware.compile).lower()} has one program; allowed: 0")  # fmt: skip
    if model and hardware and model.counted and (hardware.devices, hardware.num_nodes) not in ((1, 1), ("auto", 1)):
        problems.append(f"hardware.devices={hardware.devices}: model.name={model.name} counts in one process; "
                        "allowed: 1")  # fmt: skip
    given = {"init_from": config.init_from, "trainable": config.trainable, "max_seconds": config.max_seconds}
    problems += [f"{key}={show(value)}: has no effect with model.name={model.name}, which counts"
                 for key, value in given.items() if model and model.counted and value is not None]  # fmt: skip
    if interval and hardware:
        opaque = {f"hardware.compile={str(hardware.compile).lower()}": hardware.compile,
                  "hardware.strategy=fsdp": hardware.strategy == "fsdp"}  # fmt: skip
        problems += [f"diagnostics_interval={interval}: sees no layer of a model with {k}" for k in opaque if opaque[k]]
    if model and batch_size and accumulation and batch_size // accumulation < model.min_sequences:
        problems.append(
            f"batch_size={batch_size}: model.norm={model.tree()['norm']} as it is set needs at least "
            f"{model.min_sequences} sequences in a micro-batch (batch_size / gradient_accumulation_steps = "
            f"{batch_size // accumulation})")
    return problems


def known_keys() -> list[str]:
    """Every settable key, dotted."""
    keys = {*flatten({"model": asdict(Config().model)}), *(f"trainer.{argument}" for argument in SHORT)}
    for section, hint in hints_of(Config).items():
        classes = dataclasses_of(hint)
        keys |= {f"{section}.{f.name}" for cls in classes for f in fields(cls)} if classes else {section}
    return sorted(keys - {"model.vocab_size"})
