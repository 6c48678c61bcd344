"""The models, each configured by its own dataclass. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, Predicate

from gptexp.models.registry import NORMS, PLACEMENTS, NormSettings, NormShape, Placement, default_norms
from gptexp.validation import nearest, read, show

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu_squared", "swiglu")
POSITIONS = ("learned", "sinusoidal", "rope", "none")


@dataclass(frozen=True)
class _Model:
    """What every model has."""

    name: str = ""
    vocab_size: Annotated[int, Ge(1)] = 65  # number of symbols V; taken from the tokenizer, never set by the user
    block_size: Annotated[int, Ge(1)] = 64  # positions L of a row of a batch, the most that a GPT attends over

    @property
    def tags(self) -> list[str]:
        """The words by which a dashboard finds this variant."""
        return [self.name]

    @property
    def label(self) -> str:
        """The readable name of this variant, such as `rmsnorm-pre-h4`."""
        return "-".join(self.tags)

    @property
    def min_sequences(self) -> int:
        """The fewest sequences that a training batch must have."""
        return 1

    def tree(self) -> dict[str, Any]:
        """Every setting that has an effect."""
        return asdict(self)

    def problems(self) -> list[str]:
        """Problems between settings that are each valid alone; one line a problem."""
        return []


def _read_norms(key: str, table: Any, problems: list[str]) -> dict[str, Any]:
    """The table of norms' settings: each entry checked by its norm's own dataclass."""
    norms: dict[str, Any] = default_norms()
    if not isinstance(table, Mapping):
        problems.append(f"{key}={show(table)}: must be a table of settings by norm")
        return norms
    for name, entry in table.items():
        if name in NORMS:
            settings = read(NORMS[name].settings, f"{key}.{name}", entry, problems)
            norms[name] = asdict(settings) if settings else {}
        else:
            hint = nearest(str(name), NORMS) or ";"
            problems.append(f"{key}.{name}: unknown norm{hint} allowed: {', '.join(NORMS)}")
    return norms


@dataclass(frozen=True)
class _Normed(_Model):
    """The settings of models that have norms."""

    norm: Annotated[str, Predicate(NORMS.__contains__)] = "layernorm"  # a key of `NORMS`
    # settings of each norm, by its name; only the used norms' have an effect
    norms: Annotated[dict[str, Any], _read_norms] = field(default_factory=default_norms)

    def norm_settings(self, name: str) -> NormSettings:
        """The settings of the norm `name`."""
        return NORMS[name].settings(**self.norms.get(name, {}))

    @property
    def used_norms(self) -> dict[str, NormShape]:
        """The norms that the model has, each with the shape it is made for."""
        raise NotImplementedError

    @property
    def min_sequences(self) -> int:
        """The fewest sequences that a training batch must have."""
        return max(self.norm_settings(name).min_sequences for name in self.used_norms)

    def tree(self) -> dict[str, Any]:
        """Every setting that has an effect."""
        return asdict(self) | {"norms": {name: self.norms.get(name, {}) for name in sorted(self.used_norms)}}

    def problems(self) -> list[str]:
        """Those of the used norms, and of any other whose settings are not the default ones."""
        changed = [n for n, norm in NORMS.items() if self.norm_settings(n) != norm.settings()]
        shapes = dict.fromkeys(changed, self.used_norms[self.norm]) | self.used_norms
        return [f"model.norms.{name}.{problem}" for name, shape in shapes.items()
                for problem in self.norm_settings(name).problems(shape)]  # fmt: skip


@dataclass(frozen=True)
class GPTConfig(_Normed):
    """A decoder-only transformer."""

    target: ClassVar[str] = "gptexp.models.gpt:GPT"

    name: Literal["gpt"] = "gpt"
    n_layer: Annotated[int, Ge(0)] = 4  # number of blocks, each an attention and a feed-forward sub-layer
    n_head: Annotated[int, Ge(1)] = 4  # attention heads; must divide n_embd
    n_embd: Annotated[int, Ge(1)] = 128  # channels C of the residual stream
    # width of the feed-forward layer; None is 4 n_embd (8/3 n_embd for swiglu; n_embd without `projection`), 0 leaves
    # it out
    n_inner: Annotated[int, Ge(0)] | None = None
    # probability of dropping an embedding, an attention weight or a sub-layer's output
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    bias: bool = False  # give linear layers, layernorm and an untied head a bias
    qkv_bias: bool | None = None  # the bias of the query, key and value projections alone; None follows `bias`
    placement: Annotated[str, Predicate(PLACEMENTS.__contains__)] = "pre"  # a key of `PLACEMENTS`
    final_norm: bool | None = None  # a norm before the head; None follows the placement
    # RMSNorm of queries and keys: "head" of each head by itself, "full" of all heads together
    qk_norm: Literal["none", "head", "full"] = "none"
    attention_scale: bool = True  # divide the attention's logits by the square root of the head size
    residual: bool = True  # add each sub-layer's input to its output
    projection: bool = True  # a linear layer at the end of each sub-layer
    activation: Annotated[str, Predicate(ACTIVATIONS.__contains__)] = "gelu"  # non-linearity of the feed-forward layer
    tie_weights: bool = True  # share the token embedding with the output head
    position: Annotated[str, Predicate(POSITIONS.__contains__)] = "learned"  # how positions are told apart
    # embed the last 2, 3 .. `ngram` tokens, too, and add that to each token's embedding; 1 embeds the token alone.
    ngram: Annotated[int, Ge(1), Le(8)] = 1
    # the most rows that each length's table has; where there are more sequences, several share a row
    ngram_rows: Annotated[int, Ge(1)] = 16384
    # initial weights: "gpt2", as GPT-2's (DeepNet's for placement=deepnorm); "xavier", as the first Transformer's; or
    # "torch", as torch's own layers
    init: Literal["gpt2", "xavier", "torch"] = "gpt2"
    # start the linear layer at the end of each sub-layer at 0, so that each block is at first the identity
    zero_init: bool = False

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
        return -(-self.n_embd // 3) * 8 if self.activation == "swiglu" else 4 * self.n_embd

    @property
    def place(self) -> Placement:
        """Where the norms stand."""
        return PLACEMENTS[self.placement]

    @property
    def used_norms(self) -> dict[str, NormShape]:
        """The norms that the model has, each with the shape it is made for."""
        shape = NormShape(self.n_embd, self.block_size, self.bias)
        queries = NormShape(self.head_dim if self.qk_norm == "head" else self.n_embd, self.block_size)
        return ({"rmsnorm": queries} if self.qk_norm != "none" else {}) | {self.norm: shape}

    @property
    def tags(self) -> list[str]:
        """The words by which a dashboard finds this variant."""
        return [self.norm, self.placement, f"h{self.n_head}"]

    def problems(self) -> list[str]:
        """Problems between settings that are each valid alone; one line a problem."""
        problems = []
        whole = self.n_embd % self.n_head == 0
        if not whole:
            divisors = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - self.n_head))[:3])
            problems.append(f"model.n_head={self.n_head}: must divide model.n_embd={self.n_embd}; nearest: "
                            f"{', '.join(map(str, near))}")  # fmt: skip
        rules = {
            f"model.position=rope: needs an even head size, but model.n_embd={self.n_embd} / "
            f"model.n_head={self.n_head} = {self.head_dim}":
                whole and self.position == "rope" and self.head_dim % 2,
            f"model.position=sinusoidal: needs an even model.n_embd, not {self.n_embd}":
                self.position == "sinusoidal" and self.n_embd % 2,
            f"model.residual=false: model.placement={self.placement} weighs the residual connection":
                not self.residual and self.place.alpha,
            f"model.n_inner={self.n_inner}: must be 0 or model.n_embd={self.n_embd} with model.projection=false":
                not self.projection and self.inner_dim not in (0, self.n_embd),
            "model.final_norm=true: has no effect with model.norm=none": self.final_norm and self.norm == "none",
            f"model.ngram_rows={self.ngram_rows}: has no effect with model.ngram=1":
                self.ngram == 1 and self.ngram_rows != GPTConfig.ngram_rows,
            "model.zero_init=true: has no effect with model.projection=false": self.zero_init and not self.projection,
            f"model.init={self.init}: model.placement={self.placement} has initial weights of its own":
                self.init != "gpt2" and self.place.beta,
        }  # fmt: skip
        return [*problems, *(problem for problem, applies in rules.items() if applies), *super().problems()]


@dataclass(frozen=True)
class BigramConfig(_Model):
    """A table of logits, one row for each symbol: the next symbol depends on the last one alone."""

    target: ClassVar[str] = "gptexp.models.baselines:Bigram"

    name: Literal["bigram"] = "bigram"
    # "gpt2" draws with a deviation of 0.02, "torch" with 1, as `nn.Embedding` does
    init: Literal["gpt2", "torch"] = "gpt2"


@dataclass(frozen=True)
class MLPConfig(_Normed):
    """The last `context` symbols, embedded, through hidden layers: Bengio et al. 2003."""

    target: ClassVar[str] = "gptexp.models.baselines:MLP"

    name: Literal["mlp"] = "mlp"
    context: Annotated[int, Ge(1)] = 3  # symbols that the model sees
    n_embd: Annotated[int, Ge(1)] = 16  # channels of a symbol's embedding
    n_hidden: Annotated[int, Gt(0)] = 256  # width of the hidden layers
    n_layer: Annotated[int, Ge(1)] = 1  # number of hidden layers
    residual: bool = False  # add each hidden layer's input to its output, from the second layer on
    # a key of `NORMS`; it stands between a hidden layer's linear map and its tanh
    norm: Annotated[str, Predicate(NORMS.__contains__)] = "none"

    @property
    def used_norms(self) -> dict[str, NormShape]:
        """The norms that the model has, each with the shape it is made for."""
        return {self.norm: NormShape(self.n_hidden, self.block_size, bias=True)}

    @property
    def tags(self) -> list[str]:
        """The words by which a dashboard finds this variant."""
        return ["mlp", self.norm]

    def problems(self) -> list[str]:
        """Problems between settings that are each valid alone; one line a problem."""
        alone = self.residual and self.n_layer == 1
        own = ["model.residual=true: has no effect with model.n_layer=1"] if alone else []
        return super().problems() + own


ModelConfig = GPTConfig | BigramConfig | MLPConfig


def build_model(config: ModelConfig, seed: int = 0) -> Any:
    """A new model; its initial weights are a function of the seed and of each parameter's name and shape."""
    return resolve_name(config.target)(config, seed)
