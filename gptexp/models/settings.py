"""What a model can be made of: the registries of its parts and the dataclass that selects among them.

Nothing here imports torch, so a configuration is checked in a fraction of a second. A new norm is one
class in `norms.py` and one line in `NORMS`; its settings become `model.norms.<name>.*`.
"""

from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, Predicate


@dataclass(frozen=True)
class LayerNormSettings:
    """eps is added to the variance."""

    eps: Annotated[float, Gt(0)] = 1e-5


@dataclass(frozen=True)
class RMSNormSettings:
    """eps is added to the mean square."""

    eps: Annotated[float, Gt(0)] = 1e-6


@dataclass(frozen=True)
class BatchNormSettings:
    """eps is added to the variance; momentum moves the running averages; stats is what statistics run over."""

    eps: Annotated[float, Gt(0)] = 1e-5
    momentum: Annotated[float, Gt(0), Le(1)] = 0.1
    stats: list[Literal["batch", "time"]] = field(default_factory=lambda: ["batch", "time"])


@dataclass(frozen=True)
class NoSettings:
    """A norm without settings."""


@dataclass(frozen=True)
class Norm:
    """A registered norm: where its class is, and the dataclass of its settings."""

    target: str  # "module:class"; the class is built as cls(settings, GPTConfig)
    settings: type

    def load(self) -> Any:
        """The norm's class."""
        module, name = self.target.split(":")
        return getattr(import_module(module), name)


NORMS: dict[str, Norm] = {
    "layernorm": Norm("gptexp.models.norms:LayerNorm", LayerNormSettings),
    "rmsnorm": Norm("gptexp.models.norms:RMSNorm", RMSNormSettings),
    "batchnorm": Norm("gptexp.models.norms:BatchNorm", BatchNormSettings),
    "none": Norm("gptexp.models.norms:Identity", NoSettings),
}
PLACEMENTS = ("pre", "post")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu_squared", "swiglu")
POSITIONS = ("learned", "sinusoidal", "rope", "none")


def default_norms() -> dict[str, dict[str, Any]]:
    """The table `model.norms`: the default settings of every registered norm."""
    return {name: asdict(norm.settings()) for name, norm in NORMS.items()}


@dataclass(frozen=True)
class GPTConfig:
    """A decoder-only transformer.

    Attributes:
        vocab_size: number of symbols V; taken from the tokenizer, never set by the user.
        block_size: the most positions L that the model attends over.
        n_layer: number of blocks, each an attention and a feed-forward sub-layer.
        n_head: attention heads; must divide n_embd.
        n_embd: channels C of the residual stream.
        dropout: probability of dropping an embedding, an attention weight or a sub-layer's output.
        bias: give linear layers, layernorm and an untied head a bias.
        qkv_bias: the bias of the query, key and value projections alone; None follows `bias`.
        norm: a key of `NORMS`.
        norms: settings of each norm, by its name; only the chosen norm's are used.
        placement: "pre" is x + f(norm(x)) with a final norm; "post" is norm(x + f(x)) without one.
        activation: non-linearity of the feed-forward layer.
        tie_weights: share the token embedding with the output head.
        position: how positions are told apart.
    """

    vocab_size: Annotated[int, Ge(1)] = 65
    block_size: Annotated[int, Ge(1)] = 64
    n_layer: Annotated[int, Ge(1)] = 4
    n_head: Annotated[int, Ge(1)] = 4
    n_embd: Annotated[int, Ge(1)] = 128
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    bias: bool = False
    qkv_bias: bool | None = None
    norm: Annotated[str, Predicate(NORMS.__contains__)] = "layernorm"
    norms: dict[str, Any] = field(default_factory=default_norms)
    placement: Annotated[str, Predicate(PLACEMENTS.__contains__)] = "pre"
    activation: Annotated[str, Predicate(ACTIVATIONS.__contains__)] = "gelu"
    tie_weights: bool = True
    position: Annotated[str, Predicate(POSITIONS.__contains__)] = "learned"

    @property
    def head_dim(self) -> int:
        """Channels of one head, D."""
        return self.n_embd // self.n_head

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projections have a bias."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def norm_settings(self) -> Any:
        """The chosen norm's settings, an instance of its settings dataclass."""
        return NORMS[self.norm].settings(**self.norms.get(self.norm, {}))


def check_gpt(config: GPTConfig) -> list[str]:
    """Problems between settings that are each valid alone; one line a problem."""
    problems = []
    if config.n_embd % config.n_head:
        divisors = [n for n in range(1, config.n_embd + 1) if config.n_embd % n == 0]
        nearest = sorted(divisors, key=lambda n: abs(n - config.n_head))[:3]
        problems.append(
            f"model.n_head={config.n_head}: must divide model.n_embd={config.n_embd}; "
            f"nearest: {', '.join(map(str, sorted(nearest)))}"
        )
    elif config.position == "rope" and config.head_dim % 2:
        problems.append(
            f"model.position=rope: needs an even head size, but model.n_embd={config.n_embd} / "
            f"model.n_head={config.n_head} = {config.head_dim}"
        )
    elif config.position == "sinusoidal" and config.n_embd % 2:
        problems.append(f"model.position=sinusoidal: needs an even model.n_embd, not {config.n_embd}")
    stats = config.norms.get("batchnorm", {}).get("stats")
    if stats is not None and sorted(stats) not in (["batch"], ["batch", "time"]):
        problems.append(f"model.norms.batchnorm.stats=[{','.join(stats)}]: must be [batch,time] or [batch]")
    return problems
