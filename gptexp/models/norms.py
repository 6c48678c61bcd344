"""Normalization layers. x is (N, L, C): N sequences, L positions, C channels.

Every norm is called as `norm(x, mask)`, where mask is None or a boolean (N, L) that is False at padding,
and returns a tensor of x's shape. Only norms whose statistics cross positions or sequences use the mask.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.settings import (
    NORMS,
    BatchNormSettings,
    GPTConfig,
    LayerNormSettings,
    NoSettings,
    RMSNormSettings,
)


class Identity(nn.Module):
    """No normalization: returns x."""

    def __init__(self, settings: NoSettings, config: GPTConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return x


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over the channels, with the biased variance.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization". The bias exists when `model.bias` is true.
    """

    def __init__(self, settings: LayerNormSettings, config: GPTConfig) -> None:
        super().__init__()
        self.eps = settings.eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the channels; no mean is subtracted and there is no bias.

    The division is done in float32 and cast back before the weight, as in Llama.
    Source: Zhang, Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, settings: RMSNormSettings, config: GPTConfig) -> None:
        super().__init__()
        self.eps = settings.eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with one mean and variance a channel (or a position).

    With stats=[batch,time] the statistics run over all N·L positions and have shape (C,), as
    `nn.BatchNorm1d` on (N, C, L). With stats=[batch] they run over the N sequences alone and have shape
    (L, C): each position by itself. Training normalises with the batch's biased variance and moves the running
    averages by `momentum`, the running variance with the unbiased one; evaluation uses the running averages.
    Padding enters no statistic; a position that padding leaves to fewer than two sequences is normalised by the
    running averages. Under distributed training the statistics are those of the global batch.
    Source: Ioffe, Szegedy 2015, "Batch Normalization".

    In training a position's statistics include later positions, so the training loss looks ahead.

    Raises:
        ValueError: in training, when every statistic would be taken over fewer than two values.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, settings: BatchNormSettings, config: GPTConfig) -> None:
        super().__init__()
        self.eps, self.momentum = settings.eps, settings.momentum
        self.over_time = "time" in settings.stats
        shape = (config.n_embd,) if self.over_time else (config.block_size, config.n_embd)
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        N, L, C = x.shape
        # With per-position statistics, a sequence shorter than block_size uses the first L rows (views, so that
        # updates in place reach the buffers).
        mean, var = (self.running_mean, self.running_var) if self.over_time else (
            self.running_mean[:L], self.running_var[:L])
        if not self.training:
            return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias
        if mask is None and not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            if (N * L if self.over_time else N) < 2:
                raise ValueError(self._too_few())
            rows = x.reshape(-1, C) if self.over_time else x.reshape(N, L * C)
            y = F.batch_norm(rows, mean.view(-1), var.view(-1), None, None, True, self.momentum, self.eps)
            return y.view(N, L, C) * self.weight + self.bias
        if mask is not None:  # padding may have grown to inf on its way through the layers, and inf * 0 is nan
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        batch_mean, batch_var, count = self._statistics(x, mask)
        # A position that fewer than two sequences reach has no variance: it is normalised as in evaluation, by the
        # running averages, which it leaves as they are.
        seen = count > 1
        used_mean, used_var = torch.where(seen, batch_mean, mean), torch.where(seen, batch_var, var)
        with torch.no_grad():
            unbiased = batch_var * (count / (count - 1).clamp(min=1))
            mean.copy_(torch.where(seen, mean.lerp(batch_mean.to(mean.dtype), self.momentum), mean))
            var.copy_(torch.where(seen, var.lerp(unbiased.to(var.dtype), self.momentum), var))
        return (x - used_mean) * torch.rsqrt(used_var + self.eps) * self.weight + self.bias

    def _statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance over the unpadded positions of all ranks: (C,) or (L, C), and their count."""
        wide = x if x.dtype == torch.float64 else x.float()
        weight = (torch.ones_like(wide[..., :1]) if mask is None else mask.unsqueeze(-1).to(wide.dtype))  # (N, L, 1)
        dims = (0, 1) if self.over_time else (0,)
        count = _sum_over_ranks(weight.sum(dims))  # (1,) or (L, 1)
        if bool(count.max() < 2):
            raise ValueError(self._too_few())
        divisor = count.clamp(min=1)
        mean = _sum_over_ranks((wide * weight).sum(dims)) / divisor
        var = _sum_over_ranks(((wide - mean).square() * weight).sum(dims)) / divisor
        return mean, var, count

    def _too_few(self) -> str:
        over = "sequences and positions" if self.over_time else "sequences"
        return f"batchnorm has no variance over fewer than two {over}: use a larger batch_size"


class _AllReduce(torch.autograd.Function):
    """Sum over all ranks; each rank's result depends on every rank's input, so gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def _sum_over_ranks(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total: Tensor = _AllReduce.apply(x)
        return total
    return x


def build_norm(config: GPTConfig) -> Any:
    """A new layer of the norm that `config.norm` names."""
    return NORMS[config.norm].load()(config.norm_settings, config)
