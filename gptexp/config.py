"""Typed, validated configuration; the only code that knows OmegaConf's quirks.

A plain tree of settings goes in; a `Config` comes out, or one `UserError` that holds every problem found.
"""

import hashlib
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from annotated_types import Ge, Lt
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptexp.data.settings import DataConfig
from gptexp.data.settings import check as check_data
from gptexp.errors import UserError
from gptexp.models.registry import NORMS, default_norms
from gptexp.models.settings import GPTConfig, ModelConfig
from gptexp.training import settings as training
from gptexp.training.settings import (
    OBSERVING,
    SHORT,
    HardwareConfig,
    OptimizerConfig,
    ScheduleConfig,
    SweepConfig,
    TrainerConfig,
    check_hardware,
)
from gptexp.validation import Tree, nearest, read_fields, show


@dataclass(frozen=True)
class Config:
    """Every setting of a run.

    Attributes:
        seed: of the initial weights, the order of batches and dropout.
        max_steps: optimizer steps.
        batch_size: sequences of one optimizer step, over all devices and micro-batches.
        gradient_accumulation_steps: micro-batches into which a step's batch is cut, to save memory.
        grad_clip: the gradient's norm is scaled down to this; 0 turns it off.
        eval_interval: steps between evaluations of the validation split.
        eval_windows: evaluate on this many evenly spaced windows instead of all, but for the last time.
        eval_batch_size: sequences of an evaluation batch on each device.
        log_interval: steps between rows of training metrics.
        diagnostics_interval: steps between measurements of every layer; None measures none.
        checkpoint_interval: steps between checkpoints; None is `eval_interval`.
        early_stop_patience: stop after this many evaluations without a lower val/loss; None never stops.
        sample_tokens: length of the text sampled at each evaluation; 0 samples none.
        output_dir: folder of `runs/` and `sweeps/`.
        name: the run's name; None makes one from the variant.
        resume: a run directory to go on with, or "auto"; never stored, as `sweep` is not.
        trainer: further arguments of Lightning's Trainer.
        callbacks: further Lightning callbacks by a name of the user's choice, each with its `_target_` and arguments.
        logger: Lightning loggers, in the same way; metrics.csv is always written.
    """

    model: ModelConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=training.AdamWConfig)
    schedule: ScheduleConfig = field(default_factory=training.CosineConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: dict[str, Tree] = field(default_factory=dict)
    logger: dict[str, Tree] = field(default_factory=dict)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1337
    max_steps: Annotated[int, Ge(1)] = 2000
    batch_size: Annotated[int, Ge(1)] = 12
    gradient_accumulation_steps: Annotated[int, Ge(1)] = 1
    grad_clip: Annotated[float, Ge(0)] = 1.0
    eval_interval: Annotated[int, Ge(1)] = 250
    eval_windows: Annotated[int, Ge(1)] | None = None
    eval_batch_size: Annotated[int, Ge(1)] = 64
    log_interval: Annotated[int, Ge(1)] = 10
    diagnostics_interval: Annotated[int, Ge(1)] | None = None
    checkpoint_interval: Annotated[int, Ge(1)] | None = None
    early_stop_patience: Annotated[int, Ge(1)] | None = None
    sample_tokens: Annotated[int, Ge(0)] = 200
    output_dir: str = "outputs"
    name: str | None = None
    resume: str | None = None

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
        without = ("model", "sweep", "resume", "output_dir", "name", "trainer", "logger", "diagnostics_interval")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in without}
        plainly = {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in values.items()}
        del plainly["hardware"]["timeout"]
        trainer = {k: v for k, v in self.tree()["trainer"].items() if k not in OBSERVING}
        return plainly | {"model": self.model.tree(), "trainer": trainer}

    def fingerprint(self) -> str:
        """SHA-256 over `essence`."""
        return hashlib.sha256(json.dumps(self.essence(), sort_keys=True).encode()).hexdigest()


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it


_SECTIONS: dict[str, tuple[type, ...]] = {
    "model": get_args(ModelConfig),
    "data": (DataConfig,),
    "optimizer": get_args(OptimizerConfig),
    "schedule": get_args(ScheduleConfig),
    "hardware": (HardwareConfig,),
    "trainer": (TrainerConfig,),
    "sweep": (SweepConfig,),
}
_OBJECTS = ("callbacks", "logger")  # sections of objects that are built by their _target_


