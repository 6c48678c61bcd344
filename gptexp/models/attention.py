"""Causal self-attention, all heads in one tensor."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.inference.kv_cache import CachedDecoder
from gptexp.models.norms import build_norm
from gptexp.models.positions import NOTHING, Relative


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D), causal) v for H heads of size D, then a projection from H D channels back to C.

    Built from a `GPTConfig`:

    - n_kv_head: keys and values have K heads, each of which H / K heads of queries share (K = 1: Shazeer 2019,
      multi-query; else Ainslie et al. 2023, grouped-query).
    - qk_norm: RMSNorm of queries and keys, "head" over each head's D channels (Henry et al. 2020; Qwen 3), "full" over
      all channels (OLMo 2). Some placements have norms of each head's queries, keys and values instead.
    - attention_scale=false omits the root, and projection=false the last layer.
    - attention_softcap: c tanh(logits / c) before the softmax (Gemma 2).
    - value_residual: values are a v + b v_1, with those of the first layer and learned a and b (Zhou et al. 2024,
      arXiv 2410.17897).
    - attention_gate: a sigmoid of a linear layer of x multiplies what each head, or each of its channels, has read (Qiu
      et al. 2025, arXiv 2505.06708).
    """

    def __init__(self, config: Any, layer: int = 0) -> None:
        super().__init__()
        self.n_head, self.head_size, self.sizes = config.n_head, config.head_size, config.qkv_sizes
        self.dropout, self.softcap = config.dropout, config.attention_softcap
        self.scale = self.head_size**-0.5 if config.attention_scale else 1.0
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = nn.Linear(config.n_embd, sum(self.sizes), bias=qkv_bias)
        qkv = config.place.at("attention", layer, config.n_layer).qkv
        name, site = (config.norm_of("attention"), config.site("attention", layer)) if qkv else config.qk_norm_site
        self.per_head = qkv or config.qk_norm == "head"
        sites = (site, site if self.per_head else replace(site, channels=self.sizes[1]), site)
        self.q_norm, self.k_norm, self.v_norm = (
            build_norm(name, config.norm_settings(name), of) if wanted else None
            for wanted, of in zip((qkv or config.qk_norm != "none", qkv or config.qk_norm != "none", qkv), sites,
                                  strict=True)
        )  # fmt: skip
        self.proj = nn.Linear(self.sizes[0], config.n_embd, bias=config.bias) if config.projection else None
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if config.value_residual and layer else None
        gates = {"none": 0, "head": self.n_head, "channel": self.sizes[0]}[config.attention_gate]
        self.gate = nn.Linear(config.n_embd, gates, bias=config.bias) if gates else None

    def heads(self, x: Tensor, relative: Relative = NOTHING) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, H, L, D), keys and values (N, K, L, D) of x (N, L, C), after their norms and rotation."""
        parts = (part.unflatten(2, (-1, self.head_size)) for part in self.qkv(x).split(self.sizes, dim=2))
        q, k, v = (
            part if norm is None else norm(part.flatten(1, 2) if self.per_head else part.flatten(2)).view(part.shape)
            for norm, part in zip((self.q_norm, self.k_norm, self.v_norm), parts, strict=True)
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if relative.rotation is not None:
            q, k = relative.rotation(q), relative.rotation(k)
        return q, k, v

    def logits(self, x: Tensor, relative: Relative = NOTHING) -> Tensor:
        """The input of the softmax (N, H, L, L): -inf at later positions."""
        q, k, _ = self.heads(x, relative)
        return self._logits(q, k, _causal(q, k) if relative.bias is None else relative.bias)

    def forward(self, x: Tensor, relative: Relative = NOTHING, cache: CachedDecoder | None = None) -> Tensor:
        """(N, L, C) to (N, L, C).

        Args:
            x: input.
            relative: what the position encoding does to queries, keys and logits.
            cache: the keys and values of earlier positions, which x also attends to; those of x are added.
        """
        q, k, v = self.heads(x, relative)
        if relative.first_values is not None:
            if self.value_mix is None:
                relative.first_values.append(v)
            else:
                v = self.value_mix[0] * v + self.value_mix[1] * relative.first_values[0]
        if cache is not None:
            k, v = cache.update(self, k, v)
        mask = None if cache is None else cache.attn_mask
        if relative.bias is not None:  # which has that of the cache
            mask = relative.bias.to(q.dtype)
        y = self._attend(q, k, v, mask).transpose(1, 2)  # (N, L, H, D)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid().unflatten(2, (self.n_head, -1))
        y = y.flatten(2)
        return torch.dropout(y if self.proj is None else self.proj(y), self.dropout, self.training)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What each query reads, (N, H, L, D); a mask of None is causal, or none for a single query."""
        dropout = self.dropout if self.training else 0.0
        if self.softcap is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=self.scale, dropout_p=dropout, is_causal=q.shape[2] > 1 and mask is None,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        if mask is None and q.shape[2] > 1:
            mask = _causal(q, k)
        elif mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
        weights = torch.dropout(self._logits(q, k, mask).softmax(-1), dropout, self.training)
        return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    def _logits(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = softcapped(q @ keys.transpose(-2, -1) * self.scale, self.softcap)
        return logits if bias is None else logits + bias


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap tanh(logits / cap), between -cap and cap; None changes nothing."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _causal(q: Tensor, k: Tensor) -> Tensor:
    """-inf at later keys, else 0."""
    return torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype, device=q.device).triu(1)
