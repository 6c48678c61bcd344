"""Causal self-attention, all heads in one tensor, and tables of position embeddings."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.generation import CachedDecoder
from gptexp.models.norms import build_norm
from gptexp.models.registry import NormShape
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
    """softmax(q k^T / sqrt(D), causal) v for H heads of size D = C / H, then a projection back to C.

    qk_norm applies RMSNorm to queries and keys: "head" over each head's D channels (Henry et al. 2020; Qwen 3), "full"
    over all C channels (OLMo 2). attention_scale=false omits the root; projection=false the last layer.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.scale = config.head_dim**-0.5 if config.attention_scale else 1.0
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=qkv_bias)
        self.per_head = config.qk_norm == "head"
        shape = NormShape(config.head_dim if self.per_head else config.n_embd, config.block_size)
        self.q_norm, self.k_norm = (
            None if config.qk_norm == "none" else build_norm("rmsnorm", config.norm_settings("rmsnorm"), shape)
            for _ in range(2)
        )
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias) if config.projection else None

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (N, H, L, D) of x (N, L, C), after qk_norm and rope."""
        N, L, C = x.shape
        q, k, v = self.qkv(x).view(N, L, 3, self.n_head, C // self.n_head).unbind(2)  # each (N, L, H, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (
                norm(part if self.per_head else part.flatten(2)).view(part.shape)
                for norm, part in ((self.q_norm, q), (self.k_norm, k))
            )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return q, k, v

    def logits(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The input of the softmax (N, H, L, L), -inf at later positions."""
        q, k, _ = self.heads(x, rope)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return (q @ k.transpose(-2, -1) * self.scale).masked_fill(later, -math.inf)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, cache: CachedDecoder | None = None
    ) -> Tensor:
        """(N, L, C) to (N, L, C).

        Args:
            x: input.
            rope: cosines and sines, each (L, D) or (N, 1, L, D).
            cache: the keys and values of earlier positions, which x also attends to; it takes up those of x.
        """
        q, k, v = self.heads(x, rope)
        if cache is not None:
            k, v = cache.update(self, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if cache is None else cache.attn_mask, scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=x.shape[1] > 1,  # a single query may attend to all keys
        )  # fmt: skip
        y = y.transpose(1, 2).reshape(x.shape)
        return torch.dropout(y if self.proj is None else self.proj(y), self.dropout, self.training)
