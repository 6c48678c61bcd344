"""Optimizers over two groups of parameters: matrices, which decay, and the rest, which do not."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from gptexp.training.settings import AdamWConfig, OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[tuple[str, nn.Parameter]], matrices: set[str], fused: bool = True
) -> Optimizer:
    """An optimizer whose weight decay acts on the parameters named in `matrices` alone.

    Args:
        config: which optimizer, and its settings.
        parameters: (name, parameter) pairs.
        matrices: names of the parameters of two or more dimensions, embeddings among them. Named in advance,
            because a sharded parameter no longer shows its shape.
        fused: update all parameters in one kernel.
    """
    named = list(parameters)
    groups = [
        {"params": [p for n, p in named if n in matrices], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if n not in matrices], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if isinstance(config, AdamWConfig):
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=fused)
    return torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov, fused=fused
    )
