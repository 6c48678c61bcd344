"""Starts a model from another run's weights, by name, and its symbols by what they are."""

import math
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gptexp.data.tokenizers import Tokenizer, tokenizer_from_dict
from gptexp.errors import UserError
from gptexp.models.language_model import LanguageModel
from gptexp.runs.run import Run, checkpoint_named
from gptexp.training.load import read_checkpoint

SYMBOLS = ("wte.weight", "head.weight", "head.bias")
"""Parameters with a row for each symbol."""

POSITIONS = ("wpe.weight",)
"""Parameters with a row for each position."""


def lineage(init_from: str) -> dict[str, Any]:
    """What run.json keeps of the run that another one starts from.

    Raises:
        UserError: when there is none, or it has no such checkpoint.
    """
    run, checkpoint = Run.open(init_from, key="init_from"), checkpoint_named(init_from)
    step = int(read_checkpoint(run.checkpoint(checkpoint), f"init_from={init_from}")["global_step"])
    recipe = replace(run.config, seed=0).fingerprint()[:6]  # what such runs of different seeds share
    label = f"{run.config.model.label}, {step} steps on {run.info['data']['corpus']}, {recipe}"
    return {"path": str(run.path.absolute()), "checkpoint": checkpoint, "name": run.info["name"], "step": step,
            "config": run.info["fingerprints"]["config"], "label": label}  # fmt: skip


def initialize_from(model: LanguageModel, tokenizer: Tokenizer, source: dict[str, Any]) -> str:
    """Give a model the weights of the run of a `lineage`, in place.

    Symbols that both vocabularies have keep their rows, others keep their initial values, and so do n-grams where the
    vocabularies differ. Learned positions are cut or go on with initial values.

    Returns:
        what was taken, in words.

    Raises:
        UserError: which names the parameter that does not fit.
    """
    run, checkpoint = Run.open(source["path"], key="init_from"), source["checkpoint"]
    key = f"init_from={source['path']}"
    theirs = {name.removeprefix("model."): tensor
              for name, tensor in read_checkpoint(run.checkpoint(checkpoint), key)["state_dict"].items()
              if name.startswith("model.")}  # fmt: skip
    ours = model.state_dict()
    family, wanted = run.config.model.name, model.config.name
    if family != wanted:
        raise UserError(f"{key}: is a model={family}, this is a model={wanted}; allowed: the same")
    before = tokenizer_from_dict(run.info["tokenizer"])
    same = before.to_dict() == tokenizer.to_dict()
    if not same and family == "bigram":
        raise UserError(f"{key}: its table is of other symbols than those of this run; allowed: the same vocabulary")
    known, rows = _matched(before, tokenizer)
    if not len(known):
        raise UserError(f"{key}: the vocabularies have no symbol in common")
    for name in ours.keys() ^ theirs.keys():
        where = "has no counterpart there" if name in ours else "has no counterpart here"
        raise UserError(f"{key}: parameter {name} {where}; allowed: a model with the same parts")
    if "head.weight" in ours and ours["head.weight"].data_ptr() == ours["wte.weight"].data_ptr() and not torch.equal(
        theirs["head.weight"], theirs["wte.weight"]
    ):
        raise UserError(f"{key}: parameter head.weight is that of wte here and another one there; allowed: "
                        "model.tie_weights=false")  # fmt: skip
    said = [] if same else [_said(before, tokenizer, len(known))]
    for name, tensor in ours.items():
        other = theirs[name]
        if name.startswith("ngram.") and not same:
            said.append("new embeddings of n-grams")
        elif name in SYMBOLS and tensor.shape[1:] == other.shape[1:]:
            tensor[known] = other[rows].to(tensor.dtype)
        elif name in POSITIONS and tensor.shape[1:] == other.shape[1:]:
            shared = min(len(tensor), len(other))
            tensor[:shared] = other[:shared]
            said += [f"{shared} of {len(tensor)} positions"] if len(tensor) != len(other) else []
        elif tensor.shape == other.shape:
            tensor.copy_(other)
        else:
            raise UserError(f"{key}: parameter {name} is {tuple(tensor.shape)} here and {tuple(other.shape)} there; "
                            "allowed: the same shape")  # fmt: skip
    step = f"step {source['step']}"
    return f"starts from {source['name']}, {checkpoint}, {step}{': ' if said else ''}{'; '.join(said)}"


def _matched(before: Tokenizer, after: Tokenizer) -> tuple[Tensor, Tensor]:
    """The ids of the symbols that both have: in the new vocabulary, and in the old one."""
    old = {symbol: i for i, symbol in enumerate(before.symbols_by_id)}
    pairs = [(i, old[symbol]) for i, symbol in enumerate(after.symbols_by_id) if symbol in old]
    known, rows = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(known, dtype=torch.long), torch.tensor(rows, dtype=torch.long)


def _said(before: Tokenizer, after: Tokenizer, shared: int) -> str:
    new = [symbol for symbol in after.symbols_by_id if symbol not in set(before.symbols_by_id)]
    some = f" ({', '.join(map(repr, new[:3]))}{', ...' if len(new) > 3 else ''})" if new else ""
    return (f"{shared} of {after.vocab_size} symbols known, {len(new)} new{some}, {before.vocab_size - shared} dropped")


def freeze(model: nn.Module, patterns: list[str] | None) -> int:
    """Train only the parameters whose name fits one of the patterns, a tied one by either name; None trains all.

    Returns:
        the number of values that are trained.

    Raises:
        UserError: when a pattern fits none.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in named):
            examples = ", ".join(list(named)[:4])
            raise UserError(f"trainable=[{pattern}]: fits no parameter; allowed: patterns of names such as {examples}")
    chosen = {p for name, p in named.items() if patterns is None or any(fnmatchcase(name, key) for key in patterns)}
    for parameter in named.values():
        parameter.requires_grad_(parameter in chosen)
    return sum(math.prod(p.shape) for p in chosen)

