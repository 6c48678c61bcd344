"""What a wrong key or choice was probably meant to be."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, get_origin, get_type_hints

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from gptexp.config.choices import SECTIONS, VALUES, groups
from gptexp.config.schema import Config, flatten, known_keys
from gptexp.config.settings import instead, nearest

FREE = {name for name, hint in get_type_hints(Config).items() if get_origin(hint) is dict}
"""Sections to which a command may add keys of its own."""

OTHER_NAMES = {
    "lr": "optimizer.learning_rate", "min_lr": "schedule.min_lr_ratio", "lr_decay_iters": "schedule.decay_steps",
    "warmup": "schedule.warmup_steps", "warmup_iters": "schedule.warmup_steps",
    "steps": "max_steps", "iters": "max_steps", "max_iters": "max_steps",
    "epochs": "max_steps, the length of training in optimizer steps",
    "patience": "early_stop_patience", "clip": "grad_clip", "grad_accum": "gradient_accumulation_steps",
    "bs": "batch_size", "batch": "batch_size", "ctx": "model.block_size", "context_length": "model.block_size",
    "seq_len": "model.block_size", "d_model": "model.n_embd", "hidden_size": "model.n_embd",
    "vocab_size": "data.vocab_size",
    "ema": "callbacks=ema", "dataset": "data={}", "documents": "task=documents", "random_seed": "seed",
    "device": "hardware={}", "gpu": "hardware=gpu", "gpus": "hardware.devices",
    "dtype": "hardware.precision", "amp": "hardware.precision",
    "wandb": "logger=wandb, logger=none or logger.wandb.mode=offline", "project": "logger.wandb.project",
    "entity": "logger.wandb.entity", "out_dir": "output_dir, or hydra.run.dir for one run", "run_name": "name",
}  # fmt: skip
"""The setting that a key means, by the name that other programs give it; {} stands for its value."""

OTHER_CHOICES = {"cuda": "gpu", "ln": "layernorm", "bn": "batchnorm", "prenorm": "pre", "preln": "pre",
                 "postnorm": "post", "postln": "post"}  # fmt: skip
"""A choice by another name, in small letters without dashes."""

REGISTERED = {*VALUES, *SECTIONS, "data"}
"""The groups whose choices another package may add to."""

EXTRAS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit", "ray": "ray"}
"""The launchers that an extra of this package installs."""


def hint_of_choice(group: str, name: str, options: list[str]) -> str:
    """What stands after "unknown" in the line of a choice that there is not."""
    if group == "hydra/launcher" and name in EXTRAS:
        return f"; pip install 'gptexp[{EXTRAS[name]}]'"
    word = re.sub(r"[_-]", "", name.lower())
    meant = [f"{other}={name}" for other, choices in groups().items() if name in choices]
    if group == "data" and ("." in name or "/" in name):
        meant = [f"data=file data.path={name}"]
    elif group == "heads" and name.isdigit() and f"h{name}" not in options:
        meant = [f"model.n_head={name}"]
    if not meant:
        known = instead(OTHER_CHOICES.get(word, word), options)
        return known if group not in REGISTERED or "did you" in known else f"{known}; GPTEXP_IMPORT=MODULE finds yours"
    return f"; did you mean {meant[0]}? allowed: {', '.join(options)}"


def hint_of_key(override: Override, whole: DictConfig, declared: Iterable[str]) -> str:
    """What stands after "unknown key".

    Args:
        override: of the key.
        whole: the composed configuration.
        declared: the groups that there are.
    """
    key, value = override.key_or_group, override.get_value_string()
    known = known_keys()
    section, _, tail = key.rpartition(".")
    if key.partition(".")[0] in FREE:
        tree: Any = OmegaConf.to_container(whole)
        return nearest(key, flatten(tree)) or f"; to add it, write +{override.input_line}"
    if tail in OTHER_NAMES:
        return f"; did you mean {OTHER_NAMES[tail].format(OTHER_CHOICES.get(value, value))}?"
    names = {k.rpartition(".")[2]: k for k in reversed(known) if not section or k.startswith(f"{section}.")}
    if not section:
        names |= {group: f"{group}={value}" for group in declared}  # optimiser=muon
    near = get_close_matches(tail, names, 1, 0.7)
    return f"; did you mean {names[near[0]]}?" if near else nearest(tail if names else key, known)
