"""A decoder-only GPT, from its settings to its logits, in the order in which data meets its parts.

The parts with modules of their own: `attention`, `positions`, `norms`, `batch_norms`, `placements`, `activations`,
`ngrams`; the initial values of the weights are a table in `initialization`.
"""

from dataclasses import field
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Lt, Predicate
from torch import Tensor, nn

from gptexp.config.settings import VARIANT, settings
from gptexp.inference.kv_cache import CachedDecoder, Positions
from gptexp.models.activations import Activation
from gptexp.models.attention import CausalSelfAttention
from gptexp.models.initialization import gpt_std, initialize
from gptexp.models.language_model import LanguageModel
from gptexp.models.ngrams import NGrams
from gptexp.models.norms import NormSite, build_norm, normalized
from gptexp.models.placements import Placement
from gptexp.models.positions import Relative
from gptexp.models.settings import NormedConfig, NormName, table_of
from gptexp.registry import ACTIVATIONS, MODELS, PLACEMENTS, POSITIONS


@settings
class GPTConfig(NormedConfig):
    """A decoder-only transformer."""

    name: Literal["gpt"] = "gpt"
    placement: Annotated[str, Predicate(PLACEMENTS.__contains__), VARIANT] = "pre"
    """Where the norms are."""
    placements: table_of(PLACEMENTS) = field(default_factory=PLACEMENTS.defaults)  # type: ignore[valid-type]
    """Settings of each placement, by its name; only those of the one in use have an effect."""
    n_layer: Annotated[int, Ge(0)] = 4
    """Blocks, each an attention and a feed-forward sub-layer."""
    n_head: Annotated[int, Ge(1), VARIANT] = 4
    """Attention heads; must divide `n_embd`."""
    n_embd: Annotated[int, Ge(1)] = 128
    """Channels C of the residual stream."""
    n_inner: Annotated[int, Ge(0)] | None = None
    """Width of the feed-forward layer; null is 4 n_embd (8/3 n_embd for a gated activation; n_embd without
    `projection`), 0 leaves it out."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability of dropping an embedding, an attention weight or a sub-layer's output."""
    bias: bool = False
    """Give linear layers, layernorm and an untied head a bias."""
    qkv_bias: bool | None = None
    """The bias of the query, key and value projections alone; null follows `bias`."""
    norm_attention: NormName | None = None
    """The norm around attention; null follows `norm`."""
    norm_mlp: NormName | None = None
    """The norm around the feed-forward layer; null follows `norm`."""
    norm_final: NormName | None = None
    """The norm before the head; null follows `norm`."""
    final_norm: bool | None = None
    """A norm before the head; null follows the placement."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys: `head` for each head by itself, `full` for all heads together."""
    attention_scale: bool = True
    """Divide the attention's logits by the square root of the head size."""
    residual: bool = True
    """Add each sub-layer's input to its output."""
    projection: bool = True
    """A linear layer at the end of each sub-layer."""
    activation: Annotated[str, Predicate(ACTIVATIONS.__contains__)] = "gelu"
    """The non-linearity of the feed-forward layer."""
    tie_weights: bool = True
    """Share the token embedding with the LM head."""
    position: Annotated[str, Predicate(POSITIONS.__contains__)] = "learned"
    """The position encoding."""
    ngram: Annotated[int, Ge(1), Le(8)] = 1
    """Also embed the last 2, 3 .. `ngram` tokens together, and add that to each token's embedding; 1 does not."""
    ngram_rows: Annotated[int, Ge(1)] = 16384
    """The most rows in the table of each length; n-grams share rows where there are more of them."""
    init: Literal["gpt2", "xavier", "torch"] = "gpt2"
    """Initial weights: `gpt2` as GPT-2's (DeepNet's for placement=deepnorm), `xavier` as the first Transformer's,
    `torch` as torch's own layers."""
    zero_init: bool = False
    """Start the linear layer at the end of each sub-layer at 0, so that each block starts as the identity."""

    @property
    def head_dim(self) -> int:
        """Channels of one head, D."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the feed-forward layer; 0 for none."""
        if self.n_inner is not None:
            return self.n_inner
        if not self.projection:
            return self.n_embd
        return -(-self.n_embd // 3) * 8 if self.act.gated else 4 * self.n_embd

    @property
    def components(self) -> list[type]:
        """The classes of the norms and other registered parts."""
        return [*super().components, type(self.place), self.act, POSITIONS[self.position].made]

    @property
    def place(self) -> Placement:
        """The placement, with its settings."""
        settings = self.placements.get(self.placement, {})
        return PLACEMENTS[self.placement].made(**settings)  # type: ignore[no-any-return]

    @property
    def act(self) -> type[Activation]:
        """The activation."""
        return ACTIVATIONS[self.activation].made  # type: ignore[no-any-return]

    @property
    def used_norms(self) -> dict[str, NormSite]:
        """The norms in use, each with the first of its sites."""
        parts = ["final"] * self.has_final_norm + ["mlp"] * (self.inner_dim > 0) + ["attention"]
        found = dict([self.qk_norm_site]) if self.qk_norm != "none" else {}
        return found | {self.norm_of(part): self.site(part, 0) for part in parts}

    @property
    def qk_norm_site(self) -> tuple[str, NormSite]:
        """The norm of `qk_norm`, and what it is built for."""
        channels = self.head_dim if self.qk_norm == "head" else self.n_embd
        return "rmsnorm", NormSite(channels, self.block_size, part="qkv")

    def tree(self) -> dict[str, Any]:
        """Every setting that has an effect."""
        own = self.placements.get(self.placement)
        return super().tree() | {"placements": {self.placement: own} if own else {}}

    def norm_of(self, part: str) -> str:
        """The norm of a part: "attention", "mlp" or "final"."""
        own: str | None = getattr(self, f"norm_{part}")
        return self.norm if own is None else own

    def site(self, part: str, layer: int) -> NormSite:
        """What the norm of this part of the block `layer` is built for."""
        of_heads = part == "attention" and self.place.at(part, layer, self.n_layer).qkv
        channels = self.head_dim if of_heads else self.n_embd
        return NormSite(channels, self.block_size, self.bias, part, layer, self.n_layer)

    @property
    def has_final_norm(self) -> bool:
        """Whether there is a norm before the head."""
        return self.place.final if self.final_norm is None else self.final_norm

    @property
    def tags(self) -> list[str]:
        """The words by which a dashboard finds this variant."""
        own = {part: self.norm_of(part) for part in ("attention", "mlp", "final")}
        others = [f"{part}_{name}" for part, name in own.items() if name != self.norm]
        return [self.norm, *others, self.placement, f"h{self.n_head}"]

    def problems(self) -> list[str]:
        """Problems between settings that are each valid alone; one line per problem."""
        problems = []
        if self.n_embd % self.n_head:
            divisors = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - self.n_head))[:3])
            problems.append(f"model.n_head={self.n_head}: must divide model.n_embd={self.n_embd}; nearest: "
                            f"{', '.join(map(str, near))}")  # fmt: skip
        rules = {
            f"model.residual=false: model.placement={self.placement} weighs the residual connection":
                not self.residual and self.place.needs_residual,
            f"model.n_inner={self.n_inner}: must be 0 or model.n_embd={self.n_embd} with model.projection=false":
                not self.projection and self.inner_dim not in (0, self.n_embd),
            "model.final_norm=true: has no effect with model.norm=none":
                self.final_norm and self.norm_of("final") == "none",
            f"model.norm_final={self.norm_final}: has no effect without a final norm":
                self.norm_final is not None and not self.has_final_norm,
            f"model.norm_mlp={self.norm_mlp}: has no effect with model.n_inner=0":
                self.norm_mlp is not None and not self.inner_dim,
            f"model.ngram_rows={self.ngram_rows}: has no effect with model.ngram=1":
                self.ngram == 1 and self.ngram_rows != GPTConfig.ngram_rows,
            "model.zero_init=true: has no effect with model.projection=false": self.zero_init and not self.projection,
            f"model.init={self.init}: model.placement={self.placement} has initial weights of its own":
                self.init != "gpt2" and self.place.beta(1) is not None,
        }  # fmt: skip
        problems += [f"model.position={self.position}: {line}"
                     for line in POSITIONS[self.position].made.problems(self)]
        problems += [f"model.placement={self.placement}: {line}" for line in self.place.problems(self)]
        return [*problems, *(problem for problem, applies in rules.items() if applies), *super().problems()]


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
        positions = slice(ids.shape[1]) if cache is None else cache.positions
        x = self.wte(ids)  # (N, L, C)
        if self.ngram is not None:
            x = x + self.ngram(ids, None if cache is None else cache.preceding)
        x, relative = self.wpe.embed(x, positions), self.wpe.relative(positions)
        x = self.place.enter(torch.dropout(x, self.dropout, self.training))
        for block in self.blocks:
            x = block(x, mask, relative, positions, cache)
        logits: Tensor = self.head(self.place.leave(x, lambda y: normalized(self.norm_f, y, mask, positions)))
        return logits


def _connection(config: GPTConfig, part: str, layer: int) -> nn.Module:
    place = config.place.at(part, layer, config.n_layer)
    alpha = place.alpha(config.n_layer) if config.residual else 0.0
    return place.connection(lambda: _norm(config, part, layer), alpha)


def _norm(config: GPTConfig, part: str, layer: int) -> nn.Module:
    name = config.norm_of(part)
    return build_norm(name, config.norm_settings(name), config.site(part, layer))
