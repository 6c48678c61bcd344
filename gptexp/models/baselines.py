"""The simpler models that a GPT is measured against: a table of bigrams, and an MLP over the last few symbols."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.language_model import LanguageModel, initialise
from gptexp.models.norms import build_norm
from gptexp.models.settings import BigramConfig, MLPConfig


class Bigram(LanguageModel):
    """logits[n, l] = wte[ids[n, l]]: V x V parameters."""

    def __init__(self, config: BigramConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.vocab_size)
        initialise(self, seed, None if config.init == "torch" else lambda name: 0.02)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L) to (N, L, V)."""
        logits: Tensor = self.wte(ids)
        return logits


class MLP(LanguageModel):
    """The last `context` symbols, embedded side by side, through hidden layers tanh(norm(W h + b)), to logits.

    Before a row's first symbol stands symbol 0, which is the terminator of `data=names`. Source: Bengio et al. 2003,
    "A Neural Probabilistic Language Model", without its direct connections.
    """

    def __init__(self, config: MLPConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        widths = [config.context * config.n_embd] + [config.n_hidden] * config.n_layer
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        settings, shape = config.norm_settings(config.norm), config.used_norms[config.norm]
        self.norms = nn.ModuleList(build_norm(config.norm, settings, shape) for _ in self.hidden)
        self.head = nn.Linear(config.n_hidden, config.vocab_size)
        initialise(self, seed, self._deviation)

    def _deviation(self, name: str) -> float:
        """5/3 over the root of the inputs keeps the size of what a tanh passes on; the first logits are near 0."""
        if name == "wte.weight":
            return 1.0
        if name == "head.weight":
            return 0.01
        fan_in = self.get_parameter(name).shape[1]
        return float(5 / 3 * fan_in**-0.5)

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