def read_config(tree: Mapping[str, Any], cross_check: bool = True) -> Config:
    """Build a `Config` from a plain tree.

    Args:
        tree: nested settings; a missing key takes its default.
        cross_check: also check settings against each other.

    Raises:
        UserError: with one line for every problem, all of them together.
    """
    problems: list[str] = []
    tree = _by_short_names(tree, problems)
    values: Tree = {section: _read_objects(section, tree.get(section), problems) for section in _OBJECTS}
    for section, classes in _SECTIONS.items():
        values[section] = _read_section(section, classes, tree.get(section, {}), problems)
    sections = {*_SECTIONS, *_OBJECTS}
    top = {k: v for k, v in tree.items() if k not in sections}
    values |= read_fields(Config, "", top, problems, skip=sections) or {}
    name = values["sweep"].name if values["sweep"] else None
    if name is not None and not re.fullmatch(r"[\w+-][\w.+-]*", name):
        problems.append(f"sweep.name={show(name)}: names a directory; allowed: letters, digits, and any of _ . + -")
    if cross_check:
        problems += _cross_check(values)
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


def _read_section(
    name: str, classes: tuple[type, ...], tree: Any, problems: list[str], vocab_size: bool = False
) -> Any:
    if not isinstance(tree, Mapping):
        choices = [c().name for c in classes] if len(classes) > 1 else []
        allowed = f"a group choice: {', '.join(choices)}" if choices else "a group of settings"
        problems.append(f"{name}={show(tree)}: must be {allowed}")
        return None
    cls = classes[0]
    if len(classes) > 1:
        by_name = {c().name: c for c in classes}
        choice = tree["name"] if "name" in tree else getattr(Config(), name).name
        if choice not in by_name:
            problems.append(
                f"{name}.name={show(choice)}: unknown{nearest(str(choice), by_name)} allowed: {', '.join(by_name)}")
            return None
        cls = by_name[choice]
    before = len(problems)
    norms = {}
    if "norms" in (f.name for f in fields(cls)):  # each norm's settings are a dataclass of their own
        norms = {"norms": _read_norms(tree.get("norms", {}), problems)}
        tree = {k: v for k, v in tree.items() if k != "norms"}
    skip = {"norms"} if vocab_size else {"vocab_size", "norms"}  # the tokenizer says vocab_size
    values = read_fields(cls, f"{name}.", tree, problems, skip=skip)
    return None if values is None or len(problems) > before else cls(**values, **norms)


def read_section(name: str, given: Any) -> Any:
    """One section by itself, such as "model", from a plain tree or from its dataclass.

    Args:
        name: of the section.
        given: None is the default; a model's `vocab_size` may be set, too.

    Raises:
        UserError: with one line for every problem.
    """
    classes = _SECTIONS[name]
    if isinstance(given, classes):
        return given
    problems: list[str] = []
    made = _read_section(name, classes, {} if given is None else given, problems, vocab_size=True)
    if name == "model" and made:
        problems += made.problems()
    if problems:
        raise UserError(problems)
    return made


def _by_short_names(tree: Mapping[str, Any], problems: list[str]) -> Tree:
    """The tree with those arguments of the Trainer that have a shorter name under that name."""
    tree = dict(tree)
    trainer = tree.get("trainer")
    if not isinstance(trainer, Mapping):
        return tree
    tree["trainer"] = {k: v for k, v in trainer.items() if k not in SHORT}
    for argument, value in trainer.items():
        if argument not in SHORT or value is None:
            continue
        section, _, key = SHORT[argument].rpartition(".")
        if argument == "val_check_interval":  # Lightning counts batches, eval_interval optimizer steps
            batches = trainer.get("accumulate_grad_batches") or tree.get("gradient_accumulation_steps", 1)
            if not isinstance(value, int) or value % batches:
                problems.append(f"trainer.val_check_interval={show(value)}: must be a number of batches, a multiple of "
                                f"gradient_accumulation_steps={batches}")  # fmt: skip
            else:
                tree[key] = value // batches
        elif section:
            tree[section] = {**tree.get(section, {}), key: value}
        else:
            tree[key] = value
    return tree


