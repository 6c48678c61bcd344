"""Typed, validated configuration; the only code that knows OmegaConf's quirks.

A plain tree of settings goes in; a `Config` comes out, or one `UserError` that holds every problem found.
"""

import hashlib
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge, Lt
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptexp.data.settings import DataConfig
from gptexp.errors import UserError
from gptexp.models.settings import GPTConfig, ModelConfig
from gptexp.training.settings import (
    OBSERVING,
    SHORT,
    AdamWConfig,
    CosineConfig,
    HardwareConfig,
    OptimizerConfig,
    ScheduleConfig,
    SweepConfig,
    TrainerConfig,
)
from gptexp.validation import Tree, dataclasses_of, read, read_fields, show


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


_Objects = Annotated[dict[str, Tree], _read_objects]


@dataclass(frozen=True)
class Config:
    """Every setting of a run."""

    model: ModelConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = field(default_factory=CosineConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)  # further arguments of Lightning's Trainer
    # further Lightning callbacks by a name of the user's choice, each with its `_target_` and arguments
    callbacks: _Objects = field(default_factory=dict)
    logger: _Objects = field(default_factory=dict)  # Lightning loggers, in the same way; metrics.csv is always written
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1337  # of the initial weights, the order of batches and dropout
    max_steps: Annotated[int, Ge(1)] = 2000  # optimizer steps
    batch_size: Annotated[int, Ge(1)] = 12  # sequences of one optimizer step, over all devices and micro-batches
    # micro-batches into which a step's batch is cut, to save memory
    gradient_accumulation_steps: Annotated[int, Ge(1)] = 1
    grad_clip: Annotated[float, Ge(0)] = 1.0  # the gradient's norm is scaled down to this; 0 turns it off
    eval_interval: Annotated[int, Ge(1)] = 250  # steps between evaluations of the validation split
    # evaluate on this many evenly spaced windows instead of all, but for the last time
    eval_windows: Annotated[int, Ge(1)] | None = None
    eval_batch_size: Annotated[int, Ge(1)] = 64  # sequences of an evaluation batch on each device
    log_interval: Annotated[int, Ge(1)] = 10  # steps between rows of training metrics
    # steps between measurements of every layer; None measures none
    diagnostics_interval: Annotated[int, Ge(1)] | None = None
    checkpoint_interval: Annotated[int, Ge(1)] | None = None  # steps between checkpoints; None is `eval_interval`
    # stop after this many evaluations without a lower val/loss; None never stops
    early_stop_patience: Annotated[int, Ge(1)] | None = None
    sample_tokens: Annotated[int, Ge(0)] = 200  # length of the text sampled at each evaluation; 0 samples none
    output_dir: str = "outputs"  # folder of `runs/` and `sweeps/`
    name: str | None = None  # the run's name; None makes one from the variant
    resume: str | None = None  # a run directory to go on with, or "auto"; never stored, as `sweep` is not

    @property
    def variant(self) -> str:
        """The readable name of this variant and seed, such as `rmsnorm-pre-h4-s1337`."""
        return f"{self.model.label}-s{self.seed}"

    def sized(self, vocab_size: int) -> ModelConfig:
        """The model's configuration for a tokenizer of `vocab_size` symbols."""
        return replace(self.model, vocab_size=vocab_size)

    def tree(self) -> Tree:
        """The configuration as plain nested dictionaries, as it is stored with a run."""
        tree = asdict(self)
        del tree["resume"], tree["sweep"], tree["model"]["vocab_size"]
        tree["trainer"] = {k: v for k, v in tree["trainer"].items() if v is not None}
        return tree

    def essence(self) -> Tree:
        """Every setting that can change a result; names, paths, loggers and diagnostics cannot."""
        tree = self.tree()
        for key in ("output_dir", "name", "logger", "diagnostics_interval"):
            del tree[key]
        del tree["hardware"]["timeout"]
        trainer = {k: v for k, v in tree["trainer"].items() if k not in OBSERVING}
        return tree | {"model": self.model.tree(), "trainer": trainer}

    def fingerprint(self) -> str:
        """SHA-256 over `essence`."""
        return hashlib.sha256(json.dumps(self.essence(), sort_keys=True).encode()).hexdigest()


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it


def read_config(tree: Mapping[str, Any], cross_check: bool = True) -> Config:
    """Build a `Config` from a plain tree of settings; a missing key takes its default.

    The settings are checked against each other, too, if `cross_check`.

    Raises:
        UserError: with one line for every problem, all of them together.
    """
    problems: list[str] = []
    tree = _by_short_names(tree, problems)
    config = Config(**read_fields(Config, "", tree, problems, skip=("vocab_size",)))  # the tokenizer says vocab_size
    name = config.sweep.name if config.sweep else None
    if name is not None and not re.fullmatch(r"[\w+-][\w.+-]*", name):
        problems.append(f"sweep.name={show(name)}: names a directory; allowed: letters, digits, and any of _ . + -")
    if cross_check:
        problems += _cross_check(config)
    if problems:
        raise UserError(problems)
    return config


def load_config(path: Path) -> Config:
    """Read a stored `config.yaml`.

    Raises:
        UserError: when the file is missing or is not a valid configuration.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a configuration ({_first_line(error)})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no configuration")
    try:
        return read_config(tree)
    except UserError as error:
        raise UserError([f"{path}: {p}" for p in error.problems]) from error


def plain(config: DictConfig) -> Tree:
    """A composed Hydra configuration as plain dictionaries, interpolations resolved.

    Raises:
        UserError: when an interpolation cannot be resolved or a value is missing.
    """
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from error
    return typing.cast(Tree, tree)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """Nested settings as one dictionary with dotted keys."""
    flat: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def read_section(name: str, given: Any) -> Any:
    """One section by itself, such as "model", from a plain tree or from its dataclass; None is the default.

    A model's `vocab_size` may be set, too.

    Raises:
        UserError: with one line for every problem.
    """
    hint = typing.get_type_hints(Config, include_extras=True)[name]
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


def _cross_check(config: Config) -> list[str]:
    """Problems between settings, as far as the settings involved are themselves valid; the others are None."""
    model, hardware, interval = config.model, config.hardware, config.diagnostics_interval
    batch_size, accumulation = config.batch_size, config.gradient_accumulation_steps
    problems = [problem for section in (model, config.data) if section for problem in section.problems()]
    if hardware and batch_size and accumulation:
        problems += hardware.problems(batch_size, accumulation)
    if config.optimizer and config.optimizer.name == "muon":
        if hardware and hardware.strategy == "fsdp":
            problems.append("optimizer.name=muon: needs whole matrices, which hardware.strategy=fsdp cuts in pieces")
        if model and model.name == "bigram":
            problems.append("optimizer.name=muon: model.name=bigram has no hidden layers; allowed: adamw, sgd")
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
    keys = {*flatten(Config().tree()), "resume", *(f"trainer.{argument}" for argument in SHORT)}
    for section, hint in typing.get_type_hints(Config).items():
        keys |= {f"{section}.{f.name}" for cls in dataclasses_of(hint) for f in fields(cls)}
    return sorted(keys - {"model.vocab_size"})
