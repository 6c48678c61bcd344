"""Normalization layers that work within one position. x is (N, L, C): N sequences, L positions, C channels.

Every norm is built as `Norm(settings, site)` and called as `norm(x, mask)`, where mask is None or a boolean (N, L)
that is False at padding. It returns a tensor of x's shape and type. Only norms whose statistics cross positions or
sequences, in `batch_norms.py` and `power_norm.py`, use the mask. The initial values of a norm's parameters are
constants.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.config.settings import settings
from gptexp.inference.kv_cache import Positions
from gptexp.registry import NORMS


@dataclass(frozen=True)
class NormSite:
    """What a norm is built for: x of shape (N, L, channels), and its place in the model."""

    channels: int  # C
    positions: int  # the most positions L
    bias: bool = False  # `model.bias`, for norms that may go without a bias
    part: str = "attention"  # attention, mlp, final (before the head), qkv, or hidden (of an MLP)
    layer: int = 0  # the block, counted from 0; n_layer for the final norm
    n_layer: int = 1  # number of blocks


@settings
class NormSettings:
    """Base of the settings of every norm; used as it is by a norm without settings."""

    def problems(self, site: NormSite) -> list[str]:
        """Settings that do not fit the site or each other: lines such as `groups=3: must divide 16`."""
        return []

    def min_sequences(self, positions: int) -> int:
        """The fewest sequences, of so many positions each, that a training batch must have."""
        return 1


NORMS.base = NormSettings


@settings
class EpsSettings(NormSettings):
    """The settings of a norm that divides."""

    eps: Annotated[float, Gt(0)] = 1e-5
    """Keeps the divisor away from 0."""


class Norm(nn.Module):
    """Base of the norms here: a weight for each channel, initialized to 1, and on request a bias, initialized to 0."""

    weight: Tensor
    bias: Tensor

    def __init__(self, settings: Any, site: NormSite, bias: bool = False, weight: bool = True) -> None:
        super().__init__()
        self.size, self.eps = (site.channels,), getattr(settings, "eps", 0.0)
        self.register_parameter("weight", nn.Parameter(torch.ones(self.size)) if weight else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.size)) if bias else None)


class Positional(Norm):
    """A norm that must know the positions of x: called as norm(x, mask, positions=positions)."""


@runtime_checkable
class BatchStatistics(Protocol):
    """A norm whose statistics cross positions or sequences in training, with running averages for evaluation."""

    def discrepancy(self, x: Tensor, mask: Tensor | None = None) -> dict[str, float]:
        """How far the running averages are from this batch's statistics, by name."""


@runtime_checkable
class ApproximateGradient(Protocol):
    """A norm whose backward pass is an approximation, unless `exact_gradient` is True, which an audit sets."""

    exact_gradient: bool


def normalized(
    norm: nn.Module | None, x: Tensor, mask: Tensor | None = None, positions: Positions | None = None
) -> Tensor:
    """x (N, L, C) through a norm, if there is one; positions are those of x, None for the first L."""
    if norm is None:
        return x
    y: Tensor = norm(x, mask, positions=positions) if isinstance(norm, Positional) else norm(x, mask)
    return y


