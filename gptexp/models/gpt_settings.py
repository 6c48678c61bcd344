"""The settings of a GPT."""

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, Predicate

from gptexp.config.settings import VARIANT, settings
from gptexp.models.activations import Activation
from gptexp.models.norms import NormSite
from gptexp.models.placements import Placement
from gptexp.models.settings import NormedConfig, NormName, table_of
from gptexp.registry import ACTIVATIONS, PLACEMENTS, POSITIONS


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
    """Attention heads; must divide `n_embd`, unless `head_dim` is set."""
    n_kv_head: Annotated[int, Ge(1)] | None = None
    """Heads of keys and values, each for an equal share of the attention heads: grouped-query attention, or multi-query
    with 1; null is `n_head`."""
    head_dim: Annotated[int, Ge(1)] | None = None
    """Channels of a head; null is `n_embd` / `n_head`."""
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
    window: Annotated[int, Ge(1)] | None = None
    """Attend to so many positions, the own one and those before it (sliding window); null is all."""
    attention_softcap: Annotated[float, Gt(0)] | None = None
    """Bound the attention's logits: c tanh(logits / c), with this c."""
    logit_softcap: Annotated[float, Gt(0)] | None = None
    """Bound the head's logits in the same way."""
    value_residual: bool = False
    """Mix the values of each block with those of the first one, by two learned weights that start at 1/2."""
    attention_gate: Literal["none", "head", "channel"] = "none"
    """Multiply what a head reads by a sigmoid of the input: one for each `head`, or for each `channel` of it."""
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
    rope_theta: Annotated[float, Gt(1)] = 10000.0
    """The base of the frequencies of position=rope."""
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
    def head_size(self) -> int:
        """Channels of one head, D."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Channels of all queries, of all keys and of all values."""
        keys = (self.n_kv_head or self.n_head) * self.head_size
        return self.n_head * self.head_size, keys, keys

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
        """The norm of `qk_norm`, and what it is built for: of queries."""
        channels = self.head_size if self.qk_norm == "head" else self.qkv_sizes[0]
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
        channels = self.head_size if of_heads else self.n_embd
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
        groups = "" if self.n_kv_head in (None, self.n_head) else f"_kv{self.n_kv_head}"
        return [self.norm, *others, self.placement, f"h{self.n_head}{groups}"]

    def problems(self) -> list[str]:
        """Problems between settings that are each valid alone; one line per problem."""
        problems = []
        if self.head_dim is None and self.n_embd % self.n_head:
            problems.append(f"model.n_head={self.n_head}: must divide model.n_embd={self.n_embd}; nearest: "
                            f"{_near_divisors(self.n_embd, self.n_head)}")  # fmt: skip
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            problems.append(f"model.n_kv_head={self.n_kv_head}: must divide model.n_head={self.n_head}; nearest: "
                            f"{_near_divisors(self.n_head, self.n_kv_head)}")  # fmt: skip
        rules = {
            f"model.residual=false: model.placement={self.placement} weighs the residual connection":
                not self.residual and self.place.needs_residual,
            f"model.n_inner={self.n_inner}: must be 0 or model.n_embd={self.n_embd} with model.projection=false":
                not self.projection and self.inner_dim not in (0, self.n_embd),
            f"model.head_dim={self.head_dim}: times model.n_head must be model.n_embd with model.projection=false":
                self.head_dim is not None and not self.projection and self.qkv_sizes[0] != self.n_embd,
            f"model.rope_theta={self.rope_theta:g}: has no effect with model.position={self.position}":
                self.rope_theta != GPTConfig.rope_theta and self.position != "rope",
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


def _near_divisors(n: int, wanted: int) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:3])))
