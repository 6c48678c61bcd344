"""Causal self-attention, all heads in one tensor."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.inference.kv_cache import CachedDecoder
from gptexp.models.norms import build_norm
from gptexp.models.positions import NOTHING, Relative


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D), causal) v for H heads of size D = C / H, then a projection back to C.

    Built from a `GPTConfig`. Its qk_norm applies RMSNorm to queries and keys: "head" over each head's D channels (Henry
    et al. 2020; Qwen 3), "full" over all C channels (OLMo 2). Some placements have norms of each head's queries, keys
    and values instead. attention_scale=false omits the root, and projection=false the last layer.
    """

    def __init__(self, config: Any, layer: int = 0) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.scale = config.head_dim**-0.5 if config.attention_scale else 1.0
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=qkv_bias)
        qkv = config.place.at("attention", layer, config.n_layer).qkv
        name, site = (config.norm_of("attention"), config.site("attention", layer)) if qkv else config.qk_norm_site
        self.per_head = qkv or config.qk_norm == "head"
        self.q_norm, self.k_norm, self.v_norm = (
            build_norm(name, config.norm_settings(name), site) if wanted else None
            for wanted in (qkv or config.qk_norm != "none", qkv or config.qk_norm != "none", qkv)
        )
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias) if config.projection else None

    def heads(self, x: Tensor, relative: Relative = NOTHING) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (N, H, L, D) of x (N, L, C), after their norms and rotation."""
        N, L, C = x.shape
        q, k, v = self.qkv(x).view(N, L, 3, self.n_head, C // self.n_head).unbind(2)  # each (N, L, H, D)
        q, k, v = (
            part if norm is None else norm(part.flatten(1, 2) if self.per_head else part.flatten(2)).view(part.shape)
            for norm, part in ((self.q_norm, q), (self.k_norm, k), (self.v_norm, v))
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if relative.rotation is not None:
            q, k = relative.rotation(q), relative.rotation(k)
        return q, k, v

    def logits(self, x: Tensor, relative: Relative = NOTHING) -> Tensor:
        """The input of the softmax (N, H, L, L): -inf at later positions."""
        q, k, _ = self.heads(x, relative)
        logits = q @ k.transpose(-2, -1) * self.scale
        if relative.bias is not None:
            return logits + relative.bias
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return logits.masked_fill(later, -math.inf)

    def forward(self, x: Tensor, relative: Relative = NOTHING, cache: CachedDecoder | None = None) -> Tensor:
        """(N, L, C) to (N, L, C).

        Args:
            x: input.
            relative: what the position encoding does to queries, keys and logits.
            cache: the keys and values of earlier positions, which x also attends to; those of x are added.
        """
        q, k, v = self.heads(x, relative)
        if cache is not None:
            k, v = cache.update(self, k, v)
        attn_mask = None if cache is None else cache.attn_mask
        if relative.bias is not None:  # which has that of the cache
            attn_mask = relative.bias.to(q.dtype)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, scale=self.scale, dropout_p=self.dropout if self.training else 0.0,
            is_causal=x.shape[1] > 1 and relative.bias is None,  # a single query may attend to all keys
        )  # fmt: skip
        y = y.transpose(1, 2).reshape(x.shape)
        return torch.dropout(y if self.proj is None else self.proj(y), self.dropout, self.training)