def _read_objects(section: str, table: Any, problems: list[str]) -> dict[str, Tree]:
    """A section of objects by name. Whether each can be built is seen once Lightning is imported."""
    if table is None:
        return {}
    if not isinstance(table, Mapping):
        problems.append(f"{section}={show(table)}: must be a table of objects by name, each with its _target_")
        return {}
    found: dict[str, Tree] = {}
    for name, entry in table.items():
        if entry is None:  # switched off
            continue
        if not isinstance(entry, Mapping):
            problems.append(f"{section}.{name}={show(entry)}: must be a table with _target_, the class, and arguments")
        elif not isinstance(entry.get("_target_"), str):
            problems.append(f"{section}.{name}: lacks _target_, the class to build, such as "
                            f"{section}.{name}._target_={_EXAMPLES[section]}")  # fmt: skip
        else:
            found[str(name)] = dict(entry)
    return found


_EXAMPLES = {
    "callbacks": "lightning.pytorch.callbacks.LearningRateMonitor",
    "logger": "lightning.pytorch.loggers.CSVLogger",
}


def _read_norms(table: Any, problems: list[str]) -> Tree:
    """The table model.norms: each entry checked by its norm's own settings dataclass."""
    read: Tree = default_norms()
    if not isinstance(table, Mapping):
        problems.append(f"model.norms={show(table)}: must be a table of settings by norm")
        return read
    for name, entry in table.items():
        if name not in NORMS:
            problems.append(f"model.norms.{name}: unknown norm{nearest(str(name), NORMS)} allowed: {', '.join(NORMS)}")
            continue
        if repr(entry) == repr(read[name]):  # true is not 1
            continue
        if not isinstance(entry, Mapping):
            problems.append(f"model.norms.{name}={show(entry)}: must be a table of settings")
            continue
        values = read_fields(NORMS[name].settings, f"model.norms.{name}.", entry, problems)
        if values is not None:
            read[name] = asdict(NORMS[name].settings(**values))
    return read


def _cross_check(values: Tree) -> list[str]:
    """Problems between settings, as far as the settings involved are themselves valid."""
    problems: list[str] = []
    model, data, hardware = values.get("model"), values.get("data"), values.get("hardware")
    problems += model.problems() if model else []
    problems += check_data(data) if data else []
    batch_size = values.get("batch_size", Config.batch_size)
    accumulation = values.get("gradient_accumulation_steps", Config.gradient_accumulation_steps)
    problems += check_hardware(hardware, batch_size, accumulation) if hardware else []
    if getattr(values.get("optimizer"), "name", "") == "muon":
        if hardware and hardware.strategy == "fsdp":
            problems.append("optimizer.name=muon: needs whole matrices, which hardware.strategy=fsdp cuts in pieces")
        if model and model.name == "bigram":
            problems.append("optimizer.name=muon: model.name=bigram has no hidden layers; allowed: adamw, sgd")
    problems += _check_diagnostics(values.get("diagnostics_interval"), hardware)
    micro = batch_size // accumulation
    if model and micro < model.min_sequences:
        problems.append(
            f"batch_size={batch_size}: model.norm={model.norm} as it is set needs at least {model.min_sequences} "
            f"sequences in a micro-batch (batch_size / gradient_accumulation_steps = {micro})")
    return problems


def _check_diagnostics(interval: int | None, hardware: HardwareConfig | None) -> list[str]:
    if interval is None or hardware is None:
        return []
    compiled = f"hardware.compile={str(hardware.compile).lower()}"
    opaque = {compiled: hardware.compile, "hardware.strategy=fsdp": hardware.strategy == "fsdp"}
    return [f"diagnostics_interval={interval}: sees no layer of a model with {k}" for k, used in opaque.items() if used]


def norm_hint(key: str) -> str:
    """For an unknown setting of a norm, such as model.norms.rmsnorm.momentum: the settings that the norm has."""
    name = key.removeprefix("model.norms.").partition(".")[0]
    if not key.startswith("model.norms.") or name not in NORMS:
        return ""
    settings = ", ".join(f.name for f in fields(NORMS[name].settings))
    return f"; the settings of {name} are {settings}" if settings else f"; {name} has no settings"


def known_keys() -> list[str]:
    """Every settable key, dotted."""
    keys = [*flatten(Config().tree()), *_OBJECTS, "resume"]
    for section, classes in _SECTIONS.items():
        keys += [f"{section}.{f.name}" for cls in classes for f in fields(cls) if f.name != "vocab_size"]
    return sorted(set(keys))
