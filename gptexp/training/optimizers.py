"""Optimizers over groups of parameters: what decays and what does not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from gptexp.config.sections import OptimizerConfig
from gptexp.config.settings import settings
from gptexp.registry import OPTIMIZERS


@dataclass(frozen=True)
class Parameters:
    """A model's parameters, as an optimizer needs to know them."""

    named: list[tuple[str, nn.Parameter]]
    matrices: set[str]
    """Names of the parameters of two or more dimensions, embeddings among them; a sharded one hides its shape."""
    hidden: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Names of the matrices of hidden layers, and the rows of the parts of which each is made."""

    def decayed(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups with weight decay on matrices alone."""
        groups = [
            {"params": [p for n, p in self.named if n in self.matrices], "weight_decay": weight_decay},
            {"params": [p for n, p in self.named if n not in self.matrices], "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]


@OPTIMIZERS.register("adamw")
@settings
class AdamWConfig(OptimizerConfig):
    """AdamW, fused where the device has it; weight decay on matrices only (Loshchilov, Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """How much of the gradient's running average each step keeps."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99
    """How much of the squared gradient's running average each step keeps."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the squared gradient's average."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Of matrices, embeddings among them."""

    def build(self, parameters: Parameters, peak: float, fused: bool) -> Optimizer:
        """Torch's AdamW."""
        groups = parameters.decayed(self.weight_decay)
        return AdamW(groups, lr=peak, betas=(self.beta1, self.beta2), eps=self.eps, fused=fused)


@OPTIMIZERS.register("sgd")
@settings
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum; weight decay on matrices only."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Annotated[float, Gt(0)] = 0.1
    """The peak, which the schedule comes down from."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """How much of its direction each step keeps."""
    nesterov: bool = False
    """Look ahead along the momentum (Nesterov)."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Of matrices, embeddings among them."""

    def build(self, parameters: Parameters, peak: float, fused: bool) -> Optimizer:
        """Torch's SGD."""
        groups = parameters.decayed(self.weight_decay)
        return SGD(groups, lr=peak, momentum=self.momentum, nesterov=self.nesterov, fused=fused)
