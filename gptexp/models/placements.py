"""Where the norms of a sub-layer are, and how the residual connection around it works.

A sub-layer f turns the residual stream x into around(alpha s + after(f(before(s)))), where s = stream(x). Each of
stream, before, after and around is a norm, if the placement has it, or else the identity.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from gptexp.config.settings import settings
from gptexp.inference.kv_cache import Positions
from gptexp.models.norms import BatchStatistics, normalized
from gptexp.registry import NORMS, PLACEMENTS


@settings
class Placement:
    """The placement of a whole model, or of one of its sub-layers; its fields are its settings.

    Attributes:
        stream: a norm of the residual stream, before both f and the sum.
        before: a norm of f's input.
        after: a norm of f's output.
        around: a norm of the sum.
        qkv: norms of each head's queries, keys and values, in attention.
        final: a norm before the head.
        needs_residual: cannot do without the residual connection.
    """

    stream = before = after = around = qkv = final = needs_residual = False

    def at(self, part: str, layer: int, n_layer: int) -> "Placement":
        """The placement of the part "attention" or "mlp" of the block `layer`, counted from 0, of `n_layer`."""
        return self

    def problems(self, config: Any) -> list[str]:
        """What is wrong with a model's settings, `GPTConfig`, for this placement; one line per problem."""
        return []

    def alpha(self, n_layer: int) -> float:
        """The weight of the residual stream in the sum."""
        return 1.0

    def beta(self, n_layer: int) -> float | None:
        """The gain of the initial weights (see `initialization`); None leaves these to `model.init`."""
        return None

    def connection(self, norm: Callable[[], nn.Module], alpha: float) -> nn.Module:
        """The residual connection of a sub-layer, called as connection(x, f, mask, positions)."""
        return Residual(self, norm, alpha)

    def enter(self, x: Tensor) -> Tensor:
        """Embeddings (N, L, C) to the residual stream of the first block."""
        return x

    def leave(self, x: Tensor, final: Callable[[Tensor], Tensor]) -> Tensor:
        """The residual stream of the last block to the head's input (N, L, C), through the final norm."""
        return final(x)


class Residual(nn.Module):
    """around(alpha s + after(f(before(s)))), where s = stream(x); alpha = 0 omits the residual connection."""

    def __init__(self, place: Placement, norm: Callable[[], nn.Module], alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.stream, self.before, self.after, self.around = (
            norm() if wanted else None for wanted in (place.stream, place.before, place.after, place.around)
        )

    def forward(
        self, x: Tensor, f: Callable[[Tensor], Tensor], mask: Tensor | None, positions: Positions | None = None
    ) -> Tensor:
        """(N, L, C) to (N, L, C); positions are those of x, None for the first L."""
        x = normalized(self.stream, x, mask, positions)
        y = normalized(self.after, f(normalized(self.before, x, mask, positions)), mask, positions)
        if self.alpha:
            y = (x if self.alpha == 1.0 else self.alpha * x) + y
        return normalized(self.around, y, mask, positions)


@PLACEMENTS.register("pre")
class PreNorm(Placement):
    """x + f(norm(x)), and a final norm: GPT-2; Xiong et al. 2020, "On Layer Normalization in the Transformer"."""

    before = final = True


@PLACEMENTS.register("post")
class PostNorm(Placement):
    """norm(x + f(x)): Vaswani et al. 2017, "Attention Is All You Need"; GPT."""

    around = True


@PLACEMENTS.register("sandwich")
class Sandwich(Placement):
    """x + norm(f(norm(x))), and a final norm: Ding et al. 2021, "CogView"; Gemma 2; Kim et al. 2025, "Peri-LN"."""

    before = after = final = True


@PLACEMENTS.register("output")
class OutputNorm(Placement):
    """x + norm(f(x)), and a final norm: Team OLMo 2025, "2 OLMo 2 Furious"."""

    after = final = True


@PLACEMENTS.register("deepnorm")
class DeepNorm(Placement):
    """norm(alpha x + f(x)): Wang et al. 2022, "DeepNet", as in its table for decoder-only models."""

    around = needs_residual = True

    def alpha(self, n_layer: int) -> float:
        """(2 n)^(1/4)."""
        return float((2 * n_layer) ** 0.25)

    def beta(self, n_layer: int) -> float:
        """(8 n)^(-1/4)."""
        return float((8 * n_layer) ** -0.25)


@PLACEMENTS.register("mixln")
@settings
class MixLN(Placement):
    """Post-norm in the first blocks, pre-norm in the others, and a final norm: Li, Yin, Liu 2024, "Mix-LN"."""

    final = True
    fraction: Annotated[float, Ge(0), Le(1)] = 0.25
    """The share of the blocks that are post-norm, rounded down."""

    def at(self, part: str, layer: int, n_layer: int) -> Placement:
        """Post-norm or pre-norm."""
        return PostNorm() if layer < int(self.fraction * n_layer) else PreNorm()


class _QKVNorm(Placement):
    qkv = True


class _StreamNorm(Placement):
    stream = True


@PLACEMENTS.register("hybrid")
class HybridNorm(Placement):
    """x + attention(x), with norms of each head's queries, keys and values; then s + mlp(s), with s = norm(x).

    There is a final norm. Source: Zhuo et al. 2025, "HybridNorm: Towards Stable and Efficient Transformer Training via
    Hybrid Normalization".
    """

    final = True

    def at(self, part: str, layer: int, n_layer: int) -> Placement:
        """Of attention, or of the feed-forward layer."""
        return _QKVNorm() if part == "attention" else _StreamNorm()

    def problems(self, config: Any) -> list[str]:
        """A norm of a head's channels knows neither positions nor mask."""
        norm = config.norm_of("attention")
        rules = {
            f"needs a norm within one position for attention, not {norm}":
                issubclass(NORMS[norm].made, BatchStatistics),
            f"has norms of queries and keys; model.qk_norm={config.qk_norm} adds others": config.qk_norm != "none",
        }  # fmt: skip
        return [problem for problem, applies in rules.items() if applies]


@PLACEMENTS.register("dual")
class ResiDual(Placement):
    """A post-norm stream p and an unnormalized one q: y = f(p), p <- norm(p + y), q <- q + y; at the end p + norm(q).

    Source: Xie et al. 2023, "ResiDual: Transformer with Dual Residual Connections".
    """

    around = final = needs_residual = True

    def connection(self, norm: Callable[[], nn.Module], alpha: float) -> nn.Module:
        """As its base, for both streams."""
        return DualResidual(self, norm, alpha)

    def enter(self, x: Tensor) -> Tensor:
        """Both streams start as the embeddings: (N, L, 2 C), p and then q."""
        return x.repeat(1, 1, 2)

    def leave(self, x: Tensor, final: Callable[[Tensor], Tensor]) -> Tensor:
        """p + norm(q)."""
        p, q = x.chunk(2, dim=-1)
        return p + final(q)


class DualResidual(Residual):
    """The residual connection of `ResiDual`."""

    def forward(
        self, x: Tensor, f: Callable[[Tensor], Tensor], mask: Tensor | None, positions: Positions | None = None
    ) -> Tensor:
        """(N, L, 2 C) to (N, L, 2 C)."""
        p, q = x.chunk(2, dim=-1)
        y = f(p)
        return torch.cat([normalized(self.around, p + y, mask, positions), q + y], dim=-1)
