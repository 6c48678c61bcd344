"""Normalization layers that work within one position. x is (N, L, C): N sequences, L positions, C channels.

Every norm is built as `Norm(settings, shape)` and called as `norm(x, mask)`, where mask is None or a boolean (N, L)
that is False at padding, and returns a tensor of x's shape. Only norms whose statistics cross positions or
sequences, which are in `batchnorms.py`, use the mask. The initial values of a norm's parameters are constants.
"""

import math
from pkgutil import resolve_name

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.registry import (
    NORMS,
    DynamicTanhSettings,
    GroupNormSettings,
    LayerNormSettings,
    NormSettings,
    NormShape,
    PartialRMSNormSettings,
    RMSNormSettings,
    ScaleNormSettings,
)


class Positional(nn.Module):
    """A norm to which it matters which positions x has: called as norm(x, mask, positions=positions)."""


def upcast(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


class Identity(nn.Module):
    """No normalization: returns x."""

    def __init__(self, settings: NormSettings, shape: NormShape) -> None:
        super().__init__()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return x


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over the channels, with the biased variance.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization". Weight and bias are optional.
    """

    def __init__(self, settings: LayerNormSettings, shape: NormShape) -> None:
        super().__init__()
        self.size, self.eps = (shape.channels,), settings.eps
        bias = shape.bias if settings.bias is None else settings.bias
        self.weight = nn.Parameter(torch.ones(self.size)) if settings.affine else None
        self.bias = nn.Parameter(torch.zeros(self.size)) if settings.affine and bias else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return torch.layer_norm(x, self.size, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the channels; no mean is subtracted and there is no bias.

    The division is done in float32 and cast back before the weight, as in Llama.
    Source: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, settings: RMSNormSettings, shape: NormShape) -> None:
        super().__init__()
        self.eps = settings.eps
        self.weight = nn.Parameter(torch.ones(shape.channels))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., C) to (..., C)."""
        return F.rms_norm(upcast(x), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class PartialRMSNorm(RMSNorm):
    """y = x / sqrt(mean(x_1^2 .. x_k^2) + eps) * weight, with k = ceil(fraction C): the first channels stand for all.

    Source: pRMSNorm in Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", section 3.2.
    """

    def __init__(self, settings: PartialRMSNormSettings, shape: NormShape) -> None:
        super().__init__(settings, shape)
        self.k = max(1, math.ceil(settings.fraction * shape.channels - 1e-6))  # 0.07 * 100 is a little more than 7

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        wide = upcast(x)
        mean_square = wide[..., : self.k].square().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


class ScaleNorm(nn.Module):
    """y = weight * x / max(|x|, eps), with |x| the length of the vector and a single weight, at first sqrt(C).

    Source: Nguyen, Salazar 2019, "Transformers without Tears".
    """

    def __init__(self, settings: ScaleNormSettings, shape: NormShape) -> None:
        super().__init__()
        self.eps = settings.eps
        self.weight = nn.Parameter(torch.tensor([math.sqrt(shape.channels)]))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return F.normalize(upcast(x), dim=-1, eps=self.eps).to(x.dtype) * self.weight


class DynamicTanh(nn.Module):
    """y = tanh(alpha x) * weight + bias, with a single learned alpha; there are no statistics at all.

    Source: Zhu et al. 2025, "Transformers without Normalization".
    """

    def __init__(self, settings: DynamicTanhSettings, shape: NormShape) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([settings.alpha]))
        self.weight = nn.Parameter(torch.ones(shape.channels))
        self.bias = nn.Parameter(torch.zeros(shape.channels))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return torch.tanh(self.alpha * x) * self.weight + self.bias


class GroupNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over each group of C / groups channels by itself.

    Source: Wu, He 2018, "Group Normalization", without its statistics over positions, which would look ahead.
    """

    def __init__(self, settings: GroupNormSettings, shape: NormShape) -> None:
        super().__init__()
        self.groups, self.eps = settings.groups, settings.eps
        self.weight = nn.Parameter(torch.ones(shape.channels))
        self.bias = nn.Parameter(torch.zeros(shape.channels)) if shape.bias else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return F.group_norm(x.flatten(0, 1), self.groups, self.weight, self.bias, self.eps).view_as(x)


def build_norm(name: str, settings: NormSettings, shape: NormShape) -> nn.Module:
    """A new layer of the norm `name`."""
    layer: nn.Module = resolve_name(NORMS[name].target)(settings, shape)
    return layer
