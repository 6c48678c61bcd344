"""Simple models to measure a GPT against: a table of bigrams, and an MLP over the last few symbols."""

from itertools import pairwise
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.config.sections import ModelConfig
from gptexp.config.settings import VARIANT, settings
from gptexp.models.initialization import initialize
from gptexp.models.language_model import LanguageModel
from gptexp.models.norms import NormSite, build_norm
from gptexp.models.settings import NormedConfig, NormName
from gptexp.registry import MODELS


@settings
class BigramConfig(ModelConfig):
    """A table of logits with one row per symbol: the next symbol depends on the last one alone."""

    name: Literal["bigram"] = "bigram"
    init: Literal["gpt2", "torch"] = "gpt2"
    """The standard deviation of the initial weights: 0.02 for `gpt2`, 1 for `torch`, as in `nn.Embedding`."""


@MODELS.register("bigram", BigramConfig)
class Bigram(LanguageModel):
    """logits[n, l] = wte[ids[n, l]]: V x V parameters."""

    def __init__(self, config: BigramConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.vocab_size)
        initialize(self, seed, None if config.init == "torch" else lambda name: 0.02)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L) to (N, L, V)."""
        logits: Tensor = self.wte(ids)
        return logits


@settings
class MLPConfig(NormedConfig):
    """The last `context` symbols, embedded, through hidden layers: Bengio et al. 2003."""

    name: Literal["mlp"] = "mlp"
    context: Annotated[int, Ge(1)] = 3
    """How many symbols the model sees."""
    n_embd: Annotated[int, Ge(1)] = 16
    """Channels of a symbol's embedding."""
    n_hidden: Annotated[int, Ge(1)] = 256
    """Width of the hidden layers."""
    n_layer: Annotated[int, Ge(1)] = 1
    """Number of hidden layers."""
    residual: bool = False
    """Add each hidden layer's input to its output, from the second layer on."""
    norm: Annotated[NormName, VARIANT] = "none"
    """The norm between a hidden layer's linear map and its tanh."""
    bias: bool = True
    """Hidden layers have biases."""
    hidden_std: Annotated[float, Ge(0)] | None = None
    """The standard deviation of hidden layers' initial weights; null is 5/3 over the root of their inputs, which keeps
    the size of a tanh's output."""
    head_std: Annotated[float, Ge(0)] = 0.01
    """That of the head's."""
    bias_std: Annotated[float, Ge(0)] = 0.0
    """That of all biases of linear layers."""

    @property
    def used_norms(self) -> dict[str, NormSite]:
        """The norms in use, each with the first of its sites."""
        return {self.norm: NormSite(self.n_hidden, self.block_size, True, "hidden")}

    @property
    def tags(self) -> list[str]:
        """The words by which a dashboard finds this variant."""
        return ["mlp", self.norm]

    def problems(self) -> list[str]:
        """Problems between settings that are each valid alone; one line per problem."""
        alone = self.residual and self.n_layer == 1
        own = ["model.residual=true: has no effect with model.n_layer=1"] if alone else []
        return super().problems() + own


@MODELS.register("mlp", MLPConfig)
class MLP(LanguageModel):
    """The last `context` symbols, embedded side by side, through hidden layers tanh(norm(W h + b)), to logits.

    A row's first symbol is preceded by symbol 0, which is the terminator of `data=names`. Source: Bengio et al. 2003,
    "A Neural Probabilistic Language Model", without its direct connections.
    """

    def __init__(self, config: MLPConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        widths = [config.context * config.n_embd] + [config.n_hidden] * config.n_layer
        self.hidden = nn.ModuleList(nn.Linear(*pair, bias=config.bias) for pair in pairwise(widths))
        settings, site = config.norm_settings(config.norm), config.used_norms[config.norm]
        self.norms = nn.ModuleList(build_norm(config.norm, settings, site) for _ in self.hidden)
        self.head = nn.Linear(config.n_hidden, config.vocab_size)
        initialize(self, seed, self._deviation)

    def _deviation(self, name: str) -> float:
        """Of a parameter's initial values, by its name: Kaiming He et al. 2015 for the hidden layers."""
        config: MLPConfig = self.config
        if name == "wte.weight":
            return 1.0
        if name.endswith("bias"):
            return config.bias_std
        if name == "head.weight":
            return config.head_std
        fan_in = self.get_parameter(name).shape[1]
        return float(5 / 3 * fan_in**-0.5) if config.hidden_std is None else config.hidden_std

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L) to (N, L, V); mask is (N, L), False at padding."""
        k = self.config.context
        past = F.pad(ids, (k - 1, 0)).unfold(1, k, 1)  # (N, L, k): position l and the k - 1 before it
        h = self.wte(past).flatten(2)  # (N, L, k C)
        for i, (linear, norm) in enumerate(zip(self.hidden, self.norms, strict=True)):
            y = torch.tanh(norm(linear(h), mask))
            h = h + y if self.config.residual and i else y
        logits: Tensor = self.head(h)
        return logits
