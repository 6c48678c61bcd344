"""Norms whose statistics cross positions and sequences: batch norm and its kin.

x is (N, L, C); mask is None or (N, L), False at padding. Padding is left out of all statistics. In training, they are
those of the micro-batch, over all processes; they also update the running averages, which evaluation uses.
"""

from dataclasses import field
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional as F

from gptexp.config.settings import settings
from gptexp.inference.kv_cache import Positions
from gptexp.models.norms import EpsSettings, NormSite, Positional, upcast
from gptexp.registry import NORMS


def weighted(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x in at least float32, 0 at padding, and its weight (N, L, 1): 0 at padding, else 1."""
    if mask is None:
        return upcast(x), torch.ones_like(upcast(x[..., :1]))
    kept = mask.unsqueeze(-1)
    # Padding may have grown to inf on its way through the layers, and inf * 0 is nan.
    return upcast(x.masked_fill(~kept, 0.0)), upcast(kept.to(x.dtype))


class _AllReduce(torch.autograd.Function):
    """Sum over all ranks; each rank's result depends on every rank's input, so gradients are summed, too.

    torch.distributed.nn.functional has an equivalent, but it is deprecated and breaks torch.compile.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total: Tensor = _AllReduce.apply(grads[0])
        return total


def ranks() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, of the same shape; differentiable."""
    total: Tensor = _AllReduce.apply(x) if ranks() > 1 else x
    return total


@settings
class RunningSettings(EpsSettings):
    """The settings of norms with running averages; eps is added to the variance."""

    momentum: Annotated[float, Gt(0), Le(1)] = 0.1
    """How far a step moves the running averages towards the batch's statistics."""

    def min_sequences(self, positions: int) -> int:
        """One value has no variance."""
        return 1 if positions > 1 else 2


class _Running(Positional):
    """Base of batch norms: y = (x - mean) / sqrt(var + eps) * weight + bias.

    Mean and var are (C,), or (block_size, C) if each position has statistics of its own. A statistic of fewer than two
    values is replaced by the running one, which is then not updated.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, settings: RunningSettings, site: NormSite, per_position: bool) -> None:
        super().__init__(settings, site, bias=True)
        self.momentum, self.per_position = settings.momentum, per_position
        size = (site.positions, site.channels) if per_position else self.size
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Positions | None = None) -> Tensor:
        """(N, L, C) to (N, L, C); positions are those of x, None for the first L."""
        mean, var = self.running_mean, self.running_var
        if self.per_position:  # slices are views, so updates in place reach the buffers
            place = slice(x.shape[1]) if positions is None else positions
            mean, var = mean[place], var[place]
        if not self.training:
            return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias
        return self.normalize(x, mask, mean, var) * self.weight + self.bias

    def normalize(self, x: Tensor, mask: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        """x minus the batch mean, divided by the batch's standard deviation; updates the running mean and var."""
        wide, weight = weighted(x, mask)
        batch_mean, batch_var, count = self.statistics(wide, weight)
        if bool(count.max() < 2):
            raise ValueError("no variance over fewer than two values: use a larger batch_size")
        seen = count > 1
        used_mean, used_var = torch.where(seen, batch_mean, mean), torch.where(seen, batch_var, var)
        self.before_update(used_mean, used_var, mean, var)
        y = ((wide - used_mean) * torch.rsqrt(used_var + self.eps)).to(x.dtype)
        with torch.no_grad():
            unbiased = batch_var * (count / (count - 1).clamp(min=1))
            mean.copy_(torch.where(seen, mean.lerp(batch_mean.to(mean.dtype), self.momentum), mean))
            var.copy_(torch.where(seen, var.lerp(unbiased.to(var.dtype), self.momentum), var))
        return y

    def statistics(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and count of x (N, L, C) over the positions of weight (N, L, 1) 1, over all ranks."""
        raise NotImplementedError

    def before_update(self, used_mean: Tensor, used_var: Tensor, mean: Tensor, var: Tensor) -> None:
        """A hook for subclasses, with the statistics that normalize this batch, and the running ones as yet."""

    @torch.no_grad()
    def discrepancy(self, x: Tensor, mask: Tensor | None = None) -> dict[str, float]:
        """How far the running statistics, which evaluation uses, are from those of this batch, which training uses.

        mean_drift = mean |running mean - mean| / std and std_drift = mean |running std / std - 1|, where std is
        sqrt(var + eps), over the channels, and over the positions where these have statistics of their own. Nothing
        moves. After the training-inference discrepancy of Wang, Wu, Huang 2022 (see `RegularizedBatchNorm`).
        """
        mean, var, count = self.statistics(*weighted(x, mask))
        rows = slice(x.shape[1] if self.per_position else None)
        std = (var + self.eps).sqrt()
        mean_drift = (self.running_mean[rows] - mean).abs() / std
        std_drift = ((self.running_var[rows] + self.eps).sqrt() / std - 1).abs()
        seen = (count > 1).expand_as(mean)
        return {"mean_drift": float(mean_drift[seen].mean()), "std_drift": float(std_drift[seen].mean())}


@settings
class BatchNormSettings(RunningSettings):
    """The settings of batch norm; eps is added to the variance."""

    stats: list[Literal["batch", "time"]] = field(default_factory=lambda: ["batch", "time"])
    """What statistics run over: [batch,time], or [batch] for each position by itself."""

    def problems(self, site: NormSite) -> list[str]:
        """Statistics over time alone would be those of one sequence."""
        if sorted(self.stats) in (["batch"], ["batch", "time"]):
            return []
        return [f"stats=[{','.join(self.stats)}]: must be [batch,time] or [batch]"]

    def min_sequences(self, positions: int) -> int:
        """One sequence has no variance across sequences."""
        return super().min_sequences(positions) if "time" in self.stats else 2


@NORMS.register("batchnorm", BatchNormSettings)
class BatchNorm(_Running):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with one mean and variance per channel (or per position).

    With stats=[batch,time], statistics run over all N·L positions and have shape (C,), as `nn.BatchNorm1d` on
    (N, C, L): a position's statistics then include later positions, so the training loss looks ahead. With
    stats=[batch], they run over the N sequences alone and have shape (L, C): each position by itself. Training
    normalizes with the batch's biased variance and moves the running averages by `momentum`, the running variance with
    the unbiased one; evaluation uses the running averages. Source: Ioffe, Szegedy 2015, "Batch Normalization".

    Raises:
        ValueError: in training, when every statistic would be taken over fewer than two values.
    """

    fused = True  # use the fused kernel when nothing is padded and there is one process

    def __init__(self, settings: BatchNormSettings, site: NormSite) -> None:
        super().__init__(settings, site, per_position="time" not in settings.stats)

    def normalize(self, x: Tensor, mask: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        """The same as its base, by the fused kernel where possible."""
        rows = x.flatten(1) if self.per_position else x.flatten(0, 1)
        if mask is not None or ranks() > 1 or len(rows) < 2 or not self.fused:
            return super().normalize(x, mask, mean, var)
        y = F.batch_norm(rows, mean.view(-1), var.view(-1), None, None, True, self.momentum, self.eps)
        return y.view_as(x)

    def statistics(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of shape (C,) over sequences and positions, or (L, C) over sequences."""
        dims = (0,) if self.per_position else (0, 1)
        count = sum_over_ranks(weight.sum(dims))  # (1,) or (L, 1)
        divisor = count.clamp(min=1)
        mean = sum_over_ranks((x * weight).sum(dims)) / divisor
        return mean, sum_over_ranks(((x - mean).square() * weight).sum(dims)) / divisor, count


@settings
class RegularizedBatchNormSettings(BatchNormSettings):
    """The settings of regularized batch norm."""

    mean_penalty: Annotated[float, Ge(0)] = 0.1
    """The weight of the penalty on the batch's mean."""
    std_penalty: Annotated[float, Ge(0)] = 0.01
    """The weight of the penalty on the batch's standard deviation."""


@runtime_checkable
class Penalized(Protocol):
    """A norm that adds to the loss that is minimized."""

    penalty: Tensor | None
    """Of the last training batch, a scalar; None before the first."""


@NORMS.register("rbn", RegularizedBatchNormSettings)
class RegularizedBatchNorm(BatchNorm):
    """Batch norm with a penalty on the distance of the batch's statistics from the running ones.

    penalty = mean_penalty * |batch mean - mean|^2 + std_penalty * |batch std - std|^2, summed over the channels; it
    is part of the loss that is minimized, not of the loss that is reported.
    Source: Wang, Wu, Huang 2022, "Understanding the Failure of Batch Normalization for Transformers in NLP".
    """

    fused = False  # the fused kernel does not return the statistics
    penalty: Tensor | None = None

    def __init__(self, settings: RegularizedBatchNormSettings, site: NormSite) -> None:
        super().__init__(settings, site)
        self.mean_penalty, self.std_penalty = settings.mean_penalty, settings.std_penalty

    def __getstate__(self) -> dict[str, Any]:
        """Without the penalty of the last batch: copy.deepcopy takes no tensor that has a gradient function."""
        return {**self.__dict__, "penalty": None}

    def before_update(self, used_mean: Tensor, used_var: Tensor, mean: Tensor, var: Tensor) -> None:
        """Set the penalty of this batch."""
        std = (used_var + self.eps).sqrt() - (var + self.eps).sqrt()
        self.penalty = (self.mean_penalty * (used_mean - mean.clone()).square().sum()
                        + self.std_penalty * std.square().sum())  # fmt: skip


@NORMS.register("causal_batchnorm", RunningSettings)
class CausalBatchNorm(_Running):
    """Batch norm that never looks ahead: statistics at position t run over all sequences and the positions 0 .. t.

    y[t] = (x[t] - mean[t]) / sqrt(var[t] + eps) * weight + bias, where mean[t] and var[t], of shape (C,), are those of
    x[:, 0], ..., x[:, t]. The running averages have shape (block_size, C). Not published; batch norm made causal.
    """

    def __init__(self, settings: RunningSettings, site: NormSite) -> None:
        super().__init__(settings, site, per_position=True)

    def statistics(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each of shape (L, C); the count (L, 1)."""
        # E[x^2] - E[x]^2 loses precision where the mean is large; so first subtract the mean of the first position.
        with torch.no_grad():
            first = sum_over_ranks(weight[:, 0].sum(0)).clamp(min=1)
            shift = sum_over_ranks((x[:, 0] * weight[:, 0]).sum(0)) / first
        x = (x - shift) * weight
        count = sum_over_ranks(weight.sum(0)).cumsum(0)
        divisor = count.clamp(min=1)
        mean = sum_over_ranks(x.sum(0)).cumsum(0) / divisor
        square = sum_over_ranks(x.square().sum(0)).cumsum(0) / divisor
        return mean + shift, (square - mean.square()).clamp(min=0), count
