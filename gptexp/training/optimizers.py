"""Optimizers over groups of parameters: what decays and what does not, and for Muon the matrices of hidden layers."""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from gptexp.training.muon import Muon
from gptexp.training.settings import AdamWConfig, MuonConfig, OptimizerConfig


def build_optimizer(
    config: OptimizerConfig,
    parameters: Iterable[tuple[str, nn.Parameter]],
    matrices: set[str],
    hidden: Mapping[str, int] | None = None,
    fused: bool = True,
    learning_rate: float | None = None,
) -> Optimizer:
    """An optimizer whose weight decay acts on matrices alone: with Muon, on those of hidden layers.

    Args:
        config: which optimizer, and its settings.
        parameters: (name, parameter) pairs.
        matrices: names of the parameters of two or more dimensions, embeddings among them. Named in advance,
            because a sharded parameter no longer shows its shape.
        hidden: names of the matrices of hidden layers, and of how many equal parts each is made.
        fused: update all parameters in one kernel.
        learning_rate: the peak, instead of the config's.
    """
    named, peak = list(parameters), learning_rate or config.learning_rate
    if isinstance(config, MuonConfig):
        return _muon(config, named, hidden or {}, fused, peak)
    groups = [
        {"params": [p for n, p in named if n in matrices], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if n not in matrices], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if isinstance(config, AdamWConfig):
        return AdamW(groups, lr=peak, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)
    return SGD(groups, lr=peak, momentum=config.momentum, nesterov=config.nesterov, fused=fused)


def _muon(
    config: MuonConfig, named: list[tuple[str, nn.Parameter]], hidden: Mapping[str, int], fused: bool, peak: float
) -> Muon:
    groups = [
        {"params": [p for n, p in named if hidden.get(n) == parts], "parts": parts, "lr": peak,
         "weight_decay": config.weight_decay} for parts in sorted(set(hidden.values()))
    ]  # fmt: skip
    others = config.adam_learning_rate * peak / config.learning_rate
    groups.append({"params": [p for n, p in named if n not in hidden], "lr": others})
    return Muon(groups, momentum=config.momentum, iterations=config.iterations, betas=(config.beta1, config.beta2),
                eps=config.eps, fused=fused)  # fmt: skip