def upcast(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


@settings
class LayerNormSettings(EpsSettings):
    """The settings of layer norm; eps is added to the variance."""

    affine: bool = True
    """Multiply by a learned weight for each channel."""
    bias: bool | None = None
    """Add a learned bias for each channel; null follows `model.bias`."""

    def problems(self, site: NormSite) -> list[str]:
        """A bias is part of the affine map."""
        return ["bias=true: has no effect with affine=false"] if self.bias and not self.affine else []


@NORMS.register("layernorm", LayerNormSettings)
class LayerNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over the channels, with the biased variance.

    Weight and bias are optional. Source: Ba, Kiros, Hinton 2016, "Layer Normalization".
    """

    def __init__(self, settings: LayerNormSettings, site: NormSite) -> None:
        bias = site.bias if settings.bias is None else settings.bias
        super().__init__(settings, site, bias=settings.affine and bias, weight=settings.affine)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return torch.layer_norm(x, self.size, self.weight, self.bias, self.eps)


@NORMS.register("layernorm_scaling", LayerNormSettings)
class ScaledLayerNorm(LayerNorm):
    """LayerNorm divided by sqrt(l) in block l, counted from 1, so that the variance does not grow with depth.

    The final norm is not scaled. For placement=pre. Source: Sun et al. 2025, "The Curse of Depth in Large Language
    Models".
    """

    def __init__(self, settings: LayerNormSettings, site: NormSite) -> None:
        super().__init__(settings, site)
        self.factor = (site.layer + 1) ** -0.5 if site.part in ("attention", "mlp") else 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return super().forward(x) * self.factor


@settings
class RMSNormSettings(EpsSettings):
    """The settings of RMS norm."""

    eps: Annotated[float, Gt(0)] = 1e-6
    """Added to the mean square."""


@NORMS.register("rmsnorm", RMSNormSettings)
class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the channels; no mean is subtracted and there is no bias.

    The division is done in float32 and cast back before the weight, as in Llama.
    Source: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., C) to (..., C)."""
        return F.rms_norm(upcast(x), self.size, None, self.eps).to(x.dtype) * self.weight


@settings
class PartialRMSNormSettings(RMSNormSettings):
    """The settings of partial RMS norm."""

    fraction: Annotated[float, Gt(0), Le(1)] = 0.0625
    """The share of the channels, the first ones, whose mean square is taken."""


@NORMS.register("prmsnorm", PartialRMSNormSettings)
class PartialRMSNorm(Norm):
    """y = x / sqrt(mean(x_1^2 .. x_k^2) + eps) * weight, with k = ceil(fraction C): only the first channels count.

    Source: pRMSNorm in Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", section 3.2.
    """

    def __init__(self, settings: PartialRMSNormSettings, site: NormSite) -> None:
        super().__init__(settings, site)
        self.k = max(1, math.ceil(settings.fraction * site.channels - 1e-6))  # 0.07 * 100 is a little more than 7

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        wide = upcast(x)
        mean_square = wide[..., : self.k].square().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


@NORMS.register("scalenorm", EpsSettings)
class ScaleNorm(nn.Module):
    """y = weight * x / max(|x|, eps), with |x| the length of the vector and a single weight, initialized to sqrt(C).

    Source: Nguyen, Salazar 2019, "Transformers without Tears".
    """

    def __init__(self, settings: EpsSettings, site: NormSite) -> None:
        super().__init__()
        self.eps, self.weight = settings.eps, nn.Parameter(torch.tensor([math.sqrt(site.channels)]))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return F.normalize(upcast(x), dim=-1, eps=self.eps).to(x.dtype) * self.weight


@settings
class DynamicSettings(NormSettings):
    """The settings of norms without statistics."""

    alpha: Annotated[float, Gt(0)] = 0.5
    """The initial factor of x."""


@NORMS.register("dyt", DynamicSettings)
class DynamicTanh(Norm):
    """y = tanh(alpha x) * weight + bias, with a single learned alpha; there are no statistics at all.

    Source: Zhu et al. 2025, "Transformers without Normalization".
    """

    def __init__(self, settings: DynamicSettings, site: NormSite) -> None:
        super().__init__(settings, site, bias=True)
        self.alpha = nn.Parameter(torch.tensor([settings.alpha]))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return torch.tanh(self.alpha * x) * self.weight + self.bias


@NORMS.register("derf", DynamicSettings)
class DynamicErf(Norm):
    """y = erf(alpha x + shift) * weight + bias, with a single learned alpha and shift; there are no statistics at all.

    Source: Chen et al. 2025, "Stronger Normalization-Free Transformers".
    """

    def __init__(self, settings: DynamicSettings, site: NormSite) -> None:
        super().__init__(settings, site, bias=True)
        self.alpha, self.shift = nn.Parameter(torch.tensor([settings.alpha])), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return torch.erf(self.alpha * x + self.shift) * self.weight + self.bias


@settings
class GroupNormSettings(EpsSettings):
    """The settings of group norm; eps is added to the variance."""

    groups: Annotated[int, Ge(1)] = 4
    """Groups of neighboring channels, each normalized by itself."""

    def problems(self, site: NormSite) -> list[str]:
        """The groups must be of equal size, and of more than one channel."""
        if site.channels % self.groups:
            return [f"groups={self.groups}: must divide the {site.channels} channels"]
        return [f"groups={self.groups}: a group of one channel is always 0"] if self.groups == site.channels else []


@NORMS.register("groupnorm", GroupNormSettings)
class GroupNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over each group of C / groups channels by itself.

    Source: Wu, He 2018, "Group Normalization", without its statistics over positions, which would look ahead.
    """

    def __init__(self, settings: GroupNormSettings, site: NormSite) -> None:
        super().__init__(settings, site, bias=site.bias)
        self.groups = settings.groups

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return F.group_norm(x.flatten(0, 1), self.groups, self.weight, self.bias, self.eps).view_as(x)


@NORMS.register("none")
class Identity(nn.Module):
    """No normalization: returns x."""

    def __init__(self, settings: NormSettings, site: NormSite) -> None:
        super().__init__()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return x


def build_norm(name: str, settings: NormSettings, site: NormSite) -> nn.Module:
    """A new layer of the norm `name`."""
    return NORMS[name].made(settings, site)  # type: ignore[no-any-return]
