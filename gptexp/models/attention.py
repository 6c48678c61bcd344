"""Causal self-attention, all heads in one batched tensor, and the ways to mark positions."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.settings import GPTConfig


def sinusoidal_table(length: int, channels: int) -> Tensor:
    """Fixed position embeddings (length, channels): sines at even channels, cosines at odd ones.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
    """
    angle = _angles(length, channels)  # (L, C/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def rope_table(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head_dim) for `apply_rope`; frequencies base 10,000, halves repeated.

    Source: Su et al. 2021, "RoFormer"; the two halves of the head are paired as in Llama.
    """
    angle = _angles(length, head_dim).repeat(1, 2)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels of x (N, H, L, D) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _angles(length: int, channels: int) -> Tensor:
    frequency = torch.exp(torch.arange(0, channels, 2, dtype=torch.float64) * (-math.log(10000.0) / channels))
    return torch.outer(torch.arange(length, dtype=torch.float64), frequency).float()  # (L, channels/2)


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D), causal) v for H heads of size D = C / H, then a projection back to C."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.has_qkv_bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(N, L, C) to (N, L, C); rope holds cosines and sines, (L, D) each."""
        N, L, C = x.shape
        qkv = self.qkv(x).view(N, L, 3, self.n_head, C // self.n_head)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (N, H, L, D)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return F.dropout(self.proj(y.transpose(1, 2).reshape(N, L, C)), self.dropout, self.training)
