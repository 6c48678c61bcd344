"""A decoder-only GPT, its parts in the order in which data meets them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.attention import CausalSelfAttention, rope_table, sinusoidal_table
from gptexp.models.generation import CachedDecoder, Positions
from gptexp.models.language_model import LanguageModel, initialise
from gptexp.models.norms import Positional, build_norm
from gptexp.models.settings import GPTConfig


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()  # So et al. 2021, "Primer"


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "relu_squared": _relu_squared,
    "swiglu": F.silu,
}  # fmt: skip


class NGrams(nn.Embedding):
    """The sum of embeddings of the last 2, 3 .. n tokens, initialized to 0.

    Each length has a table of its own, with a row for each n-gram where there are `ngram_rows` or fewer, else with
    that many rows, of which a hash chooses one. Positions before the first token count as a further symbol, V.
    Sources: Huang et al. 2025, "Over-Tokenized Transformer"; Pagnoni et al. 2024, "Byte Latent Transformer" (hashing).
    """

    def __init__(self, config: GPTConfig) -> None:
        base, rows = config.vocab_size + 1, config.ngram_rows
        sizes = [min(rows, base**k) for k in range(2, config.ngram + 1)]
        super().__init__(sum(sizes), config.n_embd)
        self.base, self.sizes = base, sizes

    def forward(self, ids: Tensor, preceding: Tensor | None = None) -> Tensor:
        """(N, L, C).

        Args:
            ids: (N, L) int64.
            preceding: the tokens before those, (N, n - 1), V where there are none; None where ids begin their rows.
        """
        (N, L), n = ids.shape, len(self.sizes) + 1
        if preceding is None:
            preceding = ids.new_full((N, n - 1), self.base - 1)
        tokens, number = torch.cat([preceding, ids], dim=1), ids
        found, offset = [], 0
        for k, size in enumerate(self.sizes, 2):
            power = (self.base ** (k - 1) + 2**63) % 2**64 - 2**63  # wrapped, as int64 products are
            number = number + tokens[:, n - k : n - k + L] * power  # one for each k-gram
            row = number if size == self.base**k else _hashed(number) % size
            found.append(row + offset)
            offset += size
        return F.embedding(torch.stack(found, dim=-1), self.weight).sum(-2)


def _hashed(number: Tensor) -> Tensor:
    """40-bit hashes of int64 numbers: Fibonacci hashing, Knuth 6.4."""
    return (number * -0x61C8864680B583EB >> 24) & (2**40 - 1)


class FeedForward(nn.Module):
    """Two linear layers around a non-linearity, 4C wide; projection=false omits the second.

    swiglu has a third, gating layer, and is 8C/3 wide (rounded up to a multiple of 8) so that the number of parameters
    stays the same. Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.act, self.dropout = _ACTIVATIONS[config.activation], config.dropout
        width = config.inner_dim
        self.gate = nn.Linear(config.n_embd, width, bias=config.bias) if config.activation == "swiglu" else None
        self.fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.bias) if config.projection else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        h = self.act(self.fc(x)) if self.gate is None else self.act(self.gate(x)) * self.fc(x)  # (N, L, 4C)
        return torch.dropout(h if self.proj is None else self.proj(h), self.dropout, self.training)


class Residual(nn.Module):
    """around(alpha x + after(f(before(x)))): a residual connection with the norms of a placement.

    residual=false omits alpha x.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        place = config.place
        self.alpha = (place.alpha(config.n_layer) if place.alpha else 1.0) if config.residual else 0.0
        self.before, self.after, self.around = (
            _norm(config) if wanted else None for wanted in (place.before, place.after, place.around)
        )

    def forward(
        self, x: Tensor, f: Callable[[Tensor], Tensor], mask: Tensor | None, positions: Positions | None = None
    ) -> Tensor:
        """(N, L, C) to (N, L, C); positions are those of x, None for the first L."""
        y = _normalized(self.after, f(_normalized(self.before, x, mask, positions)), mask, positions)
        if self.alpha:
            y = (x if self.alpha == 1.0 else self.alpha * x) + y
        return _normalized(self.around, y, mask, positions)


class Block(nn.Module):
    """An attention and a feed-forward sub-layer, each with its residual connection and norms."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.residual1, self.attn = Residual(config), CausalSelfAttention(config)
        self.residual2 = Residual(config) if config.inner_dim else None
        self.mlp = FeedForward(config) if config.inner_dim else None

    def forward(
        self, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor] | None, positions: Positions | None = None,
        cache: CachedDecoder | None = None,
    ) -> Tensor:  # fmt: skip
        """(N, L, C) to (N, L, C); see `CausalSelfAttention` for rope and cache."""
        x = self.residual1(x, lambda h: self.attn(h, rope, cache=cache), mask, positions)
        return x if self.residual2 is None or self.mlp is None else self.residual2(x, self.mlp, mask, positions)


