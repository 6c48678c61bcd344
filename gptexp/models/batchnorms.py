"""Batch norms, whose statistics cross positions and sequences: masks, running averages, other ranks.

x is (N, L, C), mask is None or (N, L), False at padding. Under distributed training, statistics are those of
the global batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.generation import Positions
from gptexp.models.norms import Positional
from gptexp.models.reduction import ranks, sum_over_ranks, weighted
from gptexp.models.registry import BatchNormSettings, NormShape, RegularizedBatchNormSettings, RunningSettings


class _Running(Positional):
    """A weight and a bias a channel, and the running averages of batch statistics, which evaluation uses."""

    running_mean: Tensor
    running_var: Tensor
    too_few = "sequences and positions"

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
            raise ValueError(self._too_few())
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

    def _too_few(self) -> str:
        return f"batchnorm has no variance over fewer than two {self.too_few}: use a larger batch_size"


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

    def __init__(self, settings: BatchNormSettings, shape: NormShape) -> None:
        super().__init__(settings, shape, per_position="time" not in settings.stats)
        self.too_few = "sequences" if self.per_position else "sequences and positions"

    def normalise(self, x: Tensor, mask: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        """As its base; in one kernel where nothing is padded and this process holds the whole batch."""
        if mask is not None or ranks() > 1:
            return super().normalise(x, mask, mean, var)
        N, L, C = x.shape
        if (N if self.per_position else N * L) < 2:
            raise ValueError(self._too_few())
        rows = x.reshape(N, L * C) if self.per_position else x.reshape(-1, C)
        y = F.batch_norm(rows, mean.view(-1), var.view(-1), None, None, True, self.momentum, self.eps)
        return y.view(N, L, C)

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

    penalty: Tensor | None = None

    def __init__(self, settings: RegularizedBatchNormSettings, shape: NormShape) -> None:
        super().__init__(settings, shape)
        self.mean_penalty, self.std_penalty = settings.mean_penalty, settings.std_penalty

    def __getstate__(self) -> dict[str, Any]:
        """Without the penalty of the last batch: copy.deepcopy takes no tensor that has a gradient function."""
        return {**self.__dict__, "penalty": None}

    def normalise(self, x: Tensor, mask: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        """Never in one kernel, which would keep the statistics to itself."""
        return _Running.normalise(self, x, mask, mean, var)

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
