"""A decoder-only GPT, in the order in which data meets its parts.

Its settings are in `gpt_settings`, and the parts with modules of their own in `attention`, `positions`, `norms`,
`batch_norms`, `placements`, `activations` and `ngrams`; the initial values of the weights are a table in
`initialization`.
"""

from functools import partial

import torch
from torch import Tensor, nn

from gptexp.inference.kv_cache import CachedDecoder, Positions
from gptexp.models.attention import CausalSelfAttention, softcapped
from gptexp.models.gpt_settings import GPTConfig
from gptexp.models.initialization import gpt_std, initialize
from gptexp.models.language_model import LanguageModel
from gptexp.models.ngrams import NGrams
from gptexp.models.norms import build_norm, normalized
from gptexp.models.positions import Relative, within
from gptexp.registry import MODELS, POSITIONS


class FeedForward(nn.Module):
    """Two linear layers around a non-linearity, 4C wide; projection=false omits the second.

    With a gated activation there is a third, and all are 8C/3 wide (rounded up to a multiple of 8).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.act, self.dropout = config.act.function, config.dropout
        linear = partial(nn.Linear, bias=config.bias)
        self.gate = linear(config.n_embd, config.inner_dim) if config.act.gated else None
        self.fc = linear(config.n_embd, config.inner_dim)
        self.proj = linear(config.inner_dim, config.n_embd) if config.projection else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        h = self.act(self.fc(x)) if self.gate is None else self.act(self.gate(x)) * self.fc(x)  # (N, L, 4C)
        return torch.dropout(h if self.proj is None else self.proj(h), self.dropout, self.training)


class Block(nn.Module):
    """An attention and a feed-forward sub-layer, each with its residual connection and norms."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.residual1, self.attn = _connection(config, "attention", layer), CausalSelfAttention(config, layer)
        self.residual2 = _connection(config, "mlp", layer) if config.inner_dim else None
        self.mlp = FeedForward(config) if config.inner_dim else None

    def forward(
        self, x: Tensor, mask: Tensor | None, relative: Relative, positions: Positions | None = None,
        cache: CachedDecoder | None = None,
    ) -> Tensor:  # fmt: skip
        """(N, L, C) to (N, L, C); see `CausalSelfAttention` for relative and cache."""
        x = self.residual1(x, lambda h: self.attn(h, relative, cache=cache), mask, positions)
        return x if self.residual2 is None or self.mlp is None else self.residual2(x, self.mlp, mask, positions)


@MODELS.register("gpt", GPTConfig)
class GPT(LanguageModel):
    """Token ids (N, L) to logits (N, L, V).

    Args:
        config: the architecture.
        seed: of the initial weights, see `initialization`.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.place, self.dropout = config, config.place, config.dropout
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngram = NGrams(config) if config.ngram > 1 else None
        self.wpe = POSITIONS[config.position].made(POSITIONS.settings(config.position), config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm_f = _norm(config, "final", config.n_layer) if config.has_final_norm else None
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias and not config.tie_weights)
        if config.tie_weights:
            self.head.weight = self.wte.weight
        shapes = {name: p.shape for name, p in self.named_parameters()}
        initialize(self, seed, None if config.init == "torch" else lambda name: gpt_std(config, name, shapes[name]))
        for name, p in self.named_parameters():
            if name == "ngram.weight" or (config.zero_init and name.endswith("proj.weight")):
                nn.init.zeros_(p)

    def flops_per_token(self) -> float:
        """Floating-point operations per token of one training step (forward and backward).

        6 per weight of a linear layer, plus the attention scores: Chowdhery et al. 2022, "PaLM", appendix B.
        """
        c: GPTConfig = self.config
        seen = min(c.block_size, c.window or c.block_size)
        return super().flops_per_token() + 12.0 * c.n_layer * c.qkv_sizes[0] * seen

    @property
    def cache_bytes(self) -> int:
        """The keys and values of one text."""
        c: GPTConfig = self.config
        return 4 * c.n_layer * c.block_size * sum(c.qkv_sizes[1:])

    @property
    def hidden_matrices(self) -> dict[str, tuple[int, ...]]:
        """As its base; the weight of queries, keys and values holds three."""
        return {name: self.config.qkv_sizes if name.endswith(".qkv.weight") else rows
                for name, rows in super().hidden_matrices.items()}  # fmt: skip

    def decoder(self, n_rows: int) -> CachedDecoder:
        """Computes the next-token logits of `n_rows` growing rows with a KV cache."""
        return CachedDecoder(self, n_rows)

    def forward(self, ids: Tensor, mask: Tensor | None = None, cache: CachedDecoder | None = None) -> Tensor:
        """Next-token logits at each position.

        Args:
            ids: (N, L) int64, L at most `block_size`.
            mask: None, or (N, L) bool that is False at padding, which must be at the end of its row.
            cache: prepared for these ids; it knows their positions, and the keys and values of those before them.

        Returns:
            (N, L, V).
        """
        positions = slice(ids.shape[1]) if cache is None else cache.positions
        x = self.wte(ids)  # (N, L, C)
        if self.ngram is not None:
            x = x + self.ngram(ids, None if cache is None else cache.preceding)
        x, relative = self.wpe.embed(x, positions), self.wpe.relative(positions)
        if self.config.window is not None:
            relative = within(self.config.window, relative, positions, x.device)
        if self.config.value_residual:
            relative = relative._replace(first_values=[])
        x = self.place.enter(torch.dropout(x, self.dropout, self.training))
        for block in self.blocks:
            x = block(x, mask, relative, positions, cache)
        logits: Tensor = self.head(self.place.leave(x, lambda y: normalized(self.norm_f, y, mask, positions)))
        return softcapped(logits, self.config.logit_softcap)


def _connection(config: GPTConfig, part: str, layer: int) -> nn.Module:
    place = config.place.at(part, layer, config.n_layer)
    alpha = place.alpha(config.n_layer) if config.residual else 0.0
    return place.connection(lambda: _norm(config, part, layer), alpha)


def _norm(config: GPTConfig, part: str, layer: int) -> nn.Module:
    name = config.norm_of(part)
    return build_norm(name, config.norm_settings(name), config.site(part, layer))
