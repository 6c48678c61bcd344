"""What statistics of a batch are summed with: masks, wide numbers, other ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def weighted(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x in float32 at least, 0 at padding, and its weight (N, L, 1): 1 where there is no padding, else 0."""
    if mask is None:
        return upcast(x), torch.ones_like(upcast(x[..., :1]))
    kept = mask.unsqueeze(-1)
    # Padding may have grown to inf on its way through the layers, and inf * 0 is nan.
    return upcast(x.masked_fill(~kept, 0.0)), upcast(kept.to(x.dtype))


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


def ranks() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, of the same shape; differentiable."""
    if ranks() > 1:
        total: Tensor = _AllReduce.apply(x)
        return total
    return x
