"""Norms whose statistics cross positions and sequences: batch norms and PowerNorm.

x is (N, L, C), mask is None or (N, L), False at padding. Under distributed training, statistics are those of
the global batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.generation import Positions
from gptexp.models.norms import Positional, upcast
from gptexp.models.registry import (
    BatchNormSettings,
    NormShape,
    PowerNormSettings,
    RegularizedBatchNormSettings,
    RunningSettings,
)


def weighted(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x in float32 at least, 0 at padding, and its weight (N, L, 1): 1 where there is no padding, else 0."""
    if mask is None:
        return upcast(x), torch.ones_like(upcast(x[..., :1]))
    kept = mask.unsqueeze(-1)
    # Padding may have grown to inf on its way through the layers, and inf * 0 is nan.
    return upcast(x.masked_fill(~kept, 0.0)), upcast(kept.to(x.dtype))


class _AllReduce(torch.autograd.Function):
    """Sum over all ranks; each rank's result depends on every rank's input, so gradients are summed, too.

    torch.distributed.nn.functional has the same, but deprecated, and refuses it to torch.compile.
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
    if ranks() > 1:
        total: Tensor = _AllReduce.apply(x)
        return total
    return x


class _Running(Positional):
    """A weight and a bias a channel, and the running averages of batch statistics, which evaluation uses."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, settings: RunningSettings, shape: NormShape, per_position: bool) -> None:
        super().__init__()
        self.eps, self.momentum, self.per_position = settings.eps, settings.momentum, per_position
        size = (shape.positions, shape.channels) if per_position else (shape.channels,)
        self.weight = nn.Parameter(torch.ones(shape.channels))
        self.bias = nn.Parameter(torch.zeros(shape.channels))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x: Tensor, mask: Tensor | None = None, positions: Positions | None = None) -> Tensor:
        """(N, L, C) to (N, L, C); positions are those of x, None for the first L."""
        mean, var = self.running_mean, self.running_var
        if self.per_position:  # slices are views, so that updates in place reach the buffers
            place = slice(x.shape[1]) if positions is None else positions
            mean, var = mean[place], var[place]
        if not self.training:
            return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias
        return self.normalise(x, mask, mean, var) * self.weight + self.bias

    def normalise(self, x: Tensor, mask: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        """x less its batch mean, over its batch deviation; moves the running mean and var, in place."""
        wide, weight = weighted(x, mask)
        batch_mean, batch_var, count = self.statistics(wide, weight)
        if bool(count.max() < 2):
            raise ValueError("batchnorm has no variance over fewer than two values: use a larger batch_size")
        # A position that fewer than two values reach has no variance: it is normalised as in evaluation, by the
        # running averages, which it leaves as they are.
        seen = count > 1
        used_mean, used_var = torch.where(seen, batch_mean, mean), torch.where(seen, batch_var, var)
        self.compare(used_mean, used_var, mean, var)
        y = ((wide - used_mean) * torch.rsqrt(used_var + self.eps)).to(x.dtype)
        with torch.no_grad():
            unbiased = batch_var * (count / (count - 1).clamp(min=1))
            mean.copy_(torch.where(seen, mean.lerp(batch_mean.to(mean.dtype), self.momentum), mean))
            var.copy_(torch.where(seen, var.lerp(unbiased.to(var.dtype), self.momentum), var))
        return y

    def statistics(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and count of x (N, L, C), where weight (N, L, 1) is 1, over all ranks."""
        raise NotImplementedError

    def compare(self, used_mean: Tensor, used_var: Tensor, mean: Tensor, var: Tensor) -> None:
        """Called with the statistics that normalise this batch and the running ones, before these move."""

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


class BatchNorm(_Running):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with one mean and variance a channel (or a position).

    With stats=[batch,time] the statistics run over all N·L positions and have shape (C,), as
    `nn.BatchNorm1d` on (N, C, L). With stats=[batch] they run over the N sequences alone and have shape
    (L, C): each position by itself. Training normalises with the batch's biased variance and moves the running
    averages by `momentum`, the running variance with the unbiased one; evaluation uses the running averages.
    Padding enters no statistic; a position that padding leaves to fewer than two sequences is normalised by the
    running averages. Source: Ioffe, Szegedy 2015, "Batch Normalization".

    In training with stats=[batch,time] a position's statistics include later positions, so the loss looks ahead.

    Raises:
        ValueError: in training, when every statistic would be taken over fewer than two values.
    """

    one_kernel = True  # where nothing is padded and this process holds the whole batch

    def __init__(self, settings: BatchNormSettings, shape: NormShape) -> None:
        super().__init__(settings, shape, per_position="time" not in settings.stats)

    def normalise(self, x: Tensor, mask: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        """As its base; in one kernel where nothing is padded and this process holds the whole batch."""
        rows = x.flatten(1) if self.per_position else x.flatten(0, 1)
        if mask is not None or ranks() > 1 or len(rows) < 2 or not self.one_kernel:
            return super().normalise(x, mask, mean, var)
        y = F.batch_norm(rows, mean.view(-1), var.view(-1), None, None, True, self.momentum, self.eps)
        return y.view_as(x)

    def statistics(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of shape (C,) over sequences and positions, or (L, C) over sequences."""
        dims = (0,) if self.per_position else (0, 1)
        count = sum_over_ranks(weight.sum(dims))  # (1,) or (L, 1)
        divisor = count.clamp(min=1)
        mean = sum_over_ranks((x * weight).sum(dims)) / divisor
        return mean, sum_over_ranks(((x - mean).square() * weight).sum(dims)) / divisor, count


class RegularizedBatchNorm(BatchNorm):
    """Batch norm that pays for the distance of the batch's statistics from the running ones.

    penalty = mean_penalty * |batch mean - mean|^2 + std_penalty * |batch std - std|^2, summed over the channels; it
    joins the loss that is minimised, not the loss that is reported.
    Source: Wang, Wu, Huang 2022, "Understanding the Failure of Batch Normalization for Transformers in NLP".
    """

    one_kernel = False  # which would keep the statistics to itself
    penalty: Tensor | None = None

    def __init__(self, settings: RegularizedBatchNormSettings, shape: NormShape) -> None:
        super().__init__(settings, shape)
        self.mean_penalty, self.std_penalty = settings.mean_penalty, settings.std_penalty

    def __getstate__(self) -> dict[str, Any]:
        """Without the penalty of the last batch: copy.deepcopy takes no tensor that has a gradient function."""
        return {**self.__dict__, "penalty": None}

    def compare(self, used_mean: Tensor, used_var: Tensor, mean: Tensor, var: Tensor) -> None:
        """Set the penalty of this batch."""
        std = (used_var + self.eps).sqrt() - (var + self.eps).sqrt()
        self.penalty = (self.mean_penalty * (used_mean - mean.clone()).square().sum()
                        + self.std_penalty * std.square().sum())  # fmt: skip


class CausalBatchNorm(_Running):
    """Batch norm that never looks ahead: statistics at position t run over all sequences and the positions 0 .. t.

    y[t] = (x[t] - mean[t]) / sqrt(var[t] + eps) * weight + bias, where mean[t] and var[t], of shape (C,), are those of
    x[:, 0], ..., x[:, t]. The running averages have shape (block_size, C). A position with a single value, such as the
    first of a batch of one, is normalised by the running averages. No publication; the idea of batch norm, made causal.
    """

    def __init__(self, settings: RunningSettings, shape: NormShape) -> None:
        super().__init__(settings, shape, per_position=True)

    def statistics(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each of shape (L, C); the count (L, 1)."""
        # Sums of squares lose digits where the mean is large; the first position's, which all may see, is near it.
        with torch.no_grad():
            first = sum_over_ranks(weight[:, 0].sum(0)).clamp(min=1)
            shift = sum_over_ranks((x[:, 0] * weight[:, 0]).sum(0)) / first
        x = (x - shift) * weight
        count = sum_over_ranks(weight.sum(0)).cumsum(0)
        divisor = count.clamp(min=1)
        mean = sum_over_ranks(x.sum(0)).cumsum(0) / divisor
        square = sum_over_ranks(x.square().sum(0)).cumsum(0) / divisor
        return mean + shift, (square - mean.square()).clamp(min=0), count


class PowerNorm(nn.Module):
    """y = x / sqrt(psi + eps) * weight + bias, where psi (C,) is the mean of x^2 over sequences and positions.

    No mean is subtracted. With stats=running, the forward pass divides by psi's running average of the steps before,
    and the backward pass corrects for that with a running average of its own, nu:
    dx = (dz - nu z) / sqrt(psi + eps), z = x / sqrt(psi + eps), dz = weight dy,
    nu <- nu (1 - m mean(z^2)) + m mean(dz z), with m the momentum. With stats=batch ("PN-V"), training divides by the
    batch's own psi and differentiates through it, so it looks ahead. Evaluation uses the running average.
    prescale first divides each position's vector by its root mean square, as the authors' own layer does.
    Source: Shen et al. 2020, "PowerNorm: Rethinking Batch Normalization in Transformers", algorithms 1 and 2.
    """

    running_psi: Tensor
    running_nu: Tensor
    exact_gradient = False  # what an audit needs: the derivative of what the forward pass computes

    def __init__(self, settings: PowerNormSettings, shape: NormShape) -> None:
        super().__init__()
        self.eps, self.momentum = settings.eps, settings.momentum
        self.of_batch, self.prescale = settings.stats == "batch", settings.prescale
        self.weight = nn.Parameter(torch.ones(shape.channels))
        self.bias = nn.Parameter(torch.zeros(shape.channels))
        self.register_buffer("running_psi", torch.ones(shape.channels))
        self.register_buffer("running_nu", torch.zeros(shape.channels))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        wide, weight = self._prepared(x, mask if self.training else None)
        if not self.training:
            z = wide * torch.rsqrt(self.running_psi + self.eps)
        else:
            with torch.set_grad_enabled(self.of_batch):
                psi, count = self._mean_square(wide, weight)
            if self.of_batch or self.exact_gradient:
                z = wide * torch.rsqrt((psi if self.of_batch else self.running_psi.clone()) + self.eps)
            else:
                scale = torch.rsqrt(self.running_psi + self.eps)
                z = _Power.apply(wide, scale, self.running_nu, weight * (self.momentum / count))
            with torch.no_grad():
                self.running_psi.lerp_(psi.to(self.running_psi.dtype), self.momentum)
        y: Tensor = z.to(x.dtype) * self.weight + self.bias
        return y

    def _prepared(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is divided by the root of psi, in float32 at least, and its weight; see `weighted`."""
        wide, weight = weighted(x, mask)
        return (F.rms_norm(wide, wide.shape[-1:], None, self.eps) if self.prescale else wide), weight

    def _mean_square(self, wide: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The psi of a batch, and over how many positions."""
        count = sum_over_ranks(weight.sum()).clamp(min=1)
        return sum_over_ranks((wide.square() * weight).sum((0, 1))) / count, count

    @torch.no_grad()
    def discrepancy(self, x: Tensor, mask: Tensor | None = None) -> dict[str, float]:
        """How far the running psi is from this batch's: std_drift, as batch norm's, with std = sqrt(psi + eps)."""
        psi, _ = self._mean_square(*self._prepared(x, mask))
        drift = ((self.running_psi + self.eps) / (psi + self.eps)).sqrt() - 1
        return {"std_drift": float(drift.abs().mean())}


class _Power(torch.autograd.Function):
    """z = x * scale, with PowerNorm's approximate gradient; the backward pass moves nu, in place.

    weight (N, L, 1) is the momentum over the number of positions, 0 where there is padding.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, nu: Tensor, weight: Tensor) -> Tensor:
        z = x * scale
        ctx.save_for_backward(z, scale, weight)
        ctx.nu = nu
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, scale, weight = ctx.saved_tensors
        nu, dz = ctx.nu, grads[0]
        dx = (dz - nu.to(z.dtype) * z) * scale
        sums = torch.stack([(z.square() * weight).sum((0, 1)), (dz * z * weight).sum((0, 1))])
        gamma, lam = sum_over_ranks(sums).to(nu.dtype)
        nu.copy_(nu * (1 - gamma) + lam)
        return dx, None, None, None
