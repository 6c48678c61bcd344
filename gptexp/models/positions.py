"""Position encodings: something added to the embeddings, or something done within attention."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptexp.inference.kv_cache import Positions
from gptexp.registry import POSITIONS, NoSettings


class Rotation(NamedTuple):
    """Cosines and sines, each (L, D) or (N, 1, L, D), which rotate each pair of channels of a query or a key."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x (N, H, L, D)."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin


class Relative(NamedTuple):
    """What an encoding does within attention, the same in every layer."""

    rotation: Rotation | None = None  # of queries and keys
    # added to the logits, -inf at later keys: (H, queries, keys) where all rows have the same positions, else
    # (N, H, 1, keys)
    bias: Tensor | None = None
    first_values: list[Tensor] | None = None  # gets the values of the first layer, which the others mix with theirs


NOTHING = Relative()


class Position:
    """Base of every encoding, built from its settings and a `GPTConfig`; by itself it does nothing."""

    @staticmethod
    def problems(config: Any) -> list[str]:
        """What is wrong with a model's settings, `GPTConfig`, for this encoding; one line per problem."""
        return []

    def embed(self, x: Tensor, positions: Positions) -> Tensor:
        """Token embeddings x (N, L, C), at these positions, to the input of the first block."""
        return x

    def relative(self, positions: Positions) -> Relative:
        """What to do within attention for queries at these positions."""
        return NOTHING


@POSITIONS.register("learned")
class Learned(Position, nn.Embedding):
    """Adds a learned vector for each position: GPT-2."""

    def __init__(self, settings: NoSettings, config: Any) -> None:
        nn.Embedding.__init__(self, config.block_size, config.n_embd)

    def embed(self, x: Tensor, positions: Positions) -> Tensor:
        """x + weight."""
        return x + self.weight[positions]


@POSITIONS.register("sinusoidal")
class Sinusoidal(Position, nn.Module):
    """Adds sines at even channels and cosines at odd ones: Vaswani et al. 2017, "Attention Is All You Need", 3.5.

    Embeddings are first multiplied by sqrt(C), as there, section 3.4.
    """

    table: Tensor

    def __init__(self, settings: NoSettings, config: Any) -> None:
        nn.Module.__init__(self)
        self.register_buffer("table", sinusoidal_table(config.block_size, config.n_embd), persistent=False)

    @staticmethod
    def problems(config: Any) -> list[str]:
        """Channels come in pairs."""
        return [f"needs an even model.n_embd, not {config.n_embd}"] if config.n_embd % 2 else []

    def embed(self, x: Tensor, positions: Positions) -> Tensor:
        """sqrt(C) x + table."""
        return x * math.sqrt(x.shape[-1]) + self.table[positions]


@POSITIONS.register("rope")
class Rotary(Position, nn.Module):
    """Rotates queries and keys by an angle that grows with the position; frequencies have the base `rope_theta`.

    Source: Su et al. 2021, "RoFormer"; channel i of a head and channel i + D/2 make a pair, as in Llama.
    """

    table: Tensor  # (2, L, D): cosines and sines

    def __init__(self, settings: NoSettings, config: Any) -> None:
        nn.Module.__init__(self)
        self.register_buffer("table", torch.stack(rope_table(config.block_size, config.head_size, config.rope_theta)),
                             persistent=False)  # fmt: skip

    @staticmethod
    def problems(config: Any) -> list[str]:
        """Channels of a head come in pairs."""
        if (config.head_dim is None and config.n_embd % config.n_head) or config.head_size % 2 == 0:
            return []
        given = f"model.n_embd={config.n_embd} / model.n_head={config.n_head}"
        return [f"needs an even head size, but {given if config.head_dim is None else 'model.head_dim'} = "
                f"{config.head_size}"]  # fmt: skip

    def relative(self, positions: Positions) -> Relative:
        """The rotation: (L, D) where all rows have the same positions, else (N, 1, 1, D)."""
        cos, sin = self.table[:, positions]
        return Relative(Rotation(cos, sin) if cos.ndim == 2 else Rotation(cos[:, None], sin[:, None]))


@POSITIONS.register("alibi")
class ALiBi(Position, nn.Module):
    """Adds -m_h (i - j) to the logit of query i and key j, with a slope m_h for each head: nearer keys count more.

    With n heads, n a power of 2, the slopes are 2^(-8/n), 2^(-16/n), ..., 2^-8; else those of the next smaller power of
    2, and then every other one of the next larger. Source: Press, Smith, Lewis 2021, "Train Short, Test Long".
    """

    slopes: Tensor  # (H,)

    def __init__(self, settings: NoSettings, config: Any) -> None:
        nn.Module.__init__(self)
        heads, power = config.n_head, 2 ** int(math.log2(config.n_head))
        steps = [8 / power * h for h in range(1, power + 1)] + [4 / power * h for h in range(1, 2 * power, 2)]
        slopes = torch.tensor([2**-step for step in steps[:heads]], dtype=torch.float64)
        self.register_buffer("slopes", slopes.float(), persistent=False)

    def relative(self, positions: Positions) -> Relative:
        """The bias."""
        if isinstance(positions, slice):
            keys = torch.arange(positions.stop, device=self.slopes.device)
            distance = keys[positions, None] - keys  # (queries, keys)
        else:
            keys = torch.arange(int(positions.max()) + 1, device=self.slopes.device)
            distance = (positions - keys)[:, None, None]  # (N, 1, 1, keys)
        bias = -self.slopes[:, None, None] * distance
        return Relative(bias=bias.masked_fill(distance < 0, -math.inf))


@POSITIONS.register("none")
class NoPosition(Position, nn.Module):
    """No encoding: only the causal mask distinguishes positions."""

    def __init__(self, settings: NoSettings, config: Any) -> None:
        nn.Module.__init__(self)


def within(window: int, relative: Relative, positions: Positions, device: torch.device) -> Relative:
    """The same for a sliding window: each query attends to its own key and the `window` - 1 before it."""
    if isinstance(positions, slice):
        start, stop = positions.start or 0, int(positions.stop)
        distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(stop, device=device)
    else:
        distance = (positions - torch.arange(int(positions.max()) + 1, device=device))[:, None, None]
    outside = (distance < 0) | (distance >= window)
    bias = torch.zeros(distance.shape, device=device) if relative.bias is None else relative.bias
    return relative._replace(bias=bias.masked_fill(outside, -math.inf))


def sinusoidal_table(length: int, channels: int) -> Tensor:
    """Sines at even channels and cosines at odd ones, (length, channels)."""
    angle = _angles(length, channels)  # (L, C/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def rope_table(length: int, head_dim: int, theta: float = 10000.0) -> Rotation:
    """The rotation of the first positions, with frequencies of this base: cosines and sines (length, head_dim)."""
    angle = _angles(length, head_dim, theta).repeat(1, 2)
    return Rotation(angle.cos(), angle.sin())


def _angles(length: int, channels: int, theta: float = 10000.0) -> Tensor:
    frequency = torch.exp(torch.arange(0, channels, 2, dtype=torch.float64) * (-math.log(theta) / channels))
    return torch.outer(torch.arange(length, dtype=torch.float64), frequency).float()  # (L, channels/2)