class GPT(LanguageModel):
    """Token ids (N, L) to logits (N, L, V).

    Args:
        config: the architecture.
        seed: a parameter's initial value is a function of this seed, its name and its shape alone.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngram = NGrams(config) if config.ngram > 1 else None
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        if config.position == "rope":
            self.register_buffer("rope", torch.stack(rope_table(config.block_size, config.head_dim)), persistent=False)
        elif config.position == "sinusoidal":
            self.register_buffer("sinusoidal", sinusoidal_table(config.block_size, config.n_embd), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        final = config.place.final if config.final_norm is None else config.final_norm
        self.norm_f = _norm(config) if final else None
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias and not config.tie_weights)
        if config.tie_weights:
            self.head.weight = self.wte.weight
        initialise(self, seed, None if config.init == "torch" else self._std)
        for name, p in self.named_parameters():
            if name == "ngram.weight" or (config.zero_init and name.endswith("proj.weight")):
                nn.init.zeros_(p)

    def _std(self, name: str) -> Any:
        """The standard deviation of a weight's initial values.

        GPT-2 (Radford et al. 2019, section 2.3): 0.02, and 0.02 / sqrt(2 n_layer) for the projections back to the
        residual stream. Xavier (Glorot, Bengio 2010): sqrt(2 / (inputs + outputs)), and sqrt(1 / n_embd) for
        embeddings. DeepNet: as Xavier within the blocks, times beta except for queries and keys.
        """
        c, in_block = self.config, name.startswith("blocks.")
        if in_block and (c.place.beta or c.init == "xavier"):
            rows, columns = self.get_parameter(name).shape
            beta = c.place.beta(c.n_layer) if c.place.beta else 1.0
            if name.endswith("qkv.weight"):
                return torch.tensor([1.0, 1.0, beta]).repeat_interleave(c.n_embd)[:, None] * c.n_embd**-0.5
            return beta * math.sqrt(2 / (rows + columns))
        if c.init == "xavier":
            return c.n_embd**-0.5 if name != "head.weight" else math.sqrt(2 / (c.n_embd + c.vocab_size))
        return 0.02 / math.sqrt(2 * c.n_layer) if name.endswith("proj.weight") else 0.02

    def flops_per_token(self) -> float:
        """Floating-point operations per token of one training step (forward and backward).

        6 for each weight of a linear layer, and the attention scores: Chowdhery et al. 2022, "PaLM", appendix B.
        """
        c: GPTConfig = self.config
        return super().flops_per_token() + 12.0 * c.n_layer * c.n_embd * c.block_size

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
        positions, rope = slice(ids.shape[1]) if cache is None else cache.positions, None
        x = self.wte(ids)  # (N, L, C)
        if self.ngram is not None:
            x = x + self.ngram(ids, None if cache is None else cache.preceding)
        if self.wpe is not None:
            x = x + self.wpe.weight[positions]
        elif self.config.position == "sinusoidal":
            x = x * math.sqrt(self.config.n_embd) + self.get_buffer("sinusoidal")[positions]
        elif self.config.position == "rope":
            cos, sin = self.get_buffer("rope")[:, positions]
            rope = (cos, sin) if cos.ndim == 2 else (cos[:, None], sin[:, None])  # (L, D) or (N, 1, 1, D)
        x = torch.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, mask, rope, positions, cache)
        logits: Tensor = self.head(_normalized(self.norm_f, x, mask, positions))
        return logits


def _normalized(norm: nn.Module | None, x: Tensor, mask: Tensor | None, positions: Positions | None) -> Tensor:
    if norm is None:
        return x
    y: Tensor = norm(x, mask, positions=positions) if isinstance(norm, Positional) else norm(x, mask)
    return y


def _norm(config: GPTConfig) -> nn.Module:
    return build_norm(config.norm, config.norm_settings(config.norm), config.used_norms[config.norm])
